"""Compiles what a benchmark will launch, in several processes, before anything is timed.

The launchers run on tensors without data (cost_launch.py), and each launch compiles its kernel for the device that is
here, without running it; Triton keeps the result on disk, where the timing process finds it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from .spec import Spec


class Unit(NamedTuple):
    """What one process compiles at a time."""

    spec: str
    sizes: tuple[int, ...]
    dtype: str
    device: str


def compile_unit(unit: Unit) -> tuple[Any, bool]:
    """How many launches were compiled, or why not; and True: the process can go on."""
    import torch

    from .compiler import prepare
    from .cost import meta_inputs
    from .cost_launch import trace
    from .load import load
    from .schedule import Shape, device_of

    spec = Spec.from_json(unit.spec)
    plan, entry = prepare(spec)
    if plan is None:
        return 0, True
    inputs = meta_inputs(spec, Shape.dense(*unit.sizes), getattr(torch, unit.dtype))
    try:
        found = trace(plan, load(entry), entry.source, inputs, device_of(torch.device(unit.device)), compiling=True)
    except Exception as error:  # the timing itself will show it
        return f"{type(error).__name__}: {error}", True
    return sum(len(one.launches) for one in (found.forward, found.training, found.backward, found.step)), True

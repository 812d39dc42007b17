"""Compiles what a benchmark will launch, in several processes, before anything is timed.

The launchers run on tensors without data (cost_launch.py), and each launch compiles its kernel for the device that is
here, without running it; Triton keeps the result on disk, where the timing process finds it. A peer is called once, on
a short sequence: what it compiles lies on disk, what it chooses among that while the GPU is busy is forgotten with the
process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from .spec import Spec


class Unit(NamedTuple):
    """What one process compiles at a time."""

    spec: str
    sizes: tuple[int, ...]
    dtype: str
    device: str


class PeerUnit(NamedTuple):
    """One function of a library of peers, for a shipped spec."""

    library: str
    spec: str
    call: str
    sizes: tuple[int, ...]
    dtype: str
    device: str


SHORT = 2048  # tokens, for a peer


@contextlib.contextmanager
def untuned() -> Iterator[None]:
    """Kernels with candidates, of which the quickest is to be chosen, run each of them once, which compiles it. To time
    them beside other processes would take minutes and tell nothing."""
    import triton.testing

    def once(run: Callable[[], Any], quantiles: Sequence[float] = (), **_: Any) -> list[float]:
        run()
        return [1.0] * len(quantiles)

    timing = triton.testing.do_bench
    triton.testing.do_bench = once
    try:
        yield
    finally:
        triton.testing.do_bench = timing


def warm(unit: Unit | PeerUnit) -> tuple[Any, bool]:
    """What a process does with a unit of either kind."""
    return compile_unit(unit) if isinstance(unit, Unit) else call_peer(unit)


def call_peer(unit: PeerUnit) -> tuple[Any, bool]:
    """1, or why the call failed; and whether the process can go on."""
    import torch

    from . import peers
    from .schedule import Shape

    B, T, H, K, V = unit.sizes
    shape = Shape.dense(B, min(T, SHORT), H, K, V)
    try:
        make = peers.calls(unit.library, unit.spec)[unit.call]
        inputs, call = make(shape, getattr(torch, unit.dtype), unit.device)
        with untuned():
            output = call()
            torch.autograd.grad(output, inputs, torch.randn_like(output))
        if unit.device.startswith("cuda"):
            torch.cuda.synchronize()
    except Exception as error:  # the timing itself will show it
        return f"{type(error).__name__}: {error}", not isinstance(error, RuntimeError)
    return 1, True


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

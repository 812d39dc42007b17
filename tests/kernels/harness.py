"""Runs the Triton backend of a spec against the reference in fp64 on the same rounded inputs, under the interpreter."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from cases import constants_of, expected, make, make_states
from torch import Tensor

from flagen import compiler
from flagen.compare import Row, kind_of, limit_of, row
from flagen.load import load
from flagen.samples import gates as gates_of
from flagen.schedule import Schedule
from flagen.spec import Spec
from flagen.testing import SMALL
from flagen.triton_backend import TritonBackend
from flagen.triton_vector import VectorTritonBackend

FLOOR = 1e-30  # gradients below, as behind a decay of exp(-100), are as good as zero


class _Torch:
    """torch, but for new tensors that hold NaN."""

    def __getattr__(self, name: str) -> Any:
        return _poisoned if name == "empty" else getattr(torch, name)


def _poisoned(*args: Any, **kwargs: Any) -> Tensor:
    made = torch.empty(*args, **kwargs)
    return made.fill_(torch.nan) if made.is_floating_point() else made


@functools.cache
def generated(spec: Spec) -> tuple[Any, Any]:
    """The plan and the module of a spec. Its launchers allocate tensors full of NaN: what nobody wrote is seen."""
    plan, entry = compiler.prepare(spec)
    module = load(entry)
    module.torch = _Torch()
    return plan, module


def backend_of(
    spec: Spec, *, chunk: int | None = 16, checkpoint: int = 32, patch: Callable[[Schedule], Schedule] | None = None
) -> TritonBackend:
    """A backend with small chunks and spans, so that short sequences have several; patch: changes its schedules."""
    if spec.vector:
        found: TritonBackend = VectorTritonBackend(*generated(spec), checkpoint)
    else:
        found = TritonBackend(*generated(spec), chunk, None, checkpoint)
    if patch is not None:
        decided = found.schedule
        found.schedule = lambda inputs, sizes: patch(decided(inputs, sizes))  # type: ignore[method-assign]
    return found


def pieces(tokens: int) -> Callable[[Schedule], Schedule]:
    """Sequences are cut into pieces of so many tokens, both ways."""
    return lambda s: dataclasses.replace(s, fwd_L=tokens, bwd_L=tokens, dq_L=tokens)


def blocks_of_v(size: int) -> Callable[[Schedule], Schedule]:
    """A program owns so many channels of the value, or of the key."""
    return lambda s: dataclasses.replace(
        s,
        fwd=dataclasses.replace(s.fwd, BV=size),
        bwd=dataclasses.replace(s.bwd, BV=size),
        rows=dataclasses.replace(s.rows, BV=size),
        step=dataclasses.replace(s.step, BV=size),
    )


def narrow_states(initial: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """States as kernels take them, fp32 or complex64."""
    return tuple(x.to(torch.complex64 if x.is_complex() else torch.float32) for x in initial)


def rounded_inputs(spec: Spec, inputs: tuple[Tensor, ...], dtype: torch.dtype, gates: torch.dtype) -> tuple:
    """gates: the dtype of what only decays use; the rest has `dtype`."""
    others = {one for role, expr in spec.roles if role not in ("log_decay", "phase") for one in expr.inputs}
    return tuple(x.to(dtype if one in others else gates) for x, one in zip(inputs, spec.inputs, strict=True))


def compare(
    spec: Spec,
    batch: int,
    time: int,
    heads: int,
    key: int,
    value: int,
    *,
    cu: list[int] | None = None,
    start: bool = True,
    groups: dict[str, int] | None = None,
    dtype: torch.dtype = torch.float32,
    gates: torch.dtype | None = None,
    inputs: tuple[Tensor, ...] | None = None,
    want_final: bool = True,
    **options: Any,
) -> tuple[Any, tuple[Tensor, ...]]:
    """Forward, states and every gradient within TOLERANCES, or AssertionError with what is not; the results."""
    backend = backend_of(spec, **options)
    analysis = backend.plan.analysis
    cu_seqlens = None if cu is None else torch.tensor(cu, dtype=torch.int32)
    sequences = None if cu is None else len(cu) - 1
    if inputs is None:
        inputs = make(spec, batch, time, heads, key, value, sequences=sequences, groups=groups)
    inputs = rounded_inputs(spec, inputs, dtype, gates or dtype)
    initial = narrow_states(make_states(spec, sequences or batch, heads, key, value)) if start else ()
    wide = tuple(x.to(torch.complex128 if x.is_complex() else torch.float64) for x in initial)
    scale, needs = key**-0.5, (True,) * len(inputs)
    constants = tuple(x.float() for x in constants_of(analysis, heads))

    # the gradient that arrives is rounded too, and both sides get the same
    o, final, do, dfinal, gradients = expected(
        spec, inputs, scale, wide, cu_seqlens, grad_dtype=dtype, with_final=want_final
    )
    out = backend.forward(inputs, constants, scale, initial, cu_seqlens, want_final, True)
    given = narrow_states(dfinal) if want_final else (None,) * len(dfinal)
    got, got_initial = backend.backward(
        do.to(dtype), given, out.o, out.saved, inputs, constants, scale, initial, cu_seqlens, needs, start
    )
    assert [(x.shape, x.dtype) for x in out.saved] == [
        (x.shape, x.dtype) for x in backend.saved_like(inputs, cu_seqlens)
    ]

    output = inputs[backend.output].dtype
    rows = [row("o", out.o, o, limit_of(dtype, "o"), dtype=output)]
    rows += [
        row(f"final {i}", x, y, limit_of(dtype, "o"))
        for i, (x, y) in enumerate(zip(out.final, final if want_final else (), strict=True))
    ]
    # as in flagen.testing: a gate's gradient is a difference of larger terms
    size = SMALL * float((o.double() * do.double()).square().sum(-1).mean().sqrt())
    for one, x, y, given_ in zip(spec.inputs, got, gradients[: len(inputs)], inputs, strict=True):
        how = {"channels": one.axes[-1] in "kvd", "floor": size if one in gates_of(spec) else FLOOR}
        rows.append(row(f"d {one.name}", x, y, limit_of(dtype, kind_of(spec, one)), dtype=given_.dtype, **how))
    for i, (x, y) in enumerate(zip(got_initial, gradients[len(inputs) :], strict=True)):
        rows.append(row(f"d initial {i}", x, y, limit_of(dtype, "gate" if i else "gradient"), floor=FLOOR))
    check(rows)
    return out, got


def check(rows: list[Row]) -> None:
    wrong = [str(one) for one in rows if not one.ok]
    assert not wrong, "\n".join(wrong)

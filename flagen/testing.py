"""Holds an op against the reference of its spec: `check`, and its parts for tests of one's own.

    from flagen.testing import check
    print(check(my_spec, dtype=torch.bfloat16))          # AssertionError with a table of what differs

Errors are measured against fp64 on the same rounded inputs, as the relative RMS over a tensor and as its worst row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import reference
from .compare import HEADER, TOLERANCES, WORST_ROW, Error, Report, Row, assert_close, kind_of, limit_of, measure, row
from .samples import gates, make_inputs, make_scalars, make_state

if TYPE_CHECKING:
    from .expr import Input
    from .spec import Spec

__all__ = [
    "TOLERANCES",
    "WORST_ROW",
    "Error",
    "Report",
    "Row",
    "assert_close",
    "check",
    "kind_of",
    "make_inputs",
    "make_scalars",
    "make_state",
    "measure",
]


def check(
    spec_or_op: Any,
    *,
    B: int | None = None,
    T: int | None = None,
    H: int = 4,
    K: int | None = None,
    V: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    backend: str = "auto",
    chunk_size: int | None = None,
    cu_seqlens: Sequence[int] | Tensor | None = None,
    initial_state: bool = True,
    gate_dtype: torch.dtype | None = None,
    heads: Mapping[str, int] | None = None,
    scalars: Mapping[str, float] | None = None,
    scale: float | None = None,
    inputs: Mapping[str, Tensor] | None = None,
    decode: int = 3,
    seed: int = 0,
    segment: int | None = None,
    raises: bool = True,
) -> Report:
    """Runs an op forward and backward, with states, and token by token, against the reference in fp64 on the same
    inputs.

    spec_or_op: a Spec, the name of a shipped one, or an op of flagen.compile. backend, chunk_size: for compile, with a
        spec.
    B, T, H, K, V: sizes; by default 2, 200, 4, 64 (16 with taylor), 64; with cu_seqlens 1 and its last bound.
    device: None for CUDA if there is any (not with backend="torch"), else the CPU.
    cu_seqlens: bounds of sequences within one row, as for the op. initial_state: whether there is one, else it is zero.
    dtype, gate_dtype, heads, scalars, seed: as in make_inputs. inputs: by name, instead of those that make_inputs
        makes.
    decode: the last tokens to do again by op.step from the state before them, 0 for none; none with cu_seqlens.
    segment: as in reference.run, whose memory it bounds. raises: whether a difference beyond TOLERANCES raises
        AssertionError.
    """
    op = spec_or_op if hasattr(spec_or_op, "spec") else _compiled(spec_or_op, backend, chunk_size)
    spec = op.spec
    device = torch.device(device or ("cuda" if torch.cuda.is_available() and backend != "torch" else "cpu"))
    limits = None if cu_seqlens is None else torch.as_tensor(cu_seqlens, dtype=torch.int32)
    N = None if limits is None else len(limits) - 1
    if limits is not None and B not in (None, 1):
        raise ValueError(f"{spec.name}: cu_seqlens bounds sequences of one row, so B must be 1, got {B}; leave it out")
    B = B or (2 if limits is None else 1)
    T = T if T is not None else (200 if limits is None else int(limits[-1]))
    K, V = K or (16 if spec.taylor else 64), V or 64
    scalars = dict(scalars) if scalars is not None else make_scalars(spec)
    if inputs is None:
        sizes = {"B": B, "T": T, "H": H, "K": K, "V": V, "N": N, "heads": heads}
        inputs = make_inputs(
            spec, **sizes, dtype=dtype, gate_dtype=gate_dtype, device=device, seed=seed, scalars=scalars
        )
    else:
        B, T, H, K, V = _sizes_of(spec, inputs)
        dtype = max((x.dtype for x in inputs.values()), key=lambda kind: TOLERANCES[kind]["o"])
    leaves = tuple(inputs[one.name].detach().to(device).requires_grad_() for one in spec.inputs)
    wide = torch.float64 if any(x.dtype == torch.float64 for x in leaves) else torch.float32
    states: tuple[Tensor, ...] = ()
    if initial_state:
        state = make_state(spec, N=N or B, H=H, K=K, V=V, dtype=wide, device=device, seed=seed, scalars=scalars)
        states = tuple(x.requires_grad_() for x in ((state,) if isinstance(state, Tensor) else state))
    options = {"scale": scale, "cu_seqlens": None if limits is None else limits.to(device)}
    case = Case(op, spec, leaves, states, scalars, options, seed)
    got, want = case.run(), case.reference(segment)
    found = _compared(case, dtype, got, want)
    if decode and T and limits is None:
        found += _decoded(case, dtype, min(decode, T), got, want)
    lengths = "" if limits is None else f" cu_seqlens={limits.tolist()}"
    names = "/".join(dict.fromkeys(str(x.dtype).removeprefix("torch.") for x in leaves))
    report = Report(f"{spec.name}: B={B} T={T} H={H} K={K} V={V} {names} on {device}{lengths}", tuple(found))
    if raises and not report.ok:
        listed = "\n".join(str(row) for row in report.failures)
        raise AssertionError(
            f"{report.title}: {len(report.failures)} of {len(report.rows)} tensors differ\n{HEADER}\n{listed}"
        )
    return report


def _compiled(spec: Any, backend: str, chunk_size: int | None) -> Any:
    import flagen

    return flagen.compile(spec, backend=backend, chunk_size=chunk_size)


def _sizes_of(spec: Spec, inputs: Mapping[str, Tensor]) -> tuple[int, int, int, int, int]:
    found = dict.fromkeys("bthkv", 1)
    for one in spec.inputs:
        if one.name not in inputs:
            raise ValueError(
                f"{spec.name}: inputs lacks {one.name!r}; give all of {', '.join(x.name for x in spec.inputs)}"
            )
        for axis, size in zip(one.axes, inputs[one.name].shape, strict=True):
            if axis != "b" or "t" in one.axes:
                found[axis] = max(found[axis], size) if axis == "h" else size
    return tuple(found[axis] for axis in "bthkv")


@dataclass(frozen=True, slots=True)
class Results:
    o: Tensor
    final: tuple[Tensor, ...]
    d_inputs: tuple[Tensor, ...]
    d_initial: tuple[Tensor, ...]
    rate: float  # RMS of o . do over tokens and heads


@dataclass(frozen=True, slots=True)
class Case:
    """One set of arguments, for the op and for the reference."""

    op: Any
    spec: Spec
    inputs: tuple[Tensor, ...]
    states: tuple[Tensor, ...]
    scalars: dict[str, float]
    options: dict[str, Any]
    seed: int

    def public(self, states: tuple[Tensor, ...]) -> reference.State | None:
        return None if not states else states if self.spec.normalizer is not None else states[0]

    def tokens(self, begin: int, end: int) -> tuple[Tensor, ...]:
        """The inputs of some tokens."""
        named = zip(self.spec.inputs, self.inputs, strict=True)
        return tuple(x.narrow(one.axes.index("t"), begin, end - begin) if "t" in one.axes else x for one, x in named)

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Of the output and of the states."""
        wide = torch.float64 if torch.float64 in [x.dtype for x in self.inputs] else torch.float32
        given = self.inputs[self.spec.inputs.index(self.spec.value.inputs[0])].dtype
        return given, wide if self.spec.phase is None else wide.to_complex()

    def run(self) -> Results:
        state = self.public(self.states)
        o, final = self.op(*self.inputs, **self.scalars, **self.options, initial_state=state, output_final_state=True)
        return self.gradients(o, _tuple(final), self.inputs, self.states)

    def reference(self, segment: int | None) -> Results:
        inputs = tuple(x.detach().double().requires_grad_() for x in self.inputs)
        states = tuple(x.detach().to(torch.complex128 if x.is_complex() else torch.float64) for x in self.states)
        states = tuple(x.requires_grad_() for x in states)
        options = self.options | {"scalars": self.scalars, "segment": segment}
        o, final = reference.run(
            self.spec, inputs, **options, initial_state=self.public(states), output_final_state=True
        )
        return self.gradients(o, _tuple(final), inputs, states)

    def gradients(
        self, o: Tensor, final: tuple[Tensor, ...], inputs: tuple[Tensor, ...], states: tuple[Tensor, ...]
    ) -> Results:
        """By random gradients of the outputs, which the op gets in its own dtypes; the reference gets the same,
        widened.
        """
        generator = torch.Generator().manual_seed(self.seed + 1)
        d_out = [torch.randn(o.shape, generator=generator).to(self.dtypes[0]).to(o.device, o.dtype)]
        for x in final:
            kind = torch.complex64 if x.is_complex() else torch.float32
            d_out.append(torch.randn(x.shape, generator=generator, dtype=kind).to(x.device, x.dtype))
        grads = torch.autograd.grad((o, *final), (*inputs, *states), d_out, allow_unused=True, materialize_grads=True)
        rate = float((o.detach().double() * d_out[0].double()).sum(-1).square().mean().sqrt()) if o.numel() else 0.0
        d_inputs, d_initial = grads[: len(inputs)], grads[len(inputs) :]
        return Results(o.detach(), tuple(x.detach() for x in final), d_inputs, d_initial, rate)


def _tuple(state: Any) -> tuple[Tensor, ...]:
    return (state,) if isinstance(state, Tensor) else tuple(state)


def _compared(case: Case, dtype: torch.dtype, got: Results, want: Results) -> list[Row]:
    spec, (of_output, of_states) = case.spec, case.dtypes
    rows = [row("o", got.o, want.o, limit_of(dtype, "o"), dtype=of_output)]
    for part, x, y in zip("Sz", got.final, want.final, strict=False):
        rows.append(row(f"final_state {part}", x, y, limit_of(dtype, "o"), dtype=of_states))
    for one, x, y in zip(spec.inputs, got.d_inputs, want.d_inputs, strict=True):
        how = {"channels": one.axes[-1] in "kv", "floor": _floor(case, one, y, want.rate)}
        rows.append(row(f"d {one.name}", x, y, limit_of(dtype, kind_of(spec, one)), **how))
    for part, x, y in zip("Sz", got.d_initial, want.d_initial, strict=False):
        kind = "gradient" if part == "S" else "gate"  # z has no value channels, its gradient is a sum over them
        rows.append(row(f"d initial_state {part}", x, y, limit_of(dtype, kind)))
    return rows


def _floor(case: Case, one: Input, gradient: Tensor, rate: float) -> float:
    """The size to compare a gradient with where it is smaller than this, because it is a difference of larger terms.

    It is zero at a first token: of a decay exactly, of what a normaliser divides out again but for eps. The terms are
    of the size of o . do over the input's.
    """
    if case.spec.normalizer is not None and one not in gates(case.spec):
        x = case.inputs[case.spec.inputs.index(one)].detach().double()
        rows = x.square().sum(-1) if one.axes[-1] in "kv" else x.square()
        return rate / float(rows.mean().sqrt()) if x.any() else 0.0
    return 0.0 if gradient.any() else rate


@torch.no_grad()
def _decoded(case: Case, dtype: torch.dtype, tokens: int, got: Results, want: Results) -> list[Row]:
    """Prefill without the last tokens, then those by op.step: their outputs, and the state after them."""
    time = want.o.shape[1]
    states = tuple(x.detach().clone() for x in case.states)
    if time > tokens:
        before = case.tokens(0, time - tokens)
        state = case.public(states)
        _, final = case.op(*before, **case.scalars, **case.options, initial_state=state, output_final_state=True)
        states = _tuple(final)
    elif not states:
        states = tuple(torch.zeros_like(x) for x in got.final)
    outputs = []
    for t in range(time - tokens, time):
        now = case.tokens(t, t + 1)
        outputs.append(case.op.step(*now, **case.scalars, scale=case.options["scale"], state=case.public(states)))
    rows = [row("step o", torch.cat(outputs, 1), want.o[:, time - tokens :], limit_of(dtype, "o"))]
    for part, x, y in zip("Sz", states, want.final, strict=False):
        rows.append(row(f"step state {part}", x, y, limit_of(dtype, "o")))
    return rows

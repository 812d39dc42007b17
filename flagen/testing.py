"""Holds an op against the reference of its spec: `check`, and its parts for tests of one's own.

    from flagen.testing import check
    print(check(my_spec, dtype=torch.bfloat16))          # AssertionError with a table of what differs

Errors are measured against fp64 on the same rounded inputs, as the relative RMS over a tensor and as its worst row.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import reference
from .compare import HEADER, TOLERANCES, WORST_ROW, Error, Report, Row, assert_close, kind_of, limit_for, measure, row
from .expr import VECTOR
from .kinks import settled
from .samples import LAYOUTS, arranged, check_choices, gates, make_inputs, make_scalars, make_state
from .stabilize import LOWEST

if TYPE_CHECKING:
    from .expr import Input
    from .spec import Spec

__all__ = [
    "LAYOUTS",
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
    final_state: bool = True,
    requires_grad: Sequence[str] | None = None,
    layout: str = "contiguous",
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
    final_state: whether it is asked for, and has a gradient.
    requires_grad: the names of the inputs that need a gradient, with "initial_state" for that; None for all.
    layout: how inputs lie in memory, one of samples.LAYOUTS.
    dtype, gate_dtype, heads, scalars, seed: as in make_inputs. inputs: by name, instead of those that make_inputs
        makes.
    decode: the last tokens to do again by op.step from the state before them, 0 for none; none with cu_seqlens.
    segment: as in reference.run, whose memory it bounds. raises: whether a difference beyond TOLERANCES raises
        AssertionError.
    """
    case = make_case(
        spec_or_op, B=B, T=T, H=H, K=K, V=V, dtype=dtype, device=device, backend=backend, chunk_size=chunk_size,
        cu_seqlens=cu_seqlens, initial_state=initial_state, final_state=final_state, requires_grad=requires_grad,
        layout=layout, gate_dtype=gate_dtype, heads=heads, scalars=scalars, scale=scale, inputs=inputs, seed=seed,
    )  # fmt: skip
    got, want = case.run(), case.reference(segment)
    found = compared(case, got, want)
    if decode and case.options["cu_seqlens"] is None and want.o.shape[1]:
        found += _decoded(case, min(decode, want.o.shape[1]), got, want)
    report = Report(case.title, tuple(found))
    if raises and not report.ok:
        listed = "\n".join(str(row) for row in report.failures)
        raise AssertionError(
            f"{report.title}: {len(report.failures)} of {len(report.rows)} tensors differ\n{HEADER}\n{listed}"
        )
    return report


def make_case(
    spec_or_op: Any, *, B: int | None, T: int | None, H: int, K: int | None, V: int | None, dtype: torch.dtype,
    device: torch.device | str | None, backend: str, chunk_size: int | None, cu_seqlens: Sequence[int] | Tensor | None,
    initial_state: bool, final_state: bool, requires_grad: Sequence[str] | None, layout: str,
    gate_dtype: torch.dtype | None, heads: Mapping[str, int] | None, scalars: Mapping[str, float] | None,
    scale: float | None, inputs: Mapping[str, Tensor] | None, seed: int,
) -> Case:  # fmt: skip
    """The op, its inputs and states for the arguments of `check`, whose defaults are meant by None."""
    op = spec_or_op if hasattr(spec_or_op, "spec") else _compiled(spec_or_op, backend, chunk_size)
    spec = op.spec
    check_choices(spec, requires_grad, layout)
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
    needed = [*inputs, "initial_state"] if requires_grad is None else requires_grad
    leaves = tuple(
        arranged(inputs[one.name].detach().to(device), one.axes, layout).requires_grad_(one.name in needed)
        for one in spec.inputs
    )
    wide = torch.float64 if any(x.dtype == torch.float64 for x in leaves) else torch.float32
    states: tuple[Tensor, ...] = ()
    if initial_state:
        state = make_state(spec, N=N or B, H=H, K=K, V=V, dtype=wide, device=device, seed=seed, scalars=scalars)
        states = tuple(x.requires_grad_("initial_state" in needed) for x in _tuple(state))
    options = {"scale": scale, "cu_seqlens": None if limits is None else limits.to(device)}
    lengths = "" if limits is None else f" cu_seqlens={limits.tolist()}"
    names = "/".join(dict.fromkeys(str(x.dtype).removeprefix("torch.") for x in leaves))
    title = f"{spec.name}: B={B} T={T} H={H} K={K} V={V} {names} on {device}{lengths}"
    sharp = 4 * limit_for(dtype, *(x.dtype for x in leaves), kind="o")
    known = settled(spec, leaves, states, scalars, options, (B, T, H), sharp)
    return Case(op, spec, leaves, states, scalars, options, final_state, seed, dtype, title, known)


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
        for axis, size in zip(_heads_for_channels(one), inputs[one.name].shape, strict=True):
            if axis != "b" or "t" in one.axes:
                found[axis] = max(found[axis], size) if axis == "h" else size
    return tuple(found[axis] for axis in "bthkv")


SMALL = 0.01  # a gate's gradient that is smaller than so much of the terms is compared with that


def _heads_for_channels(one: Input) -> str:
    """The axes, with a channel of a vector state as a head of one key and one value channel."""
    return one.axes.replace(VECTOR, "h")


@dataclass(frozen=True, slots=True)
class Results:
    o: Tensor
    final: tuple[Tensor, ...]
    d_inputs: tuple[Tensor | None, ...]
    d_initial: tuple[Tensor | None, ...]
    rate: float  # RMS over tokens and heads of the norm of o * do: the size of o . do, never small by chance


@dataclass(frozen=True, slots=True)
class Case:
    """One set of arguments, for the op and for the reference."""

    op: Any
    spec: Spec
    inputs: tuple[Tensor, ...]
    states: tuple[Tensor, ...]
    scalars: dict[str, float]
    options: dict[str, Any]
    want_final: bool
    seed: int
    dtype: torch.dtype  # whose tolerances apply
    title: str
    settled: Tensor | None = None  # at which tokens the output has a gradient; None: at all

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
        o, final = self.op(
            *self.inputs, **self.scalars, **self.options, initial_state=state, output_final_state=self.want_final
        )
        return self.gradients(o, _tuple(final) if self.want_final else (), self.inputs, self.states)

    def reference(self, segment: int | None) -> Results:
        inputs = tuple(x.detach().double().requires_grad_(x.requires_grad) for x in self.inputs)
        states = tuple(
            x.detach().to(torch.complex128 if x.is_complex() else torch.float64).requires_grad_(x.requires_grad)
            for x in self.states
        )
        options = self.options | {"scalars": self.scalars, "segment": segment}
        o, final = reference.run(
            self.spec, inputs, **options, initial_state=self.public(states), output_final_state=True
        )
        return self.gradients(o, _tuple(final), inputs, states)

    def gradients(
        self, o: Tensor, final: tuple[Tensor, ...], inputs: tuple[Tensor, ...], states: tuple[Tensor, ...]
    ) -> Results:
        """By random gradients of the outputs, which the op gets in its own dtypes; the reference gets the same,
        widened. Those of what requires none are None.
        """
        generator = torch.Generator().manual_seed(self.seed + 1)
        d_out = [torch.randn(o.shape, generator=generator).to(self.dtypes[0]).to(o.device, o.dtype)]
        if self.settled is not None:
            d_out[0] *= self.settled.unsqueeze(-1)
        for x in final if self.want_final else ():
            kind = torch.complex64 if x.is_complex() else torch.float32
            d_out.append(torch.randn(x.shape, generator=generator, dtype=kind).to(x.device, x.dtype))
        grads = _gradients((o, *final)[: len(d_out)], (*inputs, *states), d_out)
        d_inputs, d_initial = grads[: len(inputs)], grads[len(inputs) :]
        return Results(o.detach(), tuple(x.detach() for x in final), d_inputs, d_initial, rate_of(o, d_out[0]))


def rate_of(o: Tensor, do: Tensor) -> float:
    """The RMS over tokens and heads of the norm of o * do, [B, T, H, V] both."""
    return float((o.detach().double() * do.double()).square().sum(-1).mean().sqrt()) if o.numel() else 0.0


def _gradients(outputs: Sequence[Tensor], leaves: Sequence[Tensor], d_out: Sequence[Tensor]) -> list[Tensor | None]:
    """As autograd.grad, for leaves of which some need no gradient, and outputs that depend on none of the others."""
    needed = [x for x in leaves if x.requires_grad]
    recorded = [(x, dx) for x, dx in zip(outputs, d_out, strict=True) if x.requires_grad]
    if not needed or not recorded:
        return [torch.zeros_like(x) if x.requires_grad else None for x in leaves]
    outputs, d_out = zip(*recorded, strict=True)
    found = iter(torch.autograd.grad(outputs, needed, d_out, allow_unused=True, materialize_grads=True))
    return [next(found) if x.requires_grad else None for x in leaves]


def _tuple(state: Any) -> tuple[Tensor, ...]:
    return (state,) if isinstance(state, Tensor) else tuple(state)


def compared(case: Case, got: Results, want: Results) -> list[Row]:
    """A row for the output, each final state and each gradient that is there."""
    spec, dtype, (of_output, of_states) = case.spec, case.dtype, case.dtypes
    # the output has the dtype of value's first input, and products are taken in it; a gradient has that of its input
    limit = functools.partial(limit_for, dtype, of_output)
    rows = [row("o", got.o, want.o, limit(kind="o"), dtype=of_output)]
    for part, x, y in zip("Szm", got.final, want.final, strict=False):
        rows.append(row(f"final_state {part}", x, y, limit(kind="o"), dtype=of_states))
    for one, given, x, y in zip(spec.inputs, case.inputs, got.d_inputs, want.d_inputs, strict=True):
        if y is not None:
            rows.append(gradient_row(case, one, x, y, want.rate, limit(given.dtype, kind=kind_of(spec, one))))
    for part, x, y in zip("Szm", got.d_initial, want.d_initial, strict=False):
        if y is not None:
            kind = "gradient" if part == "S" else "gate"  # z has no value channels, its gradient is a sum over them
            rows.append(row(f"d initial_state {part}", x, y, limit(kind=kind)))
    return rows


def gradient_row(
    case: Case, one: Input, got: Tensor, want: Tensor, rate: float, limit: float,
    by: Callable[[Case], Sequence[Tensor | None]] | None = None,
) -> Row:  # fmt: skip
    """The gradient of an input beside the right one. rate: as rate_of has it. by: how the right gradients of a case
    are found, by default by the reference.
    """
    how = {"channels": one.axes[-1] in "kvd", "floor": _floor(case, one, want, rate)}
    found = row(f"d {one.name}", got, want, limit, **how)
    if not found.ok and not found.fault and not set("bth") <= set(_heads_for_channels(one)):
        how["floor"] = max(how["floor"], _terms(case, one, by or (lambda wide: wide.reference(None).d_inputs)))
        found = row(f"d {one.name}", got, want, limit, **how)
    return found


def _floor(case: Case, one: Input, gradient: Tensor, rate: float) -> float:
    """The size to compare a gradient with where it is smaller than this, because it is a difference of larger terms.

    It is zero at a first token: of a decay exactly, of what a normaliser divides out again but for eps. The terms are
    of the size of o . do over the input's; of query and key they are vectors of K channels, of which o . do has only
    the part along the other of the two, one in root K.
    """
    if case.spec.normalizer is not None and one not in gates(case.spec):
        x = case.inputs[case.spec.inputs.index(one)].detach().double()
        rows = x.square().sum(-1) if one.axes[-1] in "kv" else x.square()
        along = x.shape[-1] ** -0.5 if one.axes[-1] == "k" else 1.0
        return rate / (along * float(rows.mean().sqrt())) if x.any() else 0.0
    if not gradient.any():
        return rate
    # a gate's gradient is what is read after a step less what was written after it: pairs on one side of it cancel
    return SMALL * rate if one in gates(case.spec) else 0.0


def _terms(case: Case, one: Input, by: Callable[[Case], Sequence[Tensor | None]]) -> float:
    """The size to compare the gradient of an input with that lacks an axis, so that its gradient is a sum: the root of
    the sum of the terms' squares.

    Rounding errors of independent terms add up like that. A sum that is much smaller has cancelled, and its error
    relative to itself tells of the luck of the draw only: it is large in any precision.
    """
    axes = [axis for axis in "bthkv" if axis in "bth" or axis in one.axes]
    axes = axes if not case.spec.vector else list("btd")
    data = json.loads(case.spec.to_json())
    for entry in data["inputs"]:
        if entry["name"] == one.name:
            entry["axes"] = " ".join(axes)
    place = case.spec.inputs.index(one)
    given = case.inputs[place].detach().double().requires_grad_()
    spread = _spread(given, one, case)
    inputs = (*case.inputs[:place], spread.detach().requires_grad_(), *case.inputs[place + 1 :])
    wide = dataclasses.replace(case, spec=type(case.spec).from_json(json.dumps(data)), inputs=inputs)
    terms = by(wide)[place]
    squares = torch.autograd.grad(spread, given, terms.square())[0]
    return float((squares.sum(-1) if one.axes[-1] in "kvd" else squares).mean().sqrt())


def _spread(x: Tensor, one: Input, case: Case) -> Tensor:
    """`x` with every one of the axes b, t and h, each of its full size."""
    named = zip(case.spec.inputs, case.inputs, strict=True)
    axes = _heads_for_channels(one)
    B, T, H, _, _ = _sizes_of(case.spec, {declared.name: tensor for declared, tensor in named})
    limits = case.options["cu_seqlens"]
    if limits is not None and "b" in axes and "t" not in axes:
        # a row per sequence becomes a row per token; those past the last sequence count for nothing
        lengths = [*limits.diff().tolist(), T - int(limits[-1])]
        numbers = torch.arange(len(lengths)).clamp(max=len(x) - 1).repeat_interleave(torch.tensor(lengths))
        x = x[numbers.to(x.device)].unsqueeze(0)
    else:
        x = x if "b" in axes else x.unsqueeze(0)
        x = x if "t" in axes else x.unsqueeze(1)
    x = x if "h" in axes else x.unsqueeze(2)
    x = x.repeat_interleave(H // x.shape[2], 2)
    return x.expand(B, T, *x.shape[2:])


@torch.no_grad()
def _decoded(case: Case, tokens: int, got: Results, want: Results) -> list[Row]:
    """Prefill without the last tokens, then those by op.step: their outputs, and the state after them."""
    time, dtype = want.o.shape[1], case.dtype
    states = tuple(x.detach().clone() for x in case.states)
    if time > tokens:
        before = case.tokens(0, time - tokens)
        state = case.public(states)
        _, final = case.op(*before, **case.scalars, **case.options, initial_state=state, output_final_state=True)
        states = _tuple(final)
    elif not states:
        states = tuple(torch.zeros_like(x, dtype=case.dtypes[1]) for x in want.final)
        if case.spec.stabilize is not None:  # nothing yet: any m will do, but it is the reference's that is compared
            states[2].fill_(LOWEST)
    outputs = []
    for t in range(time - tokens, time):
        now = case.tokens(t, t + 1)
        outputs.append(case.op.step(*now, **case.scalars, scale=case.options["scale"], state=case.public(states)))
    limit = limit_for(dtype, case.dtypes[0], kind="o")
    rows = [row("step o", torch.cat(outputs, 1), want.o[:, time - tokens :], limit)]
    for part, x, y in zip("Szm", states, want.final, strict=False):
        rows.append(row(f"step state {part}", x, y, limit))
    return rows

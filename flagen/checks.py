"""What a call of an op may be given. Every message about wrong arguments is here, or for inputs in op_faults.

A message says what is wrong, what was given, what is allowed and what to do. `Checks` holds what depends on the spec
alone; a right call passes in a few microseconds, and only a wrong one pays for finding out what to say.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from .expr import to_text
from .functions import evaluate_host
from .op_faults import FLOATS, is_dense, not_dense, refuse, symbols
from .torch_taylor import count

if TYPE_CHECKING:
    from .analysis import Analysis
    from .spec import Spec

MAX_CHANNELS = 256
MAX_TAYLOR = {1: 255, 2: 32}
MAX_PHASE = 128
MAX_FLOAT = sys.float_info.max


class Sizes(NamedTuple):
    """Of a call: batch, tokens, heads (the largest count), channels, sequences. `wide`: an input is fp64. A channel of
    a vector state counts as a head of one key and one value channel.
    """

    B: int
    T: int
    H: int
    K: int
    V: int
    N: int
    wide: bool


class Checks:
    """The rules for calls of the op of one spec. `triton`: the types of device on which it runs Triton kernels;
    `only_triton`: it runs nothing else.
    """

    def __init__(self, analysis: Analysis, triton: frozenset[str] = frozenset(), only_triton: bool = False) -> None:
        self.analysis = analysis
        self.name = analysis.spec.name
        self.triton, self.only_triton = triton, only_triton
        self.declared = analysis.inputs
        # without a time axis b counts sequences, which with cu_seqlens are not the batch
        self.axes = tuple(one.axes if "t" in one.axes else one.axes.replace("b", "n") for one in analysis.inputs)
        self.complex, self.vector = analysis.is_complex, analysis.vector
        self.parts = analysis.spec.state_parts
        self.max_key = max_key(analysis.spec)

    # --- tensors

    def tensors(self, tensors: Sequence[Tensor], cu_seqlens: Tensor | None, step: bool = False) -> Sizes:
        """The sizes of the inputs of a call. `step`: of one token."""
        size: dict[str, int] = {}
        heads = []
        first = tensors[0]
        device = first.device if isinstance(first, Tensor) else None
        wide = False
        for x, axes in zip(tensors, self.axes, strict=True):
            if not is_dense(x) or x.dim() != len(axes) or x.dtype not in FLOATS or x.device != device:
                refuse(self.name, self.declared, self.axes, tensors, cu_seqlens)
            wide = wide or x.dtype is torch.float64
            for axis, n in zip(axes, x.shape, strict=True):
                if axis == "h":
                    heads.append(n)
                elif size.setdefault(axis, n) != n:
                    refuse(self.name, self.declared, self.axes, tensors, cu_seqlens)
        most = size["d"] if self.vector else max(heads)
        for n in heads:
            if n != most and (not n or most % n):
                refuse(self.name, self.declared, self.axes, tensors, cu_seqlens)
        batch, tokens, key, value = size["b"], size["t"], size.get("k", 1), size.get("v", 1)
        sequences = batch if cu_seqlens is None else self._sequences(cu_seqlens, first, batch)
        if size.get("n", sequences) != sequences:
            refuse(self.name, self.declared, self.axes, tensors, cu_seqlens)
        if not (batch and most and key and value):
            self._empty(tensors)
        if key > self.max_key or value > MAX_CHANNELS:
            self._too_wide(key, value)
        if step and tokens != 1:
            raise ValueError(
                f"{self.name}.step: takes one token, T = 1, got T = {tokens}; call {self.name}(...) for more tokens, "
                f"with output_final_state=True for the state after them"
            )
        if (wide and device.type in self.triton) or (self.only_triton and device.type not in self.triton):
            self._no_kernels(tensors)
        return Sizes(batch, tokens, most, key, value, sequences, wide)

    def _empty(self, tensors: Sequence[Tensor]) -> NoReturn:
        for one, axes, x in zip(self.declared, self.axes, tensors, strict=True):
            if any(not n and axis != "t" for axis, n in zip(axes, x.shape, strict=True)):
                raise ValueError(
                    f"{self.name}: {one.name} is empty: {symbols(axes)} = {tuple(x.shape)}; only T may be 0"
                )
        raise AssertionError(tensors)

    def _too_wide(self, key: int, value: int) -> NoReturn:
        if value > MAX_CHANNELS:
            raise ValueError(
                f"{self.name}: V = {value} value channels, at most {MAX_CHANNELS} are supported; split them over "
                "several calls, or over more heads"
            )
        why, remedy = "", "use more heads of fewer channels"
        if order := self.analysis.taylor:
            why = f" with taylor({order})"
            remedy = "project q and k to fewer channels"
        elif self.complex:
            why = " with a phase"
        raise ValueError(f"{self.name}: K = {key} key channels, at most {self.max_key} are supported{why}; {remedy}")

    def _no_kernels(self, tensors: Sequence[Tensor]) -> NoReturn:
        device = tensors[0].device
        if device.type not in self.triton:
            raise ValueError(
                f"{self.name}: was compiled with backend='triton', and there are no Triton kernels for tensors on "
                f"{device}; move them to a CUDA device, or compile with backend='auto' or 'torch'"
            )
        names = [one.name for one, x in zip(self.declared, tensors, strict=True) if x.dtype is torch.float64]
        raise ValueError(
            f"{self.name}: {names[0]} is float64, which the Triton kernels do not take; use float32, or compile with "
            "backend='torch' for float64"
        )

    # --- sequences

    def _sequences(self, cu_seqlens: Any, first: Tensor, batch: int) -> int:
        """How many sequences cu_seqlens bounds."""
        want = f"{self.name}: cu_seqlens must be a tensor of shape [N + 1] and dtype int32, the bounds of N sequences"
        if not isinstance(cu_seqlens, Tensor):
            raise TypeError(
                f"{want}, got {type(cu_seqlens).__name__}; use torch.tensor(cu_seqlens, dtype=torch.int32, "
                f"device={self.declared[0].name}.device)"
            )
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
            raise ValueError(f"{want}, got shape {tuple(cu_seqlens.shape)}; one sequence of 100 tokens is [0, 100]")
        if cu_seqlens.dtype is not torch.int32 and cu_seqlens.dtype is not torch.int64:
            kind = str(cu_seqlens.dtype).removeprefix("torch.")
            raise ValueError(f"{want}, got dtype {kind}; convert it: cu_seqlens.to(torch.int32)")
        if cu_seqlens.device != first.device:
            raise ValueError(
                f"{self.name}: cu_seqlens is on {cu_seqlens.device} and {self.declared[0].name} on {first.device}; "
                "all tensors must be on one device"
            )
        if batch != 1:
            raise ValueError(
                f"{self.name}: with cu_seqlens the sequences lie one after the other in one row, B = 1, got B = "
                f"{batch}; flatten what has a time axis, as in {self.declared[0].name}.flatten(0, 1).unsqueeze(0)"
            )
        return cu_seqlens.shape[0] - 1

    def bounds(self, cu_seqlens: Tensor, tokens: int) -> None:
        """The values of cu_seqlens, which takes a look at them."""
        bounds = cu_seqlens.tolist()
        want = f"{self.name}: cu_seqlens must rise from 0 to at most T = {tokens}"
        if bounds[0] != 0:
            raise ValueError(f"{want}, got {_shown(bounds)}, which begins with {bounds[0]}; put a 0 first")
        for i, (begin, end) in enumerate(pairwise(bounds)):
            if end < begin:
                raise ValueError(
                    f"{want}, got {_shown(bounds)}, which falls from {begin} to {end} at {i + 1}; it holds the running "
                    "sum of the lengths, not the lengths"
                )
        if bounds[-1] > tokens:
            raise ValueError(
                f"{want}, got {_shown(bounds)}, which ends at {bounds[-1]}; drop what is past T or pad the tensors"
            )

    def values(self, tensors: Sequence[Tensor]) -> None:
        """The declared bounds of inputs, which waits for the device: under FLAGEN_DEBUG only."""
        for one, x in zip(self.declared, tensors, strict=True):
            for bound, sign, wrong in (
                (one.low, ">=", lambda x, bound: x < bound),
                (one.high, "<=", lambda x, bound: x > bound),
            ):
                if bound is not None and (bad := wrong(x, bound)).any():
                    at = tuple(bad.nonzero()[0].tolist())
                    raise ValueError(
                        f"{self.name}: {one.name} is declared {sign} {bound:g}, got {float(x[at]):g} at {at}; its "
                        "kernels rely on the bound: declare another one, or clamp the input"
                    )

    # --- states

    def state(self, argument: str, state: Any, sizes: Sizes, device: torch.device) -> tuple[Tensor, ...]:
        """A state as a tuple: (S,), (S, z) with normalize, (S, z, m) with stabilize; () for None."""
        if state is None:
            return ()
        if self.parts > 1:
            if not isinstance(state, (tuple, list)) or len(state) != self.parts:
                form, more = "a pair (S, z)", ""
                if self.parts == 3:
                    form, more = "a triple (S, z, m)", ", m what both are held divided by, in logarithms"
                raise TypeError(
                    f"{self.name}: {argument} must be {form}, as {self.name} returns it, got {_kind(state)}; z "
                    f"is the running sum of the keys' features{more}"
                )
            parts = tuple(state)
        else:
            parts = (state,)
        rows = sizes.K if not self.analysis.taylor else count(sizes.K, self.analysis.taylor)
        want = (sizes.N, sizes.H) if self.vector else (sizes.N, sizes.H, rows, sizes.V)
        dtype = state_dtype(sizes.wide, self.complex)
        for i, x in enumerate(parts):
            if not isinstance(x, Tensor):
                raise TypeError(f"{self.name}: {argument} must be a tensor, got {_kind(x)}")
            if not is_dense(x):
                raise ValueError(f"{self.name}: {argument} {not_dense(x)}")
            if x.shape != want[: 4 - i] or x.dtype is not dtype or x.device != device:
                self._bad_state(
                    argument + ("", "[1], the sum z,", "[2], the scale m,")[i], x, want[: 4 - i], dtype, device
                )
        return parts

    def _bad_state(
        self, what: str, x: Tensor, want: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> NoReturn:
        rows = "F" if self.analysis.taylor else "K"
        flat = "[N, D]" if self.vector else "[N, H]"
        form = {4: f"[N, H, {rows}, V]", 3: f"[N, H, {rows}]", 2: flat}[len(want)]
        if tuple(x.shape) != want:
            notes = ["N is the batch size, or the number of sequences of cu_seqlens"]
            notes.append("D the number of channels" if self.vector else "H the largest number of heads")
            if self.analysis.taylor:
                notes.append(f"F the rows of taylor({self.analysis.taylor})")
            raise ValueError(
                f"{self.name}: {what} must have shape {form} = {want}, got {tuple(x.shape)}.\n    {', '.join(notes)}."
            )
        if x.dtype is not dtype:
            want_kind, kind = (str(one).removeprefix("torch.") for one in (dtype, x.dtype))
            remedy = (
                f"convert it: .to(torch.{want_kind})"
                if dtype.is_complex or not x.is_complex()
                else "pass a state of this op"
            )
            raise ValueError(f"{self.name}: {what} must be {want_kind} with these inputs, got {kind}; {remedy}")
        raise ValueError(
            f"{self.name}: {what} is on {x.device} and {self.declared[0].name} on {device}; all tensors must be on one "
            "device"
        )

    def written_state(self, state: Any, sizes: Sizes, device: torch.device) -> tuple[Tensor, ...]:
        """The state that step updates in place."""
        parts = self.state("state", state, sizes, device)
        if not parts:
            raise TypeError(
                f"{self.name}.step: state is None; step updates a state in place: pass the final_state of "
                f"{self.name}(..., output_final_state=True), or zeros"
            )
        for x in parts:
            if x.requires_grad and torch.is_grad_enabled():
                raise ValueError(
                    f"{self.name}.step: state requires a gradient, and step has none and updates it in place; pass "
                    "state.detach(), or call it under torch.no_grad()"
                )
            if not x.is_contiguous() and any(s == 0 and n > 1 for s, n in zip(x.stride(), x.shape, strict=True)):
                raise ValueError(
                    f"{self.name}.step: state is an expanded view, strides {x.stride()}, whose elements share memory "
                    "and cannot be updated in place; pass state.contiguous()"
                )
        return parts

    # --- numbers

    def scale(self, scale: Any) -> float:
        """A given scale."""
        if not isinstance(scale, (int, float, torch.SymInt, torch.SymFloat)) or isinstance(scale, bool):
            raise TypeError(
                f"{self.name}: scale must be a number, or None for the default, got {_kind(scale)}; it multiplies the "
                "query: a scale that is a tensor can be multiplied into it"
            )
        if isinstance(scale, (int, float)) and not torch.compiler.is_compiling() and not abs(scale) <= MAX_FLOAT:
            raise ValueError(f"{self.name}: scale must be finite, got {_number(scale)}")
        return float(scale)

    def flag(self, output_final_state: Any) -> bool:
        """Whether the final state is asked for: by a bool, or a number that stands for one."""
        if isinstance(output_final_state, int):
            return bool(output_final_state)
        raise TypeError(
            f"{self.name}: output_final_state must be True or False, got {_kind(output_final_state)}; it decides on "
            "the host what is computed"
        )

    def scalars(self, values: Sequence[Any]) -> tuple[float, ...]:
        """The numbers for the spec's scalars, in order."""
        for one, value in zip(self.analysis.scalars, values, strict=True):
            if not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) or isinstance(value, bool):
                raise TypeError(
                    f"{self.name}: {one.name} must be a number, got {_kind(value)}; pass a float: it is part of the "
                    "recurrence, has no gradient and is read on the host"
                )
            if isinstance(value, int) and not abs(value) <= MAX_FLOAT:
                raise ValueError(f"{self.name}: {one.name} must be finite, got {_number(value)}")
        return tuple(float(value) for value in values)

    def constants(self, scalars: Sequence[float], heads: int) -> list[list[float]]:
        """The analysis' constants, a number per head each: the values that follow from scalars."""
        given = {one.name: value for one, value in zip(self.analysis.scalars, scalars, strict=True)}
        shown = ", ".join(f"{name}={value:g}" for name, value in given.items()) or f"{heads} heads"
        found = []
        for _, expr in self.analysis.constants:
            found.append(evaluate_host(expr, given, heads))
            if any(math.isnan(value) for value in found[-1]):
                raise ValueError(
                    f"{self.name}: {to_text(expr)} is not a number for {shown}; it must be one for every head"
                )
        decay = self.analysis.spec.log_decay
        if decay is not None and decay.is_constant:
            for head, value in enumerate(evaluate_host(decay, given, heads)):
                if value > 0:
                    raise ValueError(
                        f"{self.name}: log_decay = {to_text(decay)} is {value:g} > 0 in head {head} for {shown}, so "
                        "that the state would grow; it must be <= 0"
                    )
        return found


def max_key(spec: Spec) -> int:
    """The most key channels."""
    return MAX_PHASE if spec.phase is not None else MAX_TAYLOR.get(spec.taylor, MAX_CHANNELS)


def state_dtype(wide: bool, is_complex: bool) -> torch.dtype:
    """Of states: fp32, or fp64 if an input is; complex with a phase."""
    if is_complex:
        return torch.complex128 if wide else torch.complex64
    return torch.float64 if wide else torch.float32


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"{type(value).__name__} {str(value)[:40]!r}" if value is not None else "None"


def _number(value: float) -> str:
    return str(value) if isinstance(value, float) else "an integer beyond any float"


def _shown(bounds: list[int]) -> str:
    return str(bounds) if len(bounds) <= 12 else f"[{', '.join(map(str, bounds[:6]))}, ..., {bounds[-1]}]"

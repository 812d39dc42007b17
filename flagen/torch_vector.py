"""The torch backend of a vector state: h_t = a_t h_{t-1} + x_t, channel by channel, a_t = exp(log_decay_t + i phase_t).

A scan in two levels: chunks of about sqrt(T) tokens step by step, all chunks at once, then the chunks one after the
other. What carries a state across is a product of decays, at most one; nothing is divided, and a decay of zero is a
reset. The backward is the same scan in reverse. A state is real, or complex with a phase; gradients of complex states
are torch's, d / d Re + i d / d Im.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .expr import Number
from .functions import evaluate
from .torch_backend import Forward

if TYPE_CHECKING:
    from .analysis import Analysis
    from .expr import Expr, Input

MAX_CHUNK = 64
DIMENSIONS = "btd"


class VectorBackend:
    """Runs the spec of `analysis`, as TorchBackend does, with inputs [B, T, D] (1 axis less for each that they lack),
    outputs [B, T, D] and states [N, D].
    """

    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis

    @torch.no_grad()
    def forward(
        self,
        inputs: tuple[Tensor, ...],
        constants: tuple[Tensor, ...],
        scale: float,
        initial: tuple[Tensor, ...],
        cu_seqlens: Tensor | None,
        want_final: bool,
        save: bool,
    ) -> Forward:
        """As TorchBackend.forward. Saved are the states after each token and those before the first."""
        states, starts = self.saved_like(inputs, cu_seqlens)
        starts.copy_(initial[0]) if initial else starts.zero_()
        batch, tokens, channels = states.shape
        o = self._first_value(inputs).new_zeros(batch, tokens, channels)
        final = torch.empty_like(starts)
        for span in self._spans(tokens, cu_seqlens):
            tokens_of = _Tokens(self.analysis, inputs, constants, span, states)
            now = scan(tokens_of.decay(), tokens_of.update(), span.rows(starts))
            span.rows(final).copy_(now[:, -1] if now.shape[1] else span.rows(starts))
            span.tokens(states).copy_(now)
            span.tokens(o).copy_(tokens_of.role("query") * _real(now) * scale)
        return Forward(o, (final,) if want_final else (), (states, starts) if save else ())

    @torch.no_grad()
    def backward(
        self,
        do: Tensor | None,
        dfinal: tuple[Tensor | None, ...],
        o: Tensor,
        saved: tuple[Tensor, ...],
        inputs: tuple[Tensor, ...],
        constants: tuple[Tensor, ...],
        scale: float,
        initial: tuple[Tensor, ...],
        cu_seqlens: Tensor | None,
        needs: tuple[bool, ...],
        need_initial: bool,
    ) -> tuple[tuple[Tensor | None, ...], tuple[Tensor, ...]]:
        """As TorchBackend.backward."""
        states, starts = saved
        work = states.real.dtype if states.is_complex() else states.dtype
        sums = {
            one: torch.zeros(x.shape, dtype=work, device=x.device)
            for one, x, need in zip(self.analysis.inputs, inputs, needs, strict=True)
            if need
        }
        ends = torch.zeros_like(starts) if dfinal[0] is None else dfinal[0].to(starts.dtype)
        d_starts = torch.empty_like(starts)
        for span in self._spans(states.shape[1], cu_seqlens):
            tokens_of = _Tokens(self.analysis, inputs, constants, span, states)
            decay, now = tokens_of.decay(), span.tokens(states)
            # the adjoint of each state: what is read of it, and what the next one makes of it
            d_out = torch.zeros_like(_real(now)) if do is None else span.tokens(do).to(work) * scale
            after = torch.cat((torch.ones_like(decay[:, :1]), decay[:, 1:].conj().flip(1)), 1)
            adjoint = scan(after, (tokens_of.role("query") * d_out).flip(1), span.rows(ends)).flip(1)
            before = torch.cat((span.rows(starts).unsqueeze(1), now[:, :-1]), 1)[:, : now.shape[1]]
            kept = decay * before
            if now.shape[1]:
                span.rows(d_starts).copy_((decay[:, :1].conj() * adjoint[:, :1])[:, 0])
            else:
                span.rows(d_starts).copy_(span.rows(ends))
            turned = adjoint.conj() * kept
            gradients = {
                "query": d_out * _real(now),
                "key": _real(adjoint) * tokens_of.role("value"),
                "value": _real(adjoint) * tokens_of.role("key"),
                "log_decay": _real(turned),
                "phase": -turned.imag if turned.is_complex() else turned,
            }
            tokens_of.add(sums, gradients)
        found = (
            sums[one].to(x.dtype) if one in sums else None for one, x in zip(self.analysis.inputs, inputs, strict=True)
        )
        return tuple(found), (d_starts.to(initial[0].dtype),) if need_initial else ()

    @torch.no_grad()
    def step(
        self, inputs: tuple[Tensor, ...], constants: tuple[Tensor, ...], scale: float, state: tuple[Tensor, ...]
    ) -> Tensor:
        """One token, T = 1: the output [B, 1, D]. The state is updated in place."""
        states, _ = self.saved_like(inputs, None)
        (span,) = self._spans(1, None)
        tokens_of = _Tokens(self.analysis, inputs, constants, span, states)
        state[0].mul_(tokens_of.decay()[:, 0]).add_(tokens_of.update()[:, 0])
        o = tokens_of.role("query") * _real(state[0]).unsqueeze(1) * scale
        return o.expand(states.shape).to(self._first_value(inputs).dtype)

    def saved_like(self, inputs: tuple[Tensor, ...], cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        """New tensors of the shapes that forward saves: states [B, T, D] and [N, D]."""
        sizes = dict.fromkeys(DIMENSIONS, 1)
        for one, x in zip(self.analysis.inputs, inputs, strict=True):
            for axis, size in zip(one.axes, x.shape, strict=True):
                if axis != "b" or "t" in one.axes:
                    sizes[axis] = size
        dtype = torch.float64 if any(x.dtype == torch.float64 for x in inputs) else torch.float32
        dtype = dtype.to_complex() if self.analysis.is_complex else dtype
        rows = sizes["b"] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        states = torch.empty(*sizes.values(), dtype=dtype, device=inputs[0].device)
        return states, states.new_empty(rows, sizes["d"])

    def _first_value(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """The input whose dtype the output has."""
        return inputs[self.analysis.inputs.index(self.analysis.spec.value.inputs[0])]

    def _spans(self, tokens: int, cu_seqlens: Tensor | None) -> Iterator[_Span]:
        if cu_seqlens is None:
            yield _Span(None, 0, tokens)
            return
        for row, (begin, end) in enumerate(pairwise(cu_seqlens.tolist())):
            yield _Span(row, begin, end)


class _Span:
    """Tokens `begin` to `end`, of all rows or, with cu_seqlens, of sequence `row`."""

    def __init__(self, row: int | None, begin: int, end: int) -> None:
        self.row, self.begin, self.end = row, begin, end

    def tokens(self, x: Tensor) -> Tensor:
        return x[:, self.begin : self.end]

    def rows(self, x: Tensor) -> Tensor:
        return x if self.row is None else x[self.row : self.row + 1]

    def of_input(self, x: Tensor, declared: Input) -> Tensor:
        """Its part of an input as [B, T, D], a view, with 1 for the axes that it lacks."""
        for i, axis in enumerate(DIMENSIONS):
            if axis not in declared.axes:
                x = x.unsqueeze(i)
        return self.tokens(x) if "t" in declared.axes else self.rows(x) if "b" in declared.axes else x


class _Tokens:
    """The roles of a span's tokens, each broadcastable to `like` [B, T, D] of the span."""

    def __init__(self, analysis: Analysis, inputs: tuple[Tensor, ...], constants: tuple[Tensor, ...], span: _Span,
                 states: Tensor) -> None:  # fmt: skip
        self.analysis, self.span, self.like = analysis, span, span.tokens(states)
        self.work = states.real.dtype if states.is_complex() else states.dtype
        self.values = {
            one.name: span.of_input(x, one).to(self.work) for one, x in zip(analysis.inputs, inputs, strict=True)
        }
        self.values |= {one.name: x.to(self.work) for (one, _), x in zip(analysis.constants, constants, strict=True)}

    def evaluated(self, expr: Expr) -> Tensor:
        value = evaluate(expr, self.values, 1)
        return value if isinstance(value, Tensor) else self.like.new_full((1, 1, 1), value, dtype=self.work)

    def role(self, name: str) -> Tensor:
        expr = self.analysis.role(name)
        assert expr is not None, name
        return self.evaluated(expr)

    def update(self) -> Tensor:
        """key value [B, T, D]"""
        return (self.role("key") * self.role("value")).expand(self.like.shape)

    def decay(self) -> Tensor:
        """[B, T, D], complex with a phase."""
        decay = torch.ones((), dtype=self.work, device=self.like.device)
        if self.analysis.decay != "none":
            decay = self.role("log_decay").exp()
        if self.analysis.is_complex:
            phase = self.role("phase")
            decay, phase = torch.broadcast_tensors(decay, phase)
            decay = torch.polar(decay.contiguous(), phase.contiguous())
        return decay.expand(self.like.shape)

    def add(self, sums: dict[Input, Tensor], gradients: dict[str, Tensor]) -> None:
        """The chain rule from the roles to the inputs in `sums`, to which it adds."""
        for role, one, derivative in self.analysis.gradients:
            if one not in sums:
                continue
            term = gradients[role]
            if derivative != Number(1):
                term = term * self.evaluated(derivative)
            if role in ("log_decay", "phase") and self.analysis.decay != "none":
                # where the decay is zero so is its gradient, whatever the gate's derivative is there
                term = term.masked_fill(self.role("log_decay").exp() == 0, 0.0)
            lacking = [i for i, axis in enumerate(DIMENSIONS) if axis not in one.axes]
            term = term.expand(self.like.shape)
            self.span.of_input(sums[one], one).add_(term.sum(lacking, keepdim=True) if lacking else term)


def scan(decay: Tensor, x: Tensor, start: Tensor) -> Tensor:
    """h_t = decay_t h_{t-1} + x_t with h_0 = start [B, D]: all h_t [B, T, D], of start's dtype."""
    batch, tokens, channels = decay.shape
    size = max(1, min(MAX_CHUNK, math.isqrt(tokens)))
    count = -(-tokens // size)
    # chunks last but one, their tokens first: each step is one block of memory
    whole = torch.zeros(2, batch, count * size, channels, dtype=start.dtype, device=start.device)
    whole[0, :, :tokens], whole[1, :, :tokens] = x, decay
    local, passed = whole.view(2, batch, count, size, channels).permute(0, 3, 1, 2, 4).contiguous().unbind(0)
    for t in range(1, size):
        local[t].addcmul_(passed[t], local[t - 1])
        passed[t].mul_(passed[t - 1])
    carried = start.new_empty(batch, count, channels)
    state = start
    for i in range(count):
        carried[:, i] = state
        state = torch.addcmul(local[-1, :, i], passed[-1, :, i], state)
    local.addcmul_(passed, carried)
    return local.permute(1, 2, 0, 3).reshape(batch, count * size, channels)[:, :tokens]


def _real(x: Tensor) -> Tensor:
    return x.real if x.is_complex() else x

"""The torch backend: a spec as chunkwise PyTorch, for the CPU and any device without Triton.

A sequence is cut into spans of a few chunks, which stay in cache. For each span the role expressions are evaluated
(torch_roles) and the recurrence is run (torch_chunk, torch_tree); the backward takes the spans in reverse, from the
states that the forward kept at their starts. Nothing here uses autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import torch_taylor as taylor_map
from .functions import evaluate
from .stabilize import PEAK
from .torch_roles import ChainRule, Roles, Sizes, Span, environment, evaluated, padded_size
from .torch_stabilize import gauges

if TYPE_CHECKING:
    from .analysis import Analysis

CHUNK_SIZE = 64
SPAN_ELEMENTS = 1 << 18  # of one tensor of a span: a dozen of them stay in a CPU's caches


class Forward(NamedTuple):
    """The output [B, T, H, V], the final state (or ()), and the tensors that backward wants (or ())."""

    o: Tensor
    final: tuple[Tensor, ...]
    saved: tuple[Tensor, ...]


class TorchBackend:
    """Runs the spec of `analysis`.

    `chunk_size`: tokens a chunk, rounded up to a power of two for a decay per channel; None for the default. It changes
    speed and rounding only. States are fp32 (fp64 if an input is fp64), complex with a phase.
    """

    def __init__(self, analysis: Analysis, chunk_size: int | None = None) -> None:
        self.analysis = analysis
        self.normalized = analysis.normalizer is not None
        self.stabilized = analysis.stabilizer is not None
        self.chunk_size = padded_size(analysis, chunk_size or CHUNK_SIZE)

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
        """`inputs` and `constants` in the analysis' order; `initial` is () or the state. The saved tensors are as in
        saved_like."""
        sizes = Sizes.of(self.analysis.inputs, inputs)
        # zeros where there may be tokens past the last sequence
        make = torch.empty if cu_seqlens is None else torch.zeros
        shape = sizes.batch, sizes.time, sizes.heads, sizes.value
        o = make(shape, dtype=self._output_dtype(inputs), device=sizes.device)
        saved = self.saved_like(inputs, cu_seqlens) if save else ()
        scales: tuple[Tensor, ...] = ()
        if self.stabilized:
            *held, last = gauges(self.analysis, inputs, constants, sizes, (*initial[2:], None)[0], cu_seqlens)
            constants, scales = (*constants, *held), (last,)
            saved = (*saved[:2], *held) if save else ()
        starts = self._rows(initial, sizes, cu_seqlens)
        ends, state = [], None
        for i, span in enumerate(self._spans(sizes, cu_seqlens)):
            state = starts[span.row or 0] if span.first else state
            if save:
                saved[0][i] = state
            if span.chunks:
                roles = self._roles(inputs, constants, sizes, span, scale)
                out, state = roles.piece().forward(state)
                out = roles.unpacked(out)
                if self.normalized:
                    out, denominator = out[..., :-1], out[..., -1:]
                    known = self._known(denominator, constants, span)
                    out = out / evaluate(self.analysis.normalizer, known, sizes.heads)
                    if save:
                        span.tokens(saved[1].unsqueeze(-1)).copy_(denominator)
                span.tokens(o).copy_(out)
            if span.last:
                ends.append(state)
        return Forward(o, (*self._states(ends, sizes), *scales) if want_final else (), saved)

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
        """The gradients of the inputs that `needs` marks (None for the others), in their shapes and dtypes, and of the
        initial state (() unless need_initial). do, or parts of dfinal, may be None for zero.
        """
        sizes = Sizes.of(self.analysis.inputs, inputs)
        constants = (*constants, *saved[2:])
        chain = ChainRule(self.analysis, inputs, needs, sizes)
        ends = self._rows(dfinal, sizes, cu_seqlens)
        starts, adjoint = [], None
        for i, span in reversed(list(enumerate(self._spans(sizes, cu_seqlens)))):
            adjoint = ends[span.row or 0] if span.last else adjoint
            if span.chunks:
                roles = self._roles(inputs, constants, sizes, span, scale)
                d_out = self._d_output(do, o, saved[1:], constants, sizes, span)
                grads, adjoint = roles.piece().backward(d_out, saved[0][i], adjoint, chain.wants)
                chain.add(roles.gradients(grads, chain.wants), roles)
            if span.first:
                starts.append(adjoint)
        d_initial = self._states(starts[::-1], sizes) if need_initial else ()
        if need_initial and self.stabilized:
            d_initial = (*d_initial, torch.zeros_like(initial[2]))
        return chain.results(), tuple(d.to(x.dtype) for d, x in zip(d_initial, initial, strict=need_initial))

    @torch.no_grad()
    def step(
        self, inputs: tuple[Tensor, ...], constants: tuple[Tensor, ...], scale: float, state: tuple[Tensor, ...]
    ) -> Tensor:
        """One token, T = 1: the output [B, 1, H, V]. The state is updated in place."""
        sizes = Sizes.of(self.analysis.inputs, inputs)
        if self.stabilized:
            *held, last = gauges(self.analysis, inputs, constants, sizes, state[2], None)
            constants = (*constants, *held)
            state[2].copy_(last)
        values = environment(self.analysis, inputs, constants, sizes, Span(None, 0, 1, 1, True, True))

        def token(role: str, channels: int) -> Tensor:
            value = evaluated(self.analysis.role(role), values, sizes)
            return value.expand(1, sizes.batch, sizes.heads, 1, channels)[0, :, :, 0]

        query, key, value = token("query", sizes.key) * scale, token("key", sizes.key), token("value", sizes.value)
        order, exclusive = self.analysis.taylor, self.analysis.exclusive
        if self.stabilized:
            key = key * token("gate", 1).exp()
        weight = (query * token("bonus", sizes.key) * key).sum(-1, keepdim=True) if exclusive else None
        reads = taylor_map.features(query, order, query=True) if order else query
        writes = taylor_map.features(key, order, query=False) if order else key
        decay = self._step_decay(token, sizes)
        outputs = []
        # the normaliser is the same recurrence for a value of one
        values_and_sums = [(value, state[0]), *((torch.ones_like(value[..., :1]), z.unsqueeze(-1)) for z in state[1:2])]
        for own, sums in values_and_sums:
            out = weight * own + _read(reads, sums) if exclusive else None
            if self.analysis.erase != "none":
                own = self._erased(token, sizes, sums, decay, own, writes)
            elif decay is not None:
                sums.mul_(decay)
            sums.add_(writes.unsqueeze(-1) * own.unsqueeze(-2))
            outputs.append(out if exclusive else _read(reads, sums))
        out = outputs[0]
        if self.normalized:
            known = {"n": outputs[1]}
            if self.stabilized:
                known[PEAK.name] = values[PEAK.name][0, :, :, 0]
            out = out / evaluate(self.analysis.normalizer, known, sizes.heads)
        return out.unsqueeze(1).to(self._output_dtype(inputs))

    def saved_like(self, inputs: tuple[Tensor, ...], cu_seqlens: Tensor | None) -> tuple[Tensor, ...]:
        """New tensors of the shapes that forward saves, which follow from the inputs' shapes alone: the states
        [spans at most, R, F, V] that the spans start with; with a normaliser, what it divides by [B, T, H]; of a
        stabilised spec the gauges, [B, T, H] too.
        """
        sizes = Sizes.of(self.analysis.inputs, inputs)
        sequences = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
        most = sizes.time // self._span_size(sizes) + 2 * sequences
        states = torch.empty(most, *self._state_shape(sizes), **sizes.options)
        if not self.normalized:
            return (states,)
        tokens = torch.ones(sizes.batch, sizes.time, sizes.heads, **sizes.options)
        return states, tokens, *(torch.empty_like(tokens) for _ in self.analysis.gauges)

    def _erased(
        self, token: Callable[[str, int], Tensor], sizes: Sizes, state: Tensor, decay: Tensor | None, value: Tensor,
        key: Tensor,
    ) -> Tensor:  # fmt: skip
        """Takes from the state what a token erases, and decays it, in place. Returns what the key is still to write."""
        delta = self.analysis.erase == "delta"
        a = key if delta else token("erase_a", sizes.key)
        read = _read(a, state) if self.analysis.erase_previous else None
        if decay is not None:
            state.mul_(decay)
        read = _read(a, state) if read is None else read
        if delta:
            return value - token("erase", 1) * read
        state.sub_(token("erase_b", sizes.key).unsqueeze(-1) * read.unsqueeze(-2))
        return value

    def _step_decay(self, token: Callable[[str, int], Tensor], sizes: Sizes) -> Tensor | None:
        """The factor of the state for one token, broadcastable to [B, H, F, V]."""
        factor = None
        if self.analysis.decay != "none":
            width = {"key": sizes.key, "value": sizes.value}.get(self.analysis.decay, 1)
            factor = token("log_decay", width).exp()
        if self.analysis.is_complex:
            phase = token("phase", sizes.key)
            factor = torch.polar(torch.ones_like(phase) if factor is None else factor.expand_as(phase), phase)
        if factor is None:
            return None
        return factor.unsqueeze(-2) if self.analysis.decay == "value" else factor.unsqueeze(-1)

    def _roles(
        self, inputs: tuple[Tensor, ...], constants: tuple[Tensor, ...], sizes: Sizes, span: Span, scale: float
    ) -> Roles:
        return Roles(self.analysis, environment(self.analysis, inputs, constants, sizes, span), sizes, span, scale)

    def _known(self, denominator: Tensor, constants: tuple[Tensor, ...], span: Span) -> dict[str, Tensor]:
        """What the normaliser is a function of."""
        known = {"n": denominator}
        if self.stabilized:
            known[PEAK.name] = span.tokens(constants[len(self.analysis.constants)].unsqueeze(-1))
        return known

    def _d_output(
        self, do: Tensor | None, o: Tensor, sums: tuple[Tensor, ...], constants: tuple[Tensor, ...], sizes: Sizes,
        span: Span,
    ) -> Tensor:  # fmt: skip
        """The gradient of a piece's output [n, R, C, V], with that of the denominator as its last column."""
        rows = padded_size(self.analysis, span.size)
        shape = span.chunks, sizes.batch, sizes.heads, rows, sizes.value + self.normalized
        out = (torch.zeros if rows > span.size or do is None else torch.empty)(shape, **sizes.options)
        if do is None:
            return out.flatten(1, 2)
        inner = out[..., : span.size, :]
        if self.normalized:
            known = self._known(span.tokens(sums[0].unsqueeze(-1)), constants, span)
            divided = span.tokens(do) / evaluate(self.analysis.normalizer, known, sizes.heads)
            slope = evaluate(self.analysis.normalizer_gradient, known, sizes.heads)
            inner[..., :-1] = divided
            inner[..., -1:] = (divided * span.tokens(o)).sum(-1, keepdim=True) * -slope
        else:
            inner.copy_(span.tokens(do))
        return out.flatten(1, 2)

    def _output_dtype(self, inputs: tuple[Tensor, ...]) -> torch.dtype:
        used = self.analysis.spec.value.inputs or self.analysis.inputs
        return inputs[self.analysis.inputs.index(used[0])].dtype

    def _state_shape(self, sizes: Sizes) -> tuple[int, int, int]:
        """[R, F, V] of a state as the pieces hold it: real, and the normaliser's sums as a last column."""
        order = self.analysis.taylor
        features = taylor_map.count(sizes.key, order) if order else sizes.key * (2 if self.analysis.is_complex else 1)
        return sizes.batch * sizes.heads, features, sizes.value + self.normalized

    def _span_size(self, sizes: Sizes) -> int:
        # sizes may be symbolic, of which max would ask which is larger
        largest = torch.sym_max
        width = largest(largest(sizes.key * (2 if self.analysis.is_complex else 1), sizes.value), self.chunk_size)
        chunk = largest(1, sizes.batch * sizes.heads * self.chunk_size * width)
        return self.chunk_size * largest(1, SPAN_ELEMENTS // chunk)

    def _spans(self, sizes: Sizes, cu_seqlens: Tensor | None) -> Iterator[Span]:
        sequences = [(None, 0, sizes.time)]
        if cu_seqlens is not None:
            limits = cu_seqlens.tolist()
            sequences = [(i, begin, end) for i, (begin, end) in enumerate(pairwise(limits))]
        size = self.chunk_size
        for row, begin, end in sequences:
            whole = end - (end - begin) % size
            cuts = [*range(begin, whole, self._span_size(sizes)), whole]
            spans = [(cut, (after - cut) // size, size) for cut, after in pairwise(cuts)]
            if whole < end or not spans:
                spans.append((whole, int(whole < end), end - whole))
            for i, span in enumerate(spans):
                yield Span(row, *span, first=i == 0, last=i == len(spans) - 1)

    def _rows(self, state: tuple[Tensor | None, ...], sizes: Sizes, cu_seqlens: Tensor | None) -> Tensor:
        """A public state, or the gradient of one, as the pieces want it: [sequences, R, F, V]; None is zero."""
        rows, features, width = self._state_shape(sizes)
        sequences = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
        out = torch.zeros(sequences, rows, features, width, **sizes.options)
        columns = out[..., : sizes.value], out[..., -1]
        for tensor, column in zip(state, columns, strict=False):
            if tensor is None:
                continue
            tensor = tensor.reshape(sequences, rows, *tensor.shape[2:])
            if tensor.is_complex():
                real, imag = column.chunk(2, dim=2)
                real.copy_(tensor.real)
                imag.copy_(-tensor.imag)
            else:
                column.copy_(tensor)
        return out

    def _states(self, states: list[Tensor], sizes: Sizes) -> tuple[Tensor, ...]:
        """The inverse of _rows: [R, F, V] of each sequence to the tuple of [N, H, F, V]."""
        merged = torch.stack(states).unflatten(1, (-1, sizes.heads)).flatten(0, 1)
        if self.analysis.is_complex:
            real, imag = merged.chunk(2, dim=2)
            return (torch.complex(real.contiguous(), -imag),)
        if self.normalized:
            return merged[..., :-1].contiguous(), merged[..., -1].contiguous()
        return (merged,)


def _read(query: Tensor, state: Tensor) -> Tensor:
    """query [B, H, F] times state [B, H, F, V], the real part."""
    state = (state.real if state.is_complex() else state).to(query.dtype)
    return (query.unsqueeze(-2) @ state).squeeze(-2)

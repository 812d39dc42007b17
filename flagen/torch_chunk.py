"""Chunkwise linear attention in PyTorch: what all decays share, and the decay that is a scalar per token.

A `Piece` is a run of n whole chunks of C tokens for R rows (batch times heads), chunks first: query and key
[n, R, C, K], value [n, R, C, V], states [R, F, V]. Each chunk's own contribution to the state is a matrix product, a
short serial scan adds the chunks up, and the outputs are matrix products again. The backward is that of the recurrence,
written out: S_t is kept at the starts of the chunks, its adjoint at their ends. Every exponent is at most zero and a
decay of exactly zero is a reset; nothing overflows whatever the decay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from . import torch_taylor as taylor_map


class Gradients(NamedTuple):
    """Gradients of a piece; None where not wanted. `diagonal` and `angle` are those of the arguments of those names,
    `erase` those of the erasing roles by name.
    """

    query: Tensor | None
    key: Tensor | None
    value: Tensor | None
    log_decay: Tensor | None
    diagonal: Tensor | None
    angle: Tensor | None
    erase: Mapping[str, Tensor] | None = None


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype of running sums: fp64, so that differences of sums stay exact to fp32; fp32 where the device has no
    fp64."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def triangle(size: int, like: Tensor, *, strict: bool) -> Tensor:
    """[size, size] of ones where column >= row (column > row if strict): row r sums what stands at or after r."""
    return torch.ones(size, size, dtype=like.dtype, device=like.device).triu(1 if strict else 0)


def left_product(matrix: Tensor, x: Tensor) -> Tensor:
    """matrix [C, C] times every x [N, C, D]."""
    return torch.bmm(matrix.expand(x.shape[0], -1, -1), x)


class Piece:
    """n chunks. A subclass says what the decay does inside a chunk.

    query [n, R, C, K] is already scaled. `diagonal` [n, R, C], if given, is the weight of a token's own value, and the
    output reads the state before the token's decay; else the token's own pair is query times key. `taylor`: the scores
    become sum_i score^i / i! for i up to it, and the state holds the features of torch_taylor. `turn` = (cos, sin),
    each [n, R, K/2, 1], turns the state at each chunk's end: channels are the real parts, then the negated imaginary
    parts. Tensors of the object have n and R merged, N = n * R. prepare() sets reads and writes, query and key features
    as they meet the state at the chunk's start and end [N, C, F]; values [N, C, V]; total, the decay of a whole chunk,
    broadcastable to [n, R, F, V].
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        log_decay: Tensor | None,
        diagonal: Tensor | None,
        taylor: int = 0,
        turn: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.chunks, self.rows, self.size, _ = query.shape
        self.batch = self.chunks * self.rows
        self.query, self.key, self.value = query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)
        self.log_decay, self.taylor, self.turn = log_decay, taylor, turn
        self.exclusive = diagonal is not None
        self.diagonal = diagonal.flatten(0, 1) if self.exclusive else None
        self.reads = self.writes = self.values = self.total = None

    # --- the part of a subclass

    def prepare(self) -> None:
        raise NotImplementedError

    def within(self) -> Tensor:
        """The outputs of the pairs inside a chunk [N, C, V]."""
        raise NotImplementedError

    def from_state(self, states: Tensor) -> Tensor:
        """The outputs read from the chunks' first states [N, F, V]."""
        return torch.bmm(self.reads, states)

    # --- shared

    def forward(self, start: Tensor) -> tuple[Tensor, Tensor]:
        """The output [n, R, C, V] and the state after the piece [R, F, V]."""
        self.prepare()
        states = self.scan(start)
        o = self.within()
        o += self.from_state(states[:-1].flatten(0, 1))
        return o.unflatten(0, (self.chunks, self.rows)), states[-1]

    def scan(self, start: Tensor) -> Tensor:
        """The states before each chunk, and after the last: [n + 1, R, F, V]."""
        features, width = self.writes.shape[-1], self.values.shape[-1]
        states = start.new_empty(self.chunks + 1, self.rows, features, width)
        states[0] = start
        torch.bmm(self.writes.mT, self.values, out=states[1:].flatten(0, 1))
        for i in range(self.chunks):
            after = self._add_decayed(states[i + 1], states[i], i)
            if self.turn is not None:
                cos, sin = self.turn[0][i], self.turn[1][i]
                real, imag = after.chunk(2, dim=1)
                turned = torch.addcmul(real * cos, imag, sin)
                imag.mul_(cos).addcmul_(real, sin, value=-1)
                real.copy_(turned)
        return states

    def scan_back(self, adjoints: Tensor) -> Tensor:
        """`adjoints` [n + 1, R, F, V] holds what each chunk reads of its first state, and last the adjoint of the end:
        made into the adjoints of the states before each chunk. Returns those of the states at the chunks' ends, before
        the turn.
        """
        if self.turn is None:
            for i in reversed(range(self.chunks)):
                self._add_decayed(adjoints[i], adjoints[i + 1], i)
            return adjoints[1:]
        ends = torch.empty_like(adjoints[1:])
        for i in reversed(range(self.chunks)):
            cos, sin = self.turn[0][i], self.turn[1][i]
            real, imag = adjoints[i + 1].chunk(2, dim=1)
            to_real, to_imag = ends[i].chunk(2, dim=1)
            torch.mul(real, cos, out=to_real).addcmul_(imag, sin, value=-1)
            torch.mul(imag, cos, out=to_imag).addcmul_(real, sin)
            self._add_decayed(adjoints[i], ends[i], i)
        return ends

    def _add_decayed(self, target: Tensor, state: Tensor, i: int) -> Tensor:
        if self.total is None:
            return target.add_(state)
        return target.addcmul_(self.total[i if len(self.total) > 1 else 0], state)

    def angle_gradient(self, states: Tensor, adjoints: Tensor) -> Tensor | None:
        """The gradient of the turns' angles [n, R, K/2], from the states and adjoints after the turns."""
        if self.turn is None:
            return None
        real, imag = states[1:].chunk(2, dim=2)
        d_real, d_imag = adjoints[1:].chunk(2, dim=2)
        return (d_real * imag).sub_(d_imag * real).sum(-1)

    def whole_chunk(self, states: Tensor, ends: Tensor, dims: tuple[int, ...]) -> Tensor:
        """The decay's gradient by what passes a chunk from end to end, the same for all its tokens."""
        return (states[:-1] * ends).mul_(self.total).sum(dims, keepdim=True)

    def adjoints(self, reads: Tensor, do: Tensor, end: Tensor) -> Tensor:
        """A buffer for scan_back: reads^T do for each chunk, and the adjoint of the state after the piece."""
        buffer = end.new_empty(self.chunks + 1, *end.shape)
        torch.bmm(reads.mT, do, out=buffer[:-1].flatten(0, 1))
        buffer[-1] = end
        return buffer

    def scores(self) -> Tensor:
        """query key^T under the Taylor polynomial, for all pairs [N, C, C]; self.slope is the polynomial's
        derivative."""
        product = torch.bmm(self.query, self.key.mT)
        self.slope = None
        if self.taylor == 1:
            product += 1
        elif self.taylor == 2:
            self.slope = product + 1
            product = torch.addcmul(self.slope, product, product, value=0.5)
        return product

    def features(self, x: Tensor, *, query: bool) -> Tensor:
        return taylor_map.features(x, self.taylor, query=query) if self.taylor else x

    def features_back(self, gradient: Tensor, x: Tensor, *, query: bool) -> Tensor:
        return taylor_map.features_back(gradient, x, self.taylor, query=query) if self.taylor else gradient

    def shaped(self, x: Tensor | None) -> Tensor | None:
        return None if x is None else x.unflatten(0, (self.chunks, self.rows))


class ScalarPiece(Piece):
    """No decay (log_decay None) or one per token: log_decay [n, R, C, 1], or [1, R, C, 1] where it does not vary."""

    def prepare(self) -> None:
        size, like = self.size, self.query
        self.reads, self.writes = self.features(self.query, query=True), self.features(self.key, query=False)
        self.values = self.value
        future = triangle(size, like, strict=not self.exclusive)
        if self.log_decay is None:
            self.tile = 1 - future
            return
        # below the clamp the exponential is zero in the working dtype; sums of clamped values stay exact enough in fp64
        floor = -800.0 if like.dtype == torch.float64 else -150.0
        sums = self.log_decay.squeeze(-1).clamp(min=floor).to(wide_dtype(like)).cumsum(-1)
        to_query = torch.nn.functional.pad(sums[..., :-1], (1, 0)) if self.exclusive else sums
        end = sums[..., -1:]
        # the exponent is masked, not the result: above the diagonal it is positive and may overflow
        self.tile = torch.empty(*sums.shape, size, dtype=like.dtype, device=like.device)
        torch.sub(to_query.unsqueeze(-1), sums.unsqueeze(-2), out=self.tile)
        self.tile.masked_fill_(future.bool(), float("-inf")).exp_()
        self.read_decay = to_query.to(like.dtype).exp().unsqueeze(-1)
        self.write_decay = (end - sums).to(like.dtype).exp_().unsqueeze(-1)
        self.total = end.to(like.dtype).exp().unsqueeze(-1)
        self.reads = self._scaled(self.reads, self.read_decay)
        self.writes = self._scaled(self.writes, self.write_decay)

    def _scaled(self, x: Tensor, factor: Tensor) -> Tensor:
        return (self.shaped(x) * factor).flatten(0, 1)

    def _scale_(self, x: Tensor, factor: Tensor) -> Tensor:
        self.shaped(x).mul_(factor)
        return x

    def attention(self) -> Tensor:
        """The decayed weights of all pairs inside a chunk [N, C, C], without `diagonal`."""
        weights = self.scores()
        return self._scale_(weights, self.tile)

    def within(self) -> Tensor:
        weights = self.attention()
        if self.exclusive:
            weights.diagonal(dim1=1, dim2=2).copy_(self.diagonal)
        return torch.bmm(weights, self.value)

    def backward(
        self, do: Tensor, start: Tensor, end: Tensor, wants: Callable[[str], bool]
    ) -> tuple[Gradients, Tensor]:
        """Gradients from do [n, R, C, V] and the adjoint `end` of the state after the piece; and the adjoint of
        `start`."""
        self.prepare()
        do = do.flatten(0, 1)
        states = self.scan(start)
        adjoints = self.adjoints(self.reads, do, end)
        ends = self.scan_back(adjoints)
        weights, d_weights = self.attention(), torch.bmm(do, self.value.mT)
        pairs = weights * d_weights if wants("log_decay") else None
        d_value = d_diagonal = None
        if self.exclusive:
            d_diagonal = d_weights.diagonal(dim1=1, dim2=2).clone()
            weights.diagonal(dim1=1, dim2=2).copy_(self.diagonal)
        if wants("value"):
            d_value = torch.bmm(weights.mT, do).baddbmm_(self.writes, ends.flatten(0, 1))
        d_scores = self._scale_(d_weights, self.tile)
        if self.slope is not None:
            d_scores *= self.slope
        d_query = d_key = d_reads = d_writes = None
        if wants("query") or wants("log_decay"):
            d_reads = torch.bmm(do, states[:-1].flatten(0, 1).mT)
            through = (self.reads * d_reads).sum(-1) if wants("log_decay") else None
        if wants("key") or wants("log_decay"):
            d_writes = torch.bmm(self.value, ends.flatten(0, 1).mT)
            kept = (self.writes * d_writes).sum(-1) if wants("log_decay") else None
        if wants("query"):
            d_query = self._through(d_reads, "read_decay", self.query, query=True).baddbmm_(d_scores, self.key)
        if wants("key"):
            d_key = self._through(d_writes, "write_decay", self.key, query=False).baddbmm_(d_scores.mT, self.query)
        d_log_decay = self._decay_gradient(pairs, through, kept, states, ends) if wants("log_decay") else None
        angle = self.angle_gradient(states, adjoints)
        grads = Gradients(*map(self.shaped, (d_query, d_key, d_value, d_log_decay, d_diagonal)), angle)
        return grads, adjoints[0]

    def _through(self, gradient: Tensor, decay: str, x: Tensor, *, query: bool) -> Tensor:
        if self.log_decay is not None:
            self._scale_(gradient, getattr(self, decay))
        return self.features_back(gradient, x, query=query)

    def _decay_gradient(self, pairs: Tensor, through: Tensor, kept: Tensor, states: Tensor, ends: Tensor) -> Tensor:
        """[N, C, 1]: for token r, the sum over all that passes r: pairs s < r <= t, reads t >= r of the chunk's first
        state, writes s < r to its last, and the chunk's whole passage. Sums of like terms only, nothing cancels.
        (exclusive: r < t.)
        """
        late = triangle(self.size, pairs, strict=self.exclusive)
        early = triangle(self.size, pairs, strict=True)
        total = (left_product(late, pairs) * early.mT).sum(-1)
        total.addmm_(through, late.mT).addmm_(kept, early)
        whole = self.whole_chunk(states, ends, (2, 3)).view(self.batch, 1)
        return (total + whole).unsqueeze(-1)

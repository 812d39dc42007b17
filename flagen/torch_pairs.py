"""The pairs of tokens inside chunks, for a recurrence whose state several vectors of a token read and write.

A token has `m` vectors that read, of which the first reads what its own writes have made and the others what was there
before them, and `n` vectors that write. A token's vectors lie next to each other: rows [N, C * m, K], columns
[N, C * n, K] for N chunks of C tokens. The weights [N, C * m, C * n] are the products of rows and columns under the
decay between their tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .torch_chunk import left_product, triangle, wide_dtype
from .torch_tree import Tree, pair_products


class PairGradients(NamedTuple):
    """Of rows, columns and log_decay [N, C, 1 or K] (None where not wanted)."""

    rows: Tensor
    columns: Tensor
    log_decay: Tensor | None


class Pairs:
    """weights, and `reads` and `writes`: rows and columns as they meet the state at the chunk's start and end; `total`:
    the decay of a whole chunk, broadcastable to [n, R, K, V], None for none.

    log_decay [n, R, C, 1 or K] (n may be 1 for a scalar), or None. previous: the rows but the first meet the state
    before their token's decay.
    """

    def __init__(self, rows: Tensor, columns: Tensor, log_decay: Tensor | None, shape: tuple[int, int, int],
                 previous: bool) -> None:  # fmt: skip
        self.rows, self.columns, self.log_decay = rows, columns, log_decay
        self.chunks, self.count, self.size = shape  # n, R, C
        self.m, self.n = rows.shape[1] // self.size, columns.shape[1] // self.size
        self.previous = previous
        self.total: Tensor | None = None
        self.prepare()

    def prepare(self) -> None:
        raise NotImplementedError

    def backward(
        self, d_weights: Tensor, d_reads: Tensor, d_writes: Tensor, whole: Tensor, want: bool
    ) -> PairGradients:
        """From the gradients of weights, reads and writes, which it may overwrite. whole: the decay's gradient by what
        passes a chunk from end to end, per key channel [N, 1, K]. want: whether log_decay's gradient is wanted.
        """
        raise NotImplementedError

    def by_token(self, x: Tensor) -> Tensor:
        """[N, C * m, D] as [N, C, m, D], a view."""
        return x.unflatten(1, (self.size, -1))


class ScalarPairs(Pairs):
    """No decay, or one number a token."""

    def prepare(self) -> None:
        like, size = self.rows, self.size
        future = triangle(size, like, strict=True).bool()
        now = torch.eye(size, dtype=torch.bool, device=like.device)
        self.read_decay = self.write_decay = None
        if self.log_decay is None:
            first = (~future).to(like.dtype)
            others = first - now.to(like.dtype)
        else:
            # see ScalarPiece: clamped sums in fp64, and exponents that are masked before they are taken
            floor = -800.0 if like.dtype == torch.float64 else -150.0
            sums = self.log_decay.squeeze(-1).clamp(min=floor).to(wide_dtype(like)).cumsum(-1)
            before = torch.nn.functional.pad(sums[..., :-1], (1, 0)) if self.previous else sums
            first = self._tile(sums, sums, future)
            others = self._tile(before, sums, future | now)
            reads = torch.stack((sums, *(before,) * (self.m - 1)), -1)
            self.read_decay = reads.to(like.dtype).exp().flatten(2, 3).unsqueeze(-1)
            end = sums[..., -1:]
            writes = (end - sums).to(like.dtype).exp_()
            self.write_decay = writes.repeat_interleave(self.n, -1).unsqueeze(-1)
            self.total = end.to(like.dtype).exp().unsqueeze(-1)
        # [1 or n, 1 or R, C, m, C, 1], over the columns of a token
        self.tile = torch.stack((first, *(others,) * (self.m - 1)), -2).unsqueeze(-1)
        self.weights = self._tiled_(torch.bmm(self.rows, self.columns.mT))
        self.reads = self._decayed(self.rows, self.read_decay)
        self.writes = self._decayed(self.columns, self.write_decay)

    @staticmethod
    def _tile(to: Tensor, since: Tensor, hidden: Tensor) -> Tensor:
        exponents = (to.unsqueeze(-1) - since.unsqueeze(-2)).masked_fill_(hidden, float("-inf"))
        return exponents.to(torch.float32 if to.dtype == torch.float32 else to.dtype).exp_()

    def _tiled_(self, weights: Tensor) -> Tensor:
        """The weights times the tile, in place."""
        shape = (self.chunks, self.count, self.size, self.m, self.size, self.n)
        weights.view(shape).mul_(self.tile)
        return weights

    def _decayed(self, x: Tensor, decay: Tensor | None) -> Tensor:
        return x if decay is None else (x.unflatten(0, (self.chunks, self.count)) * decay).flatten(0, 1)

    def backward(
        self, d_weights: Tensor, d_reads: Tensor, d_writes: Tensor, whole: Tensor, want: bool
    ) -> PairGradients:
        d_log_decay = self._decay_gradient(d_weights, d_reads, d_writes, whole) if want else None
        d_scores = self._tiled_(d_weights)
        d_rows = self._decayed(d_reads, self.read_decay).baddbmm(d_scores, self.columns)
        d_columns = self._decayed(d_writes, self.write_decay).baddbmm(d_scores.mT, self.rows)
        return PairGradients(d_rows, d_columns, d_log_decay)

    def _decay_gradient(self, d_weights: Tensor, d_reads: Tensor, d_writes: Tensor, whole: Tensor) -> Tensor:
        """[N, C, 1]: for token r the sum over all that passes it: pairs s < r <= t, reads t >= r of the chunk's first
        state, writes s < r to its last, and the chunk's whole passage. `previous` rows pass it where t > r.
        """
        pairs = (self.weights * d_weights).view(-1, self.size, self.m, self.size, self.n).sum(-1).unbind(2)
        through = self.by_token((self.reads * d_reads).sum(-1, keepdim=True)).squeeze(-1).unbind(2)
        kept = self.by_token((self.writes * d_writes).sum(-1, keepdim=True)).sum((2, 3))
        early = triangle(self.size, kept, strict=True)
        total = whole.sum(-1) + kept @ early
        for i, (weights, read) in enumerate(zip(pairs, through, strict=True)):
            late = triangle(self.size, kept, strict=self.previous and i > 0)
            total += (left_product(late, weights) * early.mT).sum(-1)
            total += read @ late.mT
        return total.unsqueeze(-1)


class KeyPairs(Pairs):
    """A decay per key channel, by the product tree of torch_tree; C is a power of two."""

    def prepare(self) -> None:
        self.decay = self.log_decay.exp().expand(self.chunks, -1, -1, -1).flatten(0, 1)
        reads, self.writes = self._first_reads(), self.columns.clone()
        tree = Tree(self.decay, (reads,), (self.writes,))
        self.weights = reads.new_zeros(reads.shape[0], self.size * self.m, self.size * self.n)
        for _ in tree.levels():
            tiles = tree.tiles(self.weights)
            tiles.copy_(pair_products(tree.right(reads), tree.left(self.writes)).view(tiles.shape))
        own = (self.by_token(self.rows)[:, :, :1] * self.by_token(self.columns)).sum(-1)
        self._own(self.weights).copy_(own)
        self.reads = reads
        self.total = tree.total.view(self.chunks, self.count, -1, 1)

    def _first_reads(self) -> Tensor:
        rows = self.by_token(self.rows)
        decay = self.decay.unsqueeze(2)
        if not self.previous:
            return (rows * decay).flatten(1, 2)
        return torch.cat((rows[:, :, :1] * decay, rows[:, :, 1:]), 2).flatten(1, 2)

    def _own(self, weights: Tensor) -> Tensor:
        """The weights of a token's first row and its own columns: [N, C, n], a view."""
        size, width = self.size, self.size * self.n
        return weights.as_strided((weights.shape[0], size, self.n), (size * self.m * width, self.m * width + self.n, 1))

    def backward(
        self, d_weights: Tensor, d_reads: Tensor, d_writes: Tensor, whole: Tensor, want: bool
    ) -> PairGradients:
        reads, writes = self._first_reads(), self.columns.clone()
        prefix = torch.ones_like(self.rows)
        by_token = self.by_token(prefix)
        (by_token[:, :, :1] if self.previous else by_token).copy_(self.decay.unsqueeze(2))
        suffix = torch.ones_like(self.columns)
        d_rows, d_columns = torch.zeros_like(self.rows), torch.zeros_like(self.columns)
        tree = Tree(self.decay, (prefix, reads), (suffix, writes))
        for _ in tree.levels():
            tiles = tree.tiles(d_weights).flatten(0, 1)
            tree.right(d_rows).addcmul_(tree.right(prefix), torch.bmm(tiles, tree.left(writes)))
            tree.left(d_columns).addcmul_(tree.left(suffix), torch.bmm(tiles.mT, tree.right(reads)))
        d_rows.addcmul_(d_reads, prefix)
        d_writes *= suffix
        d_log_decay = self._decay_gradient(d_rows, d_columns, d_writes, whole) if want else None
        d_columns += d_writes
        own = self._own(d_weights).unsqueeze(-1)
        first, columns = self.by_token(self.rows)[:, :, :1], self.by_token(self.columns)
        self.by_token(d_rows)[:, :, 0] += (own * columns).sum(2)
        self.by_token(d_columns).addcmul_(own, first)
        return PairGradients(d_rows, d_columns, d_log_decay)

    def _decay_gradient(self, d_rows: Tensor, d_columns: Tensor, d_writes: Tensor, whole: Tensor) -> Tensor:
        """[N, C, K]: for token r the sum of what rows t >= r read, less what columns s >= r gave within the chunk (the
        pairs among these do not pass r), plus what columns s < r leave in the state, plus `whole`. `previous` rows
        count where t > r.
        """
        late = self.by_token(self.rows * d_rows)
        pairs = self.by_token(self.columns * d_columns).sum(2)
        early = self.by_token(self.columns * d_writes).sum(2)
        after = triangle(self.size, late, strict=True)
        from_now = triangle(self.size, late, strict=False)
        now = late[:, :, 0] if self.previous else late.sum(2)
        total = left_product(from_now, now - pairs)
        if self.previous:
            total.baddbmm_(after.expand(len(total), -1, -1), late[:, :, 1:].sum(2))
        total.baddbmm_(after.mT.expand(len(total), -1, -1), early)
        return total.add_(whole)

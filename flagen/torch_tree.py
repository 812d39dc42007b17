"""Chunkwise linear attention in PyTorch with a decay per key or value channel, exact at any decay.

The pairs of a chunk are met in a product tree: at level m = 1, 2, 4, .. the chunk is cut into blocks of 2m tokens, and
each token of a block's right half meets each of its left half. The decay between the two is the product of a factor
from the middle to the right token and one from the left token to the middle, products of decays both: at most one,
never divided.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .torch_chunk import Gradients, Piece, left_product, triangle


class Tree:
    """The walk through the levels for chunks [N, C, D], C a power of two. decay: exp(log_decay) [N, C, D].

    Tensors [N, C, D] may have m rows a token instead, [N, C * m, D], and scores [N, C * m, C * n]: a token's rows lie
    next to each other. `prefixed` are tensors that hold, at each level, their token's factor from the start of its half
    block, and `suffixed` those with the factor to its end; both are updated in place, and after the walk span the whole
    chunk.
    """

    def __init__(self, decay: Tensor, prefixed: tuple[Tensor, ...], suffixed: tuple[Tensor, ...]) -> None:
        self.batch, self.size, self.channels = decay.shape
        self.total, self.prefixed, self.suffixed = decay, prefixed, suffixed

    def right(self, x: Tensor) -> Tensor:
        """The right halves of this level's blocks [N * blocks, m, D], a view."""
        return x.view(-1, 2, self.half * (x.shape[1] // self.size), x.shape[-1])[:, 1]

    def left(self, x: Tensor) -> Tensor:
        return x.view(-1, 2, self.half * (x.shape[1] // self.size), x.shape[-1])[:, 0]

    def tiles(self, scores: Tensor) -> Tensor:
        """This level's part of scores [N, C, C]: [N, blocks, m, m], a view."""
        rows, width = scores.shape[1:]
        high, wide = self.half * (rows // self.size), self.half * (width // self.size)
        strides = (rows * width, 2 * (high * width + wide), width, 1)
        start = scores.storage_offset() + high * width
        return scores.as_strided((self.batch, self.size // (2 * self.half), high, wide), strides, start)

    def levels(self) -> Iterator[None]:
        self.half = 1
        while self.half < self.size:
            yield
            totals = self.total.view(-1, 2, 1, self.channels)
            for x in self.prefixed:
                self.right(x).mul_(totals[:, 0])
            for x in self.suffixed:
                self.left(x).mul_(totals[:, 1])
            self.total = totals[:, 0] * totals[:, 1]
            self.half *= 2


def pair_products(x: Tensor, y: Tensor) -> Tensor:
    """x y^T for blocks [B, m, D] each."""
    return (x * y).sum(-1, keepdim=True) if x.shape[1] == 1 else torch.bmm(x, y.mT)


def weighted(tiles: Tensor, x: Tensor) -> Tensor:
    """tiles [B, m, m] times x [B, m, D]."""
    return tiles * x if x.shape[1] == 1 else torch.bmm(tiles, x)


class ChannelPiece(Piece):
    """What the two axes share: the decay's factors and the sums of its gradient. log_decay [n, R, C, D], C a power of
    two."""

    def decays(self) -> tuple[Tensor, Tensor, Tensor]:
        """The decay [N, C, D] and the first factors from a block's start to a token, and from a token to a block's
        end."""
        decay = self.log_decay.exp().flatten(0, 1)
        return decay, torch.ones_like(decay) if self.exclusive else decay.clone(), torch.ones_like(decay)

    def decay_gradient(self, late: Tensor, pairs: Tensor, early: Tensor, whole: Tensor) -> Tensor:
        """[N, C, D]: for token r the sum of `late` over t >= r, less that of `pairs` over s >= r, plus that of `early`
        over s < r, plus `whole`. (exclusive: late over t > r.) late and pairs hold the same products, whose difference
        is exact.
        """
        before = triangle(self.size, late, strict=True)
        if self.exclusive:
            total = left_product(before, late - pairs).sub_(pairs)
        else:
            total = left_product(before.mT.logical_not().to(late.dtype), late - pairs)
        total.baddbmm_(before.mT.expand(self.batch, -1, -1), early)
        self.shaped(total).add_(whole)
        return total


class KeyPiece(ChannelPiece):
    """A decay per key channel: log_decay [n, R, C, K]."""

    def prepare(self) -> None:
        decay = self.log_decay.exp().flatten(0, 1)
        self.reads = self.query.clone() if self.exclusive else self.query * decay
        self.writes, self.values = self.key.clone(), self.value
        tree = Tree(decay, (self.reads,), (self.writes,))
        self.weights = self.query.new_zeros(self.batch, self.size, self.size)
        for _ in tree.levels():
            tiles = tree.tiles(self.weights)
            tiles.copy_(pair_products(tree.right(self.reads), tree.left(self.writes)).view(tiles.shape))
        own = self.diagonal if self.exclusive else (self.query * self.key).sum(-1)
        self.weights.diagonal(dim1=1, dim2=2).copy_(own)
        self.total = self.shaped(tree.total.view(self.batch, -1, 1))

    def within(self) -> Tensor:
        return torch.bmm(self.weights, self.value)

    def backward(
        self, do: Tensor, start: Tensor, end: Tensor, wants: Callable[[str], bool]
    ) -> tuple[Gradients, Tensor]:
        self.prepare()
        do = do.flatten(0, 1)
        states = self.scan(start)
        adjoints = self.adjoints(self.reads, do, end)
        ends = self.scan_back(adjoints)
        d_value = torch.bmm(self.weights.mT, do).baddbmm_(self.writes, ends.flatten(0, 1)) if wants("value") else None
        d_weights = torch.bmm(do, self.value.mT)
        d_own = d_weights.diagonal(dim1=1, dim2=2).unsqueeze(-1)
        d_reads = torch.bmm(do, states[:-1].flatten(0, 1).mT)
        d_writes = torch.bmm(self.value, ends.flatten(0, 1).mT)
        d_query, d_key, from_start, to_end = self._within_back(d_weights)
        d_log_decay = None
        d_reads *= from_start
        d_writes *= to_end
        pairs = self.key * d_key
        d_query += d_reads
        if wants("log_decay"):
            whole = self.whole_chunk(states, ends, (3,)).mT
            d_log_decay = self.decay_gradient(self.query * d_query, pairs, self.key * d_writes, whole)
        d_key += d_writes
        if not self.exclusive:
            d_query.addcmul_(d_own, self.key)
            d_key.addcmul_(d_own, self.query)
        d_diagonal = d_own.squeeze(-1) if self.exclusive else None
        angle = self.angle_gradient(states, adjoints)
        grads = Gradients(*map(self.shaped, (d_query, d_key, d_value, d_log_decay, d_diagonal)), angle)
        return grads, adjoints[0]

    def _within_back(self, d_weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The gradients of query and key by the pairs of different tokens, and the factors from start and to end."""
        decay, prefix, suffix = self.decays()
        reads = self.query.clone() if self.exclusive else self.query * decay
        writes = self.key.clone()
        d_query, d_key = torch.zeros_like(self.query), torch.zeros_like(self.key)
        tree = Tree(decay, (prefix, reads), (suffix, writes))
        for _ in tree.levels():
            tiles = tree.tiles(d_weights).flatten(0, 1)
            tree.right(d_query).addcmul_(tree.right(prefix), weighted(tiles, tree.left(writes)))
            tree.left(d_key).addcmul_(tree.left(suffix), weighted(tiles.mT, tree.right(reads)))
        return d_query, d_key, prefix, suffix


class ValuePiece(ChannelPiece):
    """A decay per value channel: log_decay [n, R, C, V]."""

    def prepare(self) -> None:
        self.reads, self.writes = self.features(self.query, query=True), self.features(self.key, query=False)
        self.weights = self.scores()
        self.own = self.diagonal if self.exclusive else self.weights.diagonal(dim1=1, dim2=2)
        self.values = self.value.clone()
        decay, self.from_start, _ = self.decays()
        self.output = torch.zeros_like(self.value)
        tree = Tree(decay, (self.from_start,), (self.values,))
        for _ in tree.levels():
            tiles = tree.tiles(self.weights).flatten(0, 1)
            out = weighted(tiles, tree.left(self.values))
            tree.right(self.output).addcmul_(tree.right(self.from_start), out)
        self.total = self.shaped(tree.total.view(self.batch, 1, -1))

    def within(self) -> Tensor:
        return self.output.addcmul_(self.own.unsqueeze(-1), self.value)

    def from_state(self, states: Tensor) -> Tensor:
        return super().from_state(states).mul_(self.from_start)

    def backward(
        self, do: Tensor, start: Tensor, end: Tensor, wants: Callable[[str], bool]
    ) -> tuple[Gradients, Tensor]:
        self.prepare()
        do = do.flatten(0, 1)
        states = self.scan(start)
        read = do * self.from_start
        adjoints = self.adjoints(self.reads, read, end)
        ends = self.scan_back(adjoints)
        flat_states, flat_ends = states[:-1].flatten(0, 1), ends.flatten(0, 1)
        d_value, d_scores, to_end = self._within_back(do)
        d_writes = torch.bmm(self.writes, flat_ends).mul_(to_end)
        d_log_decay = None
        if wants("log_decay"):
            late = do * self.output.add_(self.from_state(flat_states))
            whole = self.whole_chunk(states, ends, (2,))
            d_log_decay = self.decay_gradient(late, self.value * d_value, self.value * d_writes, whole)
        d_value += d_writes
        d_value.addcmul_(self.own.unsqueeze(-1), do)
        d_own = (do * self.value).sum(-1)
        if not self.exclusive:
            d_scores.diagonal(dim1=1, dim2=2).copy_(d_own)
        if self.slope is not None:
            d_scores *= self.slope
        d_query = self.features_back(torch.bmm(read, flat_states.mT), self.query, query=True)
        d_query.baddbmm_(d_scores, self.key)
        d_key = self.features_back(torch.bmm(self.values, flat_ends.mT), self.key, query=False)
        d_key.baddbmm_(d_scores.mT, self.query)
        d_diagonal = d_own if self.exclusive else None
        grads = Gradients(*map(self.shaped, (d_query, d_key, d_value, d_log_decay, d_diagonal)), None)
        return grads, adjoints[0]

    def _within_back(self, do: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of value and of the scores by the pairs of different tokens, and the factors to the chunk's
        end."""
        decay, _, suffix = self.decays()
        late = do.clone() if self.exclusive else do * decay
        values = self.value.clone()
        d_value, d_scores = torch.zeros_like(values), torch.zeros_like(self.weights)
        tree = Tree(decay, (late,), (suffix, values))
        for _ in tree.levels():
            tiles, d_tiles = tree.tiles(self.weights).flatten(0, 1), tree.tiles(d_scores)
            d_tiles.copy_(pair_products(tree.right(late), tree.left(values)).view(d_tiles.shape))
            tree.left(d_value).addcmul_(tree.left(suffix), weighted(tiles.mT, tree.right(late)))
        return d_value, d_scores, suffix

"""Chunkwise PyTorch for a state that is corrected as it is written: S_t = X_t - b_t (a_t^T X_t) + key_t value_t^T.

Inside a chunk what a_t reads depends on what was taken away before it: the reads w of a chunk solve (1 + T) w = y, with
T strictly lower triangular. Its inverse is taken by solve_triangular once for each chunk; with it, what a chunk writes
is affine in the chunk's first state, so that the serial scan takes two products a chunk. If a, b and key are one vector
u, and S_t = X_t + u_t (value_t - e_t u_t^T X_t)^T, one column a token is enough ("delta" in Analysis.erase).

The backward is that of the recurrence written out: from the states at the chunks' starts, a scan in reverse of the
adjoints at their ends, which solves the transposed systems by the same inverse. The decay is in torch_pairs; nothing is
divided by it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .torch_chunk import Gradients
from .torch_pairs import KeyPairs, Pairs, ScalarPairs


class ErasePiece:
    """n chunks of C tokens for R rows (batch times heads): query, key and erase_a, erase_b [n, R, C, K], value
    [n, R, C, V], states [R, K, V]. Either `erase` [n, R, C, 1] is given, e, and key is u, or erase_a and erase_b are.
    log_decay as for Pairs, by_channel: it is one per key channel; previous: erase reads the state before the decay.
    query is already scaled.
    """

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None, erase: Tensor | None,
                 erase_a: Tensor | None, erase_b: Tensor | None, previous: bool, by_channel: bool) -> None:  # fmt: skip
        self.chunks, self.count, self.size, _ = query.shape
        self.value = value.flatten(0, 1)
        self.strength = None if erase is None else erase.flatten(0, 1)
        self.delta = erase is not None
        rows = _interleaved(query, key if erase_a is None else erase_a)
        columns = key.flatten(0, 1) if erase_b is None else _interleaved(key, erase_b)
        kind: type[Pairs] = KeyPairs if by_channel else ScalarPairs
        self.pairs = kind(rows, columns, log_decay, (self.chunks, self.count, self.size), previous)
        self._solve()

    def _solve(self) -> None:
        """What the chunks write is inner = local - transition S, for a chunk's first state S: value - e w for "delta",
        else -w beside the value. writes: the columns that carry it to the chunk's last state.
        """
        weights = self.pairs.by_token(self.pairs.weights)
        reads = self.pairs.by_token(self.pairs.reads)
        self.outer, self.erasing = weights[:, :, 0], weights[:, :, 1]  # [N, C, C * n]
        self.query_reads, self.erase_reads = reads[:, :, 0], reads[:, :, 1]  # [N, C, K]
        eye = torch.eye(self.size, dtype=self.value.dtype, device=self.value.device)
        if self.delta:
            system = self.strength * self.erasing
            self.scaled_reads, target = self.strength * self.erase_reads, self.value
            self.writes = self.pairs.writes
        else:
            system = self.erasing[..., 1::2]
            self.scaled_reads, target = self.erase_reads, -torch.bmm(self.erasing[..., ::2], self.value)
            self.writes = self.pairs.writes[:, 1::2]
        eye = eye.expand(len(system), -1, -1)
        self.inverse = torch.linalg.solve_triangular(system, eye, upper=False, unitriangular=True)
        self.local = torch.bmm(self.inverse, target)
        self.transition = torch.bmm(self.inverse, self.scaled_reads)

    def forward(self, start: Tensor) -> tuple[Tensor, Tensor]:
        """The output [n, R, C, V] and the state after the piece [R, K, V]."""
        states, values = self.scan(start)
        o = torch.bmm(self.outer, values).baddbmm_(self.query_reads, states[:-1].flatten(0, 1))
        return self._shaped(o), states[-1]

    def scan(self, start: Tensor) -> tuple[Tensor, Tensor]:
        """The states before each chunk, and after the last, [n + 1, R, K, V]; what the columns write [N, C * n, V]."""
        states = start.new_empty(self.chunks + 1, *start.shape)
        states[0] = start
        inner = torch.empty_like(self.local)
        local, transition, writes, found = map(self._shaped, (self.local, self.transition, self.writes, inner))
        if not self.delta:
            torch.bmm(self.pairs.writes[:, ::2].mT, self.value, out=states[1:].flatten(0, 1))
        for i in range(self.chunks):
            torch.baddbmm(local[i], transition[i], states[i], alpha=-1, out=found[i])
            if self.delta:
                torch.bmm(writes[i].mT, found[i], out=states[i + 1])
            else:
                states[i + 1].baddbmm_(writes[i].mT, found[i])
            self._add_decayed(states[i + 1], states[i], i)
        return states, inner if self.delta else _interleaved(self._shaped(self.value), found)

    def scan_back(self, adjoints: Tensor, d_inner: Tensor) -> Tensor:
        """`adjoints` [n + 1, R, K, V] holds what each chunk reads of its first state, and last the adjoint of the end:
        made into the adjoints of the states before each chunk. `d_inner` [N, C, V]: the gradient of inner by the
        outputs. Returns the whole gradient of what the inverse is applied to [N, C, V].
        """
        found = torch.bmm(self.inverse.mT, d_inner)
        solved, writes = self._shaped(found), self._shaped(torch.bmm(self.inverse.mT, self.writes))
        reads = self._shaped(self.scaled_reads)
        for i in reversed(range(self.chunks)):
            solved[i].baddbmm_(writes[i], adjoints[i + 1])
            adjoints[i].baddbmm_(reads[i].mT, solved[i], alpha=-1)
            self._add_decayed(adjoints[i], adjoints[i + 1], i)
        return found

    def backward(
        self, do: Tensor, start: Tensor, end: Tensor, wants: Callable[[str], bool]
    ) -> tuple[Gradients, Tensor]:
        """Gradients from do [n, R, C, V] and the adjoint `end` of the state after the piece; and the adjoint of
        `start`."""
        do = do.flatten(0, 1)
        states, values = self.scan(start)
        adjoints = end.new_empty(self.chunks + 1, *end.shape)
        torch.bmm(self.query_reads.mT, do, out=adjoints[:-1].flatten(0, 1))
        adjoints[-1] = end
        own = self.outer if self.delta else self.outer[..., 1::2]
        solved = self.scan_back(adjoints, torch.bmm(own.mT, do))
        firsts, ends = states[:-1].flatten(0, 1), adjoints[1:].flatten(0, 1)
        # the gradient of what a reads
        d_read = -self.strength * solved if self.delta else -solved
        d_out = _interleaved(self._shaped(do), self._shaped(d_read))
        d_value, d_erase = solved, None
        if not self.delta:
            d_value = torch.bmm(self.pairs.weights[..., ::2].mT, d_out).baddbmm_(self.pairs.writes[:, ::2], ends)
        elif wants("erase"):
            read = torch.bmm(self.erasing, values).baddbmm_(self.erase_reads, firsts)
            d_erase = -(read * solved).sum(-1, keepdim=True)
        want_decay = wants("log_decay")
        found = self.pairs.backward(
            torch.bmm(d_out, values.mT), torch.bmm(d_out, firsts.mT), torch.bmm(values, ends.mT),
            self._passage(states, adjoints) if want_decay else None, want_decay,
        )  # fmt: skip
        d_query, d_a = self.pairs.by_token(found.rows).unbind(2)
        erased = {"erase": d_erase}
        if self.delta:
            d_key = d_a + found.columns
        else:
            d_key, d_b = self.pairs.by_token(found.columns).unbind(2)
            erased = {"erase_a": d_a, "erase_b": d_b}
        shaped = {role: self._shaped(x) for role, x in erased.items() if x is not None}
        grads = map(self._shaped, (d_query, d_key, d_value, found.log_decay))
        return Gradients(*grads, diagonal=None, angle=None, erase=shaped), adjoints[0]

    def _passage(self, states: Tensor, adjoints: Tensor) -> Tensor | None:
        """The decay's gradient by what passes a chunk from end to end, for each key channel [N, 1, K]."""
        return (states[:-1] * adjoints[1:]).mul_(self.pairs.total).sum(-1).flatten(0, 1).unsqueeze(1)

    def _add_decayed(self, target: Tensor, state: Tensor, i: int) -> None:
        total = self.pairs.total
        if total is None:
            target.add_(state)
        else:
            target.addcmul_(total[i if len(total) > 1 else 0], state)

    def _shaped(self, x: Tensor | None) -> Tensor | None:
        return None if x is None else x.unflatten(0, (self.chunks, self.count))


def _interleaved(x: Tensor, y: Tensor) -> Tensor:
    """Two of [n, R, C, D] as [N, C * 2, D], token by token."""
    return torch.stack((x, y), 3).flatten(2, 3).flatten(0, 1)

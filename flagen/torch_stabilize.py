"""What a stabilised state is held divided by, for the torch backend: m_t = max(log_decay_t + m_{t-1}, gate_t).

The maps m -> max(f + m, i) compose to ones of the same form, (f, i) then (f', i') to (f + f', max(i + f', i')), so that
all tokens are found in log2 T passes.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .stabilize import LOWEST
from .torch_roles import Sizes, Span, environment, evaluated

if TYPE_CHECKING:
    from .analysis import Analysis
    from .expr import Expr


def gauges(
    analysis: Analysis,
    inputs: tuple[Tensor, ...],
    constants: tuple[Tensor, ...],
    sizes: Sizes,
    before: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """m and its rise at each token [B, T, H], zero past the last sequence, and m after the last token [N, H].

    before: m before the first tokens [N, H]; None where there is nothing yet.
    """
    limits = [0, sizes.time] if cu_seqlens is None else cu_seqlens.tolist()
    rows = sizes.batch if cu_seqlens is None else len(limits) - 1
    start = torch.full((rows, sizes.heads), LOWEST, **sizes.options)
    if before is not None:
        torch.clamp(before.to(sizes.dtype), min=LOWEST, out=start)
    peak = torch.zeros(sizes.batch, sizes.time, sizes.heads, **sizes.options)
    rise, last = torch.zeros_like(peak), start.clone()
    for row, (begin, end) in enumerate(pairwise(limits)):
        if begin == end:
            continue
        own = slice(None) if cu_seqlens is None else slice(row, row + 1)
        span = Span(None if cu_seqlens is None else row, begin, 1, end - begin, True, True)
        found = _peaks(analysis, inputs, constants, sizes, span, start[own])
        peak[:, begin:end] = found[:, 1:]
        rise[:, begin:end] = found.diff(dim=1)
        last[own] = found[:, -1]
    return peak, rise, last


def _peaks(
    analysis: Analysis, inputs: tuple[Tensor, ...], constants: tuple[Tensor, ...], sizes: Sizes, span: Span,
    start: Tensor,
) -> Tensor:  # fmt: skip
    """m before and at each token of a sequence [R, T + 1, H]."""
    assert analysis.stabilizer is not None, "the spec is not stabilised"
    gate, decay = analysis.stabilizer
    read = {one for expr in (gate, decay) if expr is not None for one in expr.inputs}
    values = environment(analysis, inputs, constants, sizes, span, read)
    shape = 1, sizes.batch, sizes.heads, span.size, 1

    def token(expr: Expr) -> Tensor:
        return evaluated(expr, values, sizes).expand(shape)[0, ..., 0].transpose(1, 2).clone()

    highest = token(gate)
    falls = torch.zeros_like(highest) if decay is None else token(decay)
    width = 1
    while width < span.size:
        through = highest[:, :-width] + falls[:, width:]
        highest[:, width:] = torch.maximum(highest[:, width:], through)
        falls[:, width:] += falls[:, :-width].clone()
        width *= 2
    now = torch.maximum(highest, start.unsqueeze(1) + falls).clamp_(min=LOWEST)
    return torch.cat((start.unsqueeze(1), now), 1)

"""Where rounding decides a gradient: at tokens whose normaliser has a kink next to n, as maximum(abs(n), 1) has at 1.

On one side of the kink the gradient by n is nothing, on the other all of it, so that no two computations need agree
there. Checks ask for no gradient of such tokens' outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import reference
from .expr import Call, Input
from .functions import evaluate
from .validate import MAX_INPUTS

if TYPE_CHECKING:
    from .expr import Expr
    from .spec import Spec

KINKED = ("abs", "minimum", "maximum", "relu")
ONES = Input("ones", "b t h v")


def settled(
    spec: Spec,
    inputs: Sequence[Tensor],
    states: Sequence[Tensor],
    scalars: Mapping[str, float],
    options: Mapping[str, Any],
    shape: tuple[int, int, int],
    error: float,
) -> Tensor | None:
    """[B, T, H]: whether the derivative of the normaliser stays what it is if n moves by `error` relative to its size,
    or to the usual one where that is larger. None where the normaliser has no kinks.

    inputs, states, scalars, options: of a call, as for the reference. shape: B, T, H.
    """
    expr = spec.normalizer
    if expr is None or not any(isinstance(node, Call) and node.function in KINKED for node in expr.walk()):
        return None
    if len(spec.inputs) >= MAX_INPUTS:
        return None
    n = _sums(spec, inputs, states, scalars, options, shape)
    move = error * n.abs().clamp(min=float(n.square().mean().sqrt()))
    low, high = _slope(expr, n - move), _slope(expr, n + move)
    return (low - high).abs() <= 0.5 * torch.maximum(low.abs(), high.abs())


@torch.no_grad()
def _sums(
    spec: Spec, inputs: Sequence[Tensor], states: Sequence[Tensor], scalars: Mapping[str, float],
    options: Mapping[str, Any], shape: tuple[int, int, int],
) -> Tensor:  # fmt: skip
    """n at each token [B, T, H] in fp64: the output of the recurrence for a value of one, not divided."""
    sums = spec.replace("sums", value=ONES, normalize=False, stabilize=None, inputs=None)
    given = {one.name: x.double() for one, x in zip(spec.inputs, inputs, strict=True)}
    given[ONES.name] = inputs[0].new_ones(*shape, 1, dtype=torch.float64)
    state = None
    if states:
        state = states[1].double().unsqueeze(-1)
        if spec.stabilize is not None:
            state = state * states[2].double().exp()[..., None, None]
    ordered = tuple(given[one.name] for one in sums.inputs)
    return reference.run(sums, ordered, scalars=scalars, initial_state=state, **options)[0].squeeze(-1)


def _slope(expr: Expr, n: Tensor) -> Tensor:
    n = n.requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(evaluate(expr, {"n": n}, n.shape[-1]).sum(), n)[0]

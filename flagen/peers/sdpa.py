"""PyTorch's causal softmax attention: not the same function, the one that linear attention replaces."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ..schedule import Shape

LONGEST = 1 << 17  # tokens: minutes beyond


def calls(spec: str) -> dict[str, Callable[..., Any]]:
    """The same for every spec."""

    def make(shape: Shape, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
        if shape.T > LONGEST:
            raise NotImplementedError(f"over all pairs of {shape.T} tokens")
        like: dict[str, Any] = {"dtype": dtype, "device": device, "requires_grad": True}
        q, k = (torch.randn(shape.B, shape.H, shape.T, shape.K, **like) for _ in range(2))
        v = torch.randn(shape.B, shape.H, shape.T, shape.V, **like)
        return (q, k, v), lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    return {"scaled_dot_product_attention": make}

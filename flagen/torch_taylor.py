"""The features of the Taylor maps: their inner product is 1 + s (+ s^2 / 2) with s = query . key.

The rows are 1; k_i; k_i k_j for i <= j in the order (0,0), (0,1), .. (0,K-1), (1,1), ..: plain monomials of the key.
The query's features are those of the scaled query, with 1/2 where i = j, which makes s^2 / 2 of the distinct products.
"""

from __future__ import annotations

import torch
from torch import Tensor


def count(size: int, order: int) -> int:
    """How many features a key of `size` channels has."""
    return 1 + size + (size * (size + 1) // 2 if order == 2 else 0)


def features(x: Tensor, order: int, *, query: bool) -> Tensor:
    """[..., K] to [..., F]."""
    size = x.shape[-1]
    out = x.new_empty(*x.shape[:-1], count(size, order))
    out[..., 0] = 1
    out[..., 1 : 1 + size] = x
    if order == 2:
        begin = 1 + size
        for i in range(size):
            row = out[..., begin : begin + size - i]
            torch.mul(x[..., i:], x[..., i : i + 1], out=row)
            if query:
                row[..., 0] *= 0.5
            begin += size - i
    return out


def features_back(gradient: Tensor, x: Tensor, order: int, *, query: bool) -> Tensor:
    """The gradient of x [..., K] from that of its features [..., F]."""
    size = x.shape[-1]
    out = gradient[..., 1 : 1 + size].clone()
    if order == 2:
        begin = 1 + size
        for i in range(size):
            row = gradient[..., begin : begin + size - i]
            out[..., i] += (row * x[..., i:]).sum(-1)
            if query:
                out[..., i + 1 :].addcmul_(row[..., 1:], x[..., i : i + 1])
            else:
                out[..., i:].addcmul_(row, x[..., i : i + 1])
            begin += size - i
    return out

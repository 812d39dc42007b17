"""flash-linear-attention (fla-core), called as its own layers call it: [B, T, H, K] inputs, K^-0.5 as the scale, gates
as logarithms that are zero or negative."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

os.environ.setdefault("FLA_CACHE_RESULTS", "0")  # its choices of another day, made on a busy GPU perhaps, are not ours

import torch
from fla import ops  # type: ignore[import-not-found]
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

if TYPE_CHECKING:
    from ..schedule import Shape

LAYER, LAYERS = 3, 24
LONGEST_PARALLEL = 16384  # tokens: a kernel over all pairs is of no use beyond
# On Hopper with Triton 3.4 to 3.7.0 the library refuses its gated backward, whose results are wrong there. To have a
# time at all the refusal is lifted.
GUARD = ("fla.ops.common.chunk_o", "IS_NVIDIA_HOPPER")


def calls(spec: str) -> dict[str, Any]:
    """The functions for a shipped spec, by their names in fla.ops."""
    _lift_the_guard()
    return {name: make for name, make in _TABLE.get(spec, {}).items() if hasattr(ops, name.partition(" ")[0])}


def _lift_the_guard() -> None:
    import importlib

    try:
        module = importlib.import_module(GUARD[0])
    except ImportError:
        return
    if hasattr(module, GUARD[1]):
        setattr(module, GUARD[1], False)


class _Inputs:
    """Random inputs of a shape."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device

    def normal(self, channels: int) -> Tensor:
        B, T, H = self.shape[:3]
        return torch.randn(B, T, H, channels, dtype=self.dtype, device=self.device).requires_grad_()

    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.normal(self.shape.K), self.normal(self.shape.K), self.normal(self.shape.V)

    def gate(self, divisor: float, dtype: torch.dtype | None = None) -> Tensor:
        """A log decay for each key channel."""
        gate = logsigmoid(self.normal(self.shape.K).detach().float()) / divisor
        return gate.to(dtype or self.dtype).requires_grad_()

    def scalar_gate(self) -> Tensor:
        B, T, H = self.shape[:3]
        return (logsigmoid(torch.randn(B, T, H, device=self.device)) / 16).requires_grad_()

    def unit_interval(self) -> Tensor:
        """A number from 0 to 1 a token and head."""
        B, T, H = self.shape[:3]
        return torch.rand(B, T, H, dtype=self.dtype, device=self.device).requires_grad_()

    def erasing(self) -> tuple[Tensor, ...]:
        """r, w, k, v, and a, b of what a token erases: -kappa and kappa times a number from 0 to 1 a channel."""
        r, k, v = self.qkv()
        w = -0.6 * torch.sigmoid(self.normal(self.shape.K).detach().float())
        kappa = normalize(self.normal(self.shape.K).detach().float(), dim=-1)
        given = (w, -kappa, kappa * torch.rand_like(kappa))
        w, a, b = (x.to(self.dtype).requires_grad_() for x in given)
        return r, w, k, v, a, b

    def bonus(self) -> Tensor:
        return torch.randn(self.shape.H, self.shape.K, dtype=self.dtype, device=self.device).requires_grad_()


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple | list) else out


def _call(name: str, inputs: Callable[[_Inputs], tuple[Tensor, ...]], **options: Any) -> Callable[..., Any]:
    """Makes inputs, and a call of fla.ops.<name> with them."""

    def make(shape: Shape, dtype: torch.dtype, device: str) -> tuple[tuple[Tensor, ...], Callable[[], Tensor]]:
        given = inputs(_Inputs(shape, dtype, device))
        return given, lambda: _first(getattr(ops, name)(*given, **options))

    return make


def _parallel(name: str) -> Callable[..., Any]:
    whole = _call(name, lambda x: x.qkv())

    def make(shape: Shape, dtype: torch.dtype, device: str) -> Any:
        if shape.T > LONGEST_PARALLEL:
            raise NotImplementedError(f"over all pairs of {shape.T} tokens")
        return whole(shape, dtype, device)

    return make


def _own_key(shape: Shape, dtype: torch.dtype, device: str) -> Any:
    """The key is 1 - exp(g), made outside of the kernels."""
    x = _Inputs(shape, dtype, device)
    q, _, v = x.qkv()
    g = x.gate(1.0)
    return (q, v, g), lambda: _first(ops.chunk_gla(q, (1 - g.float().exp()).to(q.dtype), v, g))


def _channelwise(name: str) -> Callable[..., Any]:
    """For a vector state: a head's value channels are channels of it."""

    def make(shape: Shape, dtype: torch.dtype, device: str) -> Any:
        x = _Inputs(shape._replace(K=shape.V), dtype, device)
        given = tuple(one.detach().flatten(2).requires_grad_() for one in (x.normal(shape.V), x.gate(1.0)))
        return given, lambda: _first(getattr(ops, name)(*given))

    return make


def _delta(name: str, gates: Callable[[_Inputs], tuple[Tensor, ...]]) -> Callable[..., Any]:
    """Of the delta rule; q and k get their unit norm inside of the call, as the specs have it."""
    return _call(name, lambda x: (*x.qkv(), *gates(x), x.unit_interval()), use_qk_l2norm_in_kernel=True)


_TABLE: dict[str, dict[str, Callable[..., Any]]] = {
    "retnet": {"chunk_retention": _call("chunk_retention", lambda x: x.qkv())},
    "transnormer": {
        "chunk_lightning_attn": _call("chunk_lightning_attn", lambda x: x.qkv(), layer_idx=LAYER, num_layers=LAYERS)
    },
    "linear": {"chunk_linear_attn": _call("chunk_linear_attn", lambda x: x.qkv(), normalize=True)},
    "mamba2": {"chunk_simple_gla": _call("chunk_simple_gla", lambda x: (*x.qkv(), x.scalar_gate()))},
    "gla": {"chunk_gla": _call("chunk_gla", lambda x: (*x.qkv(), x.gate(16.0)))},
    "hgrn2": {"chunk_gla (key outside)": _own_key},
    "hgrn": {
        "chunk_hgrn": _channelwise("chunk_hgrn"),
        "fused_recurrent_hgrn": _channelwise("fused_recurrent_hgrn"),
    },
    "rwkv6": {"chunk_rwkv6": _call("chunk_rwkv6", lambda x: (*x.qkv(), x.gate(1.0), x.bonus()))},
    "based": {
        "parallel_based": _parallel("parallel_based"),
        "fused_chunk_based": _call("fused_chunk_based", lambda x: x.qkv()),
    },
    "delta_net": {"chunk_delta_rule": _delta("chunk_delta_rule", lambda x: ())},
    "gated_delta_net": {"chunk_gated_delta_rule": _delta("chunk_gated_delta_rule", lambda x: (x.scalar_gate(),))},
    "kda": {"chunk_kda": _delta("chunk_kda", lambda x: (x.gate(16.0, torch.float32),))},
    "rwkv7": {"chunk_rwkv7": _call("chunk_rwkv7", lambda x: x.erasing())},
    # the key that is erased with and the query less a part of the key are made outside
    "comba": {"chunk_comba": _delta("chunk_comba", lambda x: (x.normal(x.shape.K), x.scalar_gate()))},
}

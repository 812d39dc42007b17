"""The Triton backend of a vector state: that of a matrix state, but for the shapes of states and what is kept."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .schedule import Shape, device_of
from .schedule_vector import VectorSchedule, row_tokens, vector_schedule
from .torch_backend import Forward
from .triton_backend import TritonBackend

if TYPE_CHECKING:
    from .plan import Plan


class VectorTritonBackend(TritonBackend):
    """Runs the kernels of a plan with a vector state: inputs and output [B, T, D], states [N, D].

    checkpoint: tokens between the states that the training forward keeps; None: row_tokens.
    """

    def __init__(self, plan: Plan, module: ModuleType, checkpoint: int | None = None) -> None:
        self.LC = checkpoint or row_tokens(plan)
        super().__init__(plan, module, checkpoint=self.LC)

    def saved_like(self, inputs: tuple[Tensor, ...], cu_seqlens: Tensor | None) -> tuple[Tensor, ...]:
        """As TritonBackend.saved_like: the states at checkpoints, flat and fp32."""
        sizes = self._sizes(inputs, cu_seqlens)
        slots = sizes.N * -(-sizes.T // self.LC) if cu_seqlens is None else sizes.T // self.LC + sizes.N
        count = slots * sizes.V * (2 if self.plan.complex else 1)
        return (inputs[self.output].new_empty((count,), dtype=torch.float32),)

    def schedule(self, inputs: tuple[Tensor, ...], sizes: Shape) -> VectorSchedule:  # type: ignore[override]
        """The launch-time constants of a call."""
        like = inputs[self.output]
        device = self._device if like.is_meta and self._device is not None else like.device
        return self._schedule(sizes, like.dtype, device, False)  # type: ignore[return-value]

    def _make_schedule(  # type: ignore[override]
        self, sizes: Shape, dtype: torch.dtype, device: torch.device, exact: bool
    ) -> VectorSchedule:
        return vector_schedule(self.plan, sizes, dtype, device=device_of(device), checkpoint=self.LC)

    def _empty(
        self,
        inputs: tuple[Tensor, ...],
        sizes: Shape,
        initial: tuple[Tensor, ...],
        cu_seqlens: Tensor | None,
        want_final: bool,
        save: bool,
    ) -> Forward:
        like = inputs[self.output]
        dtype = torch.complex64 if self.plan.complex else torch.float32
        final = tuple(x.clone() for x in initial) or (like.new_zeros((sizes.N, sizes.V), dtype=dtype),)
        saved = self.saved_like(inputs, cu_seqlens) if save else ()
        return Forward(like.new_empty((sizes.B, 0, sizes.V)), final if want_final else (), saved)

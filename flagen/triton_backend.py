"""The Triton backend: the launchers of a generated module, given a schedule. The same methods as TorchBackend."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .schedule import Schedule, Shape, checkpoint_of, device_of, rows_of_state, schedule
from .torch_backend import Forward

if TYPE_CHECKING:
    from .plan import Plan


class TritonBackend:
    """Runs the kernels of `module`, the generated module of `plan`.

    chunk_size: tokens per chunk, a power of two from 16 to 128, or None for the schedule's choice. input_precision: how
    products of fp32 inputs are taken ("tf32", "tf32x3", "ieee"); None: tf32x3, which is fp32-accurate. checkpoint:
    tokens between the states that the training forward keeps; None: checkpoint_of. chosen: what a GPU of a name runs
    instead of a schedule for the module of a name, where something better is known.
    """

    def __init__(
        self,
        plan: Plan,
        module: ModuleType,
        chunk_size: int | None = None,
        input_precision: str | None = None,
        checkpoint: int | None = None,
        chosen: Callable[[Schedule, str, Shape, torch.dtype, str], Schedule] | None = None,
    ) -> None:
        self.plan, self.module, self.chosen = plan, module, chosen
        kept = checkpoint or checkpoint_of(plan)
        self.options = {"chunk_size": chunk_size, "input_precision": input_precision, "checkpoint": kept}
        self.output = plan.analysis.inputs.index(plan.analysis.spec.value.inputs[0])
        self.normalized, self.stabilized = plan.normalized, plan.stabilized
        self._schedule = functools.lru_cache(maxsize=256)(self._make_schedule)

    @torch.no_grad()
    def forward(
        self,
        inputs: tuple[Tensor, ...],
        constants: tuple[Tensor, ...],
        scale: float,
        initial: tuple[Tensor, ...],
        cu_seqlens: Tensor | None,
        want_final: bool,
        save: bool,
    ) -> Forward:
        """`inputs` and `constants` in the analysis' order; `initial` is () or the state. Saved: states, and with a
        normaliser its sums and what it divided by."""
        inputs, sizes = self._prepared(inputs), self._sizes(inputs, cu_seqlens)
        scales: tuple[Tensor, ...] = ()
        if self.stabilized:
            constants, scales = self._held(inputs, constants, initial, cu_seqlens)
            initial = initial[:2]
        if not sizes.T:
            out = self._empty(inputs, sizes, initial, cu_seqlens, want_final, save)
            return out._replace(final=(*out.final, *scales)) if want_final else out
        start = self._real(initial) or (None,) * (1 + self.normalized)
        plan = self.schedule(inputs, sizes)
        with torch.cuda.device_of(inputs[0]):
            o, ht, hc, *rest = self.module.fwd(
                *inputs, *constants, *start, cu_seqlens, scale, plan, final=want_final, save=save
            )
        zt, zc, den = rest or (None, None, None)
        final = (*self._public((ht, zt)[: 1 + self.normalized]), *scales) if want_final else ()
        if not save:
            return Forward(o, final, ())
        if not self.normalized:
            return Forward(o, final, (hc.view(-1),))
        held = constants[len(self.plan.analysis.constants) :]
        return Forward(o, final, (hc.view(-1), zc.view(-1), den, *held))

    @torch.no_grad()
    def backward(
        self,
        do: Tensor | None,
        dfinal: tuple[Tensor | None, ...],
        o: Tensor,
        saved: tuple[Tensor, ...],
        inputs: tuple[Tensor, ...],
        constants: tuple[Tensor, ...],
        scale: float,
        initial: tuple[Tensor, ...],
        cu_seqlens: Tensor | None,
        needs: tuple[bool, ...],
        need_initial: bool,
    ) -> tuple[tuple[Tensor | None, ...], tuple[Tensor, ...]]:
        """The gradients of the inputs that `needs` marks, in their shapes and dtypes, and of the initial state."""
        sizes = self._sizes(inputs, cu_seqlens)
        if not sizes.T:
            grads = tuple(torch.zeros_like(x) if need else None for x, need in zip(inputs, needs, strict=True))
            ends = (*dfinal, *(None for _ in initial[2:]))
            return grads, tuple(
                torch.zeros_like(x) if d is None else d.to(x.dtype) for x, d in zip(initial, ends, strict=True)
            ) if need_initial else ()
        constants = (*constants, *saved[3:])
        prepared = self._prepared(inputs)
        end = self._ends(dfinal, sizes, o)
        do = torch.zeros_like(o) if do is None else do if do.stride(-1) == 1 else do.contiguous()
        F = rows_of_state(self.plan, sizes.K)
        hc = saved[0].view(-1, sizes.H, F, sizes.V, *((2,) if self.plan.complex else ()))
        extra = (o, saved[2], saved[1].view(-1, sizes.H, F)) if self.normalized else ()
        plan = self.schedule(prepared, sizes)
        with torch.cuda.device_of(o):
            found, *d_initial = self.module.bwd(
                *prepared, *constants, do, hc, *extra, *end, cu_seqlens, scale, plan, needs, initial=need_initial
            )
        grads = tuple(
            self._summed(parts, x, one.axes, sizes, cu_seqlens)
            for parts, x, one in zip(found, inputs, self.plan.inputs, strict=True)
        )
        if not need_initial:
            return grads, ()
        found = self._public(tuple(d_initial)) + tuple(torch.zeros_like(x) for x in initial[2:])
        return grads, tuple(d.to(x.dtype) for d, x in zip(found, initial, strict=True))

    @torch.no_grad()
    def step(
        self, inputs: tuple[Tensor, ...], constants: tuple[Tensor, ...], scale: float, state: tuple[Tensor, ...]
    ) -> Tensor:
        """One token, T = 1: the output [B, 1, H, V]. The state is updated in place."""
        inputs = self._prepared(inputs)
        kept = tuple(x.contiguous() for x in self._real(state))
        with torch.cuda.device_of(inputs[0]):
            o = self.module.step(*inputs, *constants, *kept, scale, self.schedule(inputs, self._sizes(inputs, None)))
        for mine, given in zip(kept, self._real(state), strict=True):
            if mine.data_ptr() != given.data_ptr():
                given.copy_(mine)
        return o

    def saved_like(self, inputs: tuple[Tensor, ...], cu_seqlens: Tensor | None) -> tuple[Tensor, ...]:
        """New tensors of the shapes and dtypes that forward saves, which follow from the inputs' shapes and dtypes
        alone. States are flat: torch.compile would have a graph apart for each size of 1, such as a single state."""
        sizes = self._sizes(inputs, cu_seqlens)
        LC = self.options["checkpoint"]
        slots = sizes.N * -(-sizes.T // LC) if cu_seqlens is None else sizes.T // LC + sizes.N
        like = inputs[self.output]
        F = rows_of_state(self.plan, sizes.K)
        dtype = torch.bfloat16 if like.dtype == torch.bfloat16 else torch.float32
        states = like.new_empty((slots * sizes.H * F * sizes.V * (2 if self.plan.complex else 1),), dtype=dtype)
        if not self.normalized:
            return (states,)
        z = like.new_empty((slots * sizes.H * F,), dtype=torch.float32)
        rows = range(1 + len(self.plan.analysis.gauges))
        return states, z, *(like.new_empty((sizes.B, sizes.T, sizes.H), dtype=torch.float32) for _ in rows)

    def schedule(self, inputs: tuple[Tensor, ...], sizes: Shape) -> Schedule:
        """The launch-time constants of a call."""
        decay = self.plan.log_decay
        exact = bool(decay and decay.identity) and any(
            x.dtype == torch.bfloat16
            for x, one in zip(inputs, self.plan.inputs, strict=True)
            if one.name in decay.inputs
        )
        like = inputs[self.output]
        return self._schedule(sizes, like.dtype, like.device, exact)

    def _make_schedule(self, sizes: Shape, dtype: torch.dtype, device: torch.device, exact: bool) -> Schedule:
        found = schedule(self.plan, sizes, dtype, exact_decay=exact, device=device_of(device), **self.options)
        if self.chosen is None or device.type != "cuda":
            return found
        return self.chosen(found, self.module.__name__, sizes, dtype, torch.cuda.get_device_name(device))

    def _held(
        self,
        inputs: tuple[Tensor, ...],
        constants: tuple[Tensor, ...],
        initial: tuple[Tensor, ...],
        cu_seqlens: Tensor | None,
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The constants with the gauges after them, and m after the last tokens."""
        with torch.cuda.device_of(inputs[0]):
            *gauges, last = self.module.peaks(*inputs, *constants, (*initial[2:], None)[0], cu_seqlens)
        return (*constants, *gauges), (last,)

    def _empty(
        self,
        inputs: tuple[Tensor, ...],
        sizes: Shape,
        initial: tuple[Tensor, ...],
        cu_seqlens: Tensor | None,
        want_final: bool,
        save: bool,
    ) -> Forward:
        """The result for T = 0: the state passes through."""
        like = inputs[self.output]
        F = rows_of_state(self.plan, sizes.K)
        dtype = torch.complex64 if self.plan.complex else torch.float32
        shapes = ((sizes.N, sizes.H, F, sizes.V), (sizes.N, sizes.H, F))[: 1 + self.normalized]
        final = tuple(x.clone() for x in initial) or tuple(
            like.new_zeros(shape, dtype=dtype if i == 0 else torch.float32) for i, shape in enumerate(shapes)
        )
        saved = self.saved_like(inputs, cu_seqlens) if save else ()
        return Forward(like.new_empty((sizes.B, 0, sizes.H, sizes.V)), final if want_final else (), saved)

    def _sizes(self, inputs: tuple[Tensor, ...], cu_seqlens: Tensor | None) -> Shape:
        B, T, H, K, V, _, N = self.module.sizes(*inputs, *(None for _ in self.plan.analysis.constants), cu_seqlens)
        return Shape(B, T, H, K, V, N)

    def _prepared(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Kernels take any strides but in the channels, which lie side by side."""
        return tuple(
            x if not one.channel or x.stride(-1) == 1 else x.contiguous()
            for x, one in zip(inputs, self.plan.inputs, strict=True)
        )

    def _real(self, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """A public state as kernels take it: contiguous, a complex one as pairs of real numbers."""
        return tuple(torch.view_as_real(x) if x.is_complex() else x for x in state)

    def _public(self, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (torch.view_as_complex(state[0]),) if self.plan.complex else state

    def _ends(self, dfinal: tuple[Tensor | None, ...], sizes: Shape, like: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the final state, all None or all there."""
        if not dfinal or all(d is None for d in dfinal):
            return (None,) * (1 + self.normalized)
        F = rows_of_state(self.plan, sizes.K)
        shapes = (sizes.N, sizes.H, F, sizes.V), (sizes.N, sizes.H, F)
        dtype = torch.complex64 if self.plan.complex else torch.float32
        ends = tuple(
            like.new_zeros(shape, dtype=dtype) if d is None else d.to(dtype).contiguous()
            for d, shape in zip(dfinal, shapes, strict=False)
        )
        return tuple(x.contiguous() for x in self._real(tuple(x.resolve_conj() for x in ends)))

    def _summed(
        self, parts: Sequence[tuple[Tensor | None, int]], x: Tensor, axes: str, sizes: Shape, cu_seqlens: Tensor | None
    ) -> Tensor | None:
        """The gradient of the input x, in its shape and dtype, from what several kernels give to it."""
        found = [self._reduced(d, x, axes, sizes, cu_seqlens, L) for d, L in parts if d is not None]
        return functools.reduce(torch.add, found).to(x.dtype) if found else None

    def _reduced(self, d: Tensor, x: Tensor, axes: str, sizes: Shape, cu_seqlens: Tensor | None, L: int) -> Tensor:
        """A kernel's gradient [parts?, B, T, H, C?] or [parts?, pieces, H, C?] summed into the shape of the input x."""
        full = 2 + ("t" in axes) + ("k" in axes or "v" in axes)
        if d.dim() > full:
            # one part for each block of V
            d = d.sum(0) if d.shape[0] > 1 else d[0]
        if "t" not in axes:
            d = self._by_sequence(d, sizes, cu_seqlens, L)
        if "b" not in axes:
            d = d.sum(0, keepdim=True)
        at = 1 + ("t" in axes)
        groups = x.shape[axes.index("h")] if "h" in axes else 1
        if groups < sizes.H:
            d = d.unflatten(at, (groups, -1)).sum(at + 1)
        return d.reshape(x.shape)

    def _by_sequence(self, d: Tensor, sizes: Shape, cu_seqlens: Tensor | None, L: int) -> Tensor:
        """[pieces, ...] to [N, ...]: pieces of a sequence lie side by side; in packed batches pieces that no sequence
        has are zero."""
        if cu_seqlens is None:
            return d.unflatten(0, (sizes.N, -1)).sum(1)
        if not L:
            return d
        first = cu_seqlens[:-1] // L + torch.arange(sizes.N, device=d.device)
        after = torch.cat((first[1:], first.new_full((1,), d.shape[0])))
        piece = torch.arange(d.shape[0], device=d.device)
        owned = (piece >= first[:, None]) & (piece < after[:, None])
        return torch.tensordot(owned.double(), d.double(), 1).float()

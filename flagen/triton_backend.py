"""The Triton backend: the launchers of a generated module, given a schedule. The same methods as TorchBackend."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .kept import kept
from .schedule import Schedule, Shape, checkpoint_of, device_of, rows_of_state, schedule
from .torch_backend import Forward
from .triton_ahead import Ahead, like
from .triton_record import is_collecting
from .triton_replay import Replay

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
        self.normalized, self.stabilized, self.keeps = plan.normalized, plan.stabilized, plan.erase or plan.keeps > 0
        self._schedule = functools.lru_cache(maxsize=256)(self._make_schedule)
        self._replay = Replay(module)
        self._ahead, self._begun = Ahead(), set[Any]()
        self._device: torch.device | None = None  # that meta tensors stand for
        # which input has a time axis, and where
        self._time = next((i, one.axes.index("t")) for i, one in enumerate(plan.inputs) if "t" in one.axes)

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
        if not self._tokens(inputs):
            return self._without_tokens(inputs, constants, initial, cu_seqlens, want_final, save)
        first, second = len(inputs), len(inputs) + len(constants)

        def run(launchers: Any, x: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
            return self._forward(launchers, x[:first], x[first:second], scale, x[second:-1], x[-1], want_final, save)

        key = "forward", scale, want_final, save, second
        o, *rest = self._replay(key, (*inputs, *constants, *initial, cu_seqlens), run)
        ends = 1 + self.normalized + self.stabilized if want_final else 0
        return Forward(o, tuple(rest[:ends]), tuple(rest[ends:]))

    def _forward(
        self,
        launchers: Any,
        inputs: tuple[Tensor, ...],
        constants: tuple[Tensor, ...],
        scale: float,
        initial: tuple[Tensor, ...],
        cu_seqlens: Tensor | None,
        want_final: bool,
        save: bool,
    ) -> tuple[Tensor, ...]:
        """The output, the final state, and what is saved, one after the other."""
        inputs, sizes = self._prepared(inputs), self._sizes(inputs, cu_seqlens)
        given, scales = constants, ()
        if self.stabilized:
            constants, scales = self._held(launchers, inputs, constants, initial, cu_seqlens)
        start = self._real(initial[:2]) or (None,) * (1 + self.normalized)
        plan = self.schedule(inputs, sizes)
        if save and inputs[0].is_cuda and self._replay.records:
            self._begin(plan, inputs, given, scale, initial, cu_seqlens, want_final)
        with torch.cuda.device_of(inputs[0]):
            o, ht, hc, *rest = launchers.fwd(
                *inputs, *constants, *start, cu_seqlens, scale, plan, final=want_final, save=save
            )
        if self.keeps:
            return o, *((ht,) if want_final else ()), *((hc.view(-1), *rest) if save else ())
        zt, zc, den = rest or (None, None, None)
        final = (*self._public((ht, zt)[: 1 + self.normalized]), *scales) if want_final else ()
        if not save:
            return o, *final
        if not self.normalized:
            return o, *final, hc.view(-1)
        return o, *final, hc.view(-1), zc.view(-1), den, *constants[len(given) :]

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
        if not self._tokens(inputs):
            grads = tuple(torch.zeros_like(x) if need else None for x, need in zip(inputs, needs, strict=True))
            ends = (*dfinal, *(None for _ in initial[2:]))
            return grads, tuple(
                torch.zeros_like(x) if d is None else d.to(x.dtype) for x, d in zip(initial, ends, strict=True)
            ) if need_initial else ()
        tensors = (do, *dfinal, o, *saved, *inputs, *constants, cu_seqlens, *initial)
        counts = len(dfinal), len(saved), len(inputs), len(constants)

        def run(launchers: Any, x: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
            do, *rest = x
            parts = []
            for count in (counts[0], 1, *counts[1:], 1):
                parts.append(tuple(rest[:count]))
                rest = rest[count:]
            return self._backward(launchers, do, *parts, scale, tuple(rest), needs, need_initial)

        found = self._replay(("backward", scale, needs, need_initial, counts), tensors, run)
        return tuple(found[: counts[2]]), tuple(found[counts[2] :])

    def _backward(
        self,
        launchers: Any,
        do: Tensor | None,
        dfinal: tuple[Tensor | None, ...],
        o: tuple[Tensor],
        saved: tuple[Tensor, ...],
        inputs: tuple[Tensor, ...],
        constants: tuple[Tensor, ...],
        bounds: tuple[Tensor | None],
        scale: float,
        initial: tuple[Tensor, ...],
        needs: tuple[bool, ...],
        need_initial: bool,
    ) -> tuple[Tensor | None, ...]:
        """The gradients of the inputs, then those of the initial state."""
        (o,), (cu_seqlens,) = o, bounds
        if not is_collecting():
            self._ahead.wait()
        constants = (*constants, *(saved[3:] if self.stabilized else ()))
        sizes, prepared = self._sizes(inputs, cu_seqlens), self._prepared(inputs)
        end = self._ends(dfinal, sizes, o)
        do = torch.zeros_like(o) if do is None else do if do.stride(-1) == 1 else do.contiguous()
        F = rows_of_state(self.plan, sizes.K)
        hc = saved[0].view(-1, sizes.H, F, sizes.V, *((2,) if self.plan.complex else ()))
        extra = (o, saved[2], saved[1].view(-1, sizes.H, F)) if self.normalized else (saved[1:],) * self.keeps
        plan = self.schedule(prepared, sizes)
        with torch.cuda.device_of(o):
            found, *d_initial = launchers.bwd(
                *prepared, *constants, do, hc, *extra, *end, cu_seqlens, scale, plan, needs, initial=need_initial
            )
        grads = tuple(
            self._summed(parts, x, one.axes, sizes, cu_seqlens)
            for parts, x, one in zip(found, inputs, self.plan.inputs, strict=True)
        )
        if not need_initial:
            return grads
        found = self._public(tuple(d_initial)) + tuple(torch.zeros_like(x) for x in initial[2:])
        return *grads, *(d.to(x.dtype) for d, x in zip(found, initial, strict=True))

    def _begin(
        self,
        plan: Schedule,
        inputs: tuple[Tensor, ...],
        constants: tuple[Tensor, ...],
        scale: float,
        initial: tuple[Tensor, ...],
        cu_seqlens: Tensor | None,
        want_final: bool,
    ) -> None:
        """Compiles what this forward launches, and a backward that wants all gradients, if it was not begun before."""
        device = inputs[0].device
        key = plan, device, len(initial), cu_seqlens is None, want_final, *(x.dtype for x in inputs)
        if key in self._begun:
            return
        self._begun.add(key)
        self._device = device
        x, c, h, cu = (tuple(map(like, some)) for some in (inputs, constants, initial, (cu_seqlens,)))
        ends = 1 + self.normalized + self.stabilized if want_final else 0

        def forward() -> tuple[Tensor, ...]:
            return self._forward(launchers, x, c, scale, h, *cu, want_final, True)

        def backward(made: tuple[Tensor, ...]) -> None:
            o, *rest = made
            do, dfinal = torch.empty_like(o), (None,) * (1 + self.normalized)
            needs = (True,) * len(x)
            self._backward(launchers, do, dfinal, (o,), tuple(rest[ends:]), x, c, cu, scale, h, needs, bool(h))

        launchers = self._replay.launchers
        self._ahead.start(device.index or 0, forward, backward)

    def step(
        self, inputs: tuple[Tensor, ...], constants: tuple[Tensor, ...], scale: float, state: tuple[Tensor, ...]
    ) -> Tensor:
        """One token, T = 1: the output [B, 1, H, V]. The state is updated in place."""
        first, second = len(inputs), len(inputs) + len(constants)

        def run(launchers: Any, x: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
            return (self._step(launchers, x[:first], x[first:second], scale, x[second:]),)

        return self._replay(("step", scale, second), (*inputs, *constants, *state), run)[0]

    def _step(
        self,
        launchers: Any,
        inputs: tuple[Tensor, ...],
        constants: tuple[Tensor, ...],
        scale: float,
        state: tuple[Tensor, ...],
    ) -> Tensor:
        inputs = self._prepared(inputs)
        kept = tuple(x.contiguous() for x in self._real(state))
        with torch.cuda.device_of(inputs[0]):
            o = launchers.step(*inputs, *constants, *kept, scale, self.schedule(inputs, self._sizes(inputs, None)))
        for mine, given in zip(kept, self._real(state), strict=True):
            if mine.data_ptr() != given.data_ptr():
                given.copy_(mine)
        return o

    def saved_like(self, inputs: tuple[Tensor, ...], cu_seqlens: Tensor | None) -> tuple[Tensor, ...]:
        """New tensors of the shapes and dtypes that forward saves, which follow from the inputs' shapes and dtypes
        alone. States are flat: torch.compile would have a graph apart for each size of 1, such as a single state."""
        sizes, LC = self._sizes(inputs, cu_seqlens), self.options["checkpoint"]
        slots = sizes.N * -(-sizes.T // LC) if cu_seqlens is None else sizes.T // LC + sizes.N
        like = inputs[self.output]
        F = rows_of_state(self.plan, sizes.K)
        dtype = torch.bfloat16 if like.dtype == torch.bfloat16 else torch.float32
        states = like.new_empty((slots * sizes.H * F * sizes.V * (2 if self.plan.complex else 1),), dtype=dtype)
        if not self.normalized:
            found = kept(self.plan, sizes, like.dtype, self.options["chunk_size"], cu_seqlens is not None)
            return states, *(like.new_empty(shape, dtype=kind) for shape, kind in found)
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
        out = inputs[self.output]
        device = self._device if out.is_meta and self._device is not None else out.device
        return self._schedule(sizes, out.dtype, device, exact)

    def _make_schedule(self, sizes: Shape, dtype: torch.dtype, device: torch.device, exact: bool) -> Schedule:
        found = schedule(self.plan, sizes, dtype, exact_decay=exact, device=device_of(device), **self.options)
        if self.chosen is None or device.type != "cuda":
            return found
        return self.chosen(found, self.module.__name__, sizes, dtype, torch.cuda.get_device_name(device))

    def _held(
        self,
        launchers: Any,
        inputs: tuple[Tensor, ...],
        constants: tuple[Tensor, ...],
        initial: tuple[Tensor, ...],
        cu_seqlens: Tensor | None,
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The constants with the gauges after them, and m after the last tokens."""
        with torch.cuda.device_of(inputs[0]):
            *gauges, last = launchers.peaks(*inputs, *constants, (*initial[2:], None)[0], cu_seqlens)
        return (*constants, *gauges), (last,)

    @torch.no_grad()
    def _without_tokens(
        self,
        inputs: tuple[Tensor, ...],
        constants: tuple[Tensor, ...],
        initial: tuple[Tensor, ...],
        cu_seqlens: Tensor | None,
        want_final: bool,
        save: bool,
    ) -> Forward:
        """The forward for T = 0."""
        out = self._empty(inputs, self._sizes(inputs, cu_seqlens), initial[:2], cu_seqlens, want_final, save)
        if not (self.stabilized and want_final):
            return out
        _, scales = self._held(self._replay.launchers, inputs, constants, initial, cu_seqlens)
        return out._replace(final=(*out.final, *scales))

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

    def _tokens(self, inputs: tuple[Tensor, ...]) -> int:
        return int(inputs[self._time[0]].shape[self._time[1]])

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
        full = 2 + ("t" in axes) + any(channel in axes for channel in "kvd")
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

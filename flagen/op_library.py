"""The torch.library operators of a spec: forward, backward and step, opaque to torch.compile.

    flagen::<name>_<hash8>_fwd    inputs, initial state, ... -> o, final state, tensors saved for backward
    flagen::<name>_<hash8>_bwd    gradients of the outputs, ... -> gradients of what needs one
    flagen::<name>_<hash8>_step   one token; the state is updated in place

They are registered when the op is made, before anything is traced. Their fake implementations follow from shapes and
dtypes alone. Inside, autocast is off and constants are evaluated on the host, once for each set of arguments.
"""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from . import config
from .checks import Checks, state_dtype
from .torch_taylor import count

if TYPE_CHECKING:
    from .analysis import Analysis

NAMESPACE = "flagen"
FORWARD = (
    "(Tensor[] inputs, Tensor[] initial_state, Tensor? cu_seqlens, float[] scalars, float scale, bool want_final, "
    "bool save) -> (Tensor, Tensor[], Tensor[])"
)
BACKWARD = (
    "(Tensor? d_o, Tensor? d_state, Tensor? d_sums, Tensor? o, Tensor[] saved, Tensor[] inputs, "
    "Tensor[] initial_state, Tensor? cu_seqlens, float[] scalars, float scale, bool[] needs, "
    "bool need_initial) -> Tensor[]"
)
STEP = "(Tensor[] inputs, Tensor(a!)[] state, float[] scalars, float scale) -> Tensor"
MAX_CONSTANTS = 1024  # sets of them that are kept

_PLAIN_TYPES = (Tensor, torch.nn.Parameter)  # without a __torch_function__ of their own

_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_names: dict[str, int] = {}
_lock = threading.Lock()


class Operators:
    """The operators of one op: `forward`, `backward` and `step`.

    torch_backend, triton_backend: each called once, when it is first needed. checks.triton says on which types of
    device the second is used. identity: text of all that the results follow from; the operators' names hold its hash.
    """

    def __init__(
        self,
        analysis: Analysis,
        checks: Checks,
        torch_backend: Callable[[], Any],
        triton_backend: Callable[[], Any],
        identity: str,
    ) -> None:
        self.analysis = analysis
        self.checks = checks
        self.normalized = analysis.normalizer is not None
        # where the counts of heads stand, which for a vector state are its channels
        head = "d" if analysis.vector else "h"
        self.heads = [(i, axes.index(head)) for i, axes in enumerate(checks.axes) if head in axes]
        self.output = analysis.inputs.index(analysis.spec.value.inputs[0])  # whose dtype is the output's
        self._makers = {False: torch_backend, True: triton_backend}
        self._backends: dict[bool, Any] = {}
        self._lock = threading.Lock()
        self._constants: dict[Any, tuple[Tensor, ...]] = {}
        name = _unique(f"{analysis.spec.name}_{hashlib.sha256(identity.encode()).hexdigest()[:8]}")
        self.forward = _register(f"{name}_fwd", FORWARD, self._forward, self._fake_forward)
        self.backward = _register(f"{name}_bwd", BACKWARD, self._backward, self._fake_backward)
        self.step = _register(f"{name}_step", STEP, self._step, self._fake_step)
        torch.library.register_autograd(
            f"{NAMESPACE}::{name}_fwd", self._own_backward, setup_context=self._own_context, lib=_library
        )
        for kind in ("fwd", "bwd", "step"):
            torch.library.register_vmap(f"{NAMESPACE}::{name}_{kind}", self.no_vmap, lib=_library)
            # is_grads_batched, and autograd.functional's vectorize, have a vmap of their own
            _library.impl(f"{name}_{kind}", self.no_batches, "Batched")

    def backend(self, device: torch.device) -> Any:
        """What runs on a device."""
        triton = device.type in self.checks.triton
        found = self._backends.get(triton)
        if found is None:
            with self._lock:
                found = self._backends.get(triton) or self._makers[triton]()
                self._backends[triton] = found
        return found

    # --- what runs

    def _forward(
        self,
        inputs: Sequence[Tensor],
        initial_state: Sequence[Tensor],
        cu_seqlens: Tensor | None,
        scalars: Sequence[float],
        scale: float,
        want_final: bool,
        save: bool,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        device = inputs[0].device
        debug = config.debug()
        if cu_seqlens is not None and (debug or device.type == "cpu"):
            self.checks.bounds(cu_seqlens, self._sizes(inputs)[1])
        if debug:
            self.checks.values(inputs)
        with _no_autocast(device):
            o, final, saved = self.backend(device).forward(
                tuple(inputs),
                self._constants_of(inputs, scalars),
                scale,
                tuple(x.contiguous() for x in initial_state),
                cu_seqlens,
                want_final,
                save,
            )
        return o, list(final), list(saved)

    def _backward(
        self,
        d_o: Tensor | None,
        d_state: Tensor | None,
        d_sums: Tensor | None,
        o: Tensor | None,
        saved: Sequence[Tensor],
        inputs: Sequence[Tensor],
        initial_state: Sequence[Tensor],
        cu_seqlens: Tensor | None,
        scalars: Sequence[float],
        scale: float,
        needs: Sequence[bool],
        need_initial: bool,
    ) -> list[Tensor]:
        device = inputs[0].device
        if o is None:  # only a normaliser's backward reads its values
            o = self._output_like(inputs) if d_o is None else d_o
        d_final = (d_state, d_sums) if self.normalized else (d_state,)
        with _no_autocast(device):
            d_inputs, d_initial = self.backend(device).backward(
                d_o,
                d_final,
                o,
                tuple(saved),
                tuple(inputs),
                self._constants_of(inputs, scalars),
                scale,
                tuple(initial_state),
                cu_seqlens,
                tuple(needs),
                need_initial,
            )
        # the layout that the fake implementation promises, and memory of their own
        found = [x.contiguous() for x in (*d_inputs, *d_initial) if x is not None]
        given = {x.data_ptr() for x in (d_state, d_sums) if x is not None}
        return found if not given else [x.clone() if x.data_ptr() in given else x for x in found]

    def _step(
        self, inputs: Sequence[Tensor], state: Sequence[Tensor], scalars: Sequence[float], scale: float
    ) -> Tensor:
        device = inputs[0].device
        if config.debug():
            self.checks.values(inputs)
        with _no_autocast(device):
            o = self.backend(device).step(tuple(inputs), self._constants_of(inputs, scalars), scale, tuple(state))
        for x in state:
            if not x.is_inference():  # autograd must see that kernels wrote to it
                torch.autograd.graph.increment_version(x)
        return o

    def plain_forward(self, inputs: Sequence[Tensor], initial_state: Sequence[Tensor], *arguments: Any) -> Any:
        """The forward operator, past the gradient of its own, which callers have no need of."""
        if unobserved((*inputs, *initial_state)):
            return self._forward(inputs, initial_state, *arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return self.forward(inputs, initial_state, *arguments)

    def plain_backward(self, *arguments: Any) -> Any:
        """The backward operator. What it reads of the forward is as that left it."""
        if not torch.compiler.is_compiling() and unobserved([x for x in arguments[:3] if x is not None]):
            return self._backward(*arguments)
        return self.backward(*arguments)

    def plain_step(self, inputs: Sequence[Tensor], state: Sequence[Tensor], *arguments: Any) -> Any:
        """The step operator."""
        if not torch.compiler.is_compiling() and unobserved((*inputs, *state)):
            return self._step(inputs, state, *arguments)
        return self.step(inputs, state, *arguments)

    # --- the forward operator by itself, as a program of torch.export calls it

    def _own_context(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        tensors, initial_state, cu_seqlens, *settings = inputs
        o, _, saved = output
        ctx.settings, ctx.counts = settings, (len(tensors), len(initial_state))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(cu_seqlens, o if self.normalized else None, *tensors, *initial_state, *saved)

    def _own_backward(self, ctx: Any, d_o: Tensor | None, d_final: Sequence[Any], _: Any) -> tuple[Any, ...]:
        scalars, scale, _, save = ctx.settings
        if not save:
            raise NotImplementedError(
                f"{self.checks.name}: this program was exported with tensors that require no gradient, and keeps "
                "nothing for a backward; export it with tensors that do"
            )
        inputs, states = ctx.counts
        cu_seqlens, o, *rest = ctx.saved_tensors
        tensors, initial_state, saved = rest[:inputs], rest[inputs : inputs + states], rest[inputs + states :]
        needs, need_initial = list(ctx.needs_input_grad[0]), any(ctx.needs_input_grad[1])
        ends = [*d_final, None, None][:2]
        found = self.backward(
            d_o, *ends, o, saved, tensors, initial_state, cu_seqlens, scalars, scale, needs, need_initial
        )
        grads = iter(found)
        d_inputs = [next(grads) if need else None for need in needs]
        d_initial = list(grads) if need_initial else [None] * states
        # lists of numbers count as one argument, but an empty one as a list of tensors
        return d_inputs, d_initial, None, None if scalars else [], None, None, None

    # --- what torch.compile sees

    def _fake_forward(
        self,
        inputs: Sequence[Tensor],
        initial_state: Sequence[Tensor],
        cu_seqlens: Tensor | None,
        scalars: Sequence[float],
        scale: float,
        want_final: bool,
        save: bool,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        final = self._states_like(inputs, cu_seqlens) if want_final else []
        saved = self.backend(inputs[0].device).saved_like(tuple(inputs), cu_seqlens) if save else ()
        return self._output_like(inputs), final, list(saved)

    def _fake_backward(
        self,
        d_o: Tensor | None,
        d_state: Tensor | None,
        d_sums: Tensor | None,
        o: Tensor | None,
        saved: Sequence[Tensor],
        inputs: Sequence[Tensor],
        initial_state: Sequence[Tensor],
        cu_seqlens: Tensor | None,
        scalars: Sequence[float],
        scale: float,
        needs: Sequence[bool],
        need_initial: bool,
    ) -> list[Tensor]:
        found = [x for x, need in zip(inputs, needs, strict=True) if need]
        return [x.new_empty(x.shape) for x in (*found, *(initial_state if need_initial else ()))]

    def _fake_step(
        self, inputs: Sequence[Tensor], state: Sequence[Tensor], scalars: Sequence[float], scale: float
    ) -> Tensor:
        return self._output_like(inputs)

    # --- parts of these

    def _sizes(self, inputs: Sequence[Tensor]) -> tuple[int, int, int, int, int]:
        """B, T, H, K, V of inputs that were checked."""
        size: dict[str, int] = {"h": 1}
        for x, axes in zip(inputs, self.checks.axes, strict=True):
            for axis, n in zip(axes, x.shape, strict=True):
                size[axis] = n if axis != "h" else max(n, size["h"])
        if self.analysis.vector:
            return size["b"], size["t"], size["d"], 1, 1
        return size["b"], size["t"], size["h"], size["k"], size["v"]

    def _output_like(self, inputs: Sequence[Tensor]) -> Tensor:
        B, T, H, _, V = self._sizes(inputs)
        return inputs[self.output].new_empty((B, T, H) if self.analysis.vector else (B, T, H, V))

    def _states_like(self, inputs: Sequence[Tensor], cu_seqlens: Tensor | None) -> list[Tensor]:
        B, _, H, K, V = self._sizes(inputs)
        N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        F = count(K, self.analysis.taylor) if self.analysis.taylor else K
        wide = any(x.dtype is torch.float64 for x in inputs)
        shape = (N, H) if self.analysis.vector else (N, H, F, V)
        states = [inputs[0].new_empty(shape, dtype=state_dtype(wide, self.analysis.is_complex))]
        if self.normalized:
            states.append(inputs[0].new_empty((N, H, F), dtype=state_dtype(wide, False)))
        if self.analysis.stabilizer is not None:
            states.append(inputs[0].new_empty((N, H), dtype=state_dtype(wide, False)))
        return states

    def _constants_of(self, inputs: Sequence[Tensor], scalars: Sequence[float]) -> tuple[Tensor, ...]:
        """A tensor [H] for each of the analysis' constants: fp64 for PyTorch on a CPU, fp32 elsewhere."""
        if not self.analysis.constants and not self.analysis.scalars:
            return ()
        device, heads = inputs[0].device, max([inputs[i].shape[axis] for i, axis in self.heads])
        key = heads, tuple(scalars), device
        found = self._constants.get(key)
        if found is None:
            values = self.checks.constants(scalars, heads)
            wide = device.type == "cpu" and device.type not in self.checks.triton
            dtype = torch.float64 if wide else torch.float32
            # They are kept for calls in every mode, and modes belong to a thread. A CUDA graph that is being made takes
            # what its thread allocates into memory that is gone with the graph.
            with ThreadPoolExecutor(1) as other:
                make = functools.partial(torch.tensor, dtype=dtype, device=device)
                found = tuple(other.submit(make, value).result() for value in values)
            if len(self._constants) >= MAX_CONSTANTS:
                self._constants.clear()
            self._constants[key] = found
        return found

    def no_batches(self, *arguments: Any) -> NoReturn:
        self.no_vmap(None, None)

    def no_vmap(self, info: Any, in_dims: Any, *arguments: Any) -> NoReturn:
        raise NotImplementedError(
            f"{self.checks.name}: torch.vmap over this op or its gradient is not supported (torch.func.jacrev and "
            "hessian use it too, and is_grads_batched); it has a batch axis of its own: fold the mapped axis into B"
        )


def unobserved(tensors: Sequence[Tensor]) -> bool:
    """Whether an operator on these tensors would come straight to its implementation, and could as well be called past
    the dispatcher: no mode, subclass, wrapper, lazy conjugate or profiler has a part in it."""
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return False
    if torch.autograd.profiler._is_profiler_enabled:
        return False
    return all(
        type(x) in _PLAIN_TYPES and torch._C._dispatch_keys(x).raw_repr() in _plain_keys(x.device.type) for x in tensors
    )


@functools.cache
def _plain_keys(device_type: str) -> frozenset[int]:
    """The dispatch keys of tensors of a type of device that are nothing else, made in every mode."""
    if device_type == "meta":
        return frozenset()
    found = set()
    for inference in (False, True):
        with torch.inference_mode(inference):
            found.add(torch._C._dispatch_keys(torch.empty(0, device=device_type)).raw_repr())
    return frozenset(found)


def _unique(name: str) -> str:
    """The name, with a number where the process has one such already: of another op for the same spec."""
    with _lock:
        _names[name] = _names.get(name, 0) + 1
        return name if _names[name] == 1 else f"{name}_{_names[name]}"


def _register(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _no_autocast(device: torch.device) -> Any:
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)

"""The function that a spec compiles to: validation, autocast, autograd, and the operators of op_library."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import op_text, reference
from .checks import Checks, Sizes
from .op_autograd import function_of_a_call
from .op_library import Operators
from .stabilize import gated

if TYPE_CHECKING:
    from .analysis import Analysis
    from .plan import Plan
    from .spec import Spec

State = Tensor | tuple[Tensor, ...]
_MISSING = object()
INT32 = torch.iinfo(torch.int32)
MAX_PASSED = 4096  # forms of calls that are remembered as right


class Op:
    """A compiled recurrence: op(*tensors, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None),
    with the spec's scalars as further keywords, gives (o, final_state). help(op.__call__) and op.__doc__ say more.

    spec, analysis, plan: the stages that it was made from; a spec without Triton kernels has no plan. source: the text
    of the kernels, or a comment that says why there are none. path: the file with it, or None. backend: "auto",
    "triton" or "torch".
    torch_backend, triton_backend: make what runs a call, each called once, when it is first needed.
    origin: a function and its arguments that give this op, for pickle; without it the op cannot be pickled.
    """

    def __init__(
        self,
        *,
        spec: Spec,
        analysis: Analysis,
        plan: Plan | None,
        backend: str,
        torch_backend: Callable[[], Any],
        triton_backend: Callable[[], Any],
        source: str,
        path: str | None,
        origin: tuple[Callable[..., Op], tuple[Any, ...]] | None = None,
    ) -> None:
        self.spec, self.analysis, self.plan = spec, analysis, plan
        self.backend, self.source, self.path = backend, source, path
        self.__name__ = self.__qualname__ = spec.name
        self.__doc__ = op_text.call_doc(spec)
        self.__signature__ = op_text.call_signature(spec)
        self.step = _described(self._step, "step", op_text.step_signature(spec), op_text.step_doc(spec))
        self.reference = _described(self._reference, "reference", self.__signature__, op_text.reference_doc(spec))
        self._origin = origin
        self._names = tuple(one.name for one in spec.inputs)
        self._scalar_names = tuple(one.name for one in spec.scalars)
        self._casts = _cast_by_autocast(spec)
        triton = frozenset[str]() if analysis.without_kernels else _triton_devices(backend)
        self._checks = Checks(analysis, triton, backend == "triton")
        self._passed: dict[tuple[Any, ...], Sizes] = {}
        options = () if origin is None else origin[1]
        identity = "\n".join((spec.to_json(), backend, repr(options), source))
        self._operators = Operators(analysis, self._checks, torch_backend, triton_backend, identity)

    def __call__(
        self,
        *tensors: Tensor,
        scale: float | None = None,
        initial_state: State | None = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
        **named: Any,
    ) -> tuple[Tensor, State | None]:
        """See this op's __doc__, which is written from its spec."""
        if named or self._scalar_names or len(tensors) != len(self._names):
            tensors, scalars = self._bound(tensors, named)
        else:
            scalars = ()
        compiling = torch.compiler.is_compiling()
        sizes = self._checks.tensors(tensors, cu_seqlens) if compiling else self._sizes(tensors, cu_seqlens)
        scale = self._scale(scale, sizes.K)
        state = self._checks.state("initial_state", initial_state, sizes, tensors[0].device)
        if not compiling:
            self._refuse_transforms((*tensors, *state))
        tensors = self._autocast(tensors)
        if cu_seqlens is not None:
            if cu_seqlens.dtype is not torch.int32:  # a bound beyond it must not come back as another one
                cu_seqlens = cu_seqlens.clamp(INT32.min, INT32.max).to(torch.int32)
            cu_seqlens = cu_seqlens.contiguous()
        want_final = output_final_state if type(output_final_state) is bool else self._checks.flag(output_final_state)
        if torch.is_grad_enabled() and any(x.requires_grad for x in (*tensors, *state)):
            settings = (scalars, scale, want_final)
            o, *rest = function_of_a_call().apply(self, settings, cu_seqlens, len(tensors), *tensors, *state)
            final = rest[: self._checks.parts] if want_final else ()
        else:
            traced = compiling or torch._C._are_functorch_transforms_active()
            forward = self._operators.forward if traced else self._operators.plain_forward
            o, final, _ = forward(tensors, state, cu_seqlens, scalars, scale, want_final, False)
        if not want_final:
            return o, None
        return o, final[0] if self._checks.parts == 1 else tuple(final)

    def _step(self, *tensors: Tensor, state: Any = _MISSING, scale: float | None = None, **named: Any) -> Tensor:
        if named or self._scalar_names or len(tensors) != len(self._names) or state is _MISSING:
            tensors, scalars = self._bound(tensors, named, step=True, state=state)
        else:
            scalars = ()
        compiling = torch.compiler.is_compiling()
        sizes = self._checks.tensors(tensors, None, True) if compiling else self._sizes(tensors, None, True)
        parts = self._checks.written_state(state, sizes, tensors[0].device)
        if not compiling:
            self._refuse_transforms((*tensors, *parts))
        tensors, scale = self._autocast(tensors), self._scale(scale, sizes.K)
        with torch.no_grad():
            if self._checks.complex and compiling:
                # Inductor (torch 2.13) has no operators that mutate a complex tensor
                o, (final,), _ = self._operators.forward(tensors, parts, None, scalars, scale, True, False)
                parts[0].copy_(final)
                return o
            return self._operators.plain_step(tensors, parts, scalars, scale)

    def _reference(
        self,
        *tensors: Tensor,
        scale: float | None = None,
        initial_state: State | None = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
        **named: Any,
    ) -> tuple[Tensor, State | None]:
        tensors, scalars = self._bound(tensors, named)
        checks = Checks(self.analysis)
        sizes = checks.tensors(tensors, cu_seqlens)
        checks.state("initial_state", initial_state, sizes, tensors[0].device)
        if cu_seqlens is not None:
            checks.bounds(cu_seqlens, sizes.T)
        if scale is not None:
            scale = checks.scale(scale)
        return reference.run(
            self.spec,
            tensors,
            scalars=dict(zip(self._scalar_names, scalars, strict=True)),
            scale=scale,
            initial_state=initial_state,
            output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
        )

    def _bound(
        self, tensors: tuple[Tensor, ...], named: dict[str, Any], step: bool = False, state: Any = None
    ) -> tuple[tuple[Tensor, ...], tuple[float, ...]]:
        """The tensors and the scalars of a call. What is missing or unknown is a TypeError, as of any function."""
        keywords = self._names[len(tensors) :]
        wanted = (*keywords, *self._scalar_names)
        wrong = (
            len(tensors) > len(self._names) or len(named) != len(wanted) or any(name not in named for name in wanted)
        )
        if wrong or state is _MISSING:
            name, call, signature = self.__name__, op_text.short_call(self.spec), self.__signature__
            if step:
                name, call, signature = f"{name}.step", op_text.short_step(self.spec), self.step.__signature__
                named = named if state is _MISSING else {**named, "state": state}
            try:
                signature.bind(*tensors, **named)
            except TypeError as error:
                raise TypeError(f"{name}: {error}; it is called as {call}") from None
        tensors = (*tensors, *(named[name] for name in keywords))
        return tensors, self._checks.scalars([named[name] for name in self._scalar_names])

    def _sizes(self, tensors: tuple[Tensor, ...], cu_seqlens: Tensor | None, step: bool = False) -> Sizes:
        """What checks.tensors gives. It looks at nothing but these: a call of a form that passed once is right."""
        form: list[Any] = [step]
        try:
            for x in tensors if cu_seqlens is None else (*tensors, cu_seqlens):
                form += (x.shape, x.dtype, x.device, x.layout)
            key = tuple(form)
            sizes = self._passed.get(key)
        except (AttributeError, TypeError, RuntimeError):  # no tensors, nested ones, or sizes that are symbols
            return self._checks.tensors(tensors, cu_seqlens, step)
        if sizes is None:
            sizes = self._checks.tensors(tensors, cu_seqlens, step)
            if len(self._passed) >= MAX_PASSED:
                self._passed.clear()
            self._passed[key] = sizes
        return sizes

    def _scale(self, scale: float | None, key_channels: int) -> float:
        if scale is not None:
            return self._checks.scale(scale)
        return self.spec.scale if self.spec.scale is not None else key_channels**-0.5

    def _autocast(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Under autocast, what stands in query, key and value alone is cast; gates and states never are."""
        kind = tensors[0].device.type
        if kind == "meta" or not torch.is_autocast_enabled(kind):
            return tensors
        dtype = torch.get_autocast_dtype(kind)
        return tuple(
            x.to(dtype) if cast and x.dtype is not torch.float64 else x
            for x, cast in zip(tensors, self._casts, strict=True)
        )

    def _refuse_transforms(self, tensors: tuple[Tensor, ...]) -> None:
        """torch.func.grad and vjp work; a forward-mode derivative would be wrong. The operators refuse vmap."""
        if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
            self.refuse_tangents()

    def refuse_tangents(self) -> NoReturn:
        """What asks for a forward-mode derivative comes to this."""
        raise NotImplementedError(
            f"{self.__name__}: forward-mode derivatives (torch.func.jvp, jacfwd, hessian, forward_ad) are not "
            f"supported; use backward, torch.func.vjp or {self.__name__}.reference"
        )

    def __repr__(self) -> str:
        return f"<flagen op {op_text.short_call(self.spec)}, backend {self.backend!r}>"

    def __str__(self) -> str:
        return f"{op_text.short_call(self.spec)} -> (o, final_state)\n\n{self.spec}"

    def __copy__(self) -> Op:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Op:
        return self

    def __reduce__(self) -> tuple[Callable[..., Op], tuple[Any, ...]]:
        if self._origin is None:
            raise TypeError(f"{self.__name__}: only an op made by flagen.compile can be pickled")
        return self._origin


def _cast_by_autocast(spec: Spec) -> tuple[bool, ...]:
    gates = {one for role, expr in spec.roles if role in ("log_decay", "phase", "bonus") for one in expr.inputs}
    gates |= set() if spec.stabilize is None else set(gated(spec.key).gate.inputs)
    # of an erase the vectors are cast, the numbers per token are gates
    gates |= {one for expr in spec.erase or () for one in expr.inputs if "k" not in one.axes}
    return tuple(one not in gates for one in spec.inputs)


def _triton_devices(backend: str) -> frozenset[str]:
    """The types of device on which the Triton kernels run: the CPU too, where Triton interprets them."""
    if backend == "torch":
        return frozenset()
    return frozenset(("cuda", "cpu") if _interpreted() else ("cuda",))


def _interpreted() -> bool:
    """Whether Triton was imported with TRITON_INTERPRET=1, or is not yet and would be."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return False
    try:
        import triton.language as tl
        from triton.runtime.interpreter import InterpretedFunction
    except ImportError:
        return False
    return isinstance(tl.cdiv, InterpretedFunction)


def _described(run: Callable[..., Any], name: str, signature: inspect.Signature, doc: str) -> Callable[..., Any]:
    """`run` as a function with a name, a signature and documentation of its own."""

    def function(*tensors: Any, **named: Any) -> Any:
        return run(*tensors, **named)

    function.__name__ = function.__qualname__ = name
    function.__signature__ = signature
    function.__doc__ = doc
    return function

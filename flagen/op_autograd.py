"""The autograd functions of an op: its forward operator with its gradient, and what has none refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .op import Op


def function_of_a_call() -> type[torch.autograd.Function]:
    """The function to apply. What transforms and compilation need, one with setup_context, takes twice as long."""
    if torch.compiler.is_compiling():
        return Attention
    return TransformedAttention if torch._C._are_functorch_transforms_active() else EagerAttention


class Attention(torch.autograd.Function):
    """The forward operator with its gradient. Arguments: the op, (scalars, scale, want_final), cu_seqlens, the number
    of inputs, the inputs, the initial state. Outputs: o, the final state, and what backward reads.
    """

    @staticmethod
    def forward(
        op: Op, settings: tuple[tuple[float, ...], float, bool], cu_seqlens: Tensor | None, count: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        scalars, scale, want_final = settings
        o, final, saved = op._operators.forward(
            tensors[:count], tensors[count:], cu_seqlens, scalars, scale, want_final, True
        )
        return o, *final, *saved

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        op, settings, cu_seqlens, count, *tensors = inputs
        saved = output[1 + (op._checks.parts if settings[2] else 0) :]
        ctx.mark_non_differentiable(*saved, *output[3 : len(output) - len(saved)])  # of a state's parts m has none
        _keep(ctx, op, settings, cu_seqlens, count, tensors, output[0], saved)

    @staticmethod
    def vmap(info: Any, in_dims: Any, op: Op, *arguments: Any) -> NoReturn:
        op._operators.no_vmap(info, in_dims)

    @staticmethod
    def backward(ctx: Any, d_o: Tensor | None, *rest: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, ctx.op._operators.backward, d_o, rest)


class TransformedAttention(Attention):
    """Attention under torch.func, which asks for jvp; torch.compile takes no function that has one."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        ctx.op.refuse_tangents()


class EagerAttention(torch.autograd.Function):
    """Attention for a plain call: what backward reads is kept, not returned."""

    @staticmethod
    def forward(
        ctx: Any,
        op: Op,
        settings: tuple[tuple[float, ...], float, bool],
        cu_seqlens: Tensor | None,
        count: int,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        scalars, scale, want_final = settings
        o, final, saved = op._operators.plain_forward(
            tensors[:count], tensors[count:], cu_seqlens, scalars, scale, want_final, True
        )
        _keep(ctx, op, settings, cu_seqlens, count, tensors, o, saved)
        ctx.mark_non_differentiable(*final[2:])
        return o, *final

    jvp = TransformedAttention.jvp

    @staticmethod
    def backward(ctx: Any, d_o: Tensor | None, *rest: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, ctx.op._operators.plain_backward, d_o, rest)


def _keep(
    ctx: Any,
    op: Op,
    settings: tuple[tuple[float, ...], float, bool],
    cu_seqlens: Tensor | None,
    count: int,
    tensors: Sequence[Tensor],
    o: Tensor,
    saved: Sequence[Tensor],
) -> None:
    """What backward reads of a call."""
    # the initial state is read for its form alone, where it gets a gradient
    initial = tensors[count:] if any(ctx.needs_input_grad[4 + count :]) else ()
    ctx.op, ctx.settings, ctx.count, ctx.states = op, settings, count, len(initial)
    ctx.initial_count = len(tensors) - count
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(cu_seqlens, o if op._checks.parts > 1 else None, *tensors[:count], *initial, *saved)


def _gradients(
    ctx: Any, operator: Callable[..., Any], d_o: Tensor | None, rest: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """What backward returns; `operator`: what computes the gradients."""
    op, (scalars, scale, want_final), count = ctx.op, ctx.settings, ctx.count
    cu_seqlens, o, *saved = ctx.saved_tensors
    inputs, initial, saved = saved[:count], saved[count : count + ctx.states], saved[count + ctx.states :]
    d_state = rest[0] if want_final else None
    d_sums = rest[1] if want_final and op._checks.parts > 1 else None
    needs = ctx.needs_input_grad[4 : 4 + count]
    arguments = d_o, d_state, d_sums, o, saved, inputs, initial, cu_seqlens, scalars, scale, needs, ctx.states > 0
    if not torch.is_grad_enabled():
        found = operator(*arguments)
    else:
        with torch.no_grad():
            found = operator(*arguments)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        sources = (x for x in (d_o, d_state, d_sums, *inputs, *initial) if x is not None)
        found = _Gradient.apply(op.__name__, len(found), *found, *sources)
    grads, at = [], 0
    for need in needs:
        grads.append(found[at] if need else None)
        at += need
    d_initial = found[at:] if ctx.states else [None] * ctx.initial_count
    return None, None, None, None, *grads, *d_initial


class _Gradient(torch.autograd.Function):
    """The gradients, of which no gradient can be asked for: silently it would be zero. Arguments: the op's name, the
    number of gradients, the gradients, what they depend on.
    """

    @staticmethod
    def forward(name: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> NoReturn:
        raise NotImplementedError(
            f"{ctx.name}: has no second derivative, and its gradient was differentiated (create_graph=True, nested "
            f"torch.func.grad); for small sizes {ctx.name}.reference has all derivatives"
        )


# apply binds its arguments by this signature: with it at hand, a third of the time of a call
Attention.forward.__signature__ = inspect.signature(Attention.forward)

"""Factors of a role that are one number a row: kernels multiply weights by them, not blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .expr import Call, Expr, Number
from .plan_parts import leaves, row_text

if TYPE_CHECKING:
    from .plan import Plan
    from .plan_parts import Gradient, Role, TensorArg


def split_rows(expr: Expr, channel: str) -> tuple[Expr | None, Expr]:
    """expr as a product of what is one number a row, or None, and the rest, which has the channel axis."""
    if not isinstance(expr, Call) or expr.function not in ("mul", "div", "neg"):
        return None, expr
    if expr.function == "neg":
        rows, rest = split_rows(expr.args[0], channel)
        return -(Number(1) if rows is None else rows), rest
    left, right = expr.args
    if channel not in right.axes:
        rows, rest = split_rows(left, channel)
        if expr.function == "div":
            return (Number(1) if rows is None else rows) / right, rest
        return right if rows is None else rows * right, rest
    if expr.function == "mul" and channel not in left.axes:
        rows, rest = split_rows(right, channel)
        return left if rows is None else left * rows, rest
    return None, expr


def swept(plan: Plan) -> bool:
    """Whether the kernels are those of fwd and sweeps alone."""
    return plan.sweeps and not plan.vector and not plan.erase


def plain_sweeps(plan: Plan) -> bool:
    """Whether what sweeps load are inputs as they lie, or but for maps of queries and keys where no decay is loaded:
    what is made of others needs a place of its own in shared memory."""
    if not plan.swept or plan.exclusive or not plan.value_block.identity:
        return False
    return plan.decay == "none" if plan.normalized else bool(plan.query.identity and plan.key.identity)


def turned(plan: Plan) -> bool:
    """Whether what is prepared for chunks is complex: rows of queries and keys in two halves."""
    return plan.intra and plan.complex


def keeps(plan: Plan) -> int:
    """How many chunks' rows of pairs a key's row holds at the least where a training forward keeps what chunks need no
    state for, so that with states it is less than the inputs; 0: it does not keep it."""
    rows = [one for one in plan.inputs if "t" in one.axes and one.channel]
    if not plan.intra or plan.complex or plan.normalized:
        return 0
    if len(rows) >= 4:
        return 1
    # of three inputs it takes nearly all: states must be few, and gradients of prepared rows lie where others are to be
    return 2 if len(rows) == 3 and all(places(plan)) and not summed(plan) else 0


def intra_gradients(plan: Plan) -> tuple[Gradient, ...]:
    """Those that with a decay per key channel are made inside chunks: all but what only values give."""
    return plan.gradients_of("query", "key", "log_decay", "phase", "bonus")


def places(plan: Plan) -> tuple[str, str]:
    """For the query and the key the input in whose gradient's tensor what has the shape of the role may lie before, or
    nothing: kernels write that gradient where they have read the role's. Not the same one for both."""
    found: list[str] = []
    for name in ("query", "key"):
        role = plan.query if name == "query" else plan.key
        fit = [x.name for x in intra_gradients(plan) if _fits(plan, x, name, role) and x.name not in found]
        found.append(fit[0] if fit and not plan.complex else "")
    return found[0], found[1]


def _fits(plan: Plan, x: Gradient, name: str, role: Role) -> bool:
    if role.identity:
        return x.name == role.inputs[0] and plan.alone(x)
    return x.tensor.axes == "bthk" and name in [one.role for one in x.terms] and plan.alone(x)


def split_value(plan: Plan) -> tuple[Expr | None, Expr]:
    """The value as its factor of rows, or None, and the rest; whole where no kernel prepares such factors."""
    expr = plan.analysis.role("value")
    assert expr is not None, "every spec has a value"
    # what kernels have of a row of a decay is four numbers
    split = (swept(plan) and not (plan.exclusive and plan.gate is not None)) or bool(plan.erase_factors)
    return split_rows(expr, "v") if split else (None, expr)


def value_rows(plan: Plan) -> str:
    """The factor of the value that is one number a row, as text over blocks [BT], or nothing."""
    rows, _ = split_value(plan)
    return "" if rows is None else row_text(rows)


def with_value_rows(plan: Plan, given: tuple[TensorArg, ...]) -> tuple[TensorArg, ...]:
    """These tensors and those of the value's factor."""
    rows, _ = split_value(plan)
    names = {one.name for one in given} | {leaf.name for leaf in (leaves(rows) if rows is not None else ())}
    return tuple(one for one in plan.tensors if one.name in names)


def prepared(plan: Plan) -> bool:
    """Whether sums of log decays are made before, by a kernel of their own."""
    return swept(plan) and plan.decay == "scalar"


def decay_tensors(plan: Plan) -> tuple[TensorArg, ...]:
    """What the kernel that prepares the sums reads: inputs of the decay, the key's gate and the value's factor."""
    rows, _ = split_value(plan)
    names = {one.name for one in plan.tensors_of("log_decay", "gate")}
    names |= set() if rows is None else {leaf.name for leaf in leaves(rows)}
    return tuple(one for one in plan.tensors if one.name in names)


def sum_column(plan: Plan) -> int:
    """In which of the four columns of what is prepared the sum of log decays up to and with a row is."""
    return 0 if not plan.exclusive else 3 if plan.gate is not None else 1


def summed(plan: Plan) -> bool:
    """Whether an input of decay or phase lacks a time axis, so that its gradient is a sum over tokens of a running
    sum."""
    names = {name for role in (plan.log_decay, plan.phase) if role for name in role.inputs}
    return any("t" not in one.axes for one in plan.inputs if one.name in names)


def telescopes(plan: Plan) -> bool:
    """Whether what the decay's gradient is summed up from is made of the same rounded rows in all kernels.

    It is then the gradient of a recurrence with slightly other weights of rows; what two kernels round apart adds up
    in one direction until the next checkpoint. It takes registers, and by token it makes little difference.
    """
    return swept(plan) and summed(plan)


def before(plan: Plan) -> tuple[str, ...]:
    """What sweeps read that a kernel has prepared."""
    return ("gsum",) * prepared(plan) + ("dden",) * (plan.normalized and swept(plan))


def written(plan: Plan) -> str:
    """What a row of the value is multiplied by where it meets the state at the chunk's end, or nothing."""
    factors = ["b_ek"] * plan.row_decay + ["b_vf"] * bool(value_rows(plan))
    return f"({' * '.join(factors)})" if factors[1:] else "".join(factors)


def packs(plan: Plan) -> bool:
    """Whether bf16 rows are multiplied by factors two numbers at a time, and factors of products stand in additions.

    Where decays are the data's it was tried for all sizes, with other changes at once, and ended in a bad address on
    Hopper with Triton 3.6, for states of 64 x 64: there it is for blocks of 128 channels.
    """
    return swept(plan) and (not prepared(plan) or factored(plan))


def factored(plan: Plan) -> bool:
    """Whether sweeps have the value's factor from what is prepared, and its gradient comes from k . dk.

    A token writes k (f v)^T, so that f is a factor of k . dk too, and the gradient of f is k . dk over f. The key's
    sweep has k . dk for the decay; the value's then reads no values and sums nothing. Its f is nowhere zero: instead it
    is so little that nothing changes but what is divided out again.
    """
    return swept(plan) and early_factor(plan)


def chained(plan: Plan, role: str, diff: Expr, time: bool) -> tuple[str, Expr, str]:
    """Of a derivative of a role by an input: by which role the input has its gradient, the derivative of that, and the
    text of what it multiplies. The value's factor is a role of its own for inputs that are in it alone and have a time
    axis; the gradient of one without, a sum over all tokens, was 1.5 to 3 times as far off in bf16."""
    if role == "value" and factored(plan):
        factor, block = split_value(plan)
        if diff == factor:
            return role, Number(1), "b_dvalue * b_vf[:, None]"
        rows, rest = split_rows(diff, "v")
        if rest == block and time:
            return "factor", Number(1) if rows is None else rows, "b_dfactor"
    return role, diff, f"b_d{role}"


def derivatives(plan: Plan, role: str) -> list[Expr]:
    """Those that a sweep multiplies the gradient of its role by."""
    found = [(diff, "t" in one.axes) for of, one, diff in plan.analysis.gradients if of == role]
    return [diff for diff, time in found if chained(plan, role, diff, time)[0] == role]


def gate_tensors(plan: Plan) -> tuple[TensorArg, ...]:
    """What the kernel for the decay's gradient reads: inputs of the decay and the gate, and of a factor whose gradient
    it makes."""
    return decay_tensors(plan) if factored(plan) else plan.tensors_of("log_decay", "gate")


def early_factor(plan: Plan) -> bool:
    """Whether the value's factor is part of the weights of pairs, which are made for each chunk."""
    return bool(value_rows(plan)) and plan.decay == "scalar" and not plan.own_term and not plan.normalized

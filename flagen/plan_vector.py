"""Texts of vector states, whose kernels evaluate every expression for each token and channel: few instructions count.

Products are written in one order, with what is the same for all tokens first, so that equal parts are equal text, which
the compiler evaluates once; exp, sigmoid and the decay have forms of their own in generated modules.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

from .expr import Call, Expr, Input, Number
from .functions import FUNCTIONS, fold, triton_text
from .plan_parts import block_name, block_text, leaves

if TYPE_CHECKING:
    from .plan import Plan

DEAR = {*FUNCTIONS, "pow"}  # what is evaluated once
ROLES = ("query", "update", "decay", "phase", "gradients")
# what functions.py writes for a function, and a generated module's own
_FORMS = (("tl.exp(", "exp("), ("tl.sigmoid(", "sigmoid("), ("1.0 / tl.sqrt(", "tl.rsqrt("))
_MINUS = re.compile(r"\bsigmoid\(-(\w+(?:\[None, :\])?)\)")


@dataclass(frozen=True, slots=True)
class Shared:
    """What expressions of a plan have in common, to be evaluated once: over the inputs and what is shared before it.

    leaf: what stands for it, with a time axis unless it is the same for all tokens; body: what it is.
    """

    leaf: Input
    body: Expr

    @property
    def fixed(self) -> bool:
        return "t" not in self.leaf.axes

    @property
    def block(self) -> str:
        return block_name(self.leaf.name)

    @property
    def text(self) -> str:
        return _text(self.body, "t" in self.leaf.axes and "d" in self.leaf.axes)


def text_of(plan: Plan, expr: Expr, names: Mapping[Expr, str]) -> str:
    """The Triton text of a role or a derivative of a plan."""
    return _text(_shown(_canonical(plan, expr), _named(plan.shared))) if plan.vector else triton_text(expr, names)


def decay_text(plan: Plan) -> str:
    """Of a vector state with a decay: that of a step."""
    expr = _expr(plan, "decay")
    assert expr is not None, plan.name
    return text_of(plan, expr, {})


def shared(plan: Plan) -> dict[Expr, Shared]:
    """By the canonical expression, what a vector state's expressions use more than once or is the same for all tokens,
    in the order in which they follow from one another."""
    if not plan.vector:
        return {}
    used = [_canonical(plan, expr) for of in ROLES for expr in _exprs(plan, of)]
    counts = Counter(node for expr in used for node in expr.walk() if _is_dear(node))
    kept = [node for node, count in counts.items() if count > 1 or not _timed(node)]
    kept.sort(key=lambda node: (_timed(node), sum(1 for _ in node.walk()), str(node)))
    while True:
        leaves_of: dict[Expr, Input] = {node: Input(f"shared{i}", _axes(node)) for i, node in enumerate(kept)}
        bodies = {node: Call(node.function, tuple(_shown(arg, leaves_of) for arg in node.args)) for node in kept}
        uses = Counter(
            one for expr in (*(_shown(expr, leaves_of) for expr in used), *bodies.values()) for one in expr.walk()
        )
        # what only one of the others consists of is written there
        inside = {one for node in kept for one in bodies[node].walk() if _timed(node) == _timed(one)}
        fewer = [
            node for node in kept if uses[leaves_of[node]] > 1 or (not _timed(node) and leaves_of[node] not in inside)
        ]
        if fewer == kept:
            return {node: Shared(leaves_of[node], bodies[node]) for node in kept}
        kept = fewer


def shared_by(plan: Plan, *names: str, but: tuple[str, ...] = (), fixed: bool = False) -> tuple[Shared, ...]:
    """What is shared, of all tokens or of each, that the texts of `names` (of ROLES) use and those of `but` do not."""
    named = {one.leaf: one for one in plan.shared.values()}

    def reached(of: tuple[str, ...]) -> set[Input]:
        found: set[Input] = set()
        wait = [_shown(_canonical(plan, expr), _named(plan.shared)) for name in of for expr in _exprs(plan, name)]
        while wait:
            more = {one for one in wait.pop().inputs if one in named} - found
            found |= more
            wait += [named[one].body for one in more]
        return found

    wanted = reached(names) - reached(but)
    return tuple(one for one in named.values() if one.leaf in wanted and one.fixed == fixed)


def kept(plan: Plan, *names: str) -> int:
    """About how many values of its own a token has, beside the inputs and the state, while the texts of `names` (of
    ROLES; all of them if none) are evaluated: calls, each once, products that are added, derivatives."""
    used = [(of, _canonical(plan, expr)) for of in names or ROLES for expr in _exprs(plan, of)]
    calls = {node for _, expr in used for node in expr.walk() if _timed(node) and _is_dear(node)}
    products = sum(not isinstance(expr, (Input, Number)) for of, expr in used if of in ("update", "gradients"))
    return len(calls) + products


def _expr(plan: Plan, name: str) -> Expr | None:
    if name != "decay":
        return plan.analysis.role(name)
    log_decay = plan.analysis.role("log_decay")
    return None if log_decay is None else decay_of(log_decay)


def _exprs(plan: Plan, name: str) -> list[Expr]:
    """The expressions of one of ROLES."""
    if name == "gradients":
        return [diff for _, _, diff in plan.analysis.gradients]
    return [
        expr for one in (("key", "value") if name == "update" else (name,)) if (expr := _expr(plan, one)) is not None
    ]


def _canonical(plan: Plan, expr: Expr) -> Expr:
    log_decay = plan.analysis.role("log_decay")
    # whose exponential is written alike wherever it stands
    return canonical(fold(expr), None if log_decay is None else canonical(fold(log_decay)))


def _named(found: Mapping[Expr, Shared]) -> dict[Expr, Input]:
    return {node: one.leaf for node, one in found.items()}


def _shown(expr: Expr, named: Mapping[Expr, Input]) -> Expr:
    """The expression with leaves for what is shared."""
    if expr in named:
        return named[expr]
    return Call(expr.function, tuple(_shown(arg, named) for arg in expr.args)) if isinstance(expr, Call) else expr


def _text(expr: Expr, time: bool = True) -> str:
    text = triton_text(expr, {leaf: block_text(leaf, time, "d") for leaf in leaves(expr)})
    for old, new in _FORMS:
        text = text.replace(old, new)
    return _MINUS.sub(r"sigmoid_of_minus(\1)", text)


def _axes(expr: Expr) -> str:
    return "".join(axis for axis in "btd" if axis in expr.axes)


def decay_of(log_decay: Expr) -> Expr:
    """exp(log_decay), without a logarithm where it is that of a sigmoid."""
    if isinstance(log_decay, Call):
        (first, *_) = log_decay.args
        if log_decay.function == "logsigmoid":
            return Call("sigmoid", (first,))
        if log_decay.function == "neg" and isinstance(first, Call) and first.function == "softplus":
            return Call("sigmoid", (-first.args[0],))
    return Call("exp", (log_decay,))


def canonical(expr: Expr, log_decay: Expr | None = None) -> Expr:
    """The same value with products in one order: number, what has no time axis, the rest; a division by a root as a
    product with its reciprocal. log_decay, canonical: exp(2 log_decay) is the square of exp(log_decay)."""
    if not isinstance(expr, Call):
        return expr
    if expr.function not in ("mul", "neg", "div"):
        args = tuple(canonical(arg, log_decay) for arg in expr.args)
        if expr.function == "exp" and log_decay is not None and args[0] == _scaled(2, log_decay):
            return Call("mul", (Call("exp", (log_decay,)), Call("exp", (log_decay,))))
        return Call(expr.function, args)
    number, factors, divisors = _factors(expr)
    factors = [canonical(one, log_decay) for one in factors]
    for one in (canonical(one, log_decay) for one in divisors):
        if isinstance(one, Call) and one.function == "sqrt":
            factors.append(Call("pow", (one.args[0], Number(-0.5))))
            continue
        factors.append(Call("div", (Number(1), one)))
    return _product(number, factors)


def _factors(expr: Expr) -> tuple[float, list[Expr], list[Expr]]:
    """A product's number, its other factors and its divisors."""
    if isinstance(expr, Number):
        return float(expr.value), [], []
    if not isinstance(expr, Call) or expr.function not in ("mul", "neg", "div"):
        return 1.0, [expr], []
    if expr.function == "neg":
        number, factors, divisors = _factors(expr.args[0])
        return -number, factors, divisors
    (a, up, down), (b, other_up, other_down) = _factors(expr.args[0]), _factors(expr.args[1])
    if expr.function == "mul":
        return a * b, up + other_up, down + other_down
    if b == 0:
        return a, up, [*down, expr.args[1]]
    return a / b, up + other_down, down + other_up


def _product(number: float, factors: list[Expr]) -> Expr:
    factors = sorted(factors, key=lambda one: (_timed(one), str(one)))
    if not factors:
        return Number(number)
    if number == -1.0:
        return -_product(1.0, factors)
    found = factors.pop(0) if number == 1.0 else Number(int(number) if number.is_integer() else number)
    for one in factors:
        found = Call("mul", (found, one))
    return found


def _scaled(number: float, expr: Expr) -> Expr:
    """number * expr, canonical as expr is."""
    return canonical(Call("mul", (Number(number), expr)))


def _is_dear(expr: Expr) -> TypeGuard[Call]:
    return isinstance(expr, Call) and expr.function in DEAR


def _timed(expr: Expr) -> bool:
    return any(isinstance(one, Input) and "t" in one.axes for one in expr.walk())

"""stabilize="max": an exponential gate in the key without an overflow, by a scale of the state that follows the gates.

    S_t = exp(f_t) S_{t-1} + exp(i_t) key_t value_t^T,    m_t = max(f_t + m_{t-1}, i_t)

With S'_t = exp(-m_t) S_t no exponent is above zero: S'_t = exp(f_t - (m_t - m_{t-1})) S'_{t-1} + exp(i_t - m_t) key_t
value_t^T. The output is divided by the normaliser, and so does not depend on m if the normaliser is scaled as well:
max(|n|, 1) becomes max(|n'|, exp(-m_t)). m is a gauge: no result depends on it, so that its own gradient is zero and it
counts as a constant in those of the gates (xLSTM: Beck et al., 2024, arXiv 2405.04517).

What follows is the same recurrence with a scalar decay and two more inputs over b t h: PEAK, m_t, and RISE,
m_t - m_{t-1}.
"""

from __future__ import annotations

from typing import NamedTuple

from .expr import NORM, Call, Expr, Input, Number, exp, minimum

PEAK, RISE = Input("peak", "bth"), Input("rise", "bth")
# m where there is nothing yet; gates of -inf leave it there
LOWEST = -1e30
# exp(-m) is cut here: far from the largest number in fp32, where what it divides is below the smallest
MOST_FLOOR = 80.0
FLOOR = exp(minimum(-PEAK, MOST_FLOOR))


class Gated(NamedTuple):
    """A key as exp(gate) * rest. gate: natural log, over some of b t h; None where there is none."""

    gate: Expr | None
    rest: Expr


def gated(key: Expr) -> Gated:
    """The factors exp(x) of a product whose x has no channels, taken out of it."""
    if not isinstance(key, Call):
        return Gated(None, key)
    if key.function == "exp" and not key.is_constant and set(key.axes) <= set("bth"):
        return Gated(key.args[0], Number(1))
    if key.function == "neg":
        inner = gated(key.args[0])
        return Gated(inner.gate, -inner.rest)
    if key.function not in ("mul", "div"):
        return Gated(None, key)
    left, right = map(gated, key.args)
    if key.function == "div":
        gate = left.gate if right.gate is None else -right.gate if left.gate is None else left.gate - right.gate
        return Gated(gate, left.rest if right.rest == Number(1) else left.rest / right.rest)
    gate = left.gate if right.gate is None else right.gate if left.gate is None else left.gate + right.gate
    if Number(1) in (left.rest, right.rest):
        return Gated(gate, left.rest if right.rest == Number(1) else right.rest)
    return Gated(gate, left.rest * right.rest)


def scaled_normalizer(expr: Expr) -> Expr | None:
    """exp(-m) f(n) over NORM, which then stands for exp(-m) n, and PEAK; None unless f is made of n and numbers such
    that it grows as they do: by + - abs minimum maximum relu, and products and quotients with a number."""
    if expr == NORM:
        return expr
    if isinstance(expr, Number):
        return expr if expr == Number(0) else FLOOR if expr == Number(1) else expr * FLOOR
    if not isinstance(expr, Call):
        return None
    if expr.is_constant:
        return expr * FLOOR
    if expr.function in ("mul", "div"):
        left, right = expr.args
        if right.is_constant and (inner := scaled_normalizer(left)) is not None:
            return Call(expr.function, (inner, right))
        if expr.function == "mul" and left.is_constant and (inner := scaled_normalizer(right)) is not None:
            return left * inner
        return None
    if expr.function not in ("add", "sub", "neg", "abs", "minimum", "maximum", "relu"):
        return None
    args = [scaled_normalizer(arg) for arg in expr.args]
    found = [arg for arg in args if arg is not None]
    return Call(expr.function, tuple(found)) if len(found) == len(args) else None


def scaled_roles(roles: dict[str, Expr]) -> dict[str, Expr]:
    """The roles of the recurrence of S', over PEAK and RISE: the key without its gate, the natural log of the gate."""
    gate, rest = gated(roles["key"])
    assert gate is not None, "validate_stabilize refuses a key without a gate"
    decay = -RISE if "log_decay" not in roles else roles["log_decay"] - RISE
    return {"query": roles["query"], "key": rest, "value": roles["value"], "log_decay": decay, "gate": gate - PEAK}

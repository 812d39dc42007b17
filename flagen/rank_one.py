"""The structure of an erase: whether a, b and key are one vector but for factors per token.

If they are, S_t = X_t - b (a^T X_t) + key value^T is S_t = X_t + u (value' - e u^T X_t)^T, with one vector u and one
number e a token: half of the products between vectors. The factors are found in the expressions, never by division.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from .expr import Call, Expr, Number
from .functions import fold


class _Factored(NamedTuple):
    """A vector as the product of `vector`, factors with the axis k, and of `factor`, those without."""

    vector: tuple[Expr, ...]
    factor: tuple[Expr, ...]


def erase_kind(roles: Mapping[str, Expr]) -> str:
    """Analysis.erase: "none", "general", "householder" or "delta". `roles`: folded expressions by role."""
    if "erase_a" not in roles:
        return "none"
    a, b, key = (Counter(_factored(roles[role]).vector) for role in ("erase_a", "erase_b", "key"))
    return "general" if a != b else "delta" if a == key else "householder"


def canonical_erase(roles: Mapping[str, Expr]) -> dict[str, Expr]:
    """The roles with erase_a and erase_b replaced, in the "delta" form, by the number "erase"; else as they are."""
    if erase_kind(roles) != "delta":
        return dict(roles)
    a, b, key = (_factored(roles[role]) for role in ("erase_a", "erase_b", "key"))
    found = dict(roles) | {"key": _product(key.vector), "erase": _product((*b.factor, *a.factor))}
    found["value"] = _product((roles["value"], *key.factor))
    del found["erase_a"], found["erase_b"]
    return found


def _factored(expr: Expr) -> _Factored:
    if "k" not in expr.axes:
        return _Factored((), (expr,))
    if isinstance(expr, Call) and expr.function == "neg":
        inner = _factored(expr.args[0])
        return _Factored(inner.vector, (Number(-1), *inner.factor))
    if isinstance(expr, Call) and expr.function == "mul":
        left, right = map(_factored, expr.args)
        return _Factored(left.vector + right.vector, left.factor + right.factor)
    if isinstance(expr, Call) and expr.function == "div" and "k" not in expr.args[1].axes:
        inner = _factored(expr.args[0])
        return _Factored(inner.vector, (*inner.factor, 1 / expr.args[1]))
    return _Factored((expr,), ())


def _product(factors: tuple[Expr, ...]) -> Expr:
    """The product of expressions, folded; one that is 1 is left out."""
    numbers = [factor for factor in factors if isinstance(factor, Number)]
    rest = [factor for factor in factors if not isinstance(factor, Number)]
    one: Expr = Number(1)
    number = fold(functools.reduce(lambda x, y: x * y, numbers, one))
    if not rest:
        return number
    product = functools.reduce(lambda x, y: x * y, rest)
    return product if number == Number(1) else -product if number == Number(-1) else product * number

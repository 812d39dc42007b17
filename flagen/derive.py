"""Derivatives of expressions, by SymPy.

Every function of the language is opaque to SymPy and carries its own derivative, written so that it is stable: that of
sigmoid is sigmoid(x) * sigmoid(-x), never an expanded quotient of exponentials. SymPy is handed trees, never text, and
is imported at the first derivative.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from .errors import SpecError
from .expr import Call, Expr, Input, Leaf, Number, as_expr, exp, minimum, sigmoid, sqrt
from .functions import fold

_X, _Y = Input("x", ""), Input("y", "")


def _call(name: str, argument: Expr) -> Expr:
    return Call(name, (argument,))


# name -> the derivative by each argument, over _X and _Y; ties of minimum and maximum split evenly, as torch does
DERIVATIVES: dict[str, tuple[Expr, ...]] = {
    "exp": (exp(_X),),
    "log": (1 / _X,),
    "sqrt": (0.5 / sqrt(_X),),
    "abs": (_call("sign", _X),),
    "sigmoid": (sigmoid(_X) * sigmoid(-_X),),
    "logsigmoid": (sigmoid(-_X),),
    "softplus": (sigmoid(_X),),
    "tanh": (4 * sigmoid(2 * _X) * sigmoid(-2 * _X),),
    "relu": (_call("step", _X),),
    "silu": (sigmoid(_X) + _X * sigmoid(_X) * sigmoid(-_X),),
    "elu": (exp(minimum(_X, 0)),),
    "minimum": (_call("half_step", _Y - _X), _call("half_step", _X - _Y)),
    "maximum": (_call("half_step", _X - _Y), _call("half_step", _Y - _X)),
    "sign": (Number(0),),
    "step": (Number(0),),
    "half_step": (Number(0),),
}

_ARITHMETIC: dict[str, Any] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "div": lambda x, y: x / y,
    "pow": lambda x, y: x**y,
    "neg": lambda x: -x,
}


def diff(expr: Expr, inp: Expr) -> Expr:
    """d expr / d inp, element by element. `inp` is a leaf: an Input or a Scalar. Raises SpecError if not finite."""
    if not any(node == inp for node in expr.walk()):
        return Number(0)
    symbols: dict[Expr, Any] = {}
    derivative = _to_sympy(expr, symbols).diff(symbols[inp])
    return fold(_from_sympy(derivative, {symbol: leaf for leaf, symbol in symbols.items()}))


def _to_sympy(expr: Expr, symbols: dict[Expr, Any]) -> Any:
    """The tree in SymPy. A float is taken as the exact fraction it is, so that nothing is rounded on the way."""
    import sympy

    if isinstance(expr, Number):
        return sympy.Rational(*expr.value.as_integer_ratio())
    if isinstance(expr, Leaf):
        if expr not in symbols:
            symbols[expr] = sympy.Dummy(expr.name, dummy_index=len(symbols))
        return symbols[expr]
    assert isinstance(expr, Call), type(expr)
    args = [_to_sympy(arg, symbols) for arg in expr.args]
    if expr.function in _ARITHMETIC:
        return _ARITHMETIC[expr.function](*args)
    return _opaque(expr.function)(*args)


@functools.cache
def _opaque(name: str) -> Any:
    """A SymPy function that evaluates nothing and knows its derivative."""
    import sympy

    def fdiff(self: Any, argindex: int = 1) -> Any:
        return _to_sympy(DERIVATIVES[name][argindex - 1], dict(zip((_X, _Y), self.args, strict=False)))

    return type(name, (sympy.Function,), {"fdiff": fdiff, "nargs": len(DERIVATIVES[name])})


def _from_sympy(tree: Any, leaves: Mapping[Any, Expr]) -> Expr:
    import sympy
    from sympy.core.sorting import default_sort_key

    if tree in leaves:
        return leaves[tree]
    if isinstance(tree, sympy.Rational):
        return _number(tree)
    if isinstance(tree, sympy.Add):
        terms = [_from_sympy(term, leaves) for term in sorted(tree.args, key=default_sort_key)]
        return functools.reduce(_plus, sorted(terms, key=_is_negative))
    if isinstance(tree, sympy.Mul):
        return _product(tree, leaves, default_sort_key)
    if isinstance(tree, sympy.Pow):
        base, exponent = tree.args
        return _power(base, exponent, leaves)
    if isinstance(tree, sympy.log):  # SymPy's own: from the derivative of x ** y by y
        return fold(_call("log", _from_sympy(tree.args[0], leaves)))
    if isinstance(tree, sympy.Function):
        return Call(type(tree).__name__, tuple(_from_sympy(arg, leaves) for arg in tree.args))
    raise SpecError(f"a derivative has no finite value: {tree}")


def _number(value: Any) -> Expr:
    try:
        return as_expr(int(value.p) if value.q == 1 and abs(value.p) <= 2**53 else int(value.p) / int(value.q))
    except OverflowError:
        raise SpecError("a derivative holds a number beyond the range of fp64; use smaller numbers") from None


def _is_negative(term: Expr) -> bool:
    """Whether the term prints with a leading minus; such terms come last in a sum."""
    while isinstance(term, Call) and term.function in ("mul", "div"):
        term = term.args[0]
    return term.value < 0 if isinstance(term, Number) else isinstance(term, Call) and term.function == "neg"


def _plus(left: Expr, right: Expr) -> Expr:
    return left - _negated(right) if _is_negative(right) else left + right


def _negated(term: Expr) -> Expr:
    """minus a term for which _is_negative holds"""
    if isinstance(term, Call) and term.function in ("mul", "div"):
        first = _negated(term.args[0])
        if term.function == "mul" and first == Number(1):
            return term.args[1]
        return Call(term.function, (first, term.args[1]))
    return term.args[0] if isinstance(term, Call) else -term


def _product(tree: Any, leaves: Mapping[Any, Expr], key: Any) -> Expr:
    import sympy

    above: list[Expr] = []
    below: list[Expr] = []
    coefficient, rest = tree.as_coeff_Mul()
    for factor in sorted(sympy.Mul.make_args(rest), key=key):
        if isinstance(factor, sympy.Pow) and factor.exp.is_Rational and factor.exp < 0:
            below.append(_power(factor.base, -factor.exp, leaves))
        else:
            above.append(_from_sympy(factor, leaves))
    # a plain leaf reads best in front of the functions of it
    above.sort(key=lambda factor: isinstance(factor, Call))
    negative = coefficient < 0
    if abs(coefficient) != 1 or not above:
        above.insert(0, _number(abs(coefficient)))
    if negative:
        above[0] = -above[0]
    result = functools.reduce(lambda left, right: left * right, above)
    return result / functools.reduce(lambda left, right: left * right, below) if below else result


def _power(base: Any, exponent: Any, leaves: Mapping[Any, Expr]) -> Expr:
    import sympy

    if exponent.is_Rational and exponent < 0:
        return 1 / _power(base, -exponent, leaves)
    if exponent == 1:
        return _from_sympy(base, leaves)
    if exponent == sympy.Rational(1, 2):
        return sqrt(_from_sympy(base, leaves))
    return _from_sympy(base, leaves) ** _from_sympy(exponent, leaves)

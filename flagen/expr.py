"""Expressions of a spec: a small immutable tree over declared inputs, written with ordinary Python operators.

A tree is data. It is printed, differentiated and evaluated by other modules; nothing here imports torch or sympy.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeGuard

from .errors import SpecError, shown

AXES = "bthkv"  # batch, time, head, key channel, value channel: the order in which a tensor lists its axes
VECTOR = "d"  # a channel of a state that is a vector, beside b and t alone
INDICES = ("head", "heads")

# name -> number of arguments; what a user may write. Their text and derivatives are in functions.py.
FUNCTION_ARITY = {
    "exp": 1,
    "log": 1,
    "sqrt": 1,
    "abs": 1,
    "sigmoid": 1,
    "logsigmoid": 1,
    "softplus": 1,
    "tanh": 1,
    "relu": 1,
    "silu": 1,
    "elu": 1,
    "minimum": 2,
    "maximum": 2,
}
# functions of a whole vector of key channels, not element by element; where they may stand is validate's business
ROW_FUNCTIONS = {"l2norm": 1}
L2NORM_EPS = 1e-6
OPERATORS = ("add", "sub", "mul", "div", "pow", "neg")
# limits of one expression, however it is written; they keep every step after this one quick
MAX_NODES = 500
MAX_DEPTH = 60
MAX_TEXT = 4000  # characters
# appear in derivatives only: sign (0 at 0), step (x > 0 as 0/1), half_step (0.5 at 0)
DERIVATIVE_FUNCTIONS = ("sign", "step", "half_step")
_ARITY = FUNCTION_ARITY | ROW_FUNCTIONS | dict.fromkeys(DERIVATIVE_FUNCTIONS, 1)
_ARITY |= dict.fromkeys(OPERATORS, 2) | {"neg": 1}


class Expr:
    """A node. Combine nodes and numbers with + - * / ** and unary minus, and with the functions of this module."""

    __slots__ = ()

    def __add__(self, other: Operand) -> Expr:
        return _call("add", self, other)

    def __radd__(self, other: Operand) -> Expr:
        return _call("add", other, self)

    def __sub__(self, other: Operand) -> Expr:
        return _call("sub", self, other)

    def __rsub__(self, other: Operand) -> Expr:
        return _call("sub", other, self)

    def __mul__(self, other: Operand) -> Expr:
        return _call("mul", self, other)

    def __rmul__(self, other: Operand) -> Expr:
        return _call("mul", other, self)

    def __truediv__(self, other: Operand) -> Expr:
        return _call("div", self, other)

    def __rtruediv__(self, other: Operand) -> Expr:
        return _call("div", other, self)

    def __pow__(self, other: Operand) -> Expr:
        return _call("pow", self, other)

    def __rpow__(self, other: Operand) -> Expr:
        return _call("pow", other, self)

    def __neg__(self) -> Expr:
        # a negative number is one node, so that the text -5 and the tree agree
        return Number(-self.value) if isinstance(self, Number) else Call("neg", (self,))

    def __abs__(self) -> Expr:
        # the builtin, which stands in a lambda where flagen's own is not imported
        return Call("abs", (self,))

    def __pos__(self) -> Expr:
        return self

    def __bool__(self) -> bool:
        raise SpecError(
            "an expression has no truth value; use minimum, maximum, relu or abs instead of if, and, or, min or max"
        )

    def __lt__(self, other: Operand) -> bool:
        return bool(self)

    __le__ = __gt__ = __ge__ = __lt__

    def __str__(self) -> str:
        return to_text(self)

    @property
    def children(self) -> tuple[Expr, ...]:
        return ()

    def walk(self) -> Iterator[Expr]:
        """Every node, parents before children, left to right, repeats included."""
        yield self
        for child in self.children:
            yield from child.walk()

    @property
    def inputs(self) -> tuple[Input, ...]:
        """The distinct inputs, in order of first appearance."""
        return tuple(dict.fromkeys(node for node in self.walk() if isinstance(node, Input)))

    @property
    def scalars(self) -> tuple[Scalar, ...]:
        """The distinct host-side numbers, in order of first appearance."""
        return tuple(dict.fromkeys(node for node in self.walk() if isinstance(node, Scalar)))

    @property
    def axes(self) -> str:
        """The axes the value varies over, as letters in the order of AXES, without spaces: "bthk"."""
        found = {axis for node in self.inputs for axis in node.axes}
        if any(isinstance(node, Index) and node.name == "head" for node in self.walk()):
            found.add("h")
        return "".join(axis for axis in AXES + VECTOR if axis in found)

    @property
    def is_constant(self) -> bool:
        """Whether it has no tensor input: only head, heads, host-side numbers and literals."""
        return not self.inputs


Operand = Expr | int | float


@dataclass(frozen=True, slots=True)
class Number(Expr):
    value: int | float

    def __post_init__(self) -> None:
        # no subclass of theirs: its repr becomes text
        if type(self.value) not in (int, float):
            raise SpecError(f"expected a number, got {type(self.value).__name__}: {shown(self.value)}")


class Leaf(Expr):
    """What has a name: an Input, an Index or a Scalar. Every node is a Number, a Leaf or a Call."""

    __slots__ = ()
    name: str


@dataclass(frozen=True, slots=True)
class Index(Leaf):
    """`head`: the index of the head, from 0. `heads`: how many there are."""

    name: str

    def __post_init__(self) -> None:
        if type(self.name) is not str or self.name not in INDICES:
            raise SpecError(f"an Index is head or heads, got {shown(self.name)}")


@dataclass(frozen=True, slots=True)
class Scalar(Leaf):
    """A host-side number: a Python float, given by keyword at the call. It takes no gradient."""

    name: str

    def __post_init__(self) -> None:
        _check_name("Scalar", self.name)


@dataclass(frozen=True, slots=True, init=False)
class Input(Leaf):
    """A tensor argument. `axes` are einops letters in the order b t h k v, such as "b t h k"; kept without spaces.

    Those of a recurrence whose state is a vector are b t d, d its channels.
    `low` and `high` declare bounds on its values that the analysis may use.
    """

    name: str
    axes: str
    low: float | None = None
    high: float | None = None

    def __init__(self, name: str, axes: str, *, low: float | None = None, high: float | None = None) -> None:
        _check_name("Input", name)
        low, high = _bound(name, "low", low), _bound(name, "high", high)
        if low is not None and high is not None and low > high:
            raise SpecError(f"Input {name!r}: low={low} is above high={high}; swap them")
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "axes", _checked_axes(name, axes))
        object.__setattr__(self, "low", low)
        object.__setattr__(self, "high", high)


@dataclass(frozen=True, slots=True)
class Call(Expr):
    """An operator of OPERATORS, a function of FUNCTION_ARITY or ROW_FUNCTIONS, or (in derivatives only) one of
    DERIVATIVE_FUNCTIONS."""

    function: str
    args: tuple[Expr, ...]

    @property
    def children(self) -> tuple[Expr, ...]:
        return self.args

    def __post_init__(self) -> None:
        if type(self.function) is not str or self.function not in _ARITY:
            raise SpecError(f"{shown(self.function)} is no function of the language; call one of flagen's functions")
        if len(self.args) != _ARITY[self.function] or not all(isinstance(arg, _NODES) for arg in self.args):
            raise SpecError(f"{self.function} takes {_ARITY[self.function]} expression(s), got {shown(self.args)}")


_NODES = (Number, Index, Scalar, Input, Call)


def as_expr(value: Operand) -> Expr:
    """A number as a node; a node as itself. Raises SpecError on anything else."""
    if isinstance(value, _NODES):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return Number(_canonical(value))
    raise SpecError(f"expected an expression or a number, got {type(value).__name__}: {shown(value)}")


def is_finite_number(value: object) -> TypeGuard[int | float]:
    """Whether it is an int or float, and not True, inf, nan or an int beyond the range of floats."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _canonical(value: int | float) -> int | float:
    """One form per number, so that equal specs have equal text: 2.0 and numpy's 2.0 are 2."""
    if isinstance(value, float):
        if not math.isfinite(value):
            raise SpecError(f"a number in an expression must be finite, got {value}")
        value = float(value)
        return int(value) if value.is_integer() and -(2**53) <= value <= 2**53 else value
    if not -(2**53) <= value <= 2**53:
        raise SpecError("a whole number in an expression must be at most 2 ** 53; write it as a float")
    return int(value)


def _check_name(kind: str, name: object) -> None:
    if type(name) is not str:
        raise SpecError(f"{kind}: the name must be a string, got {type(name).__name__}: {shown(name)}")
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,39}", name):
        raise SpecError(
            f"{kind}: {shown(name)} is no identifier; use 1 to 40 letters a-z A-Z, digits and _, not a digit first"
        )


def _checked_axes(name: str, axes: object) -> str:
    if type(axes) is not str:
        raise SpecError(
            f"Input {name!r}: axes must be a string such as 'b t h k', got {type(axes).__name__}: {shown(axes)}"
        )
    letters = axes.replace(" ", "")
    for letter in letters:
        if letter not in AXES + VECTOR:
            raise SpecError(
                f"Input {name!r}: unknown axis {letter!r} in {shown(axes)}; the axes are b (batch), t (time), "
                "h (head), k (key channel) and v (value channel), or of a vector state b, t and d (channel)"
            )
    if len(set(letters)) < len(letters):
        raise SpecError(f"Input {name!r}: {shown(axes)} repeats an axis; give each axis once")
    ordered = "".join(letter for letter in AXES + VECTOR if letter in letters)
    if letters != ordered:
        raise SpecError(f"Input {name!r}: axes {shown(axes)} are out of order; write {' '.join(ordered)!r}")
    return letters


def _bound(name: str, which: str, value: object) -> float | None:
    if value is None:
        return None
    if not is_finite_number(value):
        raise SpecError(f"Input {name!r}: {which} must be a finite number or None, got {shown(value)}")
    return float(value)


def substitute(expr: Expr, values: Mapping[Expr, Expr]) -> Expr:
    """`expr` with every node that is a key of `values` replaced by its value."""
    if expr in values:
        return values[expr]
    if isinstance(expr, Call):
        args = tuple(substitute(arg, values) for arg in expr.args)
        if expr.function == "neg":
            return -args[0]
        return expr if args == expr.args else Call(expr.function, args)
    return expr


# how tightly each operator binds, and the level its left and right operands need to stand without parentheses
LEVELS = {"add": 1, "sub": 1, "mul": 2, "div": 2, "neg": 3, "pow": 4}
ATOM = 5
SYMBOLS = {"add": "+", "sub": "-", "mul": "*", "div": "/", "pow": "**"}
OPERAND_LEVELS = {"add": (1, 2), "sub": (1, 2), "mul": (2, 3), "div": (2, 3), "pow": (5, 3), "neg": (3,)}


def to_text(expr: Expr) -> str:
    """The expression as text with no more parentheses than it needs; parse.parse gives an equal tree back."""
    return _text(expr)[0]


def _text(expr: Expr) -> tuple[str, int]:
    if isinstance(expr, Number):
        return repr(expr.value), LEVELS["neg"] if expr.value < 0 else ATOM
    if isinstance(expr, Leaf):
        return expr.name, ATOM
    assert isinstance(expr, Call), type(expr)
    texts = [_text(arg) for arg in expr.args]
    if expr.function not in LEVELS:
        return f"{expr.function}({', '.join(text for text, _ in texts)})", ATOM
    needed = OPERAND_LEVELS[expr.function]
    operands = [text if level >= need else f"({text})" for (text, level), need in zip(texts, needed, strict=True)]
    if expr.function == "neg":
        return f"-{operands[0]}", LEVELS["neg"]
    return f"{operands[0]} {SYMBOLS[expr.function]} {operands[1]}", LEVELS[expr.function]


def _call(function: str, *args: Operand) -> Expr:
    return Call(function, tuple(as_expr(arg) for arg in args))


def _function(name: str) -> Callable[..., Expr]:
    arity = FUNCTION_ARITY[name]

    def function(*args: Operand) -> Expr:
        if len(args) != arity:
            raise SpecError(f"{name} takes {arity} argument{'s' if arity > 1 else ''}, got {len(args)}")
        return _call(name, *args)

    function.__name__ = function.__qualname__ = name
    function.__doc__ = f"The function {name} of the language, element by element."
    return function


exp, log, sqrt, abs, sigmoid, logsigmoid, softplus, tanh, relu, silu, elu, minimum, maximum = (
    _function(name) for name in FUNCTION_ARITY
)


def l2norm(x: Operand) -> Expr:
    """x / sqrt(sum of x^2 over the key channels + 1e-6): a vector of unit norm, or shorter where x is tiny.

    It may stand anywhere in query, key and erase, as in beta * l2norm(silu(k)); x must have the axis k.
    """
    return _call("l2norm", x)


head, heads = Index("head"), Index("heads")
q, k, v = Input("q", "bthk"), Input("k", "bthk"), Input("v", "bthv")
NORM = Input("n", "bth")  # stands for the normaliser in a spec's `normalize`
FEATURE = Input("x", "")  # stands for the query and for the key in an elementwise feature map


@dataclass(frozen=True, slots=True)
class Taylor:
    """The feature map of a Taylor polynomial of exp: query . key becomes 1 + s, or 1 + s + s^2 / 2 (order 2)."""

    order: int

    def __post_init__(self) -> None:
        if type(self.order) is not int or self.order not in (1, 2):
            raise SpecError(
                f"taylor({shown(self.order)}): the order must be 1 or 2; higher orders need too large a state"
            )

    def __str__(self) -> str:
        return f"taylor({self.order})"


def taylor(order: int) -> Taylor:
    """The Taylor feature map of order 1 (1 + s) or 2 (1 + s + s^2 / 2), with s = scale * query . key."""
    return Taylor(order)

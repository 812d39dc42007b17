"""Expressions at random, by Hypothesis: every function of the language over inputs with any axes, well conditioned.

Inputs are about standard normal (samples.py), so values stay within a few tens: powers are low, exp takes half of its
argument, factors are bounded, and what must be positive or negative is so for any inputs. In every list of forms the
simplest comes first, since that is where Hypothesis shrinks to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, TypeVar

from hypothesis import strategies as st

from .expr import (
    Expr,
    Input,
    Scalar,
    as_expr,
    elu,
    exp,
    head,
    heads,
    l2norm,
    log,
    logsigmoid,
    maximum,
    minimum,
    relu,
    sigmoid,
    silu,
    softplus,
    sqrt,
    tanh,
)
from .expr import abs as absolute

T = TypeVar("T")
Draw = Callable[[st.SearchStrategy[Any]], Any]
Form = Callable[[Expr], Expr]

# of any sign, growing at most like x ** 2 within the inputs' range. None is flat where it is zero, as log(x * x + 1)
# is: in fp32 that is 0 for |x| < 2e-4, and a relu after it has another derivative there
SIGNED: tuple[Form, ...] = (
    lambda x: x,
    lambda x: -x,
    lambda x: x * 0.7 + 0.1,
    tanh,
    silu,
    elu,
    relu,
    absolute,
    softplus,
    logsigmoid,
    lambda x: x * x / 2,
    lambda x: x**3 / 8,
    lambda x: exp(x / 2) - 1,
    lambda x: 1 - sigmoid(x),
    lambda x: log(x * x + 0.5),
    lambda x: x / sqrt(x * x + 1),
    lambda x: maximum(x, -0.3),
    lambda x: minimum(x, 0.3) - 0.5,
)
# from -1 to 1
BOUNDED: tuple[Form, ...] = (
    tanh,
    sigmoid,
    lambda x: x / (1 + absolute(x)),
    lambda x: x * (x**2 + 1) ** -0.5,
    lambda x: exp(-x * x),
    lambda x: minimum(maximum(x, -1), 1),
    lambda x: 1 - exp(-softplus(x)),
)
# > 0, and not near it but far out
POSITIVE: tuple[Form, ...] = (
    sigmoid,
    softplus,
    lambda x: elu(x) + 1,
    lambda x: exp(x / 2),
    lambda x: x * x + 0.1,
    lambda x: 1 / (1 + absolute(x)),
    lambda x: sqrt(x * x + 0.5),
    lambda x: maximum(tanh(x), 0.2),
    lambda x: 2 ** tanh(x),
    lambda x: relu(x) + 0.3,
    lambda x: log(2 + x * x),
    lambda x: (1 + absolute(x)) ** 1.5 / 4,
    lambda x: minimum(softplus(x), 2),
    lambda x: 1.5 - tanh(x),
    lambda x: (x * x + 1) ** -2,
    lambda x: silu(x) + 0.5,
)
# <= 0 for every x
NEGATIVE: tuple[Form, ...] = (
    lambda x: logsigmoid(x) / 4,
    lambda x: -relu(x),
    lambda x: -exp(x / 2) / 4,
    lambda x: -softplus(x) * 0.1,
    lambda x: -absolute(x) / 2,
    lambda x: log(sigmoid(x + 2)),
    lambda x: minimum(x, -x) / 2,
    lambda x: minimum(x, 0),
    lambda x: -x * x / 8,
    lambda x: maximum(logsigmoid(x) / 2, -1),
    lambda x: elu(minimum(x, 0)),
    lambda x: tanh(-relu(x)),
    lambda x: -sqrt(x * x + 0.01) / 4,
    lambda x: log(1 - 0.9 * sigmoid(x)),
    lambda x: log(1 / (1 + exp(x))) / 8,
    lambda x: -log(1 + x**2) / 2,
)
# <= 0 where x is
DECLARED: tuple[Form, ...] = (lambda x: x, lambda x: x / 4, lambda x: maximum(x, -1))
# from 0 to 1
STRENGTHS: tuple[Form, ...] = (sigmoid, lambda x: 1 - exp(-softplus(x)), lambda x: minimum(relu(x), 1))
# a number per head, > 0
CONSTANTS: tuple[Callable[[], Expr], ...] = (
    lambda: (head + 1) / heads,
    lambda: Scalar("rate") / 2,
    lambda: 2 ** (-1 - head),
    lambda: Scalar("rate") / (1 + head),
    lambda: 1 - Scalar("layer") / (1 + Scalar("layers")),
    lambda: exp(-head / 4),
)
# a log decay per head, <= 0
CONSTANT_DECAYS: tuple[Callable[[], Expr], ...] = (
    lambda: as_expr(-0.05),
    lambda: log(1 - 2 ** (-3 - head)),
    lambda: -(2 / heads) * (1 - Scalar("layer") / (1 + Scalar("layers"))) * head,
    lambda: -Scalar("rate") / (4 + head),
    lambda: logsigmoid(head + 1),
)
WEIGHTS = (0.2, 1, 0.05)


def subsets(axes: str) -> tuple[str, ...]:
    """Every non-empty selection of axes, the smallest first."""
    return tuple("".join(chosen) for n in range(1, len(axes) + 1) for chosen in combinations(axes, n))


def one_of(draw: Draw, choices: Sequence[T]) -> T:
    found: T = draw(st.sampled_from(choices))
    return found


def leaf(draw: Draw, axes: str, others: Sequence[Input] = ()) -> Input:
    """One of three inputs with these axes, so that roles share some; or one of `others` that has them."""
    names = [Input(f"{letter}_{axes}", axes) for letter in "xyz"]
    return one_of(draw, (*names, *(one for one in others if one.axes == axes)))


def signed(draw: Draw, axes: str, others: Sequence[Input] = ()) -> Expr:
    """Of any sign, over exactly these axes."""
    kind = one_of(draw, ("form", "form", "two forms", "product", "sum", "extremum", "constant"))
    x = leaf(draw, axes, others)
    if kind == "form":
        return one_of(draw, SIGNED)(x)
    if kind == "two forms":
        return one_of(draw, SIGNED)(one_of(draw, BOUNDED)(x))
    if kind == "product":
        return one_of(draw, BOUNDED)(x) * bounded(draw, axes)
    if kind == "sum":
        return one_of(draw, SIGNED)(x) + bounded(draw, axes)
    if kind == "extremum":
        y = leaf(draw, one_of(draw, subsets(axes)))
        return one_of(draw, (minimum, maximum))(x, y)
    return one_of(draw, BOUNDED)(x) * one_of(draw, CONSTANTS)() if "h" in axes else one_of(draw, BOUNDED)(x)


def bounded(draw: Draw, axes: str) -> Expr:
    """From -1 to 1, over some of these axes."""
    return one_of(draw, BOUNDED)(leaf(draw, one_of(draw, subsets(axes))))


def positive(draw: Draw, axes: str, others: Sequence[Input] = ()) -> Expr:
    """> 0, over exactly these axes; "" or "h" may be a number per head."""
    if not axes or (axes == "h" and draw(st.booleans())):
        return one_of(draw, CONSTANTS)()
    kind = one_of(draw, ("form", "form", "two forms", "product", "quotient"))
    x = leaf(draw, axes, others)
    if kind == "form":
        return one_of(draw, POSITIVE)(x)
    if kind == "two forms":
        return one_of(draw, POSITIVE)(one_of(draw, BOUNDED)(x))
    other = positive(draw, one_of(draw, ("", *subsets(axes)) if "h" in axes else subsets(axes)))
    found = one_of(draw, POSITIVE)(one_of(draw, BOUNDED)(x))
    return found * other if kind == "product" else found / (0.5 + other)


def log_decay(draw: Draw, axes: str, others: Sequence[Input] = ()) -> Expr:
    """<= 0 for any inputs, over exactly these axes; "" or "h" may be a number per head."""
    if not axes or (axes == "h" and draw(st.booleans())):
        return one_of(draw, CONSTANT_DECAYS)()
    kind = one_of(draw, ("form", "itself", "form", "shifted", "positive", "weighted", "declared"))
    if kind == "itself":
        return Input(f"g_{axes}", axes)  # the gate is computed before the call; samples makes it <= 0
    if kind == "declared":
        bound = Input(f"w_{axes}", axes, low=-2, high=one_of(draw, (0, -0.01)))
        return one_of(draw, DECLARED)(bound)
    x = leaf(draw, axes, others)
    if kind == "form":
        return one_of(draw, NEGATIVE)(x)
    if kind == "shifted":
        return one_of(draw, NEGATIVE)(x + bounded(draw, axes))
    if kind == "positive":
        return -one_of(draw, WEIGHTS) * positive(draw, axes, others)
    weight = positive(draw, one_of(draw, ("", *subsets(axes)) if "h" in axes else subsets(axes)))
    return one_of(draw, NEGATIVE)(one_of(draw, BOUNDED)(x)) * weight


def strength(draw: Draw, axes: str) -> Expr:
    """From 0 to 1, over exactly these axes."""
    return one_of(draw, STRENGTHS)(leaf(draw, axes))


def role(draw: Draw, own: Input, others: Sequence[Input], rows: bool) -> Expr:
    """Query, key or value: the input of its name, another, or one that is gated or mapped. rows: whether it may be made
    a vector of norm 1, which a value is not.
    """
    kind = one_of(draw, ("own", "own", "own", "gated", "form", "renamed", "sum", "positive", "constant", "unit"))
    axes = own.axes
    if kind == "unit":
        return l2norm(own) * one_of(draw, (1, 2)) if rows and "k" in axes else -own
    if kind == "own":
        return own
    if kind == "gated":
        return own * bounded(draw, axes)
    if kind == "form":
        return one_of(draw, SIGNED)(own)
    if kind == "renamed":
        return leaf(draw, axes)
    if kind == "sum":
        return own + signed(draw, one_of(draw, subsets(axes)), others)
    if kind == "positive":
        return positive(draw, axes, (own,))
    return own * one_of(draw, CONSTANTS)()

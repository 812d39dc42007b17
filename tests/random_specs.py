"""Specs at random: any combination that the language allows, from a seed."""

from __future__ import annotations

import random
import warnings

from flagen.errors import SpecError
from flagen.expr import (
    Expr,
    Input,
    Scalar,
    elu,
    exp,
    head,
    heads,
    k,
    log,
    logsigmoid,
    maximum,
    minimum,
    q,
    relu,
    sigmoid,
    silu,
    softplus,
    sqrt,
    tanh,
    v,
)
from flagen.expr import abs as absolute
from flagen.spec import Spec, SpecWarning, taylor

DECAY_AXES = ("", "h", "h k", "h v", "b h", "b t h", "b t h k", "b t h v", "b h k", "t h", "b t k")
OTHER_AXES = ("h", "h k", "b h", "b t h", "b t h k")
PLAIN = (sigmoid, tanh, silu, softplus, elu, relu, lambda x: x * 0.7 + 0.1, lambda x: x * x / 2, absolute)
POSITIVE = (
    sigmoid,
    softplus,
    lambda x: exp(x / 2),
    lambda x: elu(x) + 1,
    lambda x: x * x + 0.1,
    lambda x: 1 / (1 + absolute(x)),
    lambda x: sqrt(x * x + 0.5),
    lambda x: maximum(tanh(x), 0.2),
    lambda x: 2 ** tanh(x),
)
SMALL = (0.05, 0.2, 1)


class Draw:
    """Expressions over a few inputs, each declared once."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.declared: dict[str, Input] = {}

    def input(self, axes: str) -> Input:
        """A new input or, now and then, one that is there already."""
        name = f"x_{axes.replace(' ', '')}{self.random.randrange(2)}"
        return self.declared.setdefault(name, Input(name, axes))

    def positive(self, axes: str) -> Expr:
        """> 0, over these axes; "" for a number per head."""
        if not axes:
            return self.random.choice(
                (2 ** (-1 - head), (head + 1) / heads, Scalar("rate") / (1 + head), 0.3 + head * 0)
            )
        found = self.random.choice(POSITIVE)(self.input(axes))
        others = [other for other in OTHER_AXES if set(other) <= set(axes)]
        if others and self.random.random() < 0.3:
            found = found * self.random.choice(POSITIVE)(self.input(self.random.choice(others)))
        return found

    def any(self, axes: str) -> Expr:
        return self.random.choice(PLAIN)(self.input(axes))

    def log_decay(self) -> Expr | None:
        axes = self.random.choice((None, *DECAY_AXES))
        if axes is None:
            return None
        if axes and self.random.random() < 0.5:
            x = self.input(axes)
            forms = (logsigmoid(x) / 4, logsigmoid(x + self.input("h")), log(sigmoid(x)), minimum(x, -x) / 2, -relu(x))
            return self.random.choice(forms)
        return -self.random.choice(SMALL) * self.positive(axes)

    def role(self, expr: Expr, axes: str) -> Expr:
        """query, key or value: mostly as it is, else gated or mapped."""
        kind = self.random.random()
        if kind < 0.5:
            return expr
        if kind < 0.75:
            return expr * self.any(self.random.choice(("b t h", axes, "h")))
        return self.random.choice(POSITIVE)(expr)


def random_spec(seed: int) -> Spec:
    """The spec of a seed; what the language refuses is drawn again."""
    draw = Draw(seed)
    while True:
        draw.declared.clear()
        choose = draw.random.random
        arguments = {
            "log_decay": draw.log_decay(),
            "query": draw.role(q, "b t h k"),
            "key": draw.role(k, "b t h k"),
            "value": draw.role(v, "b t h v"),
            "phase": draw.any(draw.random.choice(OTHER_AXES)) * 2 if choose() < 0.2 else None,
            "bonus": draw.positive(draw.random.choice(OTHER_AXES)) if choose() < 0.3 else None,
            "scale": draw.random.choice((None, None, 1, 0.3)),
        }
        kind = draw.random.choice(("none", "none", "taylor", "elementwise", "bounded"))
        if kind == "taylor":
            arguments |= {"feature_map": taylor(draw.random.choice((1, 2)))}
            arguments |= {"normalize": choose() < 0.5} if arguments["feature_map"].order == 2 else {}
        if kind == "elementwise":
            arguments |= {
                "feature_map": draw.random.choice((lambda x: elu(x) + 1, softplus)),
                "normalize": choose() < 0.7,
            }
        if kind == "bounded":
            arguments |= {"normalize": lambda n: maximum(absolute(n), 1)}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", SpecWarning)
                warnings.filterwarnings("ignore", "the normaliser may be")
                return Spec(f"random_{seed}", **arguments)
        except (SpecError, SpecWarning):
            continue

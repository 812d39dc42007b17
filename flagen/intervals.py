"""Which values an expression can take: interval arithmetic over the inputs' bounds and the functions' ranges.

An interval has open or closed ends, because "positive" and "not negative" differ: softplus(x) is in (0, inf), relu(x)
in [0, inf). Results are upper estimates: the truth may be narrower. fp64 rounding of the ends is not accounted for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from .expr import Call, Expr, Index, Input, Number
from .functions import FUNCTIONS, host_power

INF = math.inf


@dataclass(frozen=True, slots=True)
class Interval:
    """The values from `low` to `high`; an open end is itself not taken. Infinite ends count as open."""

    low: float = -INF
    high: float = INF
    low_open: bool = False
    high_open: bool = False

    @property
    def is_positive(self) -> bool:
        return self.low > 0 or (self.low == 0 and self.low_open)

    @property
    def is_negative(self) -> bool:
        return self.high < 0 or (self.high == 0 and self.high_open)

    @property
    def is_nonnegative(self) -> bool:
        return self.low >= 0

    def __neg__(self) -> Interval:
        return Interval(-self.high, -self.low, self.high_open, self.low_open)

    def __add__(self, other: Interval) -> Interval:
        return Interval(
            self.low + other.low,
            self.high + other.high,
            self.low_open or other.low_open,
            self.high_open or other.high_open,
        )

    def __mul__(self, other: Interval) -> Interval:
        return _hull([_end_product(x, y) for x in self._ends for y in other._ends])

    def reciprocal(self) -> Interval:
        if self.low >= 0 or self.high <= 0:
            if self.high <= 0 and self.low < 0:
                return -(-self).reciprocal()
            low = 1 / self.high if self.high else INF
            return Interval(low, 1 / self.low if self.low else INF, self.high_open or self.high == INF, self.low_open)
        return Interval()

    @property
    def _ends(self) -> tuple[tuple[float, bool], tuple[float, bool]]:
        return (self.low, self.low_open or self.low == -INF), (self.high, self.high_open or self.high == INF)


def _end_product(x: tuple[float, bool], y: tuple[float, bool]) -> tuple[float, bool]:
    if x[0] == 0 or y[0] == 0:  # 0 * inf is 0 here: infinite ends are not taken
        return 0.0, not ((x[0] == 0 and not x[1]) or (y[0] == 0 and not y[1]))
    return x[0] * y[0], x[1] or y[1]


def _hull(ends: list[tuple[float, bool]]) -> Interval:
    low, high = min(end[0] for end in ends), max(end[0] for end in ends)
    return Interval(
        low,
        high,
        all(is_open for value, is_open in ends if value == low),
        all(is_open for value, is_open in ends if value == high),
    )


def interval(expr: Expr) -> Interval:
    """An interval that holds every value of `expr` for any head, any scalars and any inputs within their bounds."""
    if isinstance(expr, Number):
        return Interval(expr.value, expr.value)
    if isinstance(expr, Index):
        return Interval(0, INF) if expr.name == "head" else Interval(1, INF)
    if isinstance(expr, Input):
        return Interval(-INF if expr.low is None else expr.low, INF if expr.high is None else expr.high)
    if not isinstance(expr, Call):
        return Interval()
    args = [interval(arg) for arg in expr.args]
    result = _RULES[expr.function](*args)
    if expr.function == "mul" and expr.args[0] == expr.args[1]:
        return _intersect_nonnegative(result)
    return Interval() if math.isnan(result.low) or math.isnan(result.high) else result


def _intersect_nonnegative(x: Interval) -> Interval:
    return x if x.low >= 0 else Interval(0.0, x.high, False, x.high_open)


def _increasing(
    name: str, domain: float = -INF, supremum: float = INF, infimum: float = -INF
) -> Callable[..., Interval]:
    """The rule of an increasing function, with its limits: ends reached by rounding or at infinity are open."""
    function = FUNCTIONS[name].python

    def rule(x: Interval) -> Interval:
        if x.high < domain:
            return Interval()
        low = function(x.low) if x.low >= domain and x.low != -INF else infimum
        high = function(x.high) if x.high != INF else supremum
        return Interval(low, high, x.low_open or low == infimum, x.high_open or high == supremum)

    return rule


def _sqrt(x: Interval) -> Interval:
    if x.high < 0:
        return Interval()
    low = max(x.low, 0.0)
    return Interval(math.sqrt(low), math.sqrt(x.high), x.low_open and x.low >= 0, x.high_open)


def _relu(x: Interval) -> Interval:
    return Interval(max(x.low, 0.0), max(x.high, 0.0), x.low_open and x.low >= 0, x.high_open and x.high > 0)


def _abs(x: Interval) -> Interval:
    if x.low >= 0:
        return x
    if x.high <= 0:
        return -x
    high = max(-x.low, x.high)
    return Interval(0.0, high, False, all(is_open for end, is_open in x._ends if math.fabs(end) == high))


_SILU_LOWEST_AT, _SILU_LOWEST = -1.2784645427610738, -0.27846454276107384  # both a last digit outwards


def _silu(x: Interval) -> Interval:
    silu = FUNCTIONS["silu"].python
    ends = [
        (0.0, True) if end == -INF else (INF, True) if end == INF else (silu(end), is_open) for end, is_open in x._ends
    ]
    if x.low < _SILU_LOWEST_AT < x.high:
        ends.append((_SILU_LOWEST, False))
    return _hull(ends)


def _extremum(choose: Callable[..., float]) -> Callable[[Interval, Interval], Interval]:
    def rule(x: Interval, y: Interval) -> Interval:
        low, high = choose(x.low, y.low), choose(x.high, y.high)
        # open only where every interval with that end is open there
        low_open = all(one.low_open for one in (x, y) if one.low == low)
        high_open = all(one.high_open for one in (x, y) if one.high == high)
        return Interval(low, high, low_open, high_open)

    return rule


def _power(base: Interval, exponent: Interval) -> Interval:
    if exponent.low == exponent.high and float(exponent.low).is_integer():
        return _whole_power(base, int(exponent.low))
    if base.low < 0:
        return Interval()
    if base.low == base.high > 0:  # monotone in the exponent; the ends are exact where the power is
        ends = [(_power_of_number(base.low, end), is_open) for end, is_open in exponent._ends]
        return _hull(ends)
    power = _RULES["exp"](_RULES["log"](base) * exponent)
    # 0 ** 0.5 is 0, although exp never is
    return Interval(power.low, power.high, power.low_open and power.low > 0, power.high_open)


def _power_of_number(base: float, end: float) -> float:
    if math.isinf(end):
        return 1.0 if base == 1 else INF if (end > 0) == (base > 1) else 0.0
    return host_power(base, end)


def _whole_power(base: Interval, n: int) -> Interval:
    if n < 0:
        return _whole_power(base, -n).reciprocal()
    if n == 0:
        return Interval(1.0, 1.0)
    magnitude = _abs(base) if n % 2 == 0 else base
    ends = []
    for end, is_open in magnitude._ends:
        try:
            ends.append((float(end) ** n, is_open))
        except OverflowError:
            ends.append((math.copysign(INF, end) if n % 2 else INF, True))
    return _hull(ends)


def _l2norm(x: Interval) -> Interval:
    low, high = -1.0 if x.low < 0 else 0.0, 1.0 if x.high > 0 else 0.0
    return Interval(low, high, x.low < 0 or x.is_positive, x.high > 0 or x.is_negative)


_RULES: dict[str, Callable[..., Interval]] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x + -y,
    "mul": lambda x, y: x * y,
    "div": lambda x, y: x * y.reciprocal(),
    "neg": lambda x: -x,
    "pow": _power,
    "exp": _increasing("exp", infimum=0.0),
    "log": _increasing("log", domain=0.0),
    "sqrt": _sqrt,
    "abs": _abs,
    "sigmoid": _increasing("sigmoid", supremum=1.0, infimum=0.0),
    "logsigmoid": _increasing("logsigmoid", supremum=0.0),
    "softplus": _increasing("softplus", infimum=0.0),
    "tanh": _increasing("tanh", supremum=1.0, infimum=-1.0),
    "relu": _relu,
    "silu": _silu,
    "elu": _increasing("elu", infimum=-1.0),
    "minimum": _extremum(min),
    "maximum": _extremum(max),
    "l2norm": _l2norm,
    "sign": lambda x: Interval(-1.0, 1.0),
    "step": lambda x: Interval(0.0, 1.0),
    "half_step": lambda x: Interval(0.0, 1.0),
}

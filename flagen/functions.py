"""The functions of the language: how each is evaluated by Python, by torch and by Triton.

Every form is stable: no intermediate overflows where the result does not. Derivatives are in derive.py. torch is
imported at the first evaluation with tensors, never by importing this module.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import SpecError
from .expr import (
    ATOM,
    L2NORM_EPS,
    LEVELS,
    OPERAND_LEVELS,
    ROW_FUNCTIONS,
    SYMBOLS,
    Call,
    Expr,
    Index,
    Leaf,
    Number,
    Scalar,
)

if TYPE_CHECKING:
    import torch

LN2 = math.log(2.0)
MAX_TRITON_TEXT = 20_000  # characters; powers of powers repeat their base


@dataclass(frozen=True, slots=True)
class Function:
    """One function. `triton` is a format text over fp32 values in which {0} stands alone between delimiters and {a0} is
    an atom, parenthesised where needed; `level` is how tightly the result binds. `torch` is a dotted name or callable.
    """

    name: str
    arity: int
    python: Callable[..., float]
    torch: str | Callable[..., Any]
    triton: str
    level: int = ATOM

    def torch_callable(self) -> Callable[..., Any]:
        if callable(self.torch):
            return self.torch
        module, _, name = self.torch.rpartition(".")
        found: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return found


# --- Python, in fp64 and with the results of IEEE arithmetic instead of exceptions


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def _log(x: float) -> float:
    if x == 0:
        return -math.inf
    return math.log(x) if x > 0 else math.nan


def _sqrt(x: float) -> float:
    return math.sqrt(x) if x >= 0 else math.nan


def _sigmoid(x: float) -> float:
    if x >= 0:
        return 1.0 / (1.0 + _exp(-x))
    small = _exp(x)
    return small / (1.0 + small)


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(_exp(-math.fabs(x)))


def _logsigmoid(x: float) -> float:
    return -_softplus(-x)


def _elu(x: float) -> float:
    return x if x > 0 else math.expm1(x)


def _sign(x: float) -> float:
    return float((x > 0) - (x < 0))


def _step(x: float) -> float:
    return float(x > 0)


def _half_step(x: float) -> float:
    return 1.0 if x > 0 else 0.5 if x == 0 else 0.0


def _divide(x: float, y: float) -> float:
    if y == 0:
        return math.nan if x == 0 or math.isnan(x) else math.copysign(math.inf, x) * math.copysign(1.0, y)
    return x / y


def host_power(x: float, y: float) -> float:
    """x ** y with the results of IEEE arithmetic: inf on overflow, nan where there is no real power."""
    try:
        result = float(x) ** float(y)
    except OverflowError:
        return -math.inf if x < 0 and y % 2 == 1 else math.inf
    except ZeroDivisionError:
        return math.inf
    return math.nan if isinstance(result, complex) else result


# --- torch, where no single function is stable or takes every argument


def _torch_softplus(x: torch.Tensor) -> torch.Tensor:
    import torch

    # torch's own softplus turns linear above 20, which is 2e-9 off in fp64
    return torch.logaddexp(x, torch.zeros_like(x))


def _torch_step(x: torch.Tensor) -> torch.Tensor:
    return (x > 0).to(x.dtype)


def _torch_half_step(x: torch.Tensor) -> torch.Tensor:
    return (x > 0).to(x.dtype) + 0.5 * (x == 0).to(x.dtype)


_NN = "torch.nn.functional."
# exp of what is at most 0, zero for results below 2^-126: tl.exp takes three more instructions, which see to those
EXP_OF_NEGATIVE = "tl.exp2(tl.minimum({0}, 0.0) * 1.4426950408889634)"
_SOFTPLUS_TAIL = "tl.log(1.0 + tl.exp(-tl.abs({0})))"

FUNCTIONS: dict[str, Function] = {
    function.name: function
    for function in (
        Function("exp", 1, _exp, "torch.exp", "tl.exp({0})"),
        Function("log", 1, _log, "torch.log", "tl.log({0})"),
        Function("sqrt", 1, _sqrt, "torch.sqrt", "tl.sqrt({0})"),
        Function("abs", 1, math.fabs, "torch.abs", "tl.abs({0})"),
        Function("sigmoid", 1, _sigmoid, "torch.sigmoid", "tl.sigmoid({0})"),
        Function(
            "logsigmoid", 1, _logsigmoid, _NN + "logsigmoid", "tl.minimum({0}, 0.0) - " + _SOFTPLUS_TAIL, LEVELS["sub"]
        ),
        Function("softplus", 1, _softplus, _torch_softplus, "tl.maximum({0}, 0.0) + " + _SOFTPLUS_TAIL, LEVELS["add"]),
        Function("tanh", 1, math.tanh, "torch.tanh", "2.0 * tl.sigmoid(2.0 * {a0}) - 1.0", LEVELS["sub"]),
        Function("relu", 1, lambda x: max(x, 0.0), "torch.relu", "tl.maximum({0}, 0.0)"),
        Function("silu", 1, lambda x: x * _sigmoid(x), _NN + "silu", "{a0} * tl.sigmoid({0})", LEVELS["mul"]),
        Function("elu", 1, _elu, _NN + "elu", f"tl.where({{0}} > 0.0, {{0}}, {EXP_OF_NEGATIVE} - 1.0)"),
        Function("minimum", 2, min, "torch.minimum", "tl.minimum({0}, {1})"),
        Function("maximum", 2, max, "torch.maximum", "tl.maximum({0}, {1})"),
        Function("sign", 1, _sign, "torch.sign", "tl.where({0} > 0.0, 1.0, tl.where({0} < 0.0, -1.0, 0.0))"),
        Function("step", 1, _step, _torch_step, "tl.where({0} > 0.0, 1.0, 0.0)"),
        Function(
            "half_step", 1, _half_step, _torch_half_step, "tl.where({0} > 0.0, 1.0, tl.where({0} < 0.0, 0.0, 0.5))"
        ),
    )
}

_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "div": lambda x, y: x / y,
    "neg": lambda x: -x,
    "pow": lambda x, y: x**y,
}
_HOST_ARITHMETIC = _ARITHMETIC | {"div": _divide, "pow": host_power}


def _host_call(function: str, args: list[float]) -> float:
    if function in _HOST_ARITHMETIC:
        return float(_HOST_ARITHMETIC[function](*args))
    if any(math.isnan(arg) for arg in args):
        return math.nan
    return float(FUNCTIONS[function].python(*args))


def l2norm(x: torch.Tensor, channel: int = -1) -> tuple[torch.Tensor, torch.Tensor]:
    """x / sqrt(sum of x^2 over the axis `channel` + eps), and what x was multiplied by, with 1 for that axis."""
    factor = (x * x).sum(channel, keepdim=True).add(L2NORM_EPS).rsqrt()
    return x * factor, factor


def evaluate(expr: Expr, env: Mapping[str, Any], heads: int, channel: int = -1) -> Any:
    """The value of `expr` in torch, by operations that autograd follows.

    `env` gives each input as a tensor that broadcasts with the others, each scalar as a float, and `head`, where the
    expression uses it, as a tensor. `channel`: the tensors' axis of key channels, for l2norm. The dtype is that of the
    tensors; without any tensor the result is a float.
    """
    if isinstance(expr, Number):
        return expr.value
    if isinstance(expr, Index):
        return heads if expr.name == "heads" else env["head"]
    if isinstance(expr, Leaf):
        return env[expr.name]
    assert isinstance(expr, Call), type(expr)
    args = [evaluate(arg, env, heads, channel) for arg in expr.args]
    if expr.function in ROW_FUNCTIONS:
        return l2norm(args[0], channel)[0]
    tensors = [arg for arg in args if not isinstance(arg, (int, float))]
    if not tensors:
        return _host_call(expr.function, [float(arg) for arg in args])
    if expr.function in _ARITHMETIC:
        return _ARITHMETIC[expr.function](*args)
    # torch.minimum and torch.maximum take tensors only
    like = tensors[0]
    args = [like.new_tensor(arg) if isinstance(arg, (int, float)) else arg for arg in args]
    return FUNCTIONS[expr.function].torch_callable()(*args)


def evaluate_host(expr: Expr, scalars: Mapping[str, float], heads: int) -> list[float]:
    """The value of an expression without tensor inputs for each of `heads` heads, in fp64 Python arithmetic."""
    return [_host_value(expr, scalars, heads, head) for head in range(heads)]


def _host_value(expr: Expr, scalars: Mapping[str, float], heads: int, head: int) -> float:
    if isinstance(expr, Number):
        return float(expr.value)
    if isinstance(expr, Index):
        return float(heads if expr.name == "heads" else head)
    if isinstance(expr, Scalar):
        return float(scalars[expr.name])
    if isinstance(expr, Call):
        return _host_call(expr.function, [_host_value(arg, scalars, heads, head) for arg in expr.args])
    raise SpecError(
        f"{expr} is a tensor; only expressions of head, heads, scalars and numbers have a value on the host"
    )


def fold(expr: Expr) -> Expr:
    """`expr` with every subexpression of numbers alone replaced by its value, in fp64."""
    if not isinstance(expr, Call):
        return expr
    args = tuple(fold(arg) for arg in expr.args)
    numbers = [float(arg.value) for arg in args if isinstance(arg, Number)]
    if len(numbers) == len(args) and expr.function not in ROW_FUNCTIONS:
        value = _host_call(expr.function, numbers)
        if not math.isfinite(value):
            raise SpecError(f"{expr} is {value}; write an expression with a finite value")
        return Number(int(value) if value.is_integer() and abs(value) <= 2**53 else value)
    if expr.function == "neg":
        return -args[0]
    return Call(expr.function, args)


# --- Triton text


def triton_text(expr: Expr, names: Mapping[Expr, str]) -> str:
    """`expr` as Triton text over fp32 values, with no more parentheses than it needs.

    `names` gives the text of each Input, Index and Scalar, and of each call of a row function, which is not written out
    here. x ** n is a product for a whole number n up to 16, and
    elsewhere exp(n * log(x)), right for x >= 0.
    """
    text, _ = _triton(fold(expr), names)
    return text


def _triton(expr: Expr, names: Mapping[Expr, str]) -> tuple[str, int]:
    if isinstance(expr, Number):
        return repr(float(expr.value)), LEVELS["neg"] if expr.value < 0 else ATOM
    if not isinstance(expr, Call) or expr.function in ROW_FUNCTIONS:
        return names[expr], ATOM
    if expr.function == "pow":
        base, exponent = expr.args
        result = _triton_power(base, exponent, names)
    elif (argument := _of_elu_and_one(expr)) is not None:
        result = ELU_AND_ONE.format(_triton(argument, names)[0]), LEVELS["add"]
    elif (argument := _of_exp_of_negative(expr)) is not None:
        result = EXP_OF_NEGATIVE.format(_triton(argument, names)[0]), ATOM
    else:
        args = [_triton(arg, names) for arg in expr.args]
        if expr.function in FUNCTIONS:
            function = FUNCTIONS[expr.function]
            bare = [text for text, _ in args]
            atoms = {f"a{i}": _parenthesised(arg, ATOM) for i, arg in enumerate(args)}
            result = function.triton.format(*bare, **atoms), function.level
        elif expr.function == "neg":
            result = "-" + _parenthesised(args[0], *OPERAND_LEVELS["neg"]), LEVELS["neg"]
        else:
            result = _infix(expr.function, args), LEVELS[expr.function]
    if len(result[0]) > MAX_TRITON_TEXT:
        raise SpecError(f"an expression grew beyond {MAX_TRITON_TEXT} characters of kernel text; use smaller powers")
    return result


# without a difference that 1 then takes back: fewer operations, and accurate for large negative numbers
ELU_AND_ONE = "tl.maximum({0}, 0.0) + " + EXP_OF_NEGATIVE


def _of_elu_and_one(expr: Call) -> Expr | None:
    """x where the expression is elu(x) + 1."""
    if expr.function != "add" or Number(1) not in expr.args:
        return None
    other = expr.args[1 - expr.args.index(Number(1))]
    return other.args[0] if isinstance(other, Call) and other.function == "elu" else None


def _of_exp_of_negative(expr: Call) -> Expr | None:
    """x where the expression is exp(minimum(x, 0)), as in the derivative of elu."""
    inner = expr.args[0] if expr.function == "exp" else None
    if not isinstance(inner, Call) or inner.function != "minimum" or inner.args[1] != Number(0):
        return None
    return inner.args[0]


def _parenthesised(operand: tuple[str, int], level: int) -> str:
    text, own = operand
    return text if own >= level else f"({text})"


def _infix(function: str, args: list[tuple[str, int]]) -> str:
    left, right = (_parenthesised(arg, need) for arg, need in zip(args, OPERAND_LEVELS[function], strict=True))
    return f"{left} {SYMBOLS[function]} {right}"


def _triton_power(base: Expr, exponent: Expr, names: Mapping[Expr, str]) -> tuple[str, int]:
    if isinstance(exponent, Number):
        number = exponent.value
        if number in (0.5, -0.5):
            root = f"tl.sqrt({_triton(base, names)[0]})"
            return (root, ATOM) if number > 0 else (f"1.0 / {root}", LEVELS["div"])
        if number == int(number) and 0 <= number <= 16:
            return _product(_triton(base, names), int(number))
        if number == int(number) and -16 <= number < 0:
            product = _product(_triton(base, names), int(-number))
            return f"1.0 / {_parenthesised(product, OPERAND_LEVELS['div'][1])}", LEVELS["div"]
    power = _triton(exponent, names)
    if base == Number(2):
        return f"tl.exp2({power[0]})", ATOM
    if isinstance(base, Number):
        factor = repr(math.log(base.value)) if base.value > 0 else "float('nan')"
    else:
        factor = f"tl.log({_triton(base, names)[0]})"
    return f"tl.exp({_parenthesised(power, LEVELS['mul'])} * {factor})", ATOM


def _product(base: tuple[str, int], count: int) -> tuple[str, int]:
    """base ** count by repeated squaring, so that equal factors are equal text and the compiler computes them once."""
    if count == 0:
        return "1.0", ATOM
    if count == 1:
        return base
    if count <= 3:
        return " * ".join([_parenthesised(base, ATOM)] * count), LEVELS["mul"]
    half = f"({_product(base, count // 2)[0]})"
    return " * ".join([half, half] + [_parenthesised(base, ATOM)] * (count % 2)), LEVELS["mul"]

"""A spec's recurrence for people: plain text and LaTeX."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from .expr import ATOM, LEVELS, OPERAND_LEVELS, Call, Expr, Input, Leaf, Number, substitute, to_text
from .stabilize import gated

if TYPE_CHECKING:
    from .spec import Spec

_SIZES = {"b": "B", "t": "T", "h": "H", "k": "K", "v": "V", "d": "D"}
_GREEK = {
    "alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu", "nu", "xi",
    "pi", "rho", "sigma", "tau", "upsilon", "phi", "chi", "psi", "omega",
}  # fmt: skip


def describe(spec: Spec) -> str:
    """What print(spec) shows: the equations, then the arguments."""
    lines = [spec.name, *(f"    {line}" for line in plain(spec))]
    inputs = (f"{one.name} [{', '.join(_SIZES[axis] for axis in one.axes)}]{_bounds(one)}" for one in spec.inputs)
    lines.append(f"  inputs: {', '.join(inputs)}")
    if spec.scalars:
        lines.append(f"  scalars: {', '.join(scalar.name for scalar in spec.scalars)}")
    default = "1" if spec.vector else "K ** -0.5"
    lines.append(f"  scale: {default if spec.scale is None else f'{spec.scale:g}'} by default")
    return "\n".join(lines)


def _bounds(one: Input) -> str:
    low = "" if one.low is None else f" >= {one.low:g}"
    return low + ("" if one.high is None else f" <= {one.high:g}")


def plain(spec: Spec) -> list[str]:
    """The recurrence, a line per equation. Inputs with a time axis carry _t."""
    write = _Plain()
    if spec.vector:
        return _plain_vector(spec, write)
    query, key, value = write.vector(spec.query), write.vector(spec.key), write.vector(spec.value)
    if spec.taylor:
        key = f"f({write.text(spec.key)})"
    update = f"{key} {value}^T"
    decay = _plain_decay(spec, write)
    before = {"value": "S_{t-1} " + decay, "": "S_{t-1}"}.get(_decay_kind(spec), f"{decay} S_{{t-1}}")
    lines = [f"S_t = {before} + {update}"]
    if spec.erase is not None:
        a, b = (write.vector(expr) for expr in spec.erase)
        kept, read, after = _corrected(spec, before, "S_{t-1}", "X_t")
        lines = [f"S_t = {kept} - {b} ({a}^T {read}) + {update}", *(f"X_t = {line}" for line in after)]
    read = "S_t"
    if spec.bonus is not None:
        read = f"(S_{{t-1}} + {_weighted(spec.bonus, write, write.text(spec.bonus))} {update})"
    output = f"f(scale * {query})^T {read}" if spec.taylor else f"scale * {query}^T {read}"
    if spec.phase is not None:
        output = f"Re({output})"
    if spec.normalizer is not None:
        divisor = to_text(spec.normalizer)
        output += f" / {divisor if _is_call(spec.normalizer) else f'({divisor})'}"
    lines.append(f"o_t = {output}")
    if spec.normalizer is not None:
        lines.append("n = the numerator with value 1")
    lines += _plain_scale(spec, write)
    if spec.taylor:
        lines.append(f"f(x)^T f(y) = {'1 + x^T y' if spec.taylor == 1 else '1 + x^T y + (x^T y)^2 / 2'}")
    return lines


def _plain_scale(spec: Spec, write: _Plain) -> list[str]:
    if spec.stabilize is None:
        return []
    gate = gated(spec.key).gate
    assert gate is not None, "validate_stabilize refuses a key without a gate"
    forget = "" if spec.log_decay is None else f"{write.text(spec.log_decay)} + "
    return [f"S and n are held times exp(-m), m_t = max({forget}m_{{t-1}}, {write.text(gate)})"]


def _plain_vector(spec: Spec, write: _Plain) -> list[str]:
    update = (
        write.vector(spec.value) if spec.key == Number(1) else f"{write.vector(spec.key)} {write.vector(spec.value)}"
    )
    decay = _plain_decay(spec, write)
    read = "h_t" if spec.query == Number(1) else f"{write.vector(spec.query)} h_t"
    output = f"scale * {read}" if spec.phase is None else f"Re(scale * {read})"
    return [f"h_t = {decay}{' ' * bool(decay)}h_{{t-1}} + {update}", f"o_t = {output}"]


def _corrected(spec: Spec, decayed: str, previous: str, name: str) -> tuple[str, str, list[str]]:
    """What an erasing spec keeps of the state, what it reads of it, and the equation of what has a name."""
    if spec.erase_reads == "previous" or decayed == previous:
        return decayed, previous, []
    return name, name, [decayed]


def _is_call(expr: Expr) -> bool:
    return not (isinstance(expr, Call) and expr.function in LEVELS)


def _decay_kind(spec: Spec) -> str:
    if spec.phase is not None and (spec.log_decay is None or "k" in spec.phase.axes):
        return "key" if "k" in spec.phase.axes else "scalar"
    if spec.log_decay is None:
        return ""
    return "key" if "k" in spec.log_decay.axes else "value" if "v" in spec.log_decay.axes else "scalar"


def _plain_decay(spec: Spec, write: _Plain) -> str:
    if spec.log_decay is None and spec.phase is None:
        return ""
    if spec.phase is None and isinstance(spec.log_decay, Call) and spec.log_decay.function == "log":
        decay = f"({write.text(spec.log_decay.args[0])})"
    else:
        parts = [] if spec.log_decay is None else [write.text(spec.log_decay)]
        if spec.phase is not None:
            parts.append(f"i {write.atom(spec.phase)}")
        decay = f"exp({' + '.join(parts)})"
    return decay if _decay_kind(spec) == "scalar" else f"diag{decay}" if decay[0] == "(" else f"diag({decay})"


def _weighted(expr: Expr, write: _Plain, text: str) -> str:
    return f"diag({text})" if "k" in expr.axes else write.atom(expr)


class _Plain:
    """Expression text with _t on what varies in time."""

    def text(self, expr: Expr) -> str:
        return to_text(substitute(expr, {one: _timed(one) for one in expr.inputs}))

    def atom(self, expr: Expr) -> str:
        return self.text(expr) if not isinstance(expr, (Call, Number)) else f"({self.text(expr)})"

    def vector(self, expr: Expr) -> str:
        return self.text(expr) if not (isinstance(expr, Call) and expr.function in LEVELS) else f"({self.text(expr)})"


def _timed(one: Input) -> Expr:
    return Input(f"{one.name[:38]}_t", one.axes) if "t" in one.axes else one


def latex(spec: Spec) -> str:
    """The recurrence in LaTeX: the lines of an aligned environment, with & before each relation."""
    if spec.vector:
        return _latex_of_vector(spec)
    key, value = _vector_latex(spec.key), _vector_latex(spec.value)
    if spec.taylor:
        key = rf"f({_latex(spec.key)[0]})"
    update = rf"{key}\, {value}^{{\top}}"
    decay = _latex_decay(spec)
    kind = _decay_kind(spec)
    before = {"value": rf"S_{{t-1}}\, {decay}", "": "S_{t-1}"}.get(kind, rf"{decay}\, S_{{t-1}}")
    read = "S_t"
    if spec.bonus is not None:
        bonus = _latex(spec.bonus)[0]
        weight = rf"\operatorname{{diag}}({bonus})" if "k" in spec.bonus.axes else rf"({bonus})"
        read = rf"\left(S_{{t-1}} + {weight}\, {update}\right)"
    query = _vector_latex(spec.query)
    numerator = rf"f(s\, {query})^{{\top}} {read}" if spec.taylor else rf"s\, {query}^{{\top}} {read}"
    if spec.phase is not None:
        numerator = rf"\operatorname{{Re}}\left({numerator}\right)"
    if spec.normalizer is not None:
        numerator = rf"\frac{{{numerator}}}{{{_latex(spec.normalizer)[0]}}}"
    lines = [f"S_t &= {before} + {update}"]
    if spec.erase is not None:
        a, b = (_vector_latex(expr) for expr in spec.erase)
        kept, read, after = _corrected(spec, before, "S_{t-1}", "X_t")
        erased = rf"{b} \left({a}^{{\top}} {read}\right)"
        lines = [f"S_t &= {kept} - {erased} + {update}", *(f"X_t &= {line}" for line in after)]
    lines.append(f"o_t &= {numerator}")
    if spec.normalizer is not None:
        lines.append(r"n &= \text{the numerator with value } 1")
    if spec.stabilize is not None:
        gate = gated(spec.key).gate
        assert gate is not None, "validate_stabilize refuses a key without a gate"
        forget = "" if spec.log_decay is None else f"{_latex(spec.log_decay)[0]} + "
        scale = rf"\max\left({forget}m_{{t-1}}, {_latex(gate)[0]}\right)"
        lines.append(rf"m_t &= {scale}, \quad S, n \text{{ held times }} e^{{-m}}")
    if spec.taylor:
        square = r" + \tfrac{1}{2} (x^{\top} y)^2" if spec.taylor == 2 else ""
        lines.append(rf"f(x)^{{\top}} f(y) &= 1 + x^{{\top}} y{square}")
    return " \\\\\n".join(lines)


def _latex_of_vector(spec: Spec) -> str:
    """Products are taken channel by channel, as its circled dots say."""

    def times(*factors: str) -> str:
        return r" \odot ".join(factor for factor in factors if factor)

    key, query = ("" if expr == Number(1) else _vector_latex(expr) for expr in (spec.key, spec.query))
    read = rf"s\, {times(query, 'h_t')}"
    output = read if spec.phase is None else rf"\operatorname{{Re}}\left({read}\right)"
    update = times(key, _vector_latex(spec.value))
    return f"h_t &= {times(_latex_decay(spec), 'h_{t-1}')} + {update} \\\\\no_t &= {output}"


def _latex_decay(spec: Spec) -> str:
    if spec.log_decay is None and spec.phase is None:
        return ""
    if spec.phase is None and isinstance(spec.log_decay, Call) and spec.log_decay.function == "log":
        decay = rf"\left({_latex(spec.log_decay.args[0])[0]}\right)"
    else:
        parts = [] if spec.log_decay is None else [_latex(spec.log_decay)[0]]
        if spec.phase is not None:
            parts.append(rf"i\, {_at_level(_latex(spec.phase), LEVELS['neg'])}")
        decay = rf"\exp\left({' + '.join(parts)}\right)"
    if _decay_kind(spec) == "scalar":
        return decay
    return (
        rf"\operatorname{{diag}}{decay}"
        if decay.startswith(r"\left(")
        else rf"\operatorname{{diag}}\left({decay}\right)"
    )


def _vector_latex(expr: Expr) -> str:
    return _at_level(_latex(expr), ATOM)


def _at_level(operand: tuple[str, int], level: int) -> str:
    text, own = operand
    return text if own >= level else rf"\left({text}\right)"


_LATEX_FUNCTIONS: dict[str, Callable[..., str]] = {
    "exp": lambda x: rf"\exp\left({x}\right)",
    "log": lambda x: rf"\log\left({x}\right)",
    "sqrt": lambda x: rf"\sqrt{{{x}}}",
    "abs": lambda x: rf"\left|{x}\right|",
    "sigmoid": lambda x: rf"\sigma\left({x}\right)",
    "tanh": lambda x: rf"\tanh\left({x}\right)",
    "minimum": lambda x, y: rf"\min\left({x}, {y}\right)",
    "maximum": lambda x, y: rf"\max\left({x}, {y}\right)",
}


def _latex(expr: Expr) -> tuple[str, int]:
    """LaTeX of an expression, and how tightly it binds."""
    if isinstance(expr, Number):
        return _latex_number(expr.value), LEVELS["neg"] if expr.value < 0 else ATOM
    if isinstance(expr, Leaf):
        return _latex_name(expr), ATOM
    assert isinstance(expr, Call), type(expr)
    args = [_latex(arg) for arg in expr.args]
    bare = [text for text, _ in args]
    if expr.function == "div":
        return rf"\frac{{{bare[0]}}}{{{bare[1]}}}", LEVELS["pow"]  # needs no parentheses but as a base
    if expr.function == "pow":
        return rf"{_at_level(args[0], ATOM)}^{{{bare[1]}}}", LEVELS["pow"]
    if expr.function not in LEVELS:
        default = rf"\operatorname{{{expr.function}}}\left({', '.join(bare)}\right)"
        return (_LATEX_FUNCTIONS[expr.function](*bare) if expr.function in _LATEX_FUNCTIONS else default), ATOM
    operands = [_at_level(arg, need) for arg, need in zip(args, OPERAND_LEVELS[expr.function], strict=True)]
    if expr.function == "neg":
        return f"-{operands[0]}", LEVELS["neg"]
    if expr.function == "mul":
        # two numbers side by side would read as one
        sign = r"\cdot" if operands[1][0] in "-0123456789" else r"\,"
        return f"{operands[0]} {sign} {operands[1]}", LEVELS["mul"]
    return f"{operands[0]} {'+' if expr.function == 'add' else '-'} {operands[1]}", LEVELS[expr.function]


def _latex_number(value: int | float) -> str:
    mantissa, _, exponent = repr(value).partition("e")
    return rf"{mantissa} \cdot 10^{{{int(exponent)}}}" if exponent else mantissa


def _latex_name(leaf: Leaf) -> str:
    base, _, rest = leaf.name.partition("_")
    if base in _GREEK:
        base = f"\\{base}"
    elif len(base) > 1:
        base = rf"\mathrm{{{base}}}"
    subscripts = [rf"\mathrm{{{re.sub('_', ',', rest)}}}"] if rest else []
    if isinstance(leaf, Input) and "t" in leaf.axes and leaf.name != "n":
        subscripts.append("t")
    return f"{base}_{{{', '.join(subscripts)}}}" if subscripts else base

"""Plan -> what a standalone module holds beside its kernels: flagen's own schedule and backend as text, with the facts
of this plan that they read, and the host constants as torch expressions.

The text is that of flagen's sources, so that an emitted file decides and reduces as flagen does.
"""

from __future__ import annotations

import ast
import builtins
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .expr import ATOM, LEVELS, OPERAND_LEVELS, SYMBOLS, Call, Expr, Leaf, Number
from .functions import FUNCTIONS

if TYPE_CHECKING:
    from .plan import Plan

SOURCES = ("schedule_pieces.py", "schedule.py", "kept.py", "triton_backend.py")
VECTOR_SOURCES = ("schedule_vector.py", "triton_vector.py")  # beside these, where the state is a vector
# where torch has no function of the same arguments
TORCH_TEXT = {
    "softplus": "torch.logaddexp({0}, torch.zeros((), dtype=torch.float64))",
    "minimum": "torch.minimum(float64({0}), float64({1}))",
    "maximum": "torch.maximum(float64({0}), float64({1}))",
}


@dataclass(frozen=True, slots=True)
class Standalone:
    """function: the name of the emitted function. facts: names and literals. constants: a torch expression each.
    schedule, backend: text.
    """

    function: str
    facts: tuple[tuple[str, str], ...]
    constants: tuple[str, ...]
    schedule: str
    backend: str


def make_standalone(plan: Plan, kernels: str) -> Standalone:
    """kernels: the text of the plan's module, which has names of its own."""
    *schedules, backend = (_definitions(name) for name in SOURCES)
    schedule = "\n\n\n".join(schedules)
    if plan.vector:
        more = [_definitions(name) for name in VECTOR_SOURCES]
        schedule, backend = f"{schedule}\n\n\n{more[0]}", f"{backend}\n\n\n{more[1]}"
    backend = f"{_definitions('torch_backend.py', 'Forward')}\n\n\n{backend}"
    taken = {
        node.name for node in ast.walk(ast.parse("\n".join((kernels, schedule, backend)))) if hasattr(node, "name")
    }
    taken |= {"torch", "triton", "tl", "float64", "annotations", "dataclass", "functools", *vars(builtins)}
    return Standalone(
        function=f"{plan.name}_attention" if plan.name in taken else plan.name,
        facts=_facts(plan, schedule, backend),
        constants=tuple(host_text(expr) for _, expr in plan.analysis.constants),
        schedule=schedule,
        backend=backend,
    )


def _definitions(file: str, only: str = "") -> str:
    """The text of a source file from its first definition on, without its imports; or that of one class."""
    text = Path(__file__).with_name(file).read_text(encoding="utf-8")
    for node in ast.parse(text).body:
        if only and getattr(node, "name", "") == only:
            return ast.get_source_segment(text, node) or ""
        if not only and not isinstance(node, (ast.Expr, ast.Import, ast.ImportFrom, ast.If)):
            decorators = getattr(node, "decorator_list", None) or [node]
            return "".join(text.splitlines(keepends=True)[decorators[0].lineno - 1 :]).rstrip()
    raise LookupError(f"{file} has no definition {only}")


def _facts(plan: Plan, schedule: str, backend: str) -> tuple[tuple[str, str], ...]:
    """The attributes of the plan that the two texts read, as Python expressions."""
    names = set(re.findall(r"\bplan\.([a-z_]+)", schedule))
    # a schedule is called plan there too
    names |= {name for name in re.findall(r"\bplan\.([a-z_]+)", backend) if hasattr(plan, name)}
    return tuple((name, _literal(name, getattr(plan, name))) for name in sorted(names))


def _literal(name: str, value: Any) -> str:
    if value is None or isinstance(value, (bool, int, str)):
        return repr(value)
    if isinstance(value, tuple) and all(isinstance(x, str) for x in value):
        return repr(value)
    if name == "inputs":
        rows = (f"Facts(name={x.name!r}, axes={x.axes!r}, channel={x.channel!r})" for x in value)
        return f"({', '.join(rows)},)"
    if name == "log_decay":
        return f"Facts(identity={value.identity!r}, inputs={value.inputs!r}, text={value.text!r}, axes={value.axes!r})"
    if name == "analysis":
        first = value.spec.value.inputs[0].name
        inputs = tuple(x.name for x in value.inputs)
        constants = tuple(x.name for x, _ in value.constants)
        spec = f"Facts(value=Facts(inputs=({first!r},)))"
        gauges = tuple(x.name for x in value.gauges)
        return f"Facts(inputs={inputs!r}, constants={constants!r}, gauges={gauges!r}, spec={spec})"
    raise TypeError(f"standalone: the schedule or the backend reads plan.{name}, which has no literal yet")


def host_text(expr: Expr) -> str:
    """An expression of head, heads and scalars as torch text over fp64 tensors of these names."""
    return _host(expr)[0]


def _host(expr: Expr) -> tuple[str, int]:
    if isinstance(expr, Number):
        return repr(float(expr.value)), LEVELS["neg"] if expr.value < 0 else ATOM
    if isinstance(expr, Leaf):
        return expr.name, ATOM
    assert isinstance(expr, Call), type(expr)
    args = [_host(arg) for arg in expr.args]
    if expr.function in FUNCTIONS:
        name = FUNCTIONS[expr.function].torch
        text = TORCH_TEXT.get(expr.function) or f"{name}({{0}})"
        return text.format(*(text for text, _ in args)), ATOM
    if expr.function == "neg":
        return "-" + _within(args[0], OPERAND_LEVELS["neg"][0]), LEVELS["neg"]
    left, right = (_within(arg, level) for arg, level in zip(args, OPERAND_LEVELS[expr.function], strict=True))
    return f"{left} {SYMBOLS[expr.function]} {right}", LEVELS[expr.function]


def _within(operand: tuple[str, int], level: int) -> str:
    text, own = operand
    return text if own >= level else f"({text})"

"""What a program of a generated kernel does, counted from the kernel's own text with the arguments of a launch:
products, elementwise operations, bytes asked for. Nothing is compiled, run or looked up by name: whatever a template
does is counted.

Numbers (sizes, offsets, program ids, constants) are evaluated, blocks are known by shape and dtype alone. A construct
that is not understood is a CostError, so that a changed template cannot be counted wrongly in silence.
"""

from __future__ import annotations

import ast
import functools
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from .cost_work import BYTES, Block, CostError, Dtype, Work, functions_of, plain, steps_of

# turns of a loop that are counted, a quarter of them in loops around loops; the others are taken to be like them
TURNS = 16  # as many as there are chunks between checkpoints at the most
_NAMES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "float64": "fp64"}
_NAMES |= {name: name for name in ("int1", "int8", "uint8", "int32", "int64")}
_RANK = list(BYTES)
# what one operation of these costs in plain ones is the device's affair: they have a unit of their own
_SPECIAL = frozenset(
    ("exp", "exp2", "log", "log2", "sin", "cos", "sqrt", "rsqrt", "sqrt_rn", "sigmoid", "div_rn", "erf")
)
_PLAIN = frozenset(("abs", "floor", "ceil", "fma"))
_RANGES = ("range", "tl.range", "tl.static_range")
_SCALAR: dict[str, Callable[..., Any]] = {"maximum": max, "minimum": min, "cdiv": lambda a, b: -(-a // b)}
_BINARY = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow, ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_, ast.BitXor: operator.xor, ast.LShift: operator.lshift, ast.RShift: operator.rshift,
}  # fmt: skip
_COMPARE = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Eq: operator.eq,
    ast.NotEq: operator.ne, ast.Is: operator.is_, ast.IsNot: operator.is_not,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Scope:
    """`tl` or `torch`, an attribute of it, or a method of a value."""

    path: str
    of: Any = None


def count(
    source: str, kernel: str, arguments: Mapping[str, Any], program: tuple[int, ...]
) -> tuple[Work, dict[str, dict[str, Block]]]:
    """The work of one program of a launch, and the blocks that the variables of each function held at last. arguments:
    by name, tensors as Block with their dtype and name."""
    functions, constants = functions_of(source)
    run = _Run(functions, constants, program)
    run.where = kernel
    try:
        run.call(functions[kernel], (), {name: plain(value) for name, value in arguments.items()})
    except (AttributeError, LookupError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CostError(f"{kernel}: the cost model stumbled: {type(error).__name__}: {error}") from error
    return run.work, run.blocks


class _Return(Exception):
    def __init__(self, value: Any) -> None:
        self.value = value


class _Run:
    def __init__(
        self, functions: Mapping[str, ast.FunctionDef], constants: Mapping[str, Any], program: tuple[int, ...]
    ) -> None:
        self.functions, self.constants, self.program = functions, constants, program
        self.work, self.weight, self.where = Work(), 1.0, ""
        self.blocks: dict[str, dict[str, Block]] = {}  # of each function, what its variables hold
        self.inside: list[str] = []

    def call(self, function: ast.FunctionDef, given: Iterable[Any], named: Mapping[str, Any]) -> Any:
        parameters = function.args
        names = [one.arg for one in parameters.args]
        defaults = dict(zip(names[len(names) - len(parameters.defaults) :], parameters.defaults, strict=True))
        scope = dict(zip(names, given, strict=False)) | dict(named)
        for name in names:
            if name not in scope:
                if name not in defaults:
                    raise CostError(f"{self.where}: {function.name} is called without {name!r}")
                scope[name] = self.value(defaults[name], {})
        self.inside.append(function.name)
        try:
            self.block(function.body, scope)
        except _Return as result:
            return result.value
        finally:
            self.inside.pop()
        return None

    # --- statements

    def block(self, body: list[ast.stmt], scope: dict[str, Any]) -> None:
        for node in body:
            self.statement(node, scope)

    def statement(self, node: ast.stmt, scope: dict[str, Any]) -> None:
        if isinstance(node, ast.Assign):
            value = self.value(node.value, scope)
            for target in node.targets:
                self.assign(target, value, scope)
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            self.assign(node.target, self.value(node.value, scope), scope)
        elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            old = self.name(node.target, scope)
            scope[node.target.id] = self.binary(type(node.op), old, self.value(node.value, scope), node)
        elif isinstance(node, ast.If):
            leaves = isinstance(node.body[0], ast.Return) and ast.unparse(node.test).endswith(" == 0")
            self.block(node.body if self.taken(node.test, scope, leaves) else node.orelse, scope)
        elif isinstance(node, ast.For):
            self.loop(node, scope)
        elif isinstance(node, ast.Return):
            raise _Return(None if node.value is None else self.value(node.value, scope))
        elif isinstance(node, ast.Expr):
            self.value(node.value, scope)
        elif not isinstance(node, ast.Pass):
            raise self.unknown(node)

    def assign(self, target: ast.expr, value: Any, scope: dict[str, Any]) -> None:
        if isinstance(target, ast.Name):
            scope[target.id] = value
            if isinstance(value, Block):
                self.blocks.setdefault(self.inside[-1], {})[target.id] = value
        elif isinstance(target, ast.Tuple):
            for one, part in zip(target.elts, value, strict=True):
                self.assign(one, part, scope)
        else:
            raise self.unknown(target)

    def loop(self, node: ast.For, scope: dict[str, Any]) -> None:
        if not (isinstance(node.iter, ast.Call) and ast.unparse(node.iter.func) in _RANGES):
            raise self.unknown(node.iter)
        turns = range(*(self.number(one, scope) for one in node.iter.args))
        nested = any(isinstance(one, ast.For) for stmt in node.body for one in ast.walk(stmt))
        whole = ast.unparse(node.iter.func) == "tl.static_range"  # each turn may add what it reads to a tuple
        before, shown = self.weight, turns[: len(turns) if whole else TURNS // 4 if nested else TURNS]
        self.weight *= len(turns) / max(1, len(shown))
        for turn in shown:
            self.assign(node.target, turn, scope)
            self.block(node.body, scope)
        self.weight = before

    def number(self, node: ast.expr, scope: Mapping[str, Any]) -> int:
        value = self.value(node, scope)
        if isinstance(value, Block):
            raise CostError(f"{self.where}: {ast.unparse(node)} bounds a loop and is not known before the kernel runs")
        return int(value)

    def taken(self, node: ast.expr, scope: Mapping[str, Any], leaves: bool) -> bool:
        """Whether a branch is taken; one that depends on the data is not, in the ordinary case, unless it `leaves`."""
        value = self.value(node, scope)
        return leaves if isinstance(value, Block) and not value.tensor else bool(value)

    def truth(self, node: ast.expr, scope: Mapping[str, Any]) -> bool:
        value = self.value(node, scope)
        if isinstance(value, Block) and not value.tensor:
            raise CostError(f"{self.where}: whether {ast.unparse(node)} holds is not known before the kernel runs")
        return bool(value)

    # --- expressions

    def value(self, node: ast.expr, scope: Mapping[str, Any]) -> Any:
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            return self.name(node, scope)
        if isinstance(node, ast.Tuple | ast.List):
            return tuple(self.value(one, scope) for one in node.elts)
        if isinstance(node, ast.Attribute):
            return self.attribute(node, scope)
        if isinstance(node, ast.BinOp):
            return self.binary(type(node.op), self.value(node.left, scope), self.value(node.right, scope), node)
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            left, right = self.value(node.left, scope), self.value(node.comparators[0], scope)
            return self.elementwise(_COMPARE[type(node.ops[0])], (left, right), dtype="int1")
        if isinstance(node, ast.UnaryOp):
            value = self.value(node.operand, scope)
            if isinstance(node.op, ast.Not):
                return not value
            return self.elementwise(operator.neg if isinstance(node.op, ast.USub) else operator.invert, (value,))
        if isinstance(node, ast.BoolOp):
            any_or_all = any if isinstance(node.op, ast.Or) else all
            return any_or_all(self.truth(one, scope) for one in node.values)
        if isinstance(node, ast.IfExp):
            return self.value(node.body if self.truth(node.test, scope) else node.orelse, scope)
        if isinstance(node, ast.Subscript):
            return self.subscript(node, scope)
        if isinstance(node, ast.Call):
            return self.called(node, scope)
        raise self.unknown(node)

    def name(self, node: ast.Name, scope: Mapping[str, Any]) -> Any:
        if node.id in scope:
            return scope[node.id]
        if node.id in self.constants:
            return self.constants[node.id]
        if node.id == "tl" or node.id in self.functions:
            return _Scope(node.id)
        raise CostError(f"{self.where}: {node.id!r} has no value where it is used")

    def attribute(self, node: ast.Attribute, scope: Mapping[str, Any]) -> Any:
        of = self.value(node.value, scope)
        if isinstance(of, _Scope) and of.path == "tl" and node.attr in _NAMES:
            return Dtype(_NAMES[node.attr])
        if isinstance(of, Block) and node.attr == "dtype":
            return Dtype(of.dtype)
        if isinstance(of, Dtype) and node.attr == "element_ty":
            return of
        return _Scope(f"{of.path}.{node.attr}") if isinstance(of, _Scope) else _Scope(node.attr, of)

    def subscript(self, node: ast.Subscript, scope: Mapping[str, Any]) -> Any:
        of = self.value(node.value, scope)
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if not isinstance(of, Block):
            return of[self.number(node.slice, scope)]
        shape, left = [], list(of.shape)
        for part in parts:
            if isinstance(part, ast.Slice):
                shape.append(left.pop(0))
            elif isinstance(part, ast.Constant) and part.value is None:
                shape.append(1)
            else:
                raise self.unknown(node)
        return Block((*shape, *left), of.dtype, of.tensor)

    def binary(self, kind: type, left: Any, right: Any, node: ast.AST) -> Any:
        if kind not in _BINARY:
            raise self.unknown(node)
        if kind is ast.Div and (isinstance(left, Block) or isinstance(right, Block)):
            self.elementwise(None, (left, right), special=True)
        return self.elementwise(_BINARY[kind], (left, right))

    def elementwise(
        self, function: Callable[..., Any] | None, values: tuple[Any, ...], *, dtype: str = "", special: bool = False
    ) -> Any:
        """Numbers are computed, blocks are counted."""
        blocks = [one for one in values if isinstance(one, Block)]
        if function is not None and (not blocks or function in (operator.is_, operator.is_not)):
            return function(*values)
        tensor = next((one.tensor for one in blocks if one.tensor), "")
        found = next((one.dtype for one in blocks if one.tensor), "") or dtype or self.promoted(values)
        shape = functools.reduce(self.broadcast, (one.shape for one in blocks))
        size = prod(shape) * self.weight if shape else 0.0
        if special:
            self.work.special += size
        else:
            self.work.lanes += size
        return Block(shape, found, tensor)

    def promoted(self, values: tuple[Any, ...]) -> str:
        kinds = [one.dtype for one in values if isinstance(one, Block)]
        if any(isinstance(one, float) for one in values) and all(kind.startswith(("int", "uint")) for kind in kinds):
            kinds.append("fp32")
        return max(kinds, key=_RANK.index)

    def broadcast(self, a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
        if not a or not b:
            return a or b
        if len(a) != len(b) or any(x != y and 1 not in (x, y) for x, y in zip(a, b, strict=True)):
            raise CostError(f"{self.where}: blocks of shapes {a} and {b} do not fit")
        return tuple(map(max, a, b))

    # --- calls

    def called(self, node: ast.Call, scope: Mapping[str, Any]) -> Any:
        given = [self.value(one, scope) for one in node.args]
        named = {one.arg: self.value(one.value, scope) for one in node.keywords if one.arg}
        if isinstance(node.func, ast.Name):
            if node.func.id in self.functions and node.func.id not in scope:
                return self.call(self.functions[node.func.id], given, named)
            builtin: Any = {"min": min, "max": max, "int": int, "float": float}.get(node.func.id)
            if builtin and not any(isinstance(one, Block) for one in given):
                return builtin(*given)
            raise self.unknown(node)
        function = self.value(node.func, scope)
        if isinstance(function, _Scope) and function.path == "to":
            return self.cast(function.of, given[0])
        if not isinstance(function, _Scope) or not function.path.startswith("tl."):
            raise self.unknown(node)
        name = function.path.rpartition(".")[2]
        handler = getattr(self, f"do_{name}", None)
        if handler is not None:
            return handler(*given, **named)
        if name in _SCALAR:
            return self.elementwise(_SCALAR[name], tuple(given))
        if name in _SPECIAL | _PLAIN:
            return self.elementwise(None, tuple(given), special=name in _SPECIAL)
        raise self.unknown(node)

    def cast(self, value: Any, dtype: Dtype) -> Any:
        if not isinstance(value, Block):
            return value
        if value.dtype != dtype.name:
            self.work.lanes += prod(value.shape) * self.weight if value.shape else 0
        return Block(value.shape, dtype.name)

    def do_program_id(self, axis: int) -> int:
        return self.program[axis]

    def do_arange(self, start: int, end: int) -> Block:
        return Block((end - start,), "int32")

    def do_zeros(self, shape: tuple[int, ...], dtype: Dtype) -> Block:
        return Block(tuple(shape), dtype.name)

    def do_full(self, shape: tuple[int, ...], value: Any, dtype: Dtype) -> Block:
        return Block(tuple(shape), dtype.name)

    def do_trans(self, x: Block, *axes: int) -> Block:
        return Block(tuple(x.shape[i] for i in axes) if axes else x.shape[::-1], x.dtype, x.tensor)

    def do_reshape(self, x: Block, *shape: Any) -> Block:
        return Block(tuple(shape[0]) if isinstance(shape[0], tuple) else shape, x.dtype)

    do_broadcast_to = do_reshape

    def do_join(self, x: Block, y: Block) -> Block:
        return Block((*x.shape, 2), x.dtype)

    def do_split(self, x: Block) -> tuple[Block, ...]:
        return (Block(x.shape[:-1], x.dtype),) * 2

    def do_where(self, condition: Any, x: Any, y: Any) -> Any:
        if not isinstance(condition, Block) and not isinstance(x, Block) and not isinstance(y, Block):
            return x if condition else y
        kind = self.promoted((x, y)) if isinstance(x, Block) or isinstance(y, Block) else "fp32"
        return self.elementwise(None, (condition, x, y), dtype=kind)

    def do_sum(self, x: Block, axis: int | None = None, keep_dims: bool = False) -> Block:
        size = prod(x.shape) * self.weight
        self.work.lanes += size
        self.work.reduced += self.weight * steps_of(prod(x.shape) if axis is None else x.shape[axis])
        if axis is None:
            return Block((), x.dtype)
        at, one = axis % len(x.shape), (1,) if keep_dims else ()
        return Block((*x.shape[:at], *one, *x.shape[at + 1 :]), x.dtype)

    do_max = do_min = do_sum

    def do_cumsum(self, x: Block, axis: int = 0, reverse: bool = False) -> Block:
        self.do_sum(x, axis)
        return x

    def do_associative_scan(self, values: tuple[Block, ...], axis: int, combine: _Scope) -> tuple[Block, ...]:
        """About log2 of the rows times what puts two of them together, and the steps of one reduction."""
        before, steps = self.weight, steps_of(values[0].shape[axis])
        self.work.reduced += self.weight * steps
        self.weight *= steps
        self.call(self.functions[combine.path], (*values, *values), {})
        self.weight = before
        return values

    def do_gather(self, x: Block, index: Block, axis: int) -> Any:
        return self.elementwise(None, (x, index))

    def do_load(self, pointer: Block, mask: Any = None, other: Any = None, **hints: Any) -> Block:
        self.work.reads[pointer.tensor] += self.weight * prod(pointer.shape) * BYTES[pointer.dtype]
        self.work.lanes += self.weight * prod(pointer.shape)
        return Block(pointer.shape, pointer.dtype)

    def do_store(self, pointer: Block, value: Any, mask: Any = None, **hints: Any) -> None:
        self.work.writes[pointer.tensor] += self.weight * prod(pointer.shape) * BYTES[pointer.dtype]
        self.work.lanes += self.weight * prod(pointer.shape)

    def do_dot(self, a: Block, b: Block, acc: Any = None, input_precision: str = "tf32", **hints: Any) -> Block:
        (*batch, rows, inner), columns = a.shape, b.shape[-1]
        if b.shape != (*batch, inner, columns):
            raise CostError(f"{self.where}: a product of blocks {a.shape} and {b.shape}")
        kind = "16" if BYTES[a.dtype] <= 2 and BYTES[b.dtype] <= 2 else input_precision
        self.work.flops[kind] += self.weight * 2 * prod(batch) * rows * inner * columns
        self.work.products += self.weight
        return Block((*batch, rows, columns), "fp32")

    def do_debug_barrier(self) -> None:
        self.work.barriers += self.weight

    def do_static_assert(self, *_: Any) -> None: ...

    do_assume = do_static_assert

    def do_multiple_of(self, x: Any, *_: Any) -> Any:
        return x

    do_zeros_like = do_max_contiguous = do_multiple_of

    def unknown(self, node: ast.AST) -> CostError:
        return CostError(
            f"{self.where}, line {getattr(node, 'lineno', '?')}: the cost model does not know what "
            f"{ast.unparse(node)[:80]!r} costs; teach it to flagen/cost_trace.py"
        )

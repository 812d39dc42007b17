"""What the cost model counts with: the kernels of a text, blocks of registers, and the work of a program."""

from __future__ import annotations

import ast
import functools
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from .errors import PlanError

BYTES = {"int1": 1, "int8": 1, "uint8": 1, "int32": 4, "int64": 8, "fp16": 2, "bf16": 2, "fp32": 4, "fp64": 8}


class CostError(PlanError):
    """A kernel has something that the cost model does not know."""


@dataclass(frozen=True, slots=True)
class Block:
    """A value in registers. tensor: the argument that it points into if it is an address; dtype is then what lies
    there."""

    shape: tuple[int, ...]
    dtype: str
    tensor: str = ""


@dataclass(frozen=True, slots=True)
class Dtype:
    name: str


@dataclass(slots=True)
class Work:
    """What one program does. flops: by how products are taken ("16" for 16-bit operands, else the precision); lanes:
    elements of elementwise operations; special: elements of exponentials and their like; reads, writes: bytes that are
    asked for, by argument; products: how many there are one after the other, loops unrolled; reduced: the same of
    steps of reductions, log2 of how many numbers one puts together.
    """

    flops: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    products: float = 0.0
    lanes: float = 0.0
    special: float = 0.0
    reduced: float = 0.0
    barriers: float = 0.0
    reads: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    writes: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, other: Work, times: float = 1.0) -> None:
        for name in ("products", "lanes", "special", "reduced", "barriers"):
            setattr(self, name, getattr(self, name) + times * getattr(other, name))
        for name in ("flops", "reads", "writes"):
            for key, value in getattr(other, name).items():
                getattr(self, name)[key] += times * value


def steps_of(n: int) -> int:
    """How many it takes to put n numbers together two by two."""
    return max(1, n - 1).bit_length()


@functools.lru_cache(maxsize=64)
def functions_of(source: str) -> tuple[dict[str, ast.FunctionDef], dict[str, Any]]:
    """The Triton functions of a generated module by name, and its constants."""
    found, constants = {}, {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(one) for one in node.decorator_list):
            found[node.name] = node
        elif isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("tl.constexpr("):
            constants[ast.unparse(node.targets[0])] = ast.literal_eval(
                ast.unparse(node.value)[len("tl.constexpr(") : -1]
            )
    return found, constants


@functools.lru_cache(maxsize=64)
def kernels_of(source: str) -> tuple[str, ...]:
    """The names of the kernels of a generated module: the Triton functions that are launched, as kernel[grid](...)."""
    functions, _ = functions_of(source)
    launched = {
        node.func.value.id
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript) and isinstance(node.func.value, ast.Name)
    }
    return tuple(name for name in functions if name in launched)


def plain(value: Any) -> Any:
    """An argument as the evaluation takes it: dtypes of Triton by their names."""
    return Dtype(value.name) if hasattr(value, "primitive_bitwidth") else value

"""How many registers a thread of a kernel wants: the blocks that are alive at once, by the kernel's text.

It is a measure of pressure, not what the compiler comes to: operands that only pass through shared memory are counted,
and what an expression holds inside is not.
"""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from collections.abc import Mapping
from itertools import pairwise
from math import prod

from .cost_work import BYTES, Block

WARP = 32
_END = 1 << 60


def registers(
    functions: Mapping[str, ast.FunctionDef], kernel: str, blocks: Mapping[str, Mapping[str, Block]], warps: int
) -> float:
    """32-bit registers a thread at the line where most are alive. blocks: what the variables of each function hold."""
    return _peak(functions, kernel, blocks) / 4 / (WARP * warps)


def _peak(functions: Mapping[str, ast.FunctionDef], name: str, blocks: Mapping[str, Mapping[str, Block]]) -> int:
    """Bytes at the line where most are alive, those inside a function that is called there included."""
    function = functions[name]
    called = (node.func for node in ast.walk(function) if isinstance(node, ast.Call))
    calls = {node.lineno: node.id for node in called if isinstance(node, ast.Name) and node.id in functions}
    events, loops = _events(function), [node for node in ast.walk(function) if isinstance(node, ast.For)]
    alive: dict[int, tuple[Block, set[int]]] = {}
    for variable, block in blocks.get(name, {}).items():
        if block.shape and not block.tensor and block.dtype.startswith(("fp", "bf")):
            # two names of one block share it
            alive.setdefault(id(block), (block, set()))[1].update(_lines(sorted(events[variable]), loops, set(calls)))
    held: Counter[int] = Counter()
    for block, lines in alive.values():
        for line in lines:
            held[line] += prod(block.shape) * BYTES[block.dtype]
    for line, callee in calls.items():
        held[line] += _peak(functions, callee, blocks)
    return max(held.values(), default=0)


def _lines(events: list[tuple[int, bool]], loops: list[ast.For], calls: set[int]) -> set[int]:
    """The lines on which a variable is alive: from where it is set to its last use before it is set anew (that line
    included where a function is called there), and all of a loop that reads it before setting it."""
    sets = [line for line, is_set in events if is_set]
    found: set[int] = set()
    for begin, after in pairwise([*sets, _END]):
        uses = [line for line, is_set in events if not is_set and begin < line <= after]
        if uses:
            found.update(range(begin, max(uses)))
            found.update(calls & {max(uses)})
    for loop in loops:
        inside = [is_set for line, is_set in events if loop.lineno < line <= (loop.end_lineno or 0)]
        if inside and not inside[0]:
            found.update(range(loop.lineno, (loop.end_lineno or 0) + 1))
    return found


def _events(kernel: ast.FunctionDef) -> dict[str, list[tuple[int, bool]]]:
    """By variable: line and whether it is set there; sorted, of one line the use comes first."""
    found: dict[str, list[tuple[int, bool]]] = defaultdict(list)
    for node in ast.walk(kernel):
        if isinstance(node, ast.Name):
            found[node.id].append((node.lineno, isinstance(node.ctx, ast.Store)))
        elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            found[node.target.id].append((node.lineno, False))
    return found

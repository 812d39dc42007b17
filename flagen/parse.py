"""Text -> expression, by a walk of Python's syntax tree that knows a short list of nodes and refuses every other.

The text is data. It is parsed, never compiled or evaluated; names are looked up in a mapping that the caller gives.
"""

from __future__ import annotations

import ast
import difflib
import math
from collections.abc import Mapping

from .errors import SpecError, shown
from .expr import (
    DERIVATIVE_FUNCTIONS,
    FUNCTION_ARITY,
    MAX_DEPTH,
    MAX_NODES,
    MAX_TEXT,
    ROW_FUNCTIONS,
    Call,
    Expr,
    as_expr,
)

_BINARY = {ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "div", ast.Pow: "pow"}
_HINTS = {
    ast.BitXor: "^ is not a power here; write **",
    ast.FloorDiv: "// is not part of the language; write /",
    ast.Mod: "% is not part of the language",
    ast.MatMult: "@ is not part of the language: expressions act element by element",
    ast.Compare: "comparisons are not part of the language; use minimum, maximum or relu",
    ast.IfExp: "if is not part of the language; use minimum, maximum or relu",
    ast.BoolOp: "and, or are not part of the language; use minimum or maximum",
    ast.Attribute: "attributes (a dot after a name) are not part of the language",
    ast.Subscript: "indexing is not part of the language",
    ast.Lambda: "lambda is not part of an expression's text; write the result over its argument",
}
_SYNONYMS = {
    "max": "maximum", "min": "minimum", "log_sigmoid": "logsigmoid", "swish": "silu", "fabs": "abs", "expit": "sigmoid",
    "normalize": "l2norm",
}  # fmt: skip


def parse(text: str, names: Mapping[str, Expr], where: str = "expression") -> Expr:
    """The expression that `text` says, over the leaves in `names`; the functions of the language are always known.

    Raises SpecError with a caret under the fault. `where` starts the message, such as "gla: log_decay".
    """
    return _Parser(text, names, where).parse()


def parse_derivative(text: str, names: Mapping[str, Expr], where: str = "derivative") -> Expr:
    """As parse, for text that flagen itself wrote: derivatives know more functions and may be larger."""
    parser = _Parser(text, names, where)
    parser.functions = FUNCTION_ARITY | dict.fromkeys(DERIVATIVE_FUNCTIONS, 1)
    # beyond 200 Python's own parser gives up
    parser.max_text, parser.max_nodes, parser.max_depth = 16 * MAX_TEXT, 16 * MAX_NODES, 200
    return parser.parse()


class _Parser:
    functions = FUNCTION_ARITY | ROW_FUNCTIONS
    max_text, max_nodes, max_depth = MAX_TEXT, MAX_NODES, MAX_DEPTH

    def __init__(self, text: str, names: Mapping[str, Expr], where: str) -> None:
        if not isinstance(text, str):
            raise SpecError(f"{where}: an expression must be text, got {type(text).__name__}: {shown(text)}")
        self.text, self.names, self.where = text, names, where
        self.nodes = 0

    def fault(self, column: int, message: str) -> SpecError:
        # a window around the fault, so that long text does not bury the caret
        start = max(0, column - 80)
        shown = "".join(c if " " <= c <= "~" else "?" for c in self.text[start : column + 40])
        return SpecError(f"{self.where}:\n    {shown}\n    {' ' * (column - start)}^ {message}")

    def parse(self) -> Expr:
        self._check_characters()
        try:
            tree = ast.parse(self.text, mode="eval")
        except SyntaxError as error:
            # Python says 0 where the text ends too early
            column = min(error.offset - 1, len(self.text)) if error.offset else len(self.text)
            raise self.fault(column, f"is not an expression ({error.msg})") from None
        except (ValueError, MemoryError, RecursionError):
            raise self.fault(0, "is nested too deeply or holds too long a number; simplify it") from None
        return self._walk(tree.body, 1)

    def _check_characters(self) -> None:
        if len(self.text) > self.max_text:
            raise self.fault(0, f"is {len(self.text)} characters long, the limit is {self.max_text}; simplify it")
        if not self.text.strip():
            raise self.fault(0, "is empty; write an expression such as -exp(g)")
        if self.text[0] == " ":
            raise self.fault(0, "begins with a space; drop it")
        depth = 0
        for column, character in enumerate(self.text):
            if not " " <= character <= "~" or character in "#;\\\"'`":
                raise self.fault(column, f"the character {character!r} is not part of the language")
            depth += (character in "([{") - (character in ")]}")
            if depth > self.max_depth:
                raise self.fault(column, f"is nested more than {self.max_depth} deep; simplify it")

    def _walk(self, node: ast.expr, depth: int) -> Expr:
        self.nodes += 1
        column = node.col_offset
        if depth > self.max_depth or self.nodes > self.max_nodes:
            limit = f"has more than {self.max_nodes} parts"
            if depth > self.max_depth:
                limit = f"is nested more than {self.max_depth} deep"
            raise self.fault(column, f"{limit}; simplify it, or compute part of it before the call")
        if isinstance(node, ast.Constant):
            return self._number(node)
        if isinstance(node, ast.Name):
            return self._name(node)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
            operand = self._walk(node.operand, depth + 1)
            return -operand if isinstance(node.op, ast.USub) else operand
        if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
            left = self._walk(node.left, depth + 1)
            return Call(_BINARY[type(node.op)], (left, self._walk(node.right, depth + 1)))
        if isinstance(node, ast.Call):
            return self._call(node, depth)
        kind = type(node.op) if isinstance(node, ast.BinOp) else type(node)
        if isinstance(node, ast.BinOp):
            # point at the operator: the first character of it after the left operand and its closing parentheses
            column = self._operator_column(node)
        raise self.fault(column, _HINTS.get(kind, f"{kind.__name__} is not part of the language"))

    def _operator_column(self, node: ast.BinOp) -> int:
        column = node.left.end_col_offset or node.col_offset
        while column < len(self.text) - 1 and self.text[column] in " )":
            column += 1
        return column

    def _number(self, node: ast.Constant) -> Expr:
        value = node.value
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.fault(node.col_offset, f"{type(value).__name__} is not part of the language; use a number")
        if isinstance(value, float) and not math.isfinite(value):
            raise self.fault(node.col_offset, "is beyond the range of fp64; use a smaller number")
        try:
            return as_expr(value)
        except SpecError as error:
            raise self.fault(node.col_offset, str(error)) from None

    def _name(self, node: ast.Name) -> Expr:
        if node.id in self.names:
            return self.names[node.id]
        if node.id in self.functions:
            raise self.fault(node.col_offset, f"{node.id} is a function; write {node.id}(...)")
        known = ", ".join(sorted(self.names))
        raise self.fault(
            node.col_offset, f"unknown name {shown(node.id)}; {_did_you_mean(node.id, self.names)}known: {known}"
        )

    def _call(self, node: ast.Call, depth: int) -> Expr:
        column = node.col_offset
        if not isinstance(node.func, ast.Name):
            raise self.fault(column, "only a function of the language can be called, by its name")
        name = node.func.id
        if name not in self.functions:
            known = ", ".join(self.functions)
            hint = f"did you mean {_SYNONYMS[name]!r}? " if name in _SYNONYMS else _did_you_mean(name, self.functions)
            what = f"{name} is not a function" if name in self.names else f"unknown function {name!r}"
            raise self.fault(column, f"{what}; {hint}known: {known}")
        if node.keywords or any(isinstance(arg, ast.Starred) for arg in node.args):
            raise self.fault(column, f"{name} takes plain arguments only, without * or names")
        if len(node.args) != self.functions[name]:
            raise self.fault(column, f"{name} takes {self.functions[name]} argument(s), got {len(node.args)}")
        return Call(name, tuple(self._walk(arg, depth + 1) for arg in node.args))


def _did_you_mean(name: str, known: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(name, known, 1)
    return f"did you mean {close[0]!r}? " if close else ""

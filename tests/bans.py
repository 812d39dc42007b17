"""What must not occur in flagen, its templates and its generated files: `python tests/bans.py` lists it, as file:line.

Text is never run but in load.py, once it is verified; nothing is pickled; no template is made from text; no kernel uses
block pointers, which newer versions of Triton lack.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
SHIPPED = ("flagen", "generated", "benchmarks")

# Python's own that run text, and those of SymPy that call them
RUNS_TEXT = frozenset({"eval", "exec", "compile", "__import__", "execfile", "sympify", "parse_expr", "lambdify"})
# (file, name) -> how often it stands there
ALLOWED = {
    ("flagen/load.py", "exec"): 1,  # of the bytes that the cache has verified, compiled
    ("flagen/load.py", "compile"): 1,  # on the same line
    ("flagen/compiler.py", "compile"): 1,  # flagen's own, where an unpickled op is made again
    ("flagen/bench_run.py", "compile"): 1,  # flagen's own
}
SERIALISERS = frozenset({"pickle", "_pickle", "cPickle", "shelve", "marshal", "dill", "cloudpickle", "joblib"})
# also in templates, comments and docstrings
WORDS = {
    r"\bmake_block_ptr\b": "block pointers are gone from newer versions of Triton: write offsets and masks",
    r"\btl\.advance\b": "block pointers are gone from newer versions of Triton: write offsets and masks",
    r"\bjinja2\.Template\b|\bfrom_string\(": "templates are files, rendered by the environment of render.py",
    r"\btorch\.load\b": "torch.load unpickles",
}


def faults(root: Path) -> list[str]:
    """What is banned below `root`, a line each: "flagen/x.py:3: what is wrong"."""
    found = []
    for folder in SHIPPED:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".jinja"):
                name, text = path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")
                found += [f"{name}:{line}: {what}" for line, what in _faults_of(name, text)]
    return found


def _faults_of(name: str, text: str) -> Iterator[tuple[int, str]]:
    for word, reason in WORDS.items():
        for match in re.finditer(word, text):
            yield text.count("\n", 0, match.start()) + 1, f"{match[0]}: {reason}"
    if not name.endswith(".py"):
        return
    tree, used = ast.parse(text), Counter[str]()
    for node in ast.walk(tree):
        for package in _packages(node):
            if package in SERIALISERS:
                yield node.lineno, f"{package} runs what it reads: keep JSON"
        if (called := _runs_text(node)) is not None:
            used[called] += 1
            if used[called] > ALLOWED.get((name, called), 0):
                yield node.lineno, f"{called} may run text: see load.py and parse.py"


def _packages(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name.split(".")[0] for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.level == 0:
        return [(node.module or "").split(".")[0]]
    return []


def _runs_text(node: ast.AST) -> str | None:
    """The name, where one of RUNS_TEXT is read or imported: bare, or of builtins or sympy; not a method such as
    model.eval.
    """
    if isinstance(node, ast.ImportFrom) and node.level == 0:
        return next((alias.name for alias in node.names if alias.name in RUNS_TEXT | {"S"}), None)
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in RUNS_TEXT:
        return node.id
    if isinstance(node, ast.Attribute) and node.attr in RUNS_TEXT | {"S"}:
        owner = ast.unparse(node.value).split(".")[0]
        return node.attr if owner in ("builtins", "__builtins__", "sympy", "sp") else None
    return None


if __name__ == "__main__":
    FOUND = faults(ROOT)
    print("\n".join(FOUND) or "nothing that is banned")
    sys.exit(bool(FOUND))

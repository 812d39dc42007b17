"""Plan -> text of the generated module, by the one Jinja environment of flagen."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jinja2

    from .plan import Plan


@functools.cache
def environment() -> jinja2.Environment:
    """Strict: an undefined name is an error, never an empty string."""
    import jinja2

    found = jinja2.Environment(
        loader=jinja2.PackageLoader("flagen"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
        auto_reload=False,
    )
    found.filters["columns"] = columns
    return found


def columns(text: str) -> str:
    """Text over blocks [BT, channels] as text over blocks [channels, BT]: what it broadcasts along is swapped."""
    text = re.sub(r"\[BT, (B[KV])\]", r"[\1, BT]", text)
    return re.sub(r"\[(:, None|None, :)\]", lambda x: "[None, :]" if x[1] == ":, None" else "[:, None]", text)


def render(plan: Plan) -> str:
    """The generated module of a plan: its kernels and their launchers, importing only torch and triton."""
    return _tidy(environment().get_template("module.py.jinja").render(plan=plan))


def render_standalone(plan: Plan) -> str:
    """The module together with an autograd function, a schedule and a plain function of the spec's name: a file to
    vendor."""
    from .standalone import make_standalone

    parts = make_standalone(plan, render(plan))
    return _tidy(environment().get_template("standalone.py.jinja").render(plan=plan, parts=parts))


def _without_unused(text: str) -> str:
    """Macros set up blocks that not every kernel reads: assignments of a line to a name that its function only assigns
    to go, and branches that had nothing else."""
    found = []
    for part in re.split(r"(?m)^(?=def )", text):
        before = None
        while part != before:
            before = part
            part = _ASSIGNMENT.sub(lambda match, whole=part: _kept(match, whole), part)
            part = _EMPTY.sub("", part)
        found.append(part)
    return "".join(found)


_ASSIGNMENT = re.compile(r"(?m)^ +([a-z]\w*) = .*[^(\[{,]\n")
# a condition and comments, and no line that stands further in
_EMPTY = re.compile(r"(?m)^( +)if .*:\n(?:\1 +#.*\n|\n)*(?!\1 |\1else|\1elif|\n)")


def _kept(match: re.Match[str], text: str) -> str:
    named = len(re.findall(rf"\b{match[1]}\b", text))
    return match[0] if named > len(re.findall(rf"(?m)^ +{match[1]} = ", text)) else ""


def _tidy(text: str) -> str:
    """Without trailing spaces, runs of more than two blank lines, and blank lines at the end."""
    lines: list[str] = []
    for line in (line.rstrip() for line in _without_unused(text).splitlines()):
        if line or lines[-2:] != ["", ""]:
            lines.append(line)
    return "\n".join(lines).strip("\n") + "\n"

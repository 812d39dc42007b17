"""Plan -> text of the generated module, by the one Jinja environment of flagen."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jinja2

    from .plan import Plan


@functools.cache
def environment() -> jinja2.Environment:
    """Strict: an undefined name is an error, never an empty string."""
    import jinja2

    return jinja2.Environment(
        loader=jinja2.PackageLoader("flagen"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
        auto_reload=False,
    )


def render(plan: Plan) -> str:
    """The generated module of a plan: its kernels and their launchers, importing only torch and triton."""
    return _tidy(environment().get_template("module.py.jinja").render(plan=plan))


def render_standalone(plan: Plan) -> str:
    """The module together with an autograd function, a schedule and a plain function of the spec's name: a file to vendor."""
    from .standalone import make_standalone

    parts = make_standalone(plan, render(plan))
    return _tidy(environment().get_template("standalone.py.jinja").render(plan=plan, parts=parts))


def _tidy(text: str) -> str:
    """Without trailing spaces, runs of more than two blank lines, and blank lines at the end."""
    lines: list[str] = []
    for line in (line.rstrip() for line in text.splitlines()):
        if line or lines[-2:] != ["", ""]:
            lines.append(line)
    return "\n".join(lines).strip("\n") + "\n"

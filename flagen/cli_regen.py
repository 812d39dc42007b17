"""regen: generated/ holds every shipped spec as it is rendered, for review; flagen never imports it."""

from __future__ import annotations

import argparse
import difflib
import sys
from pathlib import Path

from . import specs
from .cli_progress import Progress
from .errors import FlagenError

CHECKOUT = Path(__file__).parent.parent


def regen(arguments: argparse.Namespace) -> int:
    """Writes the files that differ and removes those of no spec; with --check shows the differences, with status 1."""
    directory = Path(arguments.directory) if arguments.directory else _default_directory()
    wanted = rendered()
    there = {path.name: path.read_text(encoding="utf-8") for path in sorted(directory.glob("*.py"))}
    changed = sorted(name for name in wanted | there if wanted.get(name) != there.get(name))
    if arguments.check:
        for name in changed:
            sys.stdout.writelines(_difference(name, there.get(name), wanted.get(name)))
        if changed:
            print(f"{len(changed)} of the files in {directory} differ; run: flagen regen", file=sys.stderr)
        return 1 if changed else 0
    directory.mkdir(parents=True, exist_ok=True)
    for name in changed:
        if name in wanted:
            (directory / name).write_bytes(wanted[name].encode())
            print(f"written: {directory / name}")
        else:
            (directory / name).unlink()
            print(f"removed: {directory / name}")
    return 0


def rendered() -> dict[str, str]:
    """The text of every shipped spec that has kernels, by file name."""
    from .analysis import analyse
    from .plan import make_plan
    from .render import render

    texts = {}
    with Progress(len(specs.names()), "rendering") as bar:
        for name in specs.names():
            analysis = analyse(specs.get(name))
            if not analysis.without_kernels:
                texts[f"{name}.py"] = render(make_plan(analysis))
            bar.step(name)
    return texts


def _default_directory() -> Path:
    if not (CHECKOUT / "pyproject.toml").is_file():
        raise FlagenError(
            "generated/ belongs to a source checkout, and this flagen is installed without one; give --directory"
        )
    return CHECKOUT / "generated"


def _difference(name: str, there: str | None, wanted: str | None) -> list[str]:
    if there is None or wanted is None:
        return [f"generated/{name}: {'is missing' if there is None else 'belongs to no shipped spec'}\n"]
    lines = there.splitlines(keepends=True), wanted.splitlines(keepends=True)
    return list(difflib.unified_diff(*lines, f"generated/{name}", f"rendered/{name}"))

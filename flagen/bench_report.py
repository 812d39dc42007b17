"""Rows of a benchmark as CSV and as a table, and what they say together."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .bench import FIELDS, Row
from .bench_shapes import GROUPS
from .errors import FlagenError

HEADER = (
    f"{'spec':16} {'shape':18} {'what':14} {'by':24} {'value':>10} {'':3} {'floor':>9} {'share':>6} {'predicted':>9} "
    f"{'':5}  note"
)
SOFTMAX = "softmax"  # the spec of rows that belong to none
_TYPES: dict[str, type] = {"int": int, "float": float, "str": str}


def append(path: Path, row: Row) -> None:
    """One more row in a file, which gets its header with the first."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(FIELDS)
        values = dataclasses.asdict(row)
        writer.writerow([_text(values[name]) for name in FIELDS])


def _text(value: Any) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return str(value)


def read(paths: Iterable[str | Path]) -> list[Row]:
    """The rows of files that append wrote. Raises FlagenError on any other file."""
    kinds = {one.name: _TYPES[str(one.type)] for one in dataclasses.fields(Row)}
    found = []
    for path in map(Path, paths):
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != FIELDS:
                raise FlagenError(f"{path} has other columns than flagen bench writes, which are {', '.join(FIELDS)}")
            for line in reader:
                try:
                    values = {
                        name: kinds[name](line[name] or ("nan" if kinds[name] is float else "")) for name in FIELDS
                    }
                except (TypeError, ValueError) as error:
                    raise FlagenError(f"{path}, line {reader.line_num}: {error}") from None
                found.append(Row(**values))
    return found


def latest(rows: Sequence[Row]) -> list[Row]:
    """Of rows for the same thing the last; in the order of the first."""
    return list({(*_place(one), one.library, one.op, one.what): one for one in rows}.values())


def _place(one: Row) -> tuple[Any, ...]:
    return one.spec, one.shape, *one.sizes, one.dtype, one.device


def table(rows: Sequence[Row]) -> list[str]:
    """A line for each row, those of one spec and shape together."""
    lines = [HEADER, "-" * len(HEADER)]
    for one in rows:
        who = one.library if one.library == "flagen" else f"{one.library} {one.op}"
        share = "" if math.isnan(one.share) else f"{one.share:.0%}"
        flag = "OFF" if one.mispredicted else ""
        value = "-" if math.isnan(one.value) else _number(one.value)
        lines.append(
            f"{one.spec:16} {one.shape[:18]:18} {one.what:14} {who[:24]:24} {value:>10} {one.unit:3} "
            f"{_number(one.floor):>9} {share:>6} {_number(one.predicted):>9} {flag:5}  {one.note}".rstrip()
        )
    return lines


def _number(value: float) -> str:
    if math.isnan(value):
        return ""
    return f"{value:.{4 if value < 1 else 3 if value < 100 else 1}f}"


def speedups(rows: Sequence[Row], what: str = "fwd+bwd") -> list[tuple[str, str, float, tuple[str, ...]]]:
    """Of each spec and library: the geometric mean of the times of its best function over flagen's, and the shapes
    where both were measured."""
    timed = [one for one in rows if one.what == what and not math.isnan(one.value)]
    own = {_place(one): one.value for one in timed if one.library == "flagen"}
    theirs: dict[tuple[str, str], dict[tuple[Any, ...], Row]] = {}
    for one in timed:
        place = _place(one)
        if one.library != "flagen" and place in own:
            best = theirs.setdefault((one.spec, one.library), {})
            if place not in best or one.value < best[place].value:
                best[place] = one
    found = []
    for (spec, library), best in theirs.items():
        logs = [math.log(one.value / own[place]) for place, one in best.items()]
        found.append((spec, library, math.exp(sum(logs) / len(logs)), tuple(one.shape for one in best.values())))
    return found


def markdown(rows: Sequence[Row], shapes: Sequence[str] = GROUPS["large"]) -> list[str]:
    """A table of flagen's times, forward / forward and backward, each with its share of the floor, and of its speed
    against the peers; a line for each spec."""
    own = {(one.spec, one.shape, one.what): one for one in rows if one.library == "flagen"}
    libraries = list(dict.fromkeys(one.library for one in rows if one.library != "flagen" and one.spec != SOFTMAX))
    factors = {(spec, library): f"{factor:.1f}x" for spec, library, factor, _ in speedups(rows)}

    def cell(spec: str, shape: str) -> str:
        found = [own.get((spec, shape, what)) for what in ("fwd", "fwd+bwd")]
        return " / ".join(
            "-" if one is None or math.isnan(one.value) else f"{one.value:.3g} ({one.share:.0%})" for one in found
        )

    titles = ("spec", *shapes, *(f"against {library}" for library in libraries))
    lines = [titles, ("---",) * len(titles)]
    for spec in dict.fromkeys(spec for spec, shape, _ in own if shape in shapes):
        others = (factors.get((spec, library), "-") for library in libraries)
        lines.append((f"`{spec}`", *(cell(spec, shape) for shape in shapes), *others))
    return [f"| {' | '.join(line)} |" for line in lines]


def summary(rows: Sequence[Row]) -> list[str]:
    """Speed against the peers, and predictions that are off."""
    lines = [
        f"{spec}: {factor:.2f} times as fast as {library}, fwd+bwd, geometric mean over {', '.join(shapes)}"
        for spec, library, factor, shapes in speedups(rows)
    ]
    off = [f"{one.spec} {one.shape} {one.what} ({one.predicted / one.value:.2f})" for one in rows if one.mispredicted]
    if off:
        lines.append(f"predictions off by more than 1.5 times on large shapes: {', '.join(off)}")
    return lines

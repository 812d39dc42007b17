"""Rows of a benchmark as pictures: the floor's share of the time by spec and shape, and time against length."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .bench import Row
from .bench_shapes import GROUPS
from .errors import FlagenError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CALLS = ("fwd", "fwd+bwd")
TITLES = {"fwd": "forward", "fwd+bwd": "forward + backward"}


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Writes share.png and time.png, each if there are rows for it. Raises FlagenError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise FlagenError("plots need matplotlib; it comes with flagen[bench]") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = []
    for name, paint, chosen in (
        ("share", _shares, _share_rows(rows)),
        ("time", _times, _series_rows(rows)),
    ):
        if not chosen:
            continue
        count = 2 if name == "share" else 1
        figure, axes = pyplot.subplots(count, 1, figsize=(11, 8), layout="constrained", squeeze=False)
        paint([one for (one,) in axes], chosen)
        devices = ", ".join(dict.fromkeys(one.device for one in chosen))
        figure.suptitle(f"{devices}, {', '.join(dict.fromkeys(one.dtype for one in chosen))}")
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=120)
        pyplot.close(figure)
        written.append(path)
    return written


def _share_rows(rows: Sequence[Row]) -> list[Row]:
    """Without the shapes of the other picture, but where there are no others."""
    found = [one for one in rows if one.what in CALLS and (one.library != "flagen" or not math.isnan(one.share))]
    found = [one for one in found if one.shape not in GROUPS["lengths"]] or found
    return found if any(one.library == "flagen" for one in found) else []


def _shares(axes: list[Axes], rows: Sequence[Row]) -> None:
    """Bars for flagen, one for each shape; marks where the best function of a peer is."""
    specs = list(dict.fromkeys(one.spec for one in rows if one.library == "flagen"))
    shapes = list(dict.fromkeys(one.shape for one in rows if one.library == "flagen"))
    width = 0.8 / max(1, len(shapes))
    for axis, what in zip(axes, CALLS, strict=True):
        for number, shape in enumerate(shapes):
            own = {one.spec: one.share for one in rows if (one.library, one.shape, one.what) == ("flagen", shape, what)}
            at = [place + (number - (len(shapes) - 1) / 2) * width for place in range(len(specs))]
            axis.bar(at, [100 * own.get(spec, 0.0) for spec in specs], width, label=shape)
            for place, spec in zip(at, specs, strict=True):
                here = [one for one in rows if (one.spec, one.shape, one.what) == (spec, shape, what)]
                others = [one.value for one in here if one.library != "flagen" and not math.isnan(one.value)]
                mine = [one.floor for one in here if one.library == "flagen"]
                if others and mine:
                    axis.plot(place, 100 * mine[-1] / min(others), "k_", markersize=10, markeredgewidth=2)
        axis.set_xticks(range(len(specs)), specs, rotation=25, ha="right")
        axis.set_ylabel("share of the memory floor, %")
        axis.set_title(f"{TITLES[what]} (bars: flagen; lines: the best of the peers)")
        axis.grid(axis="y", alpha=0.3)
    axes[0].legend(ncols=6, fontsize="small", loc="upper center")


def _series_rows(rows: Sequence[Row]) -> list[Row]:
    """Forward and backward of what was measured at two lengths or more, all other sizes being the same."""
    lengths: dict[Any, set[int]] = defaultdict(set)
    timed = [one for one in rows if one.what == "fwd+bwd" and not math.isnan(one.value)]
    for one in timed:
        lengths[_series(one)].add(one.T)
    return [one for one in timed if len(lengths[_series(one)]) > 1]


def _series(one: Row) -> tuple[Any, ...]:
    return one.spec, one.library, one.op, one.B, one.H, one.K, one.V, one.dtype


def _times(axes: list[Axes], rows: Sequence[Row]) -> None:
    """A line for each spec and library, and thin ones for the floors."""
    (axis,) = axes
    lines: dict[Any, list[Row]] = defaultdict(list)
    for one in rows:
        lines[_series(one)].append(one)
    colours = {spec: f"C{number % 10}" for number, spec in enumerate(dict.fromkeys(key[0] for key in lines))}
    for key, points in lines.items():
        points.sort(key=lambda one: one.T)
        label = (
            f"{key[0]} {'' if key[1] == 'flagen' else key[2]}".strip() + f" (B {key[3]}, H {key[4]}, {key[5]}x{key[6]})"
        )
        style = "o-" if key[1] == "flagen" else "x--"
        colour = colours[key[0]]
        axis.plot([one.T for one in points], [one.value for one in points], style, label=label, color=colour)
        if key[1] == "flagen" and not any(math.isnan(one.floor) for one in points):
            axis.plot([one.T for one in points], [one.floor for one in points], ":", color=colour, alpha=0.6)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("tokens")
    axis.set_ylabel("ms, forward + backward (dotted: the floor)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")

"""Fits the constants of the cost model (flagen/cost.py) to rows that `flagen bench` measured on one device.

    python benchmarks/calibrate.py benchmarks/results/rows.csv

Prints the constants and how far each row is from its estimate under them. Rows of small shapes, which launches bound,
are left out; so is what --without names.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import random
from collections.abc import Sequence

import torch

from flagen import cost, specs
from flagen.bench import Row
from flagen.bench_report import latest, read
from flagen.bench_run import DTYPES
from flagen.schedule import Shape

# what each constant may be: clocks, clocks, a share, registers, a slope, two shares of what is counted, maybe too much
LIMITS = cost.Constants(
    *zip((50.0, 5.0, 0.2, 180.0, 0.0, 0.5, 0.5), (3000.0, 1000.0, 1.0, 256.0, 3.0, 4.0, 4.0), strict=True)
)
STARTS, STEPS, STEP = 4, 3000, 0.05


@dataclasses.dataclass(frozen=True)
class Point:
    """A measured time, and the kernels that it is the sum of."""

    row: Row
    kernels: tuple[cost.KernelCost, ...]

    def ratio(self, machine: cost.Machine, constants: cost.Constants) -> float:
        """The estimate over what was measured."""
        return sum(cost.retimed(one, machine, constants) for one in self.kernels) * 1e3 / self.row.value


def points(rows: Sequence[Row], machine: cost.Machine) -> list[Point]:
    """Of flagen's own rows of large shapes, forward and forward + backward, for shipped specs."""
    estimates: dict[tuple, cost.Estimate] = {}
    found = []
    for row in latest(rows):
        wanted = row.library == "flagen" and row.what in ("fwd", "fwd+bwd") and row.is_large
        if not wanted or math.isnan(row.value) or row.spec not in specs.names():
            continue
        place = row.spec, row.sizes, row.dtype
        if place not in estimates:
            dtype = getattr(torch, DTYPES[row.dtype])
            estimates[place] = cost.estimate(specs.get(row.spec), Shape.dense(*row.sizes), dtype, machine)
        stage = estimates[place].forward if row.what == "fwd" else estimates[place].both
        found.append(Point(row, stage.kernels))
    return found


def fit(found: Sequence[Point], machine: cost.Machine, seed: int = 0) -> cost.Constants:
    """The constants with the least sum of squared logarithms of the ratios, by random steps from several starts."""
    drawn = random.Random(seed)

    def loss(constants: cost.Constants) -> float:
        return sum(math.log(one.ratio(machine, constants)) ** 2 for one in found)

    best = cost.FITTED
    least = loss(best)
    for start in range(STARTS):
        at = best if start == 0 else cost.Constants(*(drawn.uniform(*limits) for limits in LIMITS))
        value = loss(at)
        for _ in range(STEPS):
            moved = cost.Constants(
                *(min(high, max(low, x * math.exp(drawn.gauss(0, STEP)) + 1e-3 * drawn.gauss(0, 1)))
                  for x, (low, high) in zip(at, LIMITS, strict=True))
            )  # fmt: skip
            new = loss(moved)
            if new < value:
                at, value = moved, new
        if value < least:
            best, least = at, value
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", nargs="+", help="what flagen bench wrote")
    parser.add_argument("--without", nargs="*", default=[], metavar="SPEC[:WHAT]",
                        help="what to leave out of the fit, such as mamba2 or mamba2:fwd+bwd")  # fmt: skip
    given = parser.parse_args()
    rows = read(given.csv)
    devices = {(row.device, row.copy) for row in rows if not math.isnan(row.copy)}
    if len({device for device, _ in devices}) != 1:
        parser.error(f"the rows must be of one device, they are of {sorted(device for device, _ in devices) or 'none'}")
    device, copy = max(devices)
    machine = cost.machine_of(device, copy)
    found = points(rows, machine)
    used = [one for one in found if not {one.row.spec, f"{one.row.spec}:{one.row.what}"} & set(given.without)]
    if not used:
        parser.error("no row is of a large shape; run flagen bench with --shapes large")
    constants = fit(used, machine)
    print(", ".join(f"{name} = {value:.4g}" for name, value in constants._asdict().items()))
    print(f"{'spec':16} {'shape':10} {'what':8} {'ms':>8} {'now':>6} {'fitted':>6}   (estimate over measured)")
    for one in found:
        left_out = "" if one in used else "  left out"
        print(f"{one.row.spec:16} {one.row.shape[:10]:10} {one.row.what:8} {one.row.value:8.3f} "
              f"{one.ratio(machine, cost.FITTED):6.2f} {one.ratio(machine, constants):6.2f}{left_out}")  # fmt: skip


if __name__ == "__main__":
    main()

"""check: specs against their reference over a grid of sizes, dtypes and layouts, in several processes; a table at last.

The unit of work is one spec at one dtype and head size, since these decide what is compiled; a unit runs all lengths.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import sys
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import cli_pool, specs
from .cli_progress import Progress
from .cli_spec import find_spec
from .errors import FlagenError
from .spec import Spec

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
HEADS = 2
CROWD = 67  # heads of which two sequences have more than a GPU has multiprocessors, so that programs are cut otherwise


@dataclass(frozen=True)
class Grid:
    """Head sizes (K, V), lengths, lengths of sequences packed into one row, with `past` tokens after the last, and the
    head sizes at which query and key have fewer heads as well, and those at which there are many heads as well: kernels
    of their own, which take long to compile."""

    sizes: tuple[tuple[int, int], ...]
    taylor_sizes: tuple[tuple[int, int], ...]
    lengths: tuple[int, ...]
    packed: tuple[tuple[int, ...], ...]
    grouped: tuple[tuple[int, int], ...]
    crowded: tuple[tuple[int, int], ...] = ()
    past: int = 7


GRIDS = {
    "cpu": Grid(
        sizes=((16, 16), (20, 12)),
        taylor_sizes=((8, 12),),
        lengths=(1, 15, 65, 200),
        packed=((1, 15, 0, 64, 65),),
        grouped=((16, 16), (20, 12), (8, 12)),
    ),
    "cuda": Grid(
        sizes=((16, 16), (60, 60), (64, 64), (100, 100), (128, 128), (256, 256), (64, 128), (100, 36)),
        taylor_sizes=((8, 8), (16, 16), (16, 64), (24, 60), (32, 128)),
        lengths=(1, 15, 63, 64, 65, 1000, 4096),
        packed=((1, 15, 0, 63, 64, 65, 200, 1000), (4096, 0, 100)),
        grouped=((64, 64), (100, 36), (16, 64)),
        crowded=((128, 128),),
    ),
}
MAX_K = {0: 256, 1: 255, 2: 32}  # by the order of the Taylor map
MAX_K_PHASE = 128


@dataclass(frozen=True)
class Unit:
    """What one process does at a time. spec: its JSON form, which any process can read."""

    name: str
    spec: str
    dtype: str
    K: int
    V: int
    device: str


@dataclass(frozen=True)
class Line:
    """One tensor of one case. fault: why there are no numbers, or the wrong shape."""

    spec: str
    dtype: str
    case: str
    tensor: str
    rms: float = 0.0
    worst: float = 0.0
    limit: float = 0.0
    worst_limit: float = 0.0
    ok: bool = False
    fault: str = ""


def check(arguments: argparse.Namespace) -> int:
    """Status 1 if anything is beyond its limit or could not be run."""
    if arguments.table:
        return _finish(list(_saved(arguments.table)), arguments.worst)
    device = _device(arguments.device)
    chosen = [specs.get(name) for name in specs.names()] if arguments.all else []
    chosen += [find_spec(text) for text in arguments.specs]
    if not chosen:
        raise FlagenError(f"check: name the specs, or give --all; the shipped ones are {', '.join(specs.names())}")
    work = sharded(units(chosen, arguments.dtype, device), *arguments.shard)
    devices = cli_pool.gpus(device)
    jobs = arguments.jobs or cli_pool.most_jobs(devices)
    lines: list[Line] = []
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(Path(arguments.save).open("w", encoding="utf-8")) if arguments.save else None
        bar = stack.enter_context(Progress(len(work), "checking"))
        for unit, found in cli_pool.run(run_unit, work, jobs, devices=devices):
            if found is None:
                found = [_fault(unit, "", "the process died; run this spec alone to see why")]
            lines += found
            bar.step(f"{unit.name} {unit.dtype} K={unit.K} V={unit.V}")
            if log:
                log.writelines(json.dumps(asdict(line)) + "\n" for line in found)
                log.flush()
    return _finish(lines, arguments.worst)


def _device(name: str) -> str:
    import torch

    kind = name.partition(":")[0]
    if kind not in GRIDS:
        raise FlagenError(f"--device {name}: the check runs on cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise FlagenError(
            f"--device {name}: torch {torch.__version__} finds no CUDA device here; leave --device out for the CPU"
        )
    return name


def units(chosen: Iterable[Spec], dtypes: Iterable[str], device: str) -> list[Unit]:
    """The grid of the device for these specs, those of one spec together."""
    grid = GRIDS[device.partition(":")[0]]
    found = []
    for spec in chosen:
        limit = min(MAX_K[spec.taylor], MAX_K_PHASE if spec.phase is not None else 256)
        sizes = [size for size in (grid.taylor_sizes if spec.taylor == 2 else grid.sizes) if size[0] <= limit]
        text = spec.to_json()
        found += [Unit(spec.name, text, dtype, K, V, device) for dtype in dtypes for K, V in sizes]
    return found


def sharded(work: list[Unit], part: int, count: int) -> list[Unit]:
    """Part 1 .. count of the units, each a sample of all specs, dtypes and sizes: every count-th in an order by chance,
    which is the same in every process.
    """
    order = sorted(range(len(work)), key=lambda i: hashlib.sha256(repr(work[i]).encode()).digest())
    return [work[i] for i in sorted(order[part - 1 :: count])]


def run_unit(unit: Unit) -> tuple[list[Line], bool]:
    """Every length and packing of a unit, and whether the process can go on."""
    import torch

    warnings.simplefilter("ignore")  # the parent has shown what the specs warn of
    spec = Spec.from_json(unit.spec)
    lines: list[Line] = []
    for options in cases(spec, unit):
        hidden = ("B", "gate_dtype", *(("H",) if options["H"] == HEADS else ()))
        label = " ".join(f"{key}={value}" for key, value in options.items() if key not in hidden)
        try:
            lines += _run_case(spec, unit, options, label)
        except Exception as error:  # whatever it is belongs in the table, and the other cases still count
            lines.append(_fault(unit, label, f"{type(error).__name__}: {error}"))
            if unit.device != "cpu":
                try:
                    torch.cuda.synchronize()
                except RuntimeError:
                    return lines, False
    return lines, True


def cases(spec: Spec, unit: Unit) -> list[dict[str, Any]]:
    """The arguments of testing.check. Dense cases have gates in fp32, packed ones in the dtype of the rest."""
    import torch

    grid = GRIDS[unit.device.partition(":")[0]]
    sizes = {"B": 2, "H": HEADS, "K": unit.K, "V": unit.V}
    found = [sizes | {"T": length, "gate_dtype": torch.float32} for length in grid.lengths]
    grouped = {one.name: 1 for one in spec.inputs if "h" in one.axes and one not in spec.value.inputs}
    if grouped and (unit.K, unit.V) in grid.grouped:
        found.append(sizes | {"T": grid.lengths[-2], "gate_dtype": torch.float32, "heads": grouped})
    if (unit.K, unit.V) in grid.crowded:
        found.append(sizes | {"H": CROWD, "T": 200, "gate_dtype": torch.float32})
    for lengths in grid.packed:
        bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
        found.append(sizes | {"B": 1, "T": bounds[-1] + grid.past, "cu_seqlens": bounds})
    return found


def _run_case(spec: Spec, unit: Unit, options: dict[str, Any], label: str) -> list[Line]:
    import torch

    from .testing import WORST_ROW, check

    report = check(spec, **options, dtype=getattr(torch, DTYPES[unit.dtype]), device=unit.device, raises=False)
    found = []
    for row in report.rows:
        numbers = row.rms, row.worst, row.limit, WORST_ROW * row.limit
        found.append(Line(unit.name, unit.dtype, label, row.tensor, *numbers, ok=row.ok, fault=row.fault))
    return found


def _fault(unit: Unit, label: str, text: str) -> Line:
    return Line(unit.name, unit.dtype, label or f"K={unit.K} V={unit.V}", "-", fault=text)


# --- the table


def _saved(paths: Iterable[str]) -> Iterable[Line]:
    for path in paths:
        for text in Path(path).read_text(encoding="utf-8").splitlines():
            yield Line(**json.loads(text))


def _finish(lines: list[Line], most: int) -> int:
    failures = [line for line in lines if not line.ok]
    for line in failures[:most]:
        numbers = f"rms {line.rms:.1e} ({line.limit:.0e}), worst row {line.worst:.1e} ({line.worst_limit:.0e})"
        print(f"{line.spec} {line.dtype} {line.case}: {line.tensor}: {line.fault or numbers}", file=sys.stderr)
    if len(failures) > most:
        print(f"... and {len(failures) - most} more", file=sys.stderr)
    print("\n".join(table(lines)))
    places = len({(line.spec, line.dtype, line.case) for line in lines})
    bad = len({(line.spec, line.dtype, line.case) for line in failures})
    print(f"\n{places} cases, {bad} beyond their limits or without a result")
    return 1 if failures or not lines else 0


def table(lines: Iterable[Line]) -> list[str]:
    """The largest errors by spec, dtype and tensor, over all cases, beside their limits. In the same order whatever
    part came first.
    """
    groups: dict[tuple[str, str, str], list[Line]] = {}
    for line in lines:
        groups.setdefault((line.spec, line.dtype, line.tensor), []).append(line)
    groups = dict(sorted(groups.items(), key=lambda item: item[0][:2]))  # tensors as each spec has them
    header = f"{'spec':14} {'dtype':5} {'tensor':20} {'cases':>5} {'rms':>8} {'limit':>8} {'row':>8} {'limit':>8}"
    text = [header, "-" * len(header)]
    for (spec, dtype, tensor), group in groups.items():
        rms, worst = max(_key(one.rms) for one in group), max(_key(one.worst) for one in group)
        bad = sum(not one.ok for one in group)
        numbers = f"{rms:8.1e} {group[0].limit:8.0e} {worst:8.1e} {group[0].worst_limit:8.0e}"
        text.append(f"{spec:14} {dtype:5} {tensor:20} {len(group):5} {numbers}{f'  {bad} FAILED' if bad else ''}")
    return text


def _key(number: float) -> float:
    """NaN is worse than any number."""
    return float("inf") if number != number else number

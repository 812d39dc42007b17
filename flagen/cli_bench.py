"""bench: times specs, and others' kernels beside them; a table, rows of CSV as they come, and pictures."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from . import specs
from .bench import Row, shapes_of
from .bench_report import append, latest, markdown, read, summary, table
from .cli_spec import find_spec
from .errors import FlagenError
from .spec import Spec

DEFAULT_SHAPES = {"cuda": ["large"], "cpu": ["1,512,2,64,64"]}
DECODE_SHAPES = {"cuda": "decode", "cpu": "8,1,2,64,64"}
ROWS = "rows.csv"


def bench(arguments: argparse.Namespace) -> int:
    """Status 1 if anything that was timed is wrong, or if there is no figure at all."""
    folder = Path(arguments.out or "benchmarks/results")
    if arguments.markdown:
        print("\n".join(markdown(latest(read(arguments.markdown)))))
        return 0
    if arguments.plot:
        rows = latest(read(arguments.plot))
        folder.mkdir(parents=True, exist_ok=True)
        return _finish(rows, folder, [], [])
    from .bench_run import Runner, Settings

    device = _device(arguments.device)
    kind = device.partition(":")[0]
    names = list(arguments.shapes or DEFAULT_SHAPES[kind])
    shapes = shapes_of(names)
    if "decode" in arguments.what and not any(one.T == 1 for one in shapes.values()):
        shapes |= shapes_of([DECODE_SHAPES[kind]])
    chosen = [find_spec(text) for text in arguments.specs] or _shipped(kind)
    settings = Settings(
        device=device,
        dtype=arguments.dtype or ("bf16" if kind == "cuda" else "fp32"),
        what=arguments.what,
        against=arguments.against,
        backend=arguments.backend,
        jobs=arguments.jobs,
        limit=arguments.time_limit or float("inf"),
    )
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:5.0f} s] {text}", file=sys.stderr, flush=True)

    def keep(row: Row) -> None:
        append(folder / ROWS, row)
        say(" ".join(table([row])[-1].split()))

    for library in settings.against:
        _importable(library)
    runner = Runner(settings, say, keep)
    runner.run(chosen, shapes)
    return _finish(runner.rows, folder, runner.wrong, runner.missing)


def _shipped(kind: str) -> list[Spec]:
    """The shipped specs; on a GPU those that have kernels."""
    from .compiler import prepare

    found = [specs.get(name) for name in specs.names()]
    return [one for one in found if kind != "cuda" or prepare(one)[0] is not None]


def _finish(rows: list[Row], folder: Path, wrong: list[str], missing: list[str]) -> int:
    print("\n".join(table(rows)))
    print("\n".join(["", *summary(rows)]).rstrip())
    try:
        from .bench_plot import draw

        for path in draw(rows, folder):
            print(f"written: {path}", file=sys.stderr)
    except FlagenError as error:
        print(f"no pictures: {error}", file=sys.stderr)
    for title, lines in (("not run", missing), ("WRONG", wrong)):
        for line in dict.fromkeys(lines):
            print(f"{title}: {line}", file=sys.stderr)
    measured = any(one.value == one.value for one in rows)
    return 1 if wrong or not measured else 0


def _importable(library: str) -> None:
    """Raises FlagenError before anything is timed if a peer is not installed."""
    from .peers import calls

    calls(library, "")


def _device(name: str | None) -> str:
    import torch

    found = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if found.partition(":")[0] not in DEFAULT_SHAPES:
        raise FlagenError(f"--device {found}: the benchmark runs on cpu or cuda")
    if found != "cpu" and not torch.cuda.is_available():
        raise FlagenError(f"--device {found}: torch {torch.__version__} finds no CUDA device here")
    return found

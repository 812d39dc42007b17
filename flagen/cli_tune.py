"""tune: times a handful of schedules on the GPU that is here, and remembers those that are better than the default."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from . import tuned_tables
from .bench import case_of, fitted, provenance, shapes_of
from .cli_spec import find_spec
from .errors import FlagenError
from .tuned_search import ROUNDS, Bench, BusyError, merged, search, text_of
from .tuned_tables import Entry, place_of, remember

if TYPE_CHECKING:
    import torch

    from .schedule import Shape
    from .spec import Spec

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def tune(arguments: argparse.Namespace) -> int:
    """Status 1 where nothing could be decided for some shape: what is wrong, or a busy GPU."""
    import torch

    if not torch.cuda.is_available():
        raise FlagenError(f"tune times kernels on a GPU, and torch {torch.__version__} finds no CUDA device here")
    folder = None if arguments.out is None else Path(arguments.out)
    dtype: torch.dtype = getattr(torch, DTYPES[arguments.dtype])
    device, failed = torch.cuda.get_device_name(), False
    versions = provenance("cuda")["versions"]
    for spec in map(find_spec, arguments.specs):
        for name, shape in shapes_of(arguments.shapes).items():
            try:
                entry = tuned(spec, fitted(spec, shape), dtype, "cuda", versions, arguments.rounds)
            except (BusyError, WrongError) as error:
                print(f"{spec.name} {name}: {error}", file=sys.stderr)
                failed = True
                continue
            path = remember([entry], device, folder)
            gain = f"{entry.ms:.4f} ms instead of {entry.default_ms:.4f}, forward and backward"
            print(
                f"{spec.name} {name}: {text_of(entry.choice) + ': ' + gain if entry.choice else 'the default is kept'}"
            )
            print(f"written: {path}", file=sys.stderr)
    return 1 if failed else 0


class WrongError(FlagenError):
    """The default itself is wrong at this shape."""


def tuned(spec: Spec, shape: Shape, dtype: torch.dtype, device: str, versions: str, rounds: int = ROUNDS) -> Entry:
    """What is best for a spec at a shape, checked and timed. Raises WrongError and BusyError: then nothing is known."""
    from . import bench_check, bench_measure, compiler
    from .load import load
    from .triton_backend import TritonBackend

    began = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:5.0f} s] {spec.name} {text}", file=sys.stderr, flush=True)

    plan, entry = compiler.prepare(spec)
    if plan is None:
        raise FlagenError(f"{spec.name}: has no kernels to tune")
    if plan.vector:
        raise FlagenError(f"{spec.name}: tune knows no other schedules for a vector state")
    module, op = load(entry), compiler.compile(spec, backend="triton")
    with tuned_tables.ignored():
        case = case_of(op, shape, dtype, device)
        if fault := bench_check.small(op, shape, dtype, device) or bench_check.sampled(op, case, shape, dtype):
            raise WrongError(f"the default is wrong, so that nothing can be compared with it: {fault}")
        bench = Bench(op, case.inputs, lambda: TritonBackend(plan, module))
        found = search(bench, shape, dtype, lambda run: bench_measure.milliseconds(run, device), say, rounds)
    default, best = (sum(getattr(one, name) for one in found) for name in ("default_ms", "ms"))
    return Entry(place_of(module.__name__, shape, dtype), merged(found), default, best, versions)

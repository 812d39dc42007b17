"""demo: compiles the shipped specs and the README's, runs them forward and backward, and shows their errors against the
reference. On a GPU the same command runs the Triton kernels.
"""

from __future__ import annotations

import argparse
import contextlib
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import cli_pool, specs
from .cli_progress import Progress
from .errors import FlagenError

if TYPE_CHECKING:
    from .op import Op
    from .spec import Spec
    from .testing import Report

TOKENS = 4096
SIZES = {"B": 1, "H": 2, "K": 32, "V": 32}
TAYLOR_K = 16


@dataclass(frozen=True)
class Result:
    """Seconds to compile, and milliseconds of one forward and one backward after a first one."""

    compiled: float
    forward: float
    backward: float
    report: Report


def demo(arguments: argparse.Namespace) -> int:
    """Status 1 if an error is beyond its limit."""
    import torch

    import flagen

    from .demo_example import my_attention

    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise FlagenError(f"--device {device}: torch {torch.__version__} finds no CUDA device here")
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    tokens = arguments.tokens or TOKENS
    where = f"Triton kernels on {torch.cuda.get_device_name(device)}" if on_gpu else "the torch backend on the CPU"
    shape = " ".join(f"{axis}={size}" for axis, size in SIZES.items())
    print(f"{where}, {str(dtype).removeprefix('torch.')}, T={tokens} {shape} (K={TAYLOR_K} with a Taylor map)")
    print("errors: relative RMS against the recurrence, token by token in fp64; worst of all gradients")
    chosen = [*map(specs.get, specs.names()), my_attention]
    if on_gpu:
        compile_ahead(chosen, device, dtype, tokens)
    print()
    print(f"{'spec':14} {'compile':>8} {'forward':>9} {'backward':>9}   {'output':>7} {'limit':>6}   gradient (limit)")
    results: list[Result] = []
    op: Any = None
    with Progress(len(chosen), "running") as bar:
        for one in chosen:
            bar.step(one.name, advance=0)
            began = time.perf_counter()
            op = flagen.compile(one)
            results.append(run(op, time.perf_counter() - began, device, dtype, tokens))
            bar.clear()
            print(line(op.spec.name, results[-1]), flush=True)
            bar.step()
    return _close(results, op)


def compile_ahead(chosen: Sequence[Spec], device: Any, dtype: Any, tokens: int) -> None:
    """Runs them once in several processes, since compiling is all that takes long: Triton's cache keeps the kernels."""
    units = [(one.to_json(), str(device), dtype, tokens) for one in chosen]
    jobs, began = min(len(units), cli_pool.most_jobs(())), time.perf_counter()
    with Progress(len(units), "compiling") as bar:
        for _ in cli_pool.run(_compile_one, units, jobs):
            bar.step()
    print(f"kernels compiled in {time.perf_counter() - began:.0f} s by {jobs} processes; below they are in the caches")


def _compile_one(unit: tuple[str, str, Any, int]) -> tuple[None, bool]:
    import torch

    import flagen

    text, device, dtype, tokens = unit
    # what is wrong is seen when it runs again
    with contextlib.suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(flagen.compile(flagen.Spec.from_json(text)), 0.0, torch.device(device), dtype, tokens)
    return None, True


def run(op: Op, compiled: float, device: Any, dtype: Any, tokens: int) -> Result:
    """One op at the demo's sizes."""
    from .testing import check, make_inputs, make_scalars

    sizes = SIZES | ({"K": TAYLOR_K} if op.spec.taylor else {})
    scalars = make_scalars(op.spec)
    inputs = make_inputs(op.spec, T=tokens, **sizes, dtype=dtype, device=device, scalars=scalars)
    for x in inputs.values():
        x.requires_grad_()
    for _ in range(2):
        times = _timed(op, tuple(inputs.values()), scalars, device)
    report = check(op, T=tokens, **sizes, dtype=dtype, device=device, scalars=scalars, raises=False)
    return Result(compiled, *times, report)


def _timed(op: Op, inputs: tuple[Any, ...], scalars: dict[str, float], device: Any) -> tuple[float, float]:
    import torch

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 1000 * time.perf_counter()

    began = now()
    o, _ = op(*inputs, **scalars)
    middle = now()
    torch.autograd.grad(o, inputs, torch.ones_like(o))
    return middle - began, now() - middle


def line(name: str, result: Result) -> str:
    """One spec's row of the table."""
    rows = result.report.rows
    output = next(row for row in rows if row.tensor == "o")
    worst = max((row for row in rows if row.tensor.startswith("d ")), key=lambda row: row.rms / row.limit)
    times = f"{result.compiled:6.2f} s {result.forward:6.1f} ms {result.backward:6.1f} ms"
    verdict = "" if result.report.ok else f"   DIFFERS: {', '.join(row.tensor for row in result.report.failures)}"
    errors = f"{output.rms:7.1e} {output.limit:6.0e}   {worst.tensor} {worst.rms:.1e} ({worst.limit:.0e})"
    return f"{name:14} {times}   {errors}{verdict}"


def _close(results: list[Result], op: Op) -> int:
    good = sum(result.report.ok for result in results)
    tensors = sum(len(result.report.rows) for result in results)
    print(f"\n{good} of {len(results)} specs agree with their references; {tensors} tensors were compared:")
    print("outputs, states, every gradient, and the last tokens again one by one")
    if op.path:
        print(f"the kernels of {op.spec.name}, the README's spec, to read: {op.path}")
    return 0 if good == len(results) else 1

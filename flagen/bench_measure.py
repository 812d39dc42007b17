"""How things are timed: triton's do_bench on a GPU, whose cache it empties before each run; a clock on a CPU."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

WARM_UP, REPEAT = 25, 100  # milliseconds
CPU_SECONDS, CPU_LEAST = 0.2, 3  # on a CPU: how long to repeat, and how often at least
COPIED = 1 << 30  # bytes of the copy that gives the bandwidth


def milliseconds(run: Callable[[], Any], device: str) -> float:
    """The median time of a run."""
    if device.startswith("cuda"):
        from triton.testing import do_bench

        return float(do_bench(run, warmup=WARM_UP, rep=REPEAT, return_mode="median"))
    run()
    taken: list[float] = []
    began = time.perf_counter()
    while len(taken) < CPU_LEAST or time.perf_counter() - began < CPU_SECONDS:
        before = time.perf_counter()
        run()
        taken.append(1e3 * (time.perf_counter() - before))
    return statistics.median(taken)


def copy_bandwidth(device: str) -> float | None:
    """Bytes read and written a second by a copy of a gigabyte; None on a CPU, whose caches make it mean nothing."""
    if not device.startswith("cuda"):
        return None
    source = torch.empty(COPIED, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * COPIED / milliseconds(lambda: target.copy_(source), device) * 1e3


def graphed(run: Callable[[], Any]) -> Callable[[], None]:
    """A CUDA graph of a run, to replay. It runs a few times before: kernels are compiled on their first launch."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()

    def replay(kept: Any = kept) -> None:  # what the graph writes to lives as long as the graph
        graph.replay()

    return replay


def peak(run: Callable[[], Any], device: str) -> int | None:
    """The most bytes that a run holds beyond what is held before it, its results included; None on a CPU.

    Garbage in cycles, of the run before too, is collected first: freed in the middle of the run it would count as
    memory that the run does without.
    """
    if not device.startswith("cuda"):
        return None
    run()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)

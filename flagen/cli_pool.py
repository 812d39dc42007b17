"""Processes that share a list of units of work. One that dies takes only its unit with it: a kernel may crash a
process, and after a fault on the GPU a process is of no more use.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, cast

MOST_JOBS = 16
READY = "ready"  # what a process says before its first result
_NO_MORE = object()


def cores() -> int:
    """How many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(
    work: Callable[[Any], tuple[Any, bool]], units: Iterable[Any], jobs: int, patience: float | None = None
) -> Iterator[tuple[Any, Any]]:
    """Pairs (unit, result) as they come; the result is None where the process died.

    work(unit) gives (result, healthy): a process that says it is not healthy is replaced. It must be a function of a
    module, since processes are started afresh (a GPU cannot be used after a fork). The next of `units` is asked for
    when a process is free, so that it may depend on the results before. patience: seconds after which a process that
    is still at its unit is killed.
    """
    waiting = iter(units)
    busy: dict[Connection, tuple[Any, Any, float]] = {}
    context = multiprocessing.get_context("spawn")

    def give(connection: Connection, process: Any, unit: Any, began: float) -> None:
        busy[connection] = process, unit, began
        connection.send(unit)

    def start() -> bool:
        unit = next(waiting, _NO_MORE)
        if unit is _NO_MORE:
            return False
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(work, theirs, max(1, cores() // jobs)), daemon=True)
        process.start()
        theirs.close()
        give(ours, process, unit, math.inf)
        return True

    try:
        while len(busy) < jobs and start():
            pass
        while busy:
            for connection in cast("list[Connection]", wait(list(busy), patience and min(patience, 5))):
                process, unit, _ = busy.pop(connection)
                try:
                    answer = connection.recv()
                except (EOFError, OSError):
                    answer = None, False
                if answer == READY:
                    busy[connection] = process, unit, time.monotonic()
                    continue
                result, healthy = answer
                yield unit, result
                following = next(waiting, _NO_MORE) if healthy else _NO_MORE
                if following is not _NO_MORE:
                    give(connection, process, following, time.monotonic())
                    continue
                if healthy:
                    connection.send(None)
                connection.close()
                process.join(10)
                if not healthy:
                    start()
            for process, _, began in busy.values():
                if patience is not None and time.monotonic() - began > patience:
                    process.kill()  # which ends its connection
    finally:
        for process, _, _ in busy.values():
            process.terminate()


def _serve(work: Callable[[Any], tuple[Any, bool]], connection: Connection, threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    connection.send(READY)
    while (unit := connection.recv()) is not None:
        answer = work(unit)
        connection.send(answer)
        if not answer[1]:
            os._exit(1)  # an orderly end would wait for the GPU

"""Processes that share a list of units of work. One that dies takes only its unit with it: a kernel may crash a
process, and after a fault on the GPU a process is of no more use.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, cast

MOST_JOBS = 16


def cores() -> int:
    """How many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(work: Callable[[Any], tuple[Any, bool]], units: list[Any], jobs: int) -> Iterator[tuple[Any, Any]]:
    """Pairs (unit, result) as they come; the result is None where the process died.

    work(unit) gives (result, healthy): a process that says it is not healthy is replaced. It must be a function of a
    module, since processes are started afresh (a GPU cannot be used after a fork).
    """
    waiting = list(reversed(units))
    busy: dict[Connection, tuple[Any, Any]] = {}
    context = multiprocessing.get_context("spawn")

    def give(connection: Connection, process: Any) -> None:
        if waiting:
            unit = waiting.pop()
            busy[connection] = process, unit
            connection.send(unit)
        else:
            connection.send(None)
            connection.close()

    def start() -> None:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(work, theirs, max(1, cores() // jobs)), daemon=True)
        process.start()
        theirs.close()
        give(ours, process)

    try:
        for _ in range(min(jobs, len(units))):
            start()
        while busy:
            for connection in cast("list[Connection]", wait(list(busy))):
                process, unit = busy.pop(connection)
                try:
                    result, healthy = connection.recv()
                except (EOFError, OSError):
                    result, healthy = None, False
                if healthy:
                    give(connection, process)
                else:
                    connection.close()
                    process.join(10)
                    if waiting:
                        start()
                yield unit, result
    finally:
        for process, _ in busy.values():
            process.terminate()


def _serve(work: Callable[[Any], tuple[Any, bool]], connection: Connection, threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    while (unit := connection.recv()) is not None:
        answer = work(unit)
        connection.send(answer)
        if not answer[1]:
            os._exit(1)  # an orderly end would wait for the GPU

"""Processes that share a list of units of work. One that dies takes only its unit with it: a kernel may crash a
process, and after a fault on the GPU a process is of no more use. Where there are several GPUs each process sees one.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple, cast

MOST_JOBS = 16  # for each GPU, or without one
VISIBLE = "CUDA_VISIBLE_DEVICES"
READY = "ready"  # what a process says before its first result
_NO_MORE = object()


def cores() -> int:
    """How many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus(device: str) -> tuple[str, ...]:
    """Values of CUDA_VISIBLE_DEVICES under which each process sees one GPU, where "cuda" means several; else none."""
    if device != "cuda":
        return ()
    import torch

    count = torch.cuda.device_count()
    given = os.environ.get(VISIBLE)
    names = tuple(given.split(",")) if given else tuple(map(str, range(count)))
    return names[:count] if count > 1 else ()


def most_jobs(devices: Sequence[str]) -> int:
    """How many processes there are if nobody says."""
    return min(cores(), MOST_JOBS * max(1, len(devices)))


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    """Variables that processes started meanwhile have."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


class _Busy(NamedTuple):
    """A process, the GPU that it sees, its unit, and since when it has been at that."""

    process: Any
    device: str | None
    unit: Any
    began: float


def run(
    work: Callable[[Any], tuple[Any, bool]], units: Iterable[Any], jobs: int, patience: float | None = None,
    devices: Sequence[str] = (),
) -> Iterator[tuple[Any, Any]]:  # fmt: skip
    """Pairs (unit, result) as they come; the result is None where the process died.

    work(unit) gives (result, healthy): a process that says it is not healthy is replaced. It must be a function of a
    module, since processes are started afresh (a GPU cannot be used after a fork). The next of `units` is asked for
    when a process is free, so that it may depend on the results before. patience: seconds after which a process that
    is still at its unit is killed. devices: as `gpus` gives them; processes are spread over them.
    """
    waiting = iter(units)
    busy: dict[Connection, _Busy] = {}
    context = multiprocessing.get_context("spawn")

    def give(connection: Connection, one: _Busy) -> None:
        busy[connection] = one
        connection.send(one.unit)

    def start() -> bool:
        unit = next(waiting, _NO_MORE)
        if unit is _NO_MORE:
            return False
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(work, theirs, max(1, cores() // jobs)), daemon=True)
        held = [one.device for one in busy.values()]
        device = min(devices, key=held.count, default=None)
        with environment(**({} if device is None else {VISIBLE: device})):
            process.start()
        theirs.close()
        give(ours, _Busy(process, device, unit, math.inf))
        return True

    try:
        while len(busy) < jobs and start():
            pass
        while busy:
            for connection in cast("list[Connection]", wait(list(busy), patience and min(patience, 5))):
                one = busy.pop(connection)
                try:
                    answer = connection.recv()
                except (EOFError, OSError):
                    answer = None, False
                if answer == READY:
                    busy[connection] = one._replace(began=time.monotonic())
                    continue
                result, healthy = answer
                yield one.unit, result
                following = next(waiting, _NO_MORE) if healthy else _NO_MORE
                if following is not _NO_MORE:
                    give(connection, one._replace(unit=following, began=time.monotonic()))
                    continue
                if healthy:
                    connection.send(None)
                connection.close()
                one.process.join(10)
                if not healthy:
                    start()
            for one in busy.values():
                if patience is not None and time.monotonic() - one.began > patience:
                    one.process.kill()  # which ends its connection
    finally:
        for one in busy.values():
            one.process.terminate()


def _serve(work: Callable[[Any], tuple[Any, bool]], connection: Connection, threads: int) -> None:
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal, for all its processes: the parent ends this one
    torch.set_num_threads(threads)
    connection.send(READY)
    while (unit := connection.recv()) is not None:
        answer = work(unit)
        connection.send(answer)
        if not answer[1]:
            os._exit(1)  # an orderly end would wait for the GPU

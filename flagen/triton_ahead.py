"""The kernels of a training step compiled side by side, before they are asked for one after the other.

At the first forward of a training step its launchers, and those of the backward that will come, run on meta tensors
and their launches are only noted; threads then compile what was noted, and make it ready to be launched. The forward
waits for its own kernels, the backward for the rest. A guess that was wrong costs nothing but their time: what a launch
does not find is compiled there, as ever.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import Tensor

from .triton_record import collecting

THREADS = 8

_logger = logging.getLogger("flagen.code")


class Ahead:
    """What is being compiled for the device of an index."""

    def __init__(self) -> None:
        self._pending: list[Future[None]] = []

    def start(self, index: int, forward: Callable[[], Any], backward: Callable[[Any], Any]) -> None:
        """Compiles what `forward` launches, and `backward` given its result; waits for the forward's kernels."""
        needed = 0
        with collecting() as launches, contextlib.suppress(Exception):  # it goes wrong again where it matters
            made = forward()
            needed = len(launches)
            backward(made)
        for kernel, _, _ in launches:
            kernel.device_caches[index]  # made once, here
        workers = min(THREADS, os.cpu_count() or 1, len(launches))
        if workers < 2:
            return
        executor = ThreadPoolExecutor(workers, thread_name_prefix="flagen-compile")
        futures = [executor.submit(_compile, index, *one) for one in launches]
        executor.shutdown(wait=False)
        wait(futures[:needed])
        self._pending += futures[needed:]

    def wait(self) -> None:
        """Until nothing is being compiled."""
        pending, self._pending = self._pending, []
        wait(pending)


def like(x: Tensor | None) -> Tensor | None:
    """A meta tensor of the same form."""
    return None if x is None else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _compile(index: int, kernel: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
    try:
        with _on(index):
            compiled = kernel.warmup(*args, grid=(1,), **named)
            _ = compiled.run  # loads it, and makes its launcher
    except Exception as error:  # if it is no accident, the launch says it again
        _logger.debug("not compiled ahead: %s: %s: %s", kernel.__name__, type(error).__name__, error)


@contextlib.contextmanager
def _on(index: int) -> Iterator[None]:
    if not torch.cuda.is_available():
        yield
        return
    with torch.cuda.device(index):
        yield

"""How long something takes, whatever else the process and the machine are at."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """What is inside takes less than so many seconds of this thread, without what the garbage collector does meanwhile
    with all that earlier tests have left."""
    gc.disable()
    began = time.thread_time()
    try:
        yield
        took = time.thread_time() - began
    finally:
        gc.enable()
    assert took < seconds, f"{took:.3f} s"

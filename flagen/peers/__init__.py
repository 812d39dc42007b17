"""Functions of other libraries that compute what a shipped spec does, to be timed beside it: `calls(library, spec)`.

A peer is imported when it is asked for. The models are told apart by name here, as nowhere else but in flagen.specs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..errors import FlagenError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..schedule import Shape

    # shape, dtype, device -> inputs, and the call that gives the output
    Make = Callable[[Shape, torch.dtype, str], tuple[tuple[Tensor, ...], Callable[[], Tensor]]]

LIBRARIES = ("fla", "sdpa")


def calls(library: str, spec: str) -> dict[str, Make]:
    """The functions of a library for a shipped spec, by their names; none where it has none. Raises FlagenError where
    the library is not known or not installed."""
    if library not in LIBRARIES:
        raise FlagenError(f"--against {library}: the peers are {', '.join(LIBRARIES)}")
    try:
        found: dict[str, Make] = importlib.import_module(f".{library}", __name__).calls(spec)
    except ImportError as error:
        raise FlagenError(f"--against {library}: {error}; install fla-core, or leave it out") from None
    return found

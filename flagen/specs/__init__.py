"""The shipped specs, one module per model; a module is imported when its spec is asked for."""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING

from ..errors import SpecError

if TYPE_CHECKING:
    from ..spec import Spec

_NAMES = (
    "retnet", "transnormer", "gla", "rwkv6", "gateloop", "based", "mamba2", "hgrn2", "linear",
    "delta_net", "gated_delta_net", "kda", "comba", "rwkv7",
    "hgrn", "gateloop_elementwise", "min_gru", "rg_lru",
    "mlstm",
)  # fmt: skip


def names() -> tuple[str, ...]:
    """The names of the shipped specs."""
    return _NAMES


def get(name: str) -> Spec:
    """The shipped spec of that name. Raises SpecError on an unknown name."""
    if name not in _NAMES:
        close = difflib.get_close_matches(str(name), _NAMES, 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise SpecError(f"no shipped spec is named {name!r}; {hint}the shipped specs are {', '.join(_NAMES)}")
    spec: Spec = getattr(importlib.import_module(f".{name}", __name__), name)
    return spec

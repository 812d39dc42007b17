"""The rules of stabilize: which recurrences have an exponential gate whose scale can be divided out again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import SpecError, shown
from .expr import to_text
from .stabilize import gated, scaled_normalizer

if TYPE_CHECKING:
    from .spec import Spec


def stabilize(spec: str, given: Any) -> str | None:
    if given is not None and (not isinstance(given, str) or given != "max"):
        raise SpecError(
            f"{spec}: stabilize must be 'max', by which the state is held divided by the largest exponential gate, or "
            f"None, got {shown(given)}"
        )
    return given


def check_stabilize(spec: Spec) -> None:
    """What stabilize needs and what cannot stand beside it. Raises SpecError on the first fault."""
    if spec.stabilize is None:
        return
    decay_axes = spec.log_decay.axes if spec.log_decay is not None else ""
    refused = (
        (bool(spec.taylor), "taylor", "the expanded features do not grow with the gate as the key does"),
        (spec.bonus is not None, "a bonus", "the output would add values of two scales"),
        (spec.erase is not None, "erase", "it has no normaliser, which takes the scale out of the output"),
        ("k" in decay_axes, "a decay per key channel", "all channels of a state have one scale: use a scalar one"),
    )
    for found, what, why in refused:
        if found:
            raise SpecError(f"{spec.name}: stabilize with {what} is not supported: {why}; drop one of them")
    if spec.normalizer is None:
        raise SpecError(
            f"{spec.name}: stabilize needs normalize: the state is held divided by a gate, and the normaliser takes "
            "that out of the output; set normalize=lambda n: maximum(abs(n), 1), or drop stabilize"
        )
    if gated(spec.key).gate is None:
        raise SpecError(
            f"{spec.name}: stabilize finds no exponential gate in key = {to_text(spec.key)}: it must be a product with "
            "exp(x), x over some of b t h, as in key=exp(i) * k"
        )
    if scaled_normalizer(spec.normalizer) is None:
        raise SpecError(
            f"{spec.name}: stabilize with normalize = {to_text(spec.normalizer)} is not supported: it must be made of "
            "n and numbers by + - abs minimum maximum relu, and * and / with numbers, as in maximum(abs(n), 1)"
        )

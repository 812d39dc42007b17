"""The rules of a vector state, the axis d: h_t = exp(log_decay_t + i phase_t) h_{t-1} + key_t value_t by channels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import SpecError
from .expr import VECTOR, Index, to_text

if TYPE_CHECKING:
    from .spec import Spec


def check_vector(spec: Spec) -> None:
    """Raises SpecError on what a vector state cannot be combined with, and on a d where the state is a matrix."""
    if not any(VECTOR in expr.axes for _, expr in spec.roles):
        return
    for role, expr in spec.roles:
        for one in expr.inputs:
            if not set(one.axes) <= set("btd"):
                raise SpecError(
                    f"{spec.name}: {role} uses {one.name} with the axes {' '.join(one.axes)} beside inputs with the "
                    "axis d, where the state is a vector and all inputs have some of b t d: give value=, and "
                    "query= and key= if there are any"
                )
        if any(isinstance(node, Index) for node in expr.walk()):
            raise SpecError(f"{spec.name}: {role} uses head or heads, and a vector state has no heads; use a Scalar")
    if spec.value.axes != "btd":
        raise SpecError(
            f"{spec.name}: value = {to_text(spec.value)} must vary over b t d, as the state is a vector; it is what is "
            "added to the state"
        )
    refused = (
        (spec.erase is not None, "erase"),
        (spec.bonus is not None, "a bonus"),
        (spec.feature_map is not None, "a feature map"),
        (spec.normalize is not False, "normalize"),
        (spec.stabilize is not None, "stabilize"),
    )
    for found, what in refused:
        if found:
            raise SpecError(
                f"{spec.name}: {what} with a vector state is not supported: it belongs to a state of keys and values; "
                "drop one of them"
            )

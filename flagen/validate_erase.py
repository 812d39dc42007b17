"""The rules of erase and of l2norm: what a correction of the state may be, and where a vector may be normalised."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import SpecError, shown
from .expr import ROW_FUNCTIONS, Call, Expr, to_text
from .validate import role_expr

if TYPE_CHECKING:
    from .spec import Spec

READS = ("decayed", "previous")
# the roles that are vectors of key channels
ROW_ROLES = ("query", "key", "erase_a", "erase_b")


def erase(spec: str, given: Any) -> tuple[Expr, Expr] | None:
    """The pair (a, b) as expressions within the limits of one; None for no erase."""
    if given is None:
        return None
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        shown = f"{len(given)} of them" if isinstance(given, (tuple, list)) else f"{type(given).__name__}"
        raise SpecError(
            f"{spec}: erase must be a pair (a, b) of expressions over b t h k, such as (k, beta * k), got {shown}; b "
            "takes from the state what a reads of it"
        )
    a, b = (role_expr(spec, role, value) for role, value in zip(("erase_a", "erase_b"), given, strict=True))
    if a is None or b is None:
        raise SpecError(f"{spec}: erase needs both of (a, b), got None in it; leave erase out where nothing is erased")
    return a, b


def erase_reads(spec: str, given: Any, erased: bool) -> str:
    """Which state a reads."""
    if given not in READS or not isinstance(given, str):
        raise SpecError(
            f"{spec}: erase_reads must be 'decayed' (a reads the state after this step's decay) or 'previous' (before "
            f"it), got {shown(given)}"
        )
    if given != "decayed" and not erased:
        raise SpecError(f"{spec}: erase_reads={given!r} says which state erase reads, and there is no erase; drop it")
    return given


def check_erase(spec: Spec) -> None:
    """What cannot stand beside erase. Raises SpecError on the first fault."""
    if spec.erase is None:
        return
    per_value = spec.log_decay is not None and "v" in spec.log_decay.axes
    refused = (
        (per_value, "a decay per value channel", "every value channel would need a correction of its own"),
        (spec.phase is not None, "a phase", "what is erased would have to be turned with the state"),
        (spec.bonus is not None, "a bonus", "the output would read a state before what it holds is corrected"),
        (bool(spec.taylor), "taylor", "a and b are vectors of key channels, the state has expanded features"),
        (spec.normalize is not False, "normalize", "with what is taken away the normaliser may be zero or negative"),
    )
    for found, what, why in refused:
        if found:
            raise SpecError(f"{spec.name}: erase with {what} is not supported: {why}; drop one of them")


def check_rows(spec: Spec) -> None:
    """Where l2norm may stand: in a vector of key channels, over something that has them, not twice."""
    normalizer = () if spec.normalizer is None else (("normalize", spec.normalizer),)
    for role, expr in (*spec.roles, *normalizer):
        for node in _rows(expr):
            text, (argument,) = to_text(node), node.args
            if role not in ROW_ROLES:
                raise SpecError(
                    f"{spec.name}: {role} uses {text}; l2norm is of a vector of key channels and may stand in query, "
                    "key and erase alone: normalise it before the call"
                )
            if "k" not in argument.axes:
                raise SpecError(
                    f"{spec.name}: {role} uses {text}, and {to_text(argument)} has no axis k to take the norm over; "
                    "give l2norm a vector, as in l2norm(k)"
                )
            if _rows(argument):
                raise SpecError(f"{spec.name}: {role} has l2norm within l2norm, {text}; one of them is enough")


def _rows(expr: Expr) -> list[Call]:
    return [node for node in expr.walk() if isinstance(node, Call) and node.function in ROW_FUNCTIONS]

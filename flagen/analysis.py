"""Spec -> Analysis: the facts that follow from a spec. Everything after this step reads the Analysis, not the Spec."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from .expr import NORM, ROW_FUNCTIONS, Call, Expr, Index, Input, Scalar, to_text
from .functions import fold
from .intervals import interval
from .parse import parse_derivative
from .rank_one import canonical_erase, erase_kind
from .spec import Spec
from .stabilize import PEAK, RISE, gated, scaled_normalizer, scaled_roles


class Stabilizer(NamedTuple):
    """What m_t = max(log_decay_t + m_{t-1}, gate_t) is made of; log_decay None is 0."""

    gate: Expr
    log_decay: Expr | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Analysis:
    """Facts of a spec. Expressions here have their constants replaced by Inputs c0, c1, ... with the axis h, and each
    l2norm(x) by an Input unit0, unit1, ... with the axes of x.

    constants: what each cN stands for: a largest subexpression without tensor inputs that uses head, heads or a Scalar.
        Its values, one per head, are computed on the host in fp64 (functions.evaluate_host).
    units: what each unitN is the l2norm of.
    roles: the roles that are present, in the order query, key, value, log_decay, phase, bonus, and of an erase either
        erase_a and erase_b, or erase. A stabilised spec has gate, natural log of a factor of the key.
    gradients: for each role and each tensor input or unit in it, the derivative of the role's expression by that; a
        unit's name stands for a role whose expression is what it is the l2norm of.
    decay: "none", "scalar", "key" (per key channel) or "value" (per value channel); decay_varies: it has a time axis.
    decay_low: a provable lower bound of log_decay per step (natural log), or None.
    exclusive: there is a bonus, the output reads the state before the update.
    erase: "none"; "delta" if a, b and key are one vector u but for factors without the axis k, so that S_t = X_t + u
        (value - erase u^T X_t)^T: the roles are that u as key, the value with the key's factor, and the number erase;
        "householder" if a and b are such; else "general".
    vector: the state is a vector, its channels the axis d; the decay is then none or scalar: one a channel.
    erase_previous: erase reads S_{t-1}, not what the decay leaves of it.
    normalizer, normalizer_gradient: f(n) and its derivative, over spec.NORM.
    stabilizer: of a stabilised spec, whose roles and normaliser are those of the recurrence of exp(-m) S (stabilize.py)
        and use the gauges beside the inputs; None otherwise.
    """

    spec: Spec
    inputs: tuple[Input, ...]
    scalars: tuple[Scalar, ...]
    constants: tuple[tuple[Input, Expr], ...]
    units: tuple[tuple[Input, Expr], ...]
    roles: tuple[tuple[str, Expr], ...]
    gradients: tuple[tuple[str, Input, Expr], ...]
    decay: str
    decay_varies: bool
    decay_low: float | None
    is_complex: bool
    exclusive: bool
    erase: str
    erase_previous: bool
    vector: bool
    taylor: int
    normalizer: Expr | None
    normalizer_gradient: Expr | None
    stabilizer: Stabilizer | None

    @property
    def gauges(self) -> tuple[Input, ...]:
        """Tensors [B, T, H] that are made of the inputs before all else, and have no gradient: m and its rise."""
        return () if self.stabilizer is None else (PEAK, RISE)

    def role(self, name: str) -> Expr | None:
        """The expression of a role, with constants replaced; None where the spec has no such role."""
        return dict(self.roles).get(name)

    @property
    def without_kernels(self) -> str:
        """Why the spec has no plan and no Triton kernels yet, or ""; it then runs as chunkwise PyTorch on every
        device.
        """
        if self.erase != "none":
            fixed = any("t" not in unit.axes for unit, _ in self.units)
            return "there are no Triton kernels for an erase with l2norm of a vector without time yet" if fixed else ""
        return "there are no Triton kernels for l2norm yet" if self.units else ""

    def __str__(self) -> str:
        lines = [str(self.spec), "", f"decay: {self.decay}{', varies in time' if self.decay_varies else ''}"]
        if self.decay_low is not None:
            lines[-1] += f", log_decay >= {self.decay_low:.6g}"
        lines += [f"constant {name.name}[head] = {expr}" for name, expr in self.constants]
        if self.erase != "none":
            lines.append(f"erase: {self.erase}, reads the {self.spec.erase_reads} state")
        lines += [f"{one.name} = l2norm({expr})" for one, expr in self.units]
        if self.stabilizer is not None:
            gate, decay = self.stabilizer
            lines.append(f"peak_t = max({'' if decay is None else f'{decay} + '}peak_{{t-1}}, {gate})")
            lines.append("rise_t = peak_t - peak_{t-1}")
        lines += [f"{role} = {expr}" for role, expr in self.roles]
        lines += [f"d {role} / d {one.name} = {expr}" for role, one, expr in self.gradients]
        if self.normalizer is not None:
            lines += [f"normalizer = {self.normalizer}", f"d normalizer / d n = {self.normalizer_gradient}"]
        return "\n".join(lines)


def analyse(spec: Spec) -> Analysis:
    """The facts that follow from a spec. Imports SymPy, for the derivatives."""
    from .derive import diff

    return _analysis(spec, lambda role, expr, one: diff(expr, one))


def derivative_texts(analysis: Analysis) -> dict[str, Any]:
    """The derivatives as text, for restored: a value of JSON."""
    normalizer = analysis.normalizer_gradient
    return {
        "gradients": [[role, one.name, to_text(expr)] for role, one, expr in analysis.gradients],
        "normalizer_gradient": None if normalizer is None else to_text(normalizer),
    }


def restored(spec: Spec, texts: Any) -> Analysis | None:
    """What analyse gives, with the derivatives read from derivative_texts instead of made by SymPy; None if the texts
    are not those of this spec.
    """
    try:
        given = {(role, name): text for role, name, text in texts["gradients"]}
        given["normalizer", NORM.name] = texts["normalizer_gradient"]
        analysis = _analysis(
            spec,
            lambda role, expr, one: parse_derivative(given[role, one.name], _leaves(expr), f"d {role} / d {one.name}"),
        )
        return analysis if derivative_texts(analysis) == texts else None
    except (KeyError, TypeError, ValueError, RecursionError):
        return None


def _leaves(expr: Expr) -> dict[str, Expr]:
    return {one.name: one for one in expr.inputs}


def _analysis(spec: Spec, derivative: Callable[[str, Expr, Input], Expr]) -> Analysis:
    """`derivative`: that of a role's expression (or of "normalizer") by an input."""
    constants: dict[Expr, Input] = {}
    units: dict[Expr, Input] = {}
    given = {role: fold(expr) for role, expr in spec.roles}
    stabilized = spec.stabilize is not None
    folded = canonical_erase(scaled_roles(given) if stabilized else given)
    roles = tuple((role, _hoist(_normalised(expr, units), constants)) for role, expr in folded.items())
    normalised = tuple((name, _hoist(expr, constants)) for expr, name in units.items())
    gradients = tuple(
        (role, one, derivative(role, expr, one))
        for role, expr in (*roles, *((name.name, expr) for name, expr in normalised))
        for one in (*spec.inputs, *units.values())
        if one in expr.inputs
    )
    decay_axes = folded["log_decay"].axes if "log_decay" in folded else ""
    low = interval(spec.log_decay).low if spec.log_decay is not None and not stabilized else -math.inf
    normalizer = None if spec.normalizer is None else fold(spec.normalizer)
    if stabilized and normalizer is not None:
        normalizer = scaled_normalizer(normalizer)
    return Analysis(
        spec=spec,
        inputs=spec.inputs,
        scalars=spec.scalars,
        constants=tuple((name, expr) for expr, name in constants.items()),
        units=normalised,
        roles=roles,
        gradients=gradients,
        decay="none"
        if "log_decay" not in folded
        else "key"
        if "k" in decay_axes
        else "value"
        if "v" in decay_axes
        else "scalar",
        decay_varies="t" in decay_axes,
        decay_low=low if math.isfinite(low) else None,
        is_complex=spec.phase is not None,
        exclusive=spec.bonus is not None,
        erase=erase_kind(given),
        vector=spec.vector,
        erase_previous=spec.erase_reads == "previous",
        taylor=spec.taylor,
        normalizer=normalizer,
        normalizer_gradient=None if normalizer is None else derivative("normalizer", normalizer, NORM),
        stabilizer=_stabilizer(given, constants) if stabilized else None,
    )


def _stabilizer(roles: dict[str, Expr], constants: dict[Expr, Input]) -> Stabilizer:
    gate, decay = gated(roles["key"]).gate, roles.get("log_decay")
    assert gate is not None, "validate_stabilize refuses a key without a gate"
    return Stabilizer(_hoist(gate, constants), None if decay is None else _hoist(decay, constants))


def _hoist(expr: Expr, constants: dict[Expr, Input]) -> Expr:
    """`expr` with each largest subexpression of head, heads and scalars replaced by a constant; numbers stay."""
    if expr.is_constant:
        if any(isinstance(node, (Index, Scalar)) for node in expr.walk()):
            return constants.setdefault(expr, Input(f"c{len(constants)}", "h"))
        return expr
    if isinstance(expr, Call):
        return Call(expr.function, tuple(_hoist(arg, constants) for arg in expr.args))
    return expr


def _normalised(expr: Expr, units: dict[Expr, Input]) -> Expr:
    """`expr` with each l2norm replaced by an input that stands for it; `units` holds what each is the l2norm of."""
    if not isinstance(expr, Call):
        return expr
    if expr.function in ROW_FUNCTIONS:
        (argument,) = expr.args
        return units.setdefault(argument, Input(f"unit{len(units)}", argument.axes))
    return Call(expr.function, tuple(_normalised(arg, units) for arg in expr.args))

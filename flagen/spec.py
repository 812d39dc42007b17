"""What a user writes: the recurrence of a model, as expressions of declared inputs.

    S_t = exp(log_decay_t + i phase_t) * S_{t-1} + key_t value_t^T
    o_t = Re(query_t^T S_t)
    erase=(a, b):    S_t = X_t - b_t (a_t^T X_t) + key_t value_t^T,    X_t = exp(log_decay_t) * S_{t-1}
    with the axis d: h_t = exp(log_decay_t + i phase_t) * h_{t-1} + key_t * value_t,    o_t = Re(query_t * h_t)

A spec is a frozen value: equal specs compare equal, hash equal and print the same. Every mistake is caught here, when
the spec is declared; validate.py holds the rules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import equations, exchange, validate, validate_erase, validate_stabilize, validate_vector
from .errors import SpecError
from .expr import (
    FEATURE,
    NORM,
    VECTOR,
    Expr,
    Input,
    Number,
    Operand,
    Scalar,
    Taylor,
    k,
    q,
    substitute,
    taylor,
    to_text,
    v,
)  # fmt: skip
from .validate import EPS, SpecWarning

__all__ = ["EPS", "FEATURE", "NORM", "ROLES", "Spec", "SpecWarning", "Taylor", "default_inputs", "taylor"]

ROLES = ("query", "key", "value", "log_decay", "phase", "bonus")  # those that are arguments of Spec
ERASE_ROLES = ("erase_a", "erase_b")


@dataclass(frozen=True, init=False, repr=False)
class Spec:
    """The recurrence of a model.

    name: [a-z][a-z0-9_]*, at most 41 characters, the prefix of every generated name.
    query, key, value: expressions over `b t h k`, `b t h k` and `b t h v`; by default the inputs q, k and v. If value
        is over `b t d`, the state is a vector, all roles are over some of `b t d`, and query and key are 1 by default.
    log_decay: natural log of the decay per step; over any of `b t h` and at most one of `k`, `v`. None: no decay.
    phase: angle of the decay per step in radians, over any of `b t h k`.
    bonus: the output reads S_{t-1} + diag(bonus) key value^T instead of S_t; over any of `b t h k`.
    feature_map: taylor(n), or a function of one expression applied to the finished query and key.
    normalize: divide the output by n + eps, where n is the output with value 1; or a function f(n), to divide by f(n).
    erase: a pair (a, b) over `b t h k`: before key value^T is added, b times what a reads of the state is taken away.
    erase_reads: which state a reads: "decayed", after this step's decay, or "previous", S_{t-1}.
    stabilize: "max" for a key with a factor exp(i), i over some of b t h: the recurrence is the same, and the state is
        held divided by exp(m), m the largest log gate so far, so that nothing overflows; the state then has a third
        part, m [N, H]. It needs normalize.
    scale: the op's default scale, which multiplies query; None is K ** -0.5.
    inputs: the order of the tensor arguments, as names or Inputs. By default the order in which query, key, value,
        log_decay, phase, bonus and erase use them; within one expression q, k, v first and the others by name.

    After construction an elementwise feature map is composed into `query` and `key`; `feature_map` keeps it as a Taylor
    or as an expression over FEATURE, `normalize` is a bool or an expression over NORM, `inputs` is the tuple of Inputs.
    Raises SpecError on a spec that has no meaning, and warns (SpecWarning) of a normaliser that may be zero.
    """

    name: str
    query: Expr
    key: Expr
    value: Expr
    log_decay: Expr | None
    phase: Expr | None
    bonus: Expr | None
    erase: tuple[Expr, Expr] | None
    erase_reads: str
    feature_map: Taylor | Expr | None
    normalize: bool | Expr
    eps: float
    stabilize: str | None
    scale: float | None
    inputs: tuple[Input, ...]
    bare_query: Expr = field(compare=False)  # before the feature map, for replace and the JSON form
    bare_key: Expr = field(compare=False)

    def __init__(
        self,
        name: str,
        *,
        query: Operand = q,
        key: Operand = k,
        value: Operand = v,
        log_decay: Operand | None = None,
        phase: Operand | None = None,
        bonus: Operand | None = None,
        erase: tuple[Operand, Operand] | None = None,
        erase_reads: str = "decayed",
        feature_map: Taylor | Callable[[Expr], Expr] | Expr | None = None,
        normalize: bool | Callable[[Expr], Expr] | Expr = False,
        eps: float = EPS,
        stabilize: str | None = None,
        scale: float | None = None,
        inputs: Sequence[str | Input] | None = None,
    ) -> None:
        validate.check_spec_name(name)
        given = {"query": query, "key": key, "value": value, "log_decay": log_decay, "phase": phase, "bonus": bonus}
        roles = {role: validate.role_expr(name, role, value) for role, value in given.items()}
        feature = validate.feature_map(name, feature_map)
        self._set("name", name)
        self._set("bare_query", roles["query"])
        self._set("bare_key", roles["key"])
        if roles["value"] is not None and VECTOR in roles["value"].axes:
            roles |= {role: Number(1) for role, default in (("query", q), ("key", k)) if roles[role] == default}
            self._set("bare_query", roles["query"])
            self._set("bare_key", roles["key"])
        for role, expr in roles.items():
            if isinstance(feature, Expr) and role in ("query", "key") and expr is not None:
                expr = substitute(feature, {FEATURE: expr})
            self._set(role, expr)
        self._set("erase", validate_erase.erase(name, erase))
        self._set("erase_reads", validate_erase.erase_reads(name, erase_reads, erase is not None))
        self._set("feature_map", feature)
        self._set("normalize", validate.normalizer(name, normalize))
        self._set("eps", validate.eps(name, eps, normalize))
        self._set("stabilize", validate_stabilize.stabilize(name, stabilize))
        self._set("scale", validate.scale(name, scale))
        self._set("inputs", ())
        validate.check_roles(self)
        validate_vector.check_vector(self)
        validate_erase.check_erase(self)
        validate_erase.check_rows(self)
        validate_stabilize.check_stabilize(self)
        self._set("inputs", validate.ordered_inputs(name, default_inputs(self), inputs))
        validate.warn_about_normalizer(self)

    def _set(self, attribute: str, value: Any) -> None:
        object.__setattr__(self, attribute, value)

    @property
    def vector(self) -> bool:
        """Whether the state is a vector: the axis d."""
        return VECTOR in self.value.axes

    @property
    def erase_a(self) -> Expr | None:
        """What reads the state, of erase; None without."""
        return None if self.erase is None else self.erase[0]

    @property
    def erase_b(self) -> Expr | None:
        """What it is taken from the state with, of erase; None without."""
        return None if self.erase is None else self.erase[1]

    @property
    def taylor(self) -> int:
        """The order of the Taylor feature map, or 0."""
        return self.feature_map.order if isinstance(self.feature_map, Taylor) else 0

    @property
    def normalizer(self) -> Expr | None:
        """What the output is divided by, as an expression over NORM; None without normalize."""
        if isinstance(self.normalize, Expr):
            return self.normalize
        return NORM + self.eps if self.normalize else None

    @property
    def state_parts(self) -> int:
        """How many tensors a state has: S, with normalize z, with stabilize m."""
        return 1 + (self.normalizer is not None) + (self.stabilize is not None)

    @property
    def scalars(self) -> tuple[Scalar, ...]:
        """The host-side numbers, keyword arguments of the op, in the order in which the roles use them."""
        return tuple(dict.fromkeys(scalar for _, expr in self.roles for scalar in expr.scalars))

    @property
    def roles(self) -> tuple[tuple[str, Expr], ...]:
        """The roles that are present, each with its expression: ("query", ...), ("key", ...), ..."""
        return tuple((role, expr) for role in (*ROLES, *ERASE_ROLES) if (expr := getattr(self, role)) is not None)

    def replace(self, name: str, **changes: Any) -> Spec:
        """A new spec with another name and some arguments of Spec changed; a feature map applies to a new query."""
        arguments = self._arguments()
        if self.inputs != default_inputs(self):
            arguments["inputs"] = self.inputs
        unknown = sorted(set(changes) - set(arguments) - {"inputs"})
        if unknown:
            allowed = ", ".join([*arguments, *({"inputs"} - set(arguments))])
            raise SpecError(f"{self.name}.replace: unknown argument {unknown[0]!r}; it takes {allowed}")
        if changes.get("erase", self) is None:
            arguments["erase_reads"] = "decayed"
        if "eps" not in changes and changes.get("normalize", True) is not True:
            arguments["eps"] = EPS
        return Spec(name, **(arguments | changes))

    def _arguments(self) -> dict[str, Any]:
        """What Spec was given, but for its name and the order of the inputs."""
        arguments: dict[str, Any] = {role: getattr(self, role) for role in ROLES}
        arguments |= {"query": self.bare_query, "key": self.bare_key, "erase": self.erase}
        arguments |= {"erase_reads": self.erase_reads, "feature_map": self.feature_map}
        arguments |= {"normalize": self.normalize, "eps": self.eps, "stabilize": self.stabilize}
        return arguments | {"scale": self.scale}

    def to_json(self) -> str:
        """The spec as JSON, with expressions as text. Spec.from_json gives an equal spec back."""
        return exchange.to_json(self)

    @staticmethod
    def from_json(text: str) -> Spec:
        """The spec in a JSON text, of which nothing is executed. Raises SpecError on anything out of form."""
        return Spec(**exchange.spec_arguments(text))

    @property
    def equations(self) -> list[str]:
        """The recurrence in plain text, a line per equation."""
        return equations.plain(self)

    @property
    def recurrence(self) -> str:
        """The recurrence in plain text on one line."""
        return ",  ".join(self.equations)

    def latex(self) -> str:
        """The recurrence in LaTeX, for an aligned environment's inside."""
        return equations.latex(self)

    def __str__(self) -> str:
        return equations.describe(self)

    def __repr__(self) -> str:
        defaults = {"query": q, "key": k, "value": v, "erase_reads": "decayed", "normalize": False, "eps": EPS}
        arguments = self._arguments()
        shown = [repr(self.name)]
        for key, value in arguments.items():
            if value != defaults.get(key):
                shown.append(f"{key}={_shown(value)}")
        return f"Spec({', '.join(shown)})"


def _shown(argument: Any) -> str:
    """An argument of Spec as its repr has it."""
    if isinstance(argument, tuple):
        return f"({', '.join(to_text(one) for one in argument)})"
    return repr(argument) if isinstance(argument, str) else str(argument)


def default_inputs(spec: Spec) -> tuple[Input, ...]:
    """The tensor arguments in the order in which the roles use them; in one expression q, k, v first, then by name."""
    first = {"q": 0, "k": 1, "v": 2}
    found: dict[Input, None] = {}
    for _, expr in spec.roles:
        found |= dict.fromkeys(sorted(expr.inputs, key=lambda one: (first.get(one.name, 3), one.name)))
    return tuple(found)

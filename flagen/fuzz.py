"""One trial of a spec: a plain value that says everything of a call of testing.check, prints as Python and as JSON.

    from flagen.fuzz import Trial
    trial = Trial(spec, T=17, K=5, V=3)
    print(trial)                  # a snippet to paste: the spec, and the call
    trial.check()                 # AssertionError where the op differs from the reference

Trials at random are drawn by fuzz_specs.py, judged by fuzz_judge.py, and hunted through by `flagen fuzz`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch

from . import testing
from .compare import Report
from .errors import FlagenError
from .expr import OPERATORS, ROW_FUNCTIONS, Call, Expr, Index, Input, Scalar, k, q, to_text, v
from .spec import EPS, ROLES, Spec, Taylor, default_inputs

FORMAT = 1
DTYPES = ("float32", "float64", "bfloat16", "float16")
DEFAULTS = {"query": q, "key": k, "value": v}


@dataclass(frozen=True, repr=False)
class Trial:
    """A spec and arguments of testing.check, which says what each means; the values are numbers, strings and tuples.

    dtype, gate_dtype: names such as "bfloat16". heads: pairs of an input's name and its number of heads, where it has
    fewer. The first value of each is the simplest: without a state, without decode, one of everything.
    """

    spec: Spec
    B: int = 1
    T: int = 1
    H: int = 1
    K: int = 1
    V: int = 1
    dtype: str = "float32"
    gate_dtype: str | None = None
    chunk_size: int | None = None
    heads: tuple[tuple[str, int], ...] = ()
    cu_seqlens: tuple[int, ...] | None = None
    scale: float | None = None
    initial_state: bool = False
    final_state: bool = False
    requires_grad: tuple[str, ...] | None = None
    layout: str = "contiguous"
    decode: int = 0
    seed: int = 0
    device: str = "cpu"
    backend: str = "torch"

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of testing.check."""
        found = {one.name: getattr(self, one.name) for one in dataclasses.fields(self) if one.name != "spec"}
        found["dtype"] = getattr(torch, self.dtype)
        found["gate_dtype"] = None if self.gate_dtype is None else getattr(torch, self.gate_dtype)
        found["heads"] = dict(self.heads) or None
        if self.cu_seqlens is not None:
            del found["B"]
        return found

    def check(self, *, raises: bool = True) -> Report:
        """Compiles the spec and holds the op against its reference, as testing.check does."""
        return testing.check(self.spec, **self.arguments(), raises=raises)

    def case(self) -> testing.Case:
        """The op with the inputs and states that `check` makes."""
        arguments = self.arguments() | {"inputs": None, "scalars": None}
        return testing.make_case(self.spec, **({"B": None} | {k: x for k, x in arguments.items() if k != "decode"}))

    def __repr__(self) -> str:
        return f"{source(self.spec)}\n{_call(self)}\n"

    __str__ = __repr__

    def to_json(self) -> str:
        """The trial on one line of JSON; from_json gives an equal one back."""
        fields = {one.name: getattr(self, one.name) for one in dataclasses.fields(self) if one.name != "spec"}
        shown = {name: value for name, value in fields.items() if value != _SIMPLEST[name]}
        return json.dumps({"flagen_trial": FORMAT, "spec": json.loads(self.spec.to_json())} | shown)

    @staticmethod
    def from_json(text: str) -> Trial:
        """The trial in a JSON text. Raises FlagenError (SpecError for the spec) on anything out of form."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise FlagenError(f"a trial is JSON text, got {text[:40]!r}: {error}") from None
        if not isinstance(data, dict) or data.pop("flagen_trial", None) != FORMAT or "spec" not in data:
            raise FlagenError(f"a trial is a JSON object with flagen_trial: {FORMAT} and a spec, got {text[:60]!r}")
        spec = Spec.from_json(json.dumps(data.pop("spec")))
        for name, value in data.items():
            simplest = _SIMPLEST.get(name, _SIMPLEST)
            if simplest is _SIMPLEST:
                raise FlagenError(f"a trial has no field {name[:40]!r}; the fields are {', '.join(_SIMPLEST)}")
            data[name] = _tupled(value)
            if type(simplest) in (int, bool, str) and type(value) is not type(simplest):
                kind = type(simplest).__name__
                raise FlagenError(f"a trial: the field {name!r} must be {kind}, got {str(value)[:40]!r}")
        return Trial(spec, **data)

    @property
    def digest(self) -> str:
        """Of the spec: equal for equal specs, in any process."""
        return hashlib.sha256(self.spec.to_json().encode()).hexdigest()[:16]


_SIMPLEST = {one.name: one.default for one in dataclasses.fields(Trial) if one.name != "spec"}


def _tupled(value: Any) -> Any:
    return tuple(_tupled(one) for one in value) if isinstance(value, list) else value


# --- as Python


def source(spec: Spec) -> str:
    """Python text that imports what it needs and makes an equal spec, under the name `spec`."""
    exprs = [*_given(spec).values(), spec.feature_map, spec.normalize]
    nodes = [node for expr in exprs if isinstance(expr, Expr) for node in expr.walk()]
    imported = {node.function for node in nodes if isinstance(node, Call) and node.function not in OPERATORS}
    imported |= {node.name for node in nodes if isinstance(node, Index)}
    imported |= {one.name for one in (q, k, v) if one in nodes} | {"Spec"}
    declared = [one for one in spec.inputs if one not in (q, k, v)]
    imported |= {"Input"} if declared else set()
    imported |= {"Scalar"} if spec.scalars else set()
    imported |= {"taylor"} if isinstance(spec.feature_map, Taylor) else set()
    names = ", ".join(sorted(imported, key=lambda name: (not name[0].isupper(), name)))
    lines = ["import torch", "", f"from flagen import {names}", "from flagen.testing import check", ""]
    lines += [f"{one.name} = {_declaration(one)}" for one in declared]
    lines += [f'{one.name} = Scalar("{one.name}")' for one in spec.scalars]
    return "\n".join([*lines, *_constructor(spec)])


def _declaration(one: Input) -> str:
    bounds = [f", {name}={value!r}" for name in ("low", "high") if (value := getattr(one, name)) is not None]
    return f'Input("{one.name}", "{" ".join(one.axes)}"{"".join(bounds)})'


def _given(spec: Spec) -> dict[str, Expr]:
    """The roles that differ from their defaults, as they were written."""
    found: dict[str, Any] = {role: getattr(spec, role) for role in ROLES}
    found |= {"query": spec.bare_query, "key": spec.bare_key, "erase_a": spec.erase_a, "erase_b": spec.erase_b}
    return {role: expr for role, expr in found.items() if expr is not None and expr != DEFAULTS.get(role)}


def _constructor(spec: Spec) -> list[str]:
    shown = {role: to_text(expr) for role, expr in _given(spec).items()}
    if spec.erase is not None:
        shown["erase"] = f"({shown.pop('erase_a')}, {shown.pop('erase_b')})"
        shown |= {"erase_reads": repr(spec.erase_reads)} if spec.erase_reads != "decayed" else {}
    if spec.feature_map is not None:
        text = to_text(spec.feature_map) if isinstance(spec.feature_map, Expr) else ""
        shown["feature_map"] = f"lambda x: {text}" if text else str(spec.feature_map)
    if spec.normalize is not False:
        shown["normalize"] = f"lambda n: {to_text(spec.normalize)}" if isinstance(spec.normalize, Expr) else "True"
    shown |= {"eps": repr(spec.eps)} if spec.eps != EPS else {}
    shown |= {"stabilize": repr(spec.stabilize)} if spec.stabilize is not None else {}
    shown |= {"scale": repr(spec.scale)} if spec.scale is not None else {}
    if spec.inputs != default_inputs(spec):
        shown["inputs"] = repr(tuple(one.name for one in spec.inputs))
    return ["spec = Spec(", f'    "{spec.name}",', *(f"    {name}={text}," for name, text in shown.items()), ")"]


def _call(trial: Trial) -> str:
    """The call of testing.check, with what differs from its defaults."""
    shown = {name: f"{getattr(trial, name)!r}" for name in ("B", "T", "H", "K", "V")}
    if trial.cu_seqlens is not None:
        shown = {name: shown[name] for name in "THKV"} | {"cu_seqlens": repr(list(trial.cu_seqlens))}
    shown["dtype"] = f"torch.{trial.dtype}"
    shown |= {} if trial.gate_dtype is None else {"gate_dtype": f"torch.{trial.gate_dtype}"}
    shown |= {"heads": repr(dict(trial.heads))} if trial.heads else {}
    for name, default in (("chunk_size", None), ("scale", None), ("initial_state", True), ("final_state", True),
                          ("requires_grad", None), ("layout", "contiguous"), ("decode", 3), ("seed", 0)):  # fmt: skip
        value = getattr(trial, name)
        shown |= {} if value == default else {name: f'"{value}"' if isinstance(value, str) else repr(value)}
    shown |= {"device": f'"{trial.device}"', "backend": f'"{trial.backend}"'}
    return "check(\n    spec,\n" + "".join(f"    {name}={text},\n" for name, text in shown.items()) + ")"


# --- what it exercises


def decay_kind(spec: Spec) -> str:
    """none, constant, scalar, key or value, with + phase where there is one."""
    expr = spec.log_decay
    if expr is None:
        kind = "none"
    else:
        channel = next((name for axis, name in (("k", "key"), ("v", "value")) if axis in expr.axes), "scalar")
        kind = channel if "t" in expr.axes else f"constant {channel}" if channel != "scalar" else "constant"
    return kind + (" + phase" if spec.phase is not None else "")


def features(trial: Trial) -> frozenset[str]:
    """What the trial has beyond the simplest one. A failure with fewer of them explains one with more."""
    spec = trial.spec
    found = {f"decay {decay_kind(spec)}"} if spec.log_decay is not None else set()
    found |= {f"taylor({spec.taylor})"} if spec.taylor else {"feature map"} if spec.feature_map is not None else set()
    found |= {"normalize"} if spec.normalizer is not None else set()
    found |= {"stabilize"} if spec.stabilize is not None else set()
    found |= {role for role in ("phase", "bonus") if getattr(spec, role) is not None}
    bare = {"query": spec.bare_query, "key": spec.bare_key, "value": spec.value}
    found |= {role for role, expr in bare.items() if not isinstance(expr, Input)}
    found |= {f"erase {spec.erase_reads}"} if spec.erase is not None else set()
    nodes = [node for _, expr in spec.roles for node in expr.walk()]
    found |= {"l2norm"} if any(isinstance(one, Call) and one.function in ROW_FUNCTIONS for one in nodes) else set()
    leaves = {node for node in nodes if not node.children}
    found |= {"scalars"} if any(isinstance(one, Scalar) for one in leaves) else set()
    found |= {"head"} if any(isinstance(one, Index) for one in leaves) else set()
    found |= (
        {"bounds"} if any(isinstance(one, Input) and (one.low, one.high) != (None, None) for one in leaves) else set()
    )
    found |= {"packed"} if trial.cu_seqlens is not None else set()
    found |= {"grouped"} if trial.heads else set()
    for name in ("gate_dtype", "dtype", "layout", "requires_grad", "initial_state", "final_state", "decode"):
        value = getattr(trial, name)
        if value != _SIMPLEST[name]:
            found.add(f"{name} {value}" if isinstance(value, str) else name)
    return frozenset(found)

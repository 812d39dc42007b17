"""The JSON form of a spec: a flat object in which expressions are text. Reading it executes nothing.

    {"flagen_spec": 1, "name": "gla", "inputs": [{"name": "q", "axes": "b t h k"}, ...], "query": "q", "key": "k",
     "value": "v", "log_decay": "g"}

Optional: log_decay, phase, bonus, erase (a list of two expressions), erase_reads ("previous"), feature_map ("taylor(2)"
or an expression over x), normalize (true or an expression over n), eps, stabilize ("max"), scale, scalars (a list of
names); an input may have low and high. Every other field is refused.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from .errors import SpecError, shown
from .expr import FEATURE, NORM, Expr, Input, Scalar, Taylor, head, heads, to_text
from .parse import parse
from .validate import EPS, MAX_INPUTS, check_argument_name, check_spec_name

if TYPE_CHECKING:
    from .spec import Spec

FORMAT = 1
MAX_JSON = 65_536  # characters
_FIELDS = {
    "flagen_spec": int, "name": str, "inputs": list, "scalars": list, "query": str, "key": str, "value": str,
    "log_decay": str, "phase": str, "bonus": str, "erase": list, "erase_reads": str,
    "feature_map": str, "normalize": (bool, str), "eps": (int, float), "stabilize": str,
    "scale": (int, float),
}  # fmt: skip
_REQUIRED = ("flagen_spec", "name", "inputs", "query", "key", "value")
_INPUT_FIELDS = {"name": str, "axes": str, "low": (int, float), "high": (int, float)}


def to_json(spec: Spec) -> str:
    """The spec as JSON text, the same for equal specs."""
    data: dict[str, Any] = {"flagen_spec": FORMAT, "name": spec.name}
    data["inputs"] = [_input_data(one) for one in spec.inputs]
    if spec.scalars:
        data["scalars"] = sorted(scalar.name for scalar in spec.scalars)
    data |= {"query": to_text(spec.bare_query), "key": to_text(spec.bare_key), "value": to_text(spec.value)}
    for role in ("log_decay", "phase", "bonus"):
        if (expr := getattr(spec, role)) is not None:
            data[role] = to_text(expr)
    if spec.erase is not None:
        data["erase"] = [to_text(expr) for expr in spec.erase]
    if spec.erase_reads != "decayed":
        data["erase_reads"] = spec.erase_reads
    if spec.feature_map is not None:
        data["feature_map"] = str(spec.feature_map)
    if spec.normalize is not False:
        data["normalize"] = to_text(spec.normalize) if isinstance(spec.normalize, Expr) else True
    if spec.eps != EPS:
        data["eps"] = spec.eps
    if spec.stabilize is not None:
        data["stabilize"] = spec.stabilize
    if spec.scale is not None:
        data["scale"] = spec.scale
    return json.dumps(data, indent=2, allow_nan=False)


def _input_data(one: Input) -> dict[str, Any]:
    data: dict[str, Any] = {"name": one.name, "axes": " ".join(one.axes)}
    return data | {bound: value for bound in ("low", "high") if (value := getattr(one, bound)) is not None}


def spec_arguments(text: str) -> dict[str, Any]:
    """The arguments of Spec that a JSON text stands for. Raises SpecError on anything out of form."""
    data = _load(text)
    _check_fields("a spec", data, _FIELDS, _REQUIRED)
    if data["flagen_spec"] != FORMAT or isinstance(data["flagen_spec"], bool):
        raise SpecError(f"the spec has format {shown(data['flagen_spec'])}, this flagen reads format {FORMAT}")
    name = data["name"]
    check_spec_name(name)
    inputs = _inputs(name, data["inputs"])
    scalars = _scalars(name, data.get("scalars", []))
    if twice := {one.name for one in inputs} & set(scalars):
        raise SpecError(f"{name}: {min(twice)!r} is both an input and a scalar; rename one")
    indices: dict[str, Expr] = {"head": head, "heads": heads}
    known = {one.name: one for one in inputs} | scalars | indices
    arguments: dict[str, Any] = {"name": name}
    for role in ("query", "key", "value", "log_decay", "phase", "bonus"):
        if role in data:
            arguments[role] = parse(data[role], known, f"{name}: {role}")
    if "erase" in data:
        arguments["erase"] = _pair(name, data["erase"], known)
    if "erase_reads" in data:
        arguments["erase_reads"] = data["erase_reads"]
    if "feature_map" in data:
        arguments["feature_map"] = _feature_map(name, data["feature_map"], scalars | indices)
    normalize = data.get("normalize", False)
    arguments["normalize"] = (
        parse(normalize, {NORM.name: NORM}, f"{name}: normalize") if isinstance(normalize, str) else normalize
    )
    arguments |= {field: data[field] for field in ("eps", "stabilize", "scale") if field in data}
    _check_used(name, arguments, scalars)
    return arguments | {"inputs": inputs}


def _load(text: str) -> dict[str, Any]:
    if not isinstance(text, str):
        raise SpecError(f"from_json takes text, got {type(text).__name__}")
    if len(text) > MAX_JSON:
        raise SpecError(f"the JSON text is {len(text)} characters long, the limit is {MAX_JSON}")
    try:
        data = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise SpecError("the JSON text is nested too deeply; a spec is a flat object") from None
    except SpecError:
        raise
    except ValueError as error:
        raise SpecError(f"not JSON: {error}") from None
    if not isinstance(data, dict):
        raise SpecError(f"a spec must be a JSON object, got {type(data).__name__}")
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        names = [name for name, _ in pairs]
        raise SpecError(f"the field {next(name for name in names if names.count(name) > 1)[:60]!r} is given twice")
    return data


def _no_constant(name: str) -> Any:
    raise SpecError(f"{name} is not allowed in a spec; numbers must be finite")


def _check_fields(what: str, data: dict[str, Any], fields: dict[str, Any], required: tuple[str, ...]) -> None:
    for field, value in data.items():
        if field not in fields:
            raise SpecError(f"{what} has no field {field[:60]!r}; the fields are {', '.join(fields)}")
        kinds = fields[field] if isinstance(fields[field], tuple) else (fields[field],)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise SpecError(
                f"{what}: the field {field!r} must be {expected}, got {shown(value)}; leave out what is absent"
            )
    for field in required:
        if field not in data:
            raise SpecError(f"{what} lacks the field {field!r}; required are {', '.join(required)}")


def _inputs(spec: str, entries: list[Any]) -> list[Input]:
    if len(entries) > MAX_INPUTS:
        raise SpecError(f"{spec}: {len(entries)} inputs, the limit is {MAX_INPUTS}")
    inputs = []
    for entry in entries:
        if not isinstance(entry, dict):
            raise SpecError(f"{spec}: an input must be an object with name and axes, got {shown(entry)}")
        _check_fields(f"{spec}: an input", entry, _INPUT_FIELDS, ("name", "axes"))
        inputs.append(Input(entry["name"], entry["axes"], low=entry.get("low"), high=entry.get("high")))
        check_argument_name(spec, entry["name"])
    names = [one.name for one in inputs]
    for name in names:
        if names.count(name) > 1:
            raise SpecError(f"{spec}: the input {name!r} is listed twice")
    return inputs


def _scalars(spec: str, names: list[Any]) -> dict[str, Expr]:
    if len(names) > MAX_INPUTS:
        raise SpecError(f"{spec}: {len(names)} scalars, the limit is {MAX_INPUTS}")
    scalars: dict[str, Expr] = {}
    for name in names:
        scalar = Scalar(name)
        check_argument_name(spec, name)
        if name in scalars:
            raise SpecError(f"{spec}: the scalar {name!r} is listed twice")
        scalars[name] = scalar
    return scalars


def _pair(spec: str, texts: list[Any], known: dict[str, Expr]) -> tuple[Expr, Expr]:
    if len(texts) != 2:
        raise SpecError(f"{spec}: erase must list two expressions, a and b, got {len(texts)}")
    a, b = texts
    return parse(a, known, f"{spec}: erase_a"), parse(b, known, f"{spec}: erase_b")


def _feature_map(spec: str, text: str, known: dict[str, Expr]) -> Taylor | Expr:
    for order in (1, 2):
        if text == f"taylor({order})":
            return Taylor(order)
    if FEATURE.name in known:
        raise SpecError(f"{spec}: feature_map is an expression over 'x', which is also a scalar; rename the scalar")
    return parse(text, known | {FEATURE.name: FEATURE}, f"{spec}: feature_map")


def _check_used(spec: str, arguments: dict[str, Any], scalars: dict[str, Expr]) -> None:
    values = (*arguments.values(), *arguments.get("erase", ()))
    used = {scalar.name for value in values if isinstance(value, Expr) for scalar in value.scalars}
    unused = sorted(set(scalars) - used)
    if unused:
        raise SpecError(f"{spec}: the scalar {unused[0]!r} is used by no expression; leave it out")

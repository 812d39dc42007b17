"""The signature and the documentation of an op, written from its spec."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING

from .checks import MAX_CHANNELS, max_key
from .expr import to_text
from .op_faults import symbols

if TYPE_CHECKING:
    from .expr import Input
    from .spec import Spec

_EMPTY = inspect.Parameter.empty
BARE = {
    "query": "the query",
    "key": "the key",
    "value": "the value",
    "log_decay": "natural log of the decay per step, <= 0",
    "phase": "angle of the decay per step, in radians",
    "bonus": "weight of the current token",
    "erase_a": "what reads the state to erase",
    "erase_b": "what is taken away with what was read",
}


def call_signature(spec: Spec) -> inspect.Signature:
    """Of the op and of its reference."""
    options = {"scale": None, "initial_state": None, "output_final_state": False, "cu_seqlens": None}
    return _signature(
        spec, options, "tuple[Tensor, Tensor | None]" if not _pair(spec) else "tuple[Tensor, tuple | None]"
    )


def step_signature(spec: Spec) -> inspect.Signature:
    """Of the op's step."""
    return _signature(spec, {"state": _EMPTY, "scale": None}, "Tensor")


def _signature(spec: Spec, options: Mapping[str, object], result: str) -> inspect.Signature:
    parameter = inspect.Parameter
    pair = "tuple[Tensor, Tensor, Tensor]" if spec.stabilize is not None else "tuple[Tensor, Tensor]"
    kinds = {
        "scale": "float | None",
        "output_final_state": "bool",
        "cu_seqlens": "Tensor | None",
        "initial_state": f"{pair} | None" if _pair(spec) else "Tensor | None",
        "state": pair if _pair(spec) else "Tensor",
    }
    tensors = [parameter(one.name, parameter.POSITIONAL_OR_KEYWORD, annotation="Tensor") for one in spec.inputs]
    scalars = [parameter(one.name, parameter.KEYWORD_ONLY, annotation="float") for one in spec.scalars]
    rest = [
        parameter(name, parameter.KEYWORD_ONLY, default=default, annotation=kinds[name])
        for name, default in options.items()
    ]
    return inspect.Signature(tensors + scalars + rest, return_annotation=result)


def short_call(spec: Spec) -> str:
    """The op's call in a line, without annotations: "gla(q, k, v, g, *, scale=None, ...)"."""
    names = [one.name for one in spec.inputs]
    options = ["scale=None", "initial_state=None", "output_final_state=False", "cu_seqlens=None"]
    return f"{spec.name}({', '.join([*names, '*', *(one.name for one in spec.scalars), *options])})"


def short_step(spec: Spec) -> str:
    """The call of the op's step in a line."""
    names = [one.name for one in spec.inputs]
    return f"{spec.name}.step({', '.join([*names, '*', *(one.name for one in spec.scalars), 'state', 'scale=None'])})"


def call_doc(spec: Spec) -> str:
    """The docstring of the op."""
    equations = "\n".join(f"    {line}" for line in spec.equations)
    scale = f"{spec.scale:g}" if spec.scale is not None else "1" if spec.vector else "K ** -0.5"
    sizes = ["device, of any strides."]
    if not spec.vector:
        sizes = ["device, of any strides. H is the largest number of heads; a tensor may have any divisor of it."]
        sizes.append(f"K is at most {max_key(spec)}, V {MAX_CHANNELS}.")
    lines = [
        short_call(spec),
        "",
        equations,
        "",
        "Tensors are float16, bfloat16 or float32, mixed at will (float64 where PyTorch runs it, not Triton), on one",
        *sizes,
        "",
        *(f"{one.name}: {symbols(one.axes)}{_bounds(one)}, {_meaning(spec, one)}." for one in spec.inputs),
        *(f"{one.name}: a number, required." for one in spec.scalars),
        f"scale: a number that multiplies the query; None: {scale}.",
        f"initial_state: {_state(spec)}. None: zero.",
        "output_final_state: whether to return the state after the last token, in the same form, or None.",
        "cu_seqlens: [N + 1] int32, the bounds of N sequences that lie one after the other in one row, B = 1; they",
        "    rise from 0 to at most T, and rows past the last give zero. None: every row is a sequence, N = B.",
    ]
    if any("b" in one.axes and "t" not in one.axes for one in spec.inputs):
        lines.append("    Tensors with the axis B and without T then have a row per sequence.")
    output = "[B, T, D]" if spec.vector else "[B, T, H, V]"
    gauge = ["m counts as a constant: it has no gradient, and o does not depend on it."] if spec.stabilize else []
    lines += [
        "",
        f"Returns o {output}, in the dtype of {spec.value.inputs[0].name}, and the final state or None.",
        "Every tensor and initial_state get a gradient, from o and from the final state, but no second derivative.",
        *gauge,
        "Raises ValueError and TypeError on arguments that do not fit, before anything runs.",
    ]
    return "\n".join(lines)


def step_doc(spec: Spec) -> str:
    """The docstring of the op's step."""
    return "\n".join(
        (
            f"{short_step(spec)} -> o",
            "",
            f"One token of {spec.name}. Tensors as for the op, with T = 1. No gradient.",
            f"state: {_state(spec)}, updated in place.",
            f"Returns o {'[B, 1, D]' if spec.vector else '[B, 1, H, V]'}.",
        )
    )


def reference_doc(spec: Spec) -> str:
    """The docstring of the op's reference."""
    return (
        f"{spec.name} token by token in plain PyTorch, made from the spec alone: slow; the op is judged by it.\n\n"
        "Takes and returns what the op does; computed in fp64 if any input is, else in fp32. Gradients are autograd's."
    )


def _pair(spec: Spec) -> bool:
    return spec.normalizer is not None


def _state(spec: Spec) -> str:
    kind = "complex64" if spec.phase is not None else "float32"
    wide = "complex128" if spec.phase is not None else "float64"
    if spec.vector:
        form = f"[N, D] {kind}"
    elif not _pair(spec):
        form = f"[N, H, {'F' if spec.taylor else 'K'}, V] {kind}"
    else:
        rows = "F" if spec.taylor else "K"
        form = f"the pair (S [N, H, {rows}, V], z [N, H, {rows}]) {kind}"
        if spec.stabilize is not None:
            form = f"the triple (S [N, H, {rows}, V], z [N, H, {rows}], m [N, H]) {kind}, S and z times exp(-m)"
    rows = {1: "; F = 1 + K features", 2: "; F = 1 + K + K (K + 1) / 2 features"}.get(spec.taylor, "")
    return f"{form} ({wide} if a tensor is float64){rows}"


def _bounds(one: Input) -> str:
    low = "" if one.low is None else f" >= {one.low:g}"
    return low + ("" if one.high is None else f" <= {one.high:g}")


def _meaning(spec: Spec, one: Input) -> str:
    """What an input is for, by the roles in which it stands."""
    found = []
    for role, expr in spec.roles:
        if expr == one:
            found.append(BARE[role])
        elif one in expr.inputs:
            found.append(f"in {role} = {to_text(expr)}")
    return "; ".join(found)

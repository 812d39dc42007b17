"""Commands about one spec: list, show, emit; and how the command line names a spec."""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from . import specs
from .cli_cost import show_cost
from .errors import SpecError
from .exchange import MAX_JSON
from .spec import Spec

if TYPE_CHECKING:
    from .analysis import Analysis
    from .plan import Plan

DECAYS = {"none": "none", "scalar": "one per head", "key": "one per key channel", "value": "one per value channel"}


def find_spec(text: str) -> Spec:
    """The spec that SPEC stands for. Raises SpecError where there is none; OSError where a file cannot be read."""
    if text in specs.names():
        return specs.get(text)
    if text.endswith(".json") or Path(text).is_file():
        try:
            with Path(text).open(encoding="utf-8") as file:
                return Spec.from_json(file.read(MAX_JSON + 1))
        except UnicodeDecodeError:
            raise SpecError(f"{text} is no JSON text in UTF-8") from None
    if ":" in text:
        return _attribute(text)
    try:
        return specs.get(text)
    except SpecError as error:
        raise SpecError(f"{error}; a spec may also be a JSON file or module:attribute") from None


def _attribute(text: str) -> Spec:
    name, _, attribute = text.partition(":")
    if not name or name.startswith("."):
        raise SpecError(f"{text!r} is not module:attribute, such as my_models.attention:my_spec")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` has it, for the `flagen` script
    try:
        value = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise SpecError(f"{text!r}: there is no module {error.name!r}; modules are looked for in the working directory "
                        "and where Python finds packages") from None  # fmt: skip
    found = getattr(value, attribute, None)
    if not isinstance(found, Spec):
        there = sorted(key for key, one in vars(value).items() if isinstance(one, Spec))
        what = "has no such attribute" if found is None else f"there it is of type {type(found).__name__}"
        raise SpecError(f"{text!r}: {what}; the specs in {name} are: {', '.join(there) or 'none'}")
    return found


def list_specs(arguments: argparse.Namespace) -> int:
    """The shipped specs, each with its recurrence on a line."""
    names = specs.names()
    width = max(map(len, names))
    for name in names:
        spec = specs.get(name)
        print(f"{name:{width}}  {spec.equations[0]}")
        for line in spec.equations[1:]:
            print(f"{'':{width}}  {line}")
    return 0


def show(arguments: argparse.Namespace) -> int:
    """What is known of a spec before it is compiled."""
    from .analysis import analyse
    from .plan import make_plan

    spec, shape = find_spec(arguments.spec), arguments.shape
    shape = shape | {"D": shape["H"] * shape["V"]} if spec.vector else shape
    analysis = analyse(spec)
    print(spec.name)
    for line in spec.equations:
        print(f"    {line}")
    channels = f" D={shape['D']}" if spec.vector else f" H={shape['H']} K={shape['K']} V={shape['V']}"
    print(f"\ninputs at B={shape['B']} T={shape['T']}{channels}")
    roles = {one: [role for role, expr in spec.roles if one in expr.inputs] for one in spec.inputs}
    for one in spec.inputs:
        sizes = ", ".join(str(shape[axis.upper()]) for axis in one.axes)
        print(f"    {one.name:8} {' '.join(one.axes):10} [{sizes}]{'':2}in {', '.join(roles[one])}")
    for scalar in spec.scalars:
        print(f"    {scalar.name:8} a number, by keyword")
    default = "1" if spec.vector else "K ** -0.5"
    print(f"    {'scale':8} {default if spec.scale is None else f'{spec.scale:g}'} by default")
    _show_state(analysis, shape)
    print(f"\ndecay: {decay_text(analysis)}")
    if analysis.erase != "none":
        print(f"erase: {analysis.erase}, reads the {spec.erase_reads} state")
    print("\nkernels")
    if reason := analysis.without_kernels:
        print(f"    none: {reason}; it runs as chunkwise PyTorch on every device")
        return 0
    plan = make_plan(analysis)
    for kernel in plan.kernels:
        print(f"    {kernel.name} ({kernel.direction}): {kernel.when}")
        print(f"        reads {', '.join(kernel.reads)}; writes {', '.join(kernel.writes)}")
    show_cost(spec, shape, arguments.dtype, arguments.device)
    _show_bytes(plan, shape)
    return 0


def decay_text(analysis: Analysis) -> str:
    """The kind of decay in words."""
    text = DECAYS[analysis.decay] if not analysis.vector or analysis.decay == "none" else "one per channel"
    if analysis.decay != "none":
        text += " and token" if analysis.decay_varies else ", the same for all tokens"
    if analysis.decay_low is not None and analysis.decay != "none":
        text += f", log_decay >= {analysis.decay_low:.4g}"
    return text + (", with a phase" if analysis.is_complex else "")


def _show_state(analysis: Analysis, shape: dict[str, int]) -> None:
    from .torch_taylor import count

    spec, rows = analysis.spec, count(shape["K"], analysis.taylor) if analysis.taylor else shape["K"]
    kind = "complex64" if spec.phase is not None else "fp32"
    if spec.vector:
        print(f"    state    {kind} [{shape['B']}, {shape['D']}]")
        return
    print(f"    state    {kind} [{shape['B']}, {shape['H']}, {rows}, {shape['V']}]", end="")
    parts = (f"[{shape['B']}, {shape['H']}, {rows}]", f"[{shape['B']}, {shape['H']}]")[: spec.state_parts - 1]
    print("".join(f", and {one}" for one in parts))


def _show_bytes(plan: Plan, shape: dict[str, int]) -> None:
    """What kernels that move each tensor once move, in 16 bits, for all heads; parameters do not count by token."""
    from .schedule import checkpoint_of, rows_of_state
    from .schedule_vector import row_tokens

    if plan.vector:
        shape = shape | {"H": 1, "K": 1, "V": shape["D"]}
    sizes = {axis: shape[axis.upper()] for axis in ("hkvd" if plan.vector else "hkv")}

    def width(axes: str) -> int:
        return 2 * math.prod(sizes[axis] for axis in axes if axis in sizes)

    inputs = sum(width(one.axes) for one in plan.analysis.inputs if "t" in one.axes)
    output = width("hv")
    # for the backward: a state every few tokens, with a normaliser what was divided by (fp32), and then o again; of a
    # vector state fp32 ones
    parts = (2 if plan.complex else 1) * (2 if plan.vector else 1)
    every = row_tokens(plan) if plan.vector else checkpoint_of(plan)
    saved = parts * 2 * shape["H"] * rows_of_state(plan, shape["K"]) * shape["V"] // every
    saved += 4 * shape["H"] * (plan.normalized + 2 * plan.stabilized)
    reads = inputs + output + saved + (output if plan.normalized else 0)
    channels = f"{shape['V']} channels" if plan.vector else f"{shape['H']} heads"
    print(f"\nbytes per token, 16-bit inputs, {channels}, each tensor moved once")
    print(f"    forward   {inputs + output:8}  reads {inputs}, writes {output}")
    print(f"    training  {inputs + output + saved:8}  and writes {saved} for the backward")
    print(f"    backward  {reads + inputs:8}  reads {reads}, writes {inputs}")


def emit_module(arguments: argparse.Namespace) -> int:
    """The kernels of a spec as one module to keep."""
    from .compiler import emit

    text = emit(find_spec(arguments.spec))
    if arguments.output is None:
        print(text, end="")
    else:
        Path(arguments.output).write_text(text, encoding="utf-8")
        print(f"written: {arguments.output}", file=sys.stderr)
    return 0

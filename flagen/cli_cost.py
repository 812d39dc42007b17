"""The cost of a call as a table: what `flagen show` prints below the facts of a spec."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import TYPE_CHECKING

from .errors import FlagenError
from .spec import Spec

if TYPE_CHECKING:
    from .cost import Estimate, KernelCost, Machine, Stage

MB = 1 << 20
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
HEADER = (
    f"{'kernel':16} {'grid':>12} {'tile':32} {'warps':>5} {'stages':>6} {'regs':>4} {'read MB':>8} {'written':>8} "
    f"{'GFLOP':>8} {'us':>8}  bound"
)


def show_cost(spec: Spec, shape: dict[str, int], dtype: str, device: str | None) -> None:
    """The kernels of a call, forward, backward and decode, with what they move and how long they should take."""
    if importlib.util.find_spec("triton") is None:
        print("\nkernels of a call: not shown, since the schedule needs Triton, which is not installed")
        return
    import torch

    from .cost import CostError, estimate
    from .schedule import Shape

    machine = _machine(device)
    sizes = Shape.dense(*(shape[axis] for axis in "BTHKV"))
    try:
        found = estimate(spec, sizes, getattr(torch, DTYPES[dtype]), machine)
    except CostError as error:
        print(f"\nkernels of a call: not shown, {error}")
        return
    print(f"\nschedule on {machine.name}, {dtype}: {_schedule(found)}")
    for title, stage in (
        ("forward", found.forward),
        ("training forward", found.training),
        ("backward", found.backward),
        ("decode", found.step),
    ):
        _table(title, stage, spec.name, machine)
    _sums(found, machine)


def _machine(device: str | None) -> Machine:
    """The device of that name; the one that is here, else an H100."""
    import torch

    from .cost import MACHINES, machine_of

    if device is not None:
        return machine_of(device)
    if torch.cuda.is_available():
        try:
            return machine_of(torch.cuda.get_device_name())
        except FlagenError:
            pass
    return MACHINES["h100"]


def _schedule(found: Estimate) -> str:
    """The fields of a schedule that are plain numbers and words."""
    fields = ((one.name, getattr(found.schedule, one.name)) for one in dataclasses.fields(found.schedule))
    return " ".join(f"{name}={value}" for name, value in fields if not dataclasses.is_dataclass(value))


def _table(title: str, stage: Stage, name: str, machine: Machine) -> None:
    floor = stage.floor / machine.bandwidth
    share = f"{stage.moved / stage.floor:.2f} times the least bytes, {floor / stage.seconds:.0%} of the floor"
    print(f"\n{title}: {1e6 * stage.seconds:.0f} us by estimate, {share} ({1e6 * floor:.0f} us)")
    print(f"    {HEADER}")
    for kernel in stage.kernels:
        print(f"    {_line(kernel, name)}")


def _line(one: KernelCost, name: str) -> str:
    short = one.name.removeprefix(f"{name}_").removesuffix("_kernel")
    grid = "x".join(map(str, one.grid)).removesuffix("x1").removesuffix("x1")
    return (
        f"{short:16} {grid:>12} {one.tile:32} {one.num_warps or '':>5} {one.num_stages or '':>6} "
        f"{one.registers or 0:4.0f} {one.read / MB:8.1f} {one.written / MB:8.1f} {one.flops / 1e9:8.1f} "
        f"{1e6 * one.seconds:8.1f}  {one.bound}"
    )


def _sums(found: Estimate, machine: Machine) -> None:
    both, extra = found.both, found.extra
    floor = both.floor / machine.bandwidth
    print(f"\nforward and backward: {1e6 * both.seconds:.0f} us by estimate, {floor / both.seconds:.0%} of the floor; "
          f"{both.moved / MB:.0f} MB moved, {both.moved / both.floor:.2f} times the least")  # fmt: skip
    print(f"memory beside inputs, output and gradients: {extra / MB:.1f} MB, {extra / found.inputs:.0%} of the inputs; "
          f"{found.held / MB:.1f} MB are kept for the backward")  # fmt: skip
    basis = "measured" if machine.measured else "from data sheets"
    print(f"copy bandwidth {machine.bandwidth / 1e12:.2f} TB/s ({basis}); times are estimates, see flagen/cost.py")

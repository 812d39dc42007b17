"""What a call costs on a device, from plan, schedule, shape and dtypes alone: its kernels with their grids, bytes,
FLOPs and times, the least that could be moved, and the memory that it takes. Nothing runs.

Which kernels are launched, with which tiles and on which scratch, is what the launchers do (cost_launch.py); what a
program does is counted in the kernel's text (cost_trace.py); bytes of DRAM are those of the tensors that a kernel
touches, once each, but for scratch that is written over and over and does not fit the cache. A kernel's time is LAUNCH
or the largest of

    memory: its bytes at the device's copy bandwidth;
    chain: by the rounds of programs, PRODUCT for each product and REDUCTION for each step of the reductions of a
        program, one after the other, and the program's issue slots;
    issue: by the rounds of programs, the issue slots of those that share a multiprocessor.

Slots are spent on elementwise operations, at ISSUE of the rate of the multiprocessor, or at PLAIN of it in kernels
without products, which have no operands to bring into place, on exponentials, at SPECIAL of the rate of their own unit,
which works beside the others, and on products, at the rate measured for large ones. A kernel that wants more than
REGISTERS registers a thread (cost_registers.py) spills, which makes its slots dearer by SPILL for each 32 of them.

The seven were fitted by benchmarks/calibrate.py to the forward and the forward + backward of all shipped specs at large
shapes in bf16, measured on an H100 with Triton 3.6 (benchmarks/results/h100.csv): of its 112 estimates 111 are between
0.72 and 1.45 times what was measured, as calibrate.py's column "now" shows; the forward and backward of one vector
state at 2,16384,16,128 is 0.42 times, whose kernels take less than half of the time by a profiler, and was left out.
Copy bandwidth and rate of products of the H100 were measured, and the H200's copy bandwidth is a bench's own; those of
other devices are data sheets' times about the same shares. Everything else is an estimate.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .compiler import prepare
from .cost_launch import Argument, Calls, Launch, TorchKernel, trace
from .cost_registers import registers
from .cost_trace import count
from .cost_work import Block, Work, functions_of
from .cost_work import CostError as CostError
from .load import load
from .schedule import Device, Shape, rows_of_state

if TYPE_CHECKING:
    from collections.abc import Callable

    from .plan import Plan
    from .schedule import Schedule
    from .spec import Spec

WARP, LANES, SPECIAL_LANES = 32, 128, 16  # elements per clock of a multiprocessor: elementwise, and exponentials
REGISTER_FILE, MOST_WARPS = 65536, 64  # of a multiprocessor: 32-bit registers and warps
MOST_REGISTERS = 255  # of a thread
OWN_REGISTERS = 40  # of a thread beside its blocks: addresses, masks, counters


class Constants(NamedTuple):
    """PRODUCT, REDUCTION: clocks; ISSUE, PLAIN, SPECIAL: shares; REGISTERS: of a thread, as cost_registers counts;
    SPILL: a slope."""

    PRODUCT: float = 181.4
    REDUCTION: float = 261.8
    ISSUE: float = 0.5144
    REGISTERS: float = 219.5
    SPILL: float = 0.5235
    PLAIN: float = 1.011
    SPECIAL: float = 4.0


FITTED = Constants()


@dataclass(frozen=True, slots=True)
class Machine:
    """What the cost model knows of a device.

    device: as the schedule takes it; clock: Hz; bandwidth: bytes read and written a second by a copy; products: FLOP a
    second by how they are taken; cache: bytes of the last-level cache; launch: seconds; measured: whether bandwidth and
    products are.
    """

    name: str
    device: Device
    clock: float
    bandwidth: float
    products: dict[str, float]
    cache: int
    launch: float = 2.5e-6
    measured: bool = False


def _rates(half: float, single: float) -> dict[str, float]:
    """From the rates of 16-bit products and of fp32 arithmetic."""
    return {"16": half, "tf32": half / 2, "tf32x3": half / 6, "ieee": single, "bf16x3": half / 3, "bf16x6": half / 6}


_KB, _MB = 1 << 10, 1 << 20
MACHINES = {
    "h100": Machine("h100", Device(132, 227 * _KB), 1.755e9, 3.02e12, _rates(700e12, 60e12), 50 * _MB, measured=True),
    "h200": Machine("h200", Device(132, 227 * _KB), 1.755e9, 4.3e12, _rates(700e12, 60e12), 50 * _MB),
    "a100": Machine("a100", Device(108, 163 * _KB), 1.41e9, 1.8e12, _rates(225e12, 18e12), 40 * _MB),
    "b200": Machine("b200", Device(148, 227 * _KB), 1.85e9, 7.2e12, _rates(1600e12, 70e12), 126 * _MB),
    "mi300x": Machine("mi300x", Device(304, 64 * _KB, "ieee"), 2.1e9, 4.6e12, _rates(900e12, 120e12), 256 * _MB),
}


def machine_of(name: str, bandwidth: float | None = None) -> Machine:
    """The machine of a device's name, as in MACHINES or as the driver gives it. bandwidth: measured, in place of the
    table's. Raises CostError where the table has none."""
    plain = name.lower().replace(" ", "")
    found = next((one for key, one in MACHINES.items() if key in plain), None)
    if found is None:
        raise CostError(f"the cost model knows no device {name!r}; it knows {', '.join(MACHINES)}")
    return found if bandwidth is None else dataclasses.replace(found, bandwidth=bandwidth)


@dataclass(frozen=True, slots=True)
class KernelCost:
    """One launch.

    read, written: bytes of DRAM; asked: bytes that its programs ask for; flops: of products; registers: that a thread
    wants; seconds: predicted; bound: which term decides, "memory", "chain", "issue" or "launch".
    """

    name: str
    grid: tuple[int, ...]
    tile: str
    num_warps: int
    num_stages: int
    read: float
    written: float
    asked: float
    flops: float
    registers: float
    seconds: float
    bound: str
    work: Work | None = None


@dataclass(frozen=True, slots=True)
class Stage:
    """The kernels of one stage. floor: the bytes of each input and output once; peak: the most bytes that are held
    beside the inputs, what the forward keeps for the backward included."""

    kernels: tuple[KernelCost, ...]
    floor: int
    peak: int

    @property
    def seconds(self) -> float:
        return sum(one.seconds for one in self.kernels)

    @property
    def moved(self) -> float:
        return sum(one.read + one.written for one in self.kernels)


@dataclass(frozen=True, slots=True)
class Estimate:
    """forward: without a gradient; training: the forward that keeps what the backward reads; backward; step: one token.
    inputs: bytes of the inputs; held: bytes kept between training forward and backward, beside inputs and output;
    extra: the most bytes of forward and backward beyond inputs, output and gradients."""

    forward: Stage
    training: Stage
    backward: Stage
    step: Stage
    inputs: int
    held: int
    extra: int
    schedule: Schedule
    machine: Machine

    @property
    def both(self) -> Stage:
        """Forward and backward of a training step."""
        return Stage(self.training.kernels + self.backward.kernels, self.forward.floor + self.backward.floor, 0)


def estimate(
    spec: Spec,
    shape: Shape,
    dtype: torch.dtype = torch.bfloat16,
    machine: Machine = MACHINES["h100"],
    *,
    change: Callable[[Schedule], Schedule] | None = None,
    constants: Constants = FITTED,
    **options: Any,
) -> Estimate:
    """The cost of a call with dense inputs of these sizes.

    dtype: of inputs with channels; the others, step sizes and scalar gates, are fp32. change: another schedule in place
    of the one that is decided. options: chunk_size, input_precision, as of TritonBackend. Raises CostError where a
    kernel has something that the model does not know, and where a spec has none.
    """
    plan, entry = prepare(spec)
    if plan is None:
        raise CostError(f"{spec.name}: has no kernels, so that the cost model has nothing to count")
    shape = shape.of_vector() if plan.vector else shape
    inputs = meta_inputs(spec, shape, dtype)
    traced = trace(plan, load(entry), entry.source, inputs, machine.device, change, **options)
    read = sum(x.numel() * x.element_size() for x in inputs)
    state = _state_bytes(plan, shape)
    now = read // max(1, shape.T) + traced.output // max(1, shape.T)
    floors = (read + traced.output, read + traced.output, 2 * read + traced.output, 2 * state + now)
    forward, training, backward, step = (
        Stage(costs(calls, entry.source, machine, constants), floor, calls.peak)
        for calls, floor in zip((traced.forward, traced.training, traced.backward, traced.step), floors, strict=True)
    )
    # of a step as a whole, as it is measured: while the forward runs there are no gradients yet
    extra = max(0, max(traced.training.peak, traced.backward.peak) - traced.output - traced.results)
    return Estimate(forward, training, backward, step, read, traced.held, extra, traced.schedule, machine)


def meta_inputs(spec: Spec, shape: Shape, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Tensors without data, as samples.make_inputs shapes them. Step sizes and scalar gates are fp32."""
    sizes = {"b": shape.B, "t": shape.T, "h": shape.H, "k": shape.K, "v": shape.V, "d": shape.H * shape.V}
    return tuple(
        torch.empty([sizes[axis] for axis in one.axes], dtype=dtype_of(one.axes, dtype), device="meta")
        for one in spec.inputs
    )


def dtype_of(axes: str, dtype: torch.dtype) -> torch.dtype:
    """Of an input: `dtype` with channels, fp32 without, as models keep them."""
    return dtype if set("kvd") & set(axes) or dtype == torch.float64 else torch.float32


def _state_bytes(plan: Plan, shape: Shape) -> int:
    rows = rows_of_state(plan, shape.K)
    sums = (rows if plan.normalized else 0) + (1 if plan.stabilized else 0)
    return 4 * shape.N * shape.H * (rows * shape.V * (2 if plan.complex else 1) + sums)


def costs(calls: Calls, source: str, machine: Machine, constants: Constants = FITTED) -> tuple[KernelCost, ...]:
    """Of every launch of a stage, torch's own kernels included."""
    return tuple(
        _of_torch(one, machine) if isinstance(one, TorchKernel) else _of_launch(one, source, machine, constants)
        for one in calls.launches
    )


def _of_torch(one: TorchKernel, machine: Machine) -> KernelCost:
    moved = (one.read + one.written) / machine.bandwidth
    return KernelCost(f"torch.{one.name}", (), "", 0, 0, one.read, one.written, one.read + one.written, 0, 0,
                      max(moved, machine.launch), "memory" if moved > machine.launch else "launch")  # fmt: skip


def _of_launch(launch: Launch, source: str, machine: Machine, constants: Constants) -> KernelCost:
    arguments = {name: Block((), one.dtype, name) if isinstance(one, Argument) else one
                 for name, one in launch.arguments.items()}  # fmt: skip
    # tensors that only the first or the last piece touches are seen in one of them
    work, blocks = count(source, launch.kernel, arguments, (0, 0, 0))
    last, _ = count(source, launch.kernel, arguments, tuple(n - 1 for n in launch.grid))
    mean = Work()
    share = 1 / launch.arguments.get("NP", 1) if launch.arguments.get("NP", 1) > 1 else 0.5
    mean.add(work, 1 - share)
    mean.add(last, share)
    functions, _ = functions_of(source)
    wanted = registers(functions, launch.kernel, blocks, launch.num_warps)
    programs = prod(launch.grid)
    together = _together(programs, launch.num_warps, wanted, machine)
    read, written = _traffic(launch, mean, together, machine)
    terms = times(mean, programs, together, wanted, machine, constants)
    terms |= {"memory": (read + written) / machine.bandwidth, "launch": machine.launch}
    bound = max(terms, key=lambda name: terms[name])
    return KernelCost(
        name=launch.kernel,
        grid=launch.grid,
        tile=_tile(launch),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        read=read,
        written=written,
        asked=programs * (sum(mean.reads.values()) + sum(mean.writes.values())),
        flops=programs * sum(mean.flops.values()),
        registers=wanted,
        seconds=terms[bound],
        bound=bound,
        work=mean,
    )


def _together(programs: int, warps: int, wanted: float, machine: Machine) -> int:
    """How many programs share a multiprocessor."""
    fit = REGISTER_FILE // int(WARP * warps * min(MOST_REGISTERS, wanted + OWN_REGISTERS))
    fit = max(1, min(fit, MOST_WARPS // warps))
    return min(fit, -(-programs // machine.device.multiprocessors))


def retimed(one: KernelCost, machine: Machine, constants: Constants) -> float:
    """The seconds of a kernel under other constants."""
    if one.work is None:
        return one.seconds
    programs = prod(one.grid)
    together = _together(programs, one.num_warps, one.registers, machine)
    terms = times(one.work, programs, together, one.registers, machine, constants)
    return max(*terms.values(), (one.read + one.written) / machine.bandwidth, machine.launch)


def times(
    work: Work, programs: int, together: int, wanted: float, machine: Machine, constants: Constants = FITTED
) -> dict[str, float]:
    """Seconds by the chain of a program and by the slots of those that share a multiprocessor."""
    multiprocessors, clock = machine.device.multiprocessors, machine.clock
    rounds = -(-programs // (multiprocessors * together))
    spilt = 1 + constants.SPILL * max(0.0, wanted - constants.REGISTERS) / 32
    share = constants.ISSUE if work.products else constants.PLAIN
    slots = (work.lanes / LANES / share + work.special / SPECIAL_LANES / constants.SPECIAL) / clock * spilt
    for kind, flops in work.flops.items():
        slots += flops / (machine.products[kind] / multiprocessors)
    chain = (work.products * constants.PRODUCT + work.reduced * constants.REDUCTION) / clock
    return {"chain": rounds * (chain + slots), "issue": rounds * together * slots}


def _traffic(launch: Launch, work: Work, together: int, machine: Machine) -> tuple[float, float]:
    """Bytes of DRAM read and written: each tensor once, as far as it is touched."""
    programs = prod(launch.grid)
    active = min(1.0, machine.device.multiprocessors * together / programs)
    sizes: dict[str, float] = {name: one.nbytes for name, one in launch.tensors.items()}
    read, written = dict(work.reads), dict(work.writes)
    for moved in (read, written):
        for name in moved:
            moved[name] *= programs
    for name in set(read) & set(written):
        # scratch is written over and over; padding of blocks alone makes up to four times the bytes
        if written[name] > 4 * sizes[name]:
            if sizes[name] * active <= machine.cache / 2:
                read[name] = 0
            else:
                sizes[name] = max(read[name], written[name])
    return sum(min(read[x], sizes[x]) for x in read), sum(min(written[x], sizes[x]) for x in written)


def _tile(launch: Launch) -> str:
    """The blocks of a launch by their names, as the kernel takes them."""
    taken = launch.arguments
    return " ".join(f"{name}={taken[name]}" for name in ("BT", "BK", "BF", "BV", "BP", "S", "BD") if name in taken)

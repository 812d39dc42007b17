"""The launches of a call, found by running the launchers of a generated module on tensors without data.

The Triton backend runs as it does for a call, with stand-ins for the kernels that keep what they are launched with, and
a watch over what torch itself is asked for: its own kernels, and the memory that is held.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import schedule as schedules
from .cost_work import CostError, kernels_of
from .schedule_vector import VectorSchedule, vector_schedule
from .triton_backend import TritonBackend
from .triton_vector import VectorTritonBackend

if TYPE_CHECKING:
    from .plan import Plan
    from .schedule import Schedule, Shape

DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64",
          torch.int32: "int32", torch.int64: "int64", torch.int8: "int8", torch.bool: "int1"}  # fmt: skip
# of torch's operators: those that allocate and write nothing
_NEW = frozenset(("empty", "new_empty", "empty_like", "empty_strided", "lift_fresh"))


class Argument(NamedTuple):
    """A tensor that a kernel is given."""

    shape: tuple[int, ...]
    dtype: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Launch:
    """A launch of a kernel of the module. arguments: numbers, dtypes, None, and tensors as Argument."""

    kernel: str
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    num_warps: int
    num_stages: int

    @property
    def tensors(self) -> dict[str, Argument]:
        return {name: one for name, one in self.arguments.items() if isinstance(one, Argument)}


@dataclass(frozen=True, slots=True)
class TorchKernel:
    """A kernel of torch's own: a sum over parts, a cast, a filling with zeros."""

    name: str
    read: int
    written: int


@dataclass(slots=True)
class Calls:
    """What one stage of a call (forward, backward, step) launches, in order. peak: the most bytes that are held at once
    of what the call itself allocates, its results included."""

    launches: list[Launch | TorchKernel] = field(default_factory=list)
    peak: int = 0


class Traced(NamedTuple):
    """forward: without saving anything; training: the forward that keeps what the backward reads; held: bytes that the
    training forward keeps for the backward beside inputs and output; results: bytes of the gradients, output: of o."""

    forward: Calls
    training: Calls
    backward: Calls
    step: Calls
    output: int
    held: int
    results: int
    schedule: Schedule


class _Memory(TorchDispatchMode):
    """Keeps torch's own kernels and the bytes of the storages that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = Calls()
        self.alive = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types_: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [x for x in _flat(args) if isinstance(x, Tensor)]
        for x in given:
            self.note(x, counts=False)
        out = func(*args, **(kwargs or {}))
        made = [x for x in _flat((out,)) if isinstance(x, Tensor)]
        mutates = func._schema.is_mutable
        fresh = [x for x in made if self.note(x)]
        if (fresh or mutates) and func.overloadpacket.__name__ not in _NEW:
            reads = given[1:] if mutates else given
            kernel = TorchKernel(func.overloadpacket.__name__, sum(map(nbytes, reads)), sum(map(nbytes, made)))
            if kernel.read + kernel.written:
                self.calls.launches.append(kernel)
        return out

    def note(self, x: Tensor, counts: bool = True) -> bool:
        """Whether the storage is new. counts: not for what was there before the call."""
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self.known:
            return False
        self.known.add(key)
        size = storage.nbytes() if counts else 0
        self.alive += size
        self.most = max(self.most, self.alive)
        weakref.finalize(storage, self.gone, key, size)
        return True

    def gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.alive -= size

    def watch(self) -> Calls:
        """From now on what happens belongs to new Calls."""
        self.calls, self.most = Calls(), self.alive
        return self.calls

    def done(self) -> None:
        """The peak since then."""
        self.calls.peak = self.most


class _Stand:
    """In place of a kernel: keeps its launches."""

    def __init__(
        self, name: str, names: list[str], keep: Callable[[Launch], None], compiled: Callable[..., Any] | None = None
    ) -> None:
        self.name, self.names, self.keep, self.compiled = name, names, keep, compiled

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            named = dict(zip(self.names, args, strict=False)) | kwargs
            num_warps, num_stages = named.pop("num_warps", 4), named.pop("num_stages", 3)
            if unknown := set(named) - set(self.names):
                raise CostError(f"{self.name} is launched with {', '.join(sorted(unknown))}, which it does not take")
            sizes = tuple(grid(named) if callable(grid) else grid)
            values = {name: _argument(value) for name, value in named.items()}
            self.keep(Launch(self.name, (*sizes, 1, 1)[:3], values, num_warps, num_stages))
            if self.compiled is not None:
                self.compiled(*args, grid=sizes, **kwargs)

        return launch


class _Backend(TritonBackend):
    """The Triton backend with the schedule of a device that need not be here."""

    def __init__(self, plan: Plan, module: Any, target: schedules.Device, **options: Any) -> None:
        super().__init__(plan, module, **options)
        self.target = target

    def _make_schedule(self, sizes: Shape, dtype: torch.dtype, device: torch.device, exact: bool) -> Schedule:
        return schedules.schedule(self.plan, sizes, dtype, exact_decay=exact, device=self.target, **self.options)


class _VectorBackend(VectorTritonBackend):
    """The same for a vector state."""

    def __init__(self, plan: Plan, module: Any, target: schedules.Device, **options: Any) -> None:
        super().__init__(plan, module)
        self.target = target

    def _make_schedule(  # type: ignore[override]
        self, sizes: Shape, dtype: torch.dtype, device: torch.device, exact: bool
    ) -> VectorSchedule:
        return vector_schedule(self.plan, sizes, dtype, device=self.target)


def trace(
    plan: Plan,
    module: types.ModuleType,
    source: str,
    inputs: tuple[Tensor, ...],
    device: schedules.Device,
    change: Callable[[Schedule], Schedule] | None = None,
    compiling: bool = False,
    **options: Any,
) -> Traced:
    """What a call with inputs like these would launch on the device; nothing runs.

    inputs: meta tensors in the order of the spec's inputs, dense. change: another schedule in place of the one that is
    decided. compiling: what is launched is compiled, for the device that is here. options: as of TritonBackend.
    """
    memory = _Memory()
    kind = _VectorBackend if plan.vector else _Backend
    backend = kind(plan, _rebound(module, source, memory, compiling), device, **options)
    if change is not None:
        decided = backend.schedule
        backend.schedule = lambda given, sizes: change(decided(given, sizes))  # type: ignore[method-assign]
    one_per_head = torch.empty(backend._sizes(inputs, None).H, device="meta")
    call = (inputs, (one_per_head,) * len(plan.analysis.constants), 1.0)
    backend.forward(*call, (), None, False, False)  # tables that launchers keep are made once
    with memory:
        forward = memory.watch()
        backend.forward(*call, (), None, False, False)
        memory.done()
        training = memory.watch()
        out = backend.forward(*call, (), None, False, True)
        memory.done()
        held, output, do = memory.alive - nbytes(out.o), nbytes(out.o), torch.empty_like(out.o)
        backward = memory.watch()
        ends, needs = (None,) * (1 + plan.normalized), (True,) * len(inputs)
        gradients, _ = backend.backward(do, ends, out.o, out.saved, *call, (), None, needs, False)
        memory.done()
        backward.peak -= nbytes(do)
        results = sum(map(nbytes, gradients))
        del out, do, gradients
        now = tuple(x.narrow(1, 0, 1) if one.time else x for x, one in zip(inputs, plan.inputs, strict=True))
        states = _states(plan, inputs, backend)
        step = memory.watch()
        backend.step(now, *call[1:], states)
    return Traced(
        forward, training, backward, step, output, held, results, backend.schedule(inputs, backend._sizes(inputs, None))
    )


def nbytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _states(plan: Plan, inputs: tuple[Tensor, ...], backend: TritonBackend) -> tuple[Tensor, ...]:
    sizes = backend._sizes(inputs, None)
    if plan.vector:
        kind = torch.complex64 if plan.complex else torch.float32
        return (torch.empty(sizes.N, sizes.V, dtype=kind, device="meta"),)
    rows = schedules.rows_of_state(plan, sizes.K)
    kind = torch.complex64 if plan.complex else torch.float32
    shapes = ((sizes.N, sizes.H, rows, sizes.V), (sizes.N, sizes.H, rows), (sizes.N, sizes.H))[: plan.spec.state_parts]
    return tuple(torch.empty(x, dtype=kind if i == 0 else torch.float32, device="meta") for i, x in enumerate(shapes))


def _rebound(module: types.ModuleType, source: str, memory: _Memory, compiling: bool = False) -> types.SimpleNamespace:
    """The module's launchers over stand-ins; the module itself is left as it is. compiling: what is launched is
    compiled for the device that is here."""
    kernels = kernels_of(source)
    names = dict(vars(module))
    for name in kernels:
        kernel = names[name]
        names[name] = _Stand(
            name,
            list(kernel.arg_names),
            lambda launch: memory.calls.launches.append(launch),
            kernel.warmup if compiling else None,
        )
    for name, one in vars(module).items():
        if isinstance(one, types.FunctionType) and one.__module__ == module.__name__:
            names[name] = types.FunctionType(one.__code__, names, name, one.__defaults__, one.__closure__)
        elif isinstance(one, dict) and not name.startswith("__"):
            names[name] = {}  # a table that launchers keep
    return types.SimpleNamespace(**{name: one for name, one in names.items() if not name.startswith("__")})


def _argument(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Argument(tuple(value.shape), DTYPES[value.dtype], nbytes(value))
    return value


def _flat(values: Any) -> list[Any]:
    found: list[Any] = []
    for one in values:
        found += _flat(one) if isinstance(one, list | tuple) else [one]
    return found

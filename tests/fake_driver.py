"""A GPU for tests of launches without one: kernels are compiled for sm_90, or not at all, and a launch notes what it
was given. What a launcher did once, with every tensor kept, says what a replay of it may have at one address."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from flagen import specs
from flagen.analysis import analyse
from flagen.bench import make_inputs
from flagen.checks import Checks
from flagen.compiler import prepare
from flagen.load import load
from flagen.samples import make_scalars
from flagen.schedule import Shape
from flagen.torch_taylor import count
from flagen.triton_backend import TritonBackend
from flagen.triton_record import tensors_of
from flagen.triton_replay import Program, forked, joined
from flagen.triton_vector import VectorTritonBackend

STREAM = 7
SIZES = Shape.dense(1, 600, 2, 16, 16)  # cut in pieces


class Memory:
    """What launches made of the memory at addresses that they were given: numbers that depend on the kernel, its other
    arguments, and what was at all its addresses. launches: kernel, form, grid, arguments, addresses among them, stream,
    and which of the addresses had nothing; among them what waits for what: "wait", stream, stream."""

    def __init__(self) -> None:
        self.at: dict[int, int] = {}
        self.launches: list[tuple[Any, ...]] = []
        self.quiet = False  # whether launches do nothing, for timing
        self.stream = STREAM  # the current one
        self.model: list[tuple[Any, ...]] | None = None  # launches that say which addresses have nothing

    def define(self, tensors: Any) -> None:
        self.launches.clear()
        self.at = {x.data_ptr(): 1 + i for i, x in enumerate(tensors) if x is not None}

    def launch(
        self, function: str, packed: Any, grid: Any, arguments: Any, places: Any, shown: Any, stream: int
    ) -> None:
        addresses = tuple(a if isinstance(a := arguments[i], int) else a.data_ptr() for i in places)
        fresh = tuple(a not in self.at for a in addresses)
        if self.model is not None and len(self.launches) < len(self.model):
            fresh = self.model[len(self.launches)][-1]
        before = tuple(0 if new else self.at.get(a, 0) for a, new in zip(addresses, fresh, strict=True))
        self.launches.append((function, packed, grid, tuple(shown), addresses, stream, fresh))
        for i, a in zip(places, addresses, strict=True):
            self.at[a] = hash((function, packed, grid, tuple(shown), before, i))


class Kept(TorchDispatchMode):
    """Inside, what operators make is kept, so that no address comes twice. spans: first address and bytes of what they
    only allocated; fixed: first addresses of what torch filled, read or wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []
        self.spans: dict[int, int] = {}
        self.fixed: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        given, made = tensors_of((args, kwargs or {})), tensors_of(results)
        self.kept += made
        new = [x for x in made if all(_first(x) != _first(y) for y in given)]
        self.spans.update({_first(x): x.untyped_storage().nbytes() for x in new})
        if func._schema.is_mutable or (new and "empty" not in func._schema.name):
            self.fixed.update(map(_first, (*given, *made)))
        return results


def _first(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def clashes(
    kept: Kept, results: Sequence[Tensor], model: Sequence[Any], replayed: Sequence[Any]
) -> tuple[set[Any], int]:
    """Pairs of what was allocated that have bytes in common in a replay while both are there, and how many pairs have
    bytes in common. `model` is what the launcher launched, which gave `results`, while everything was kept.

    Two may have bytes in common if neither is a result or torch's, and all launches that have one are over, by the
    order of streams and what they wait for, before any that has the other begins.
    """
    fixed = kept.fixed | {_first(x) for x in results}
    starts: dict[int, int] = {}  # where the replay has it
    users: dict[int, list[int]] = {}
    over: dict[int, set[int]] = {}  # launches that are over before what a stream is given next
    before: list[set[int]] = []
    for at, (mine, other) in enumerate(zip(model, replayed, strict=True)):
        before.append(set())
        if other[0] == "wait":
            over.setdefault(other[1], set()).update(over.get(other[2], ()))
            continue
        before[at] |= over.setdefault(other[5], set())
        over[other[5]].add(at)
        for a, b in zip(mine[4], other[4], strict=True):
            first = next((one for one, size in kept.spans.items() if one <= a < one + size), None)
            if first is None:
                assert a == b, "an input is another"
            else:
                assert starts.setdefault(first, b - (a - first)) == b - (a - first), "one value at two places"
                assert (a - b) % 64 == 0, "aligned otherwise than torch does on a CPU"
                users.setdefault(first, []).append(at)
    found, common = set(), 0
    for x in starts:
        for y in (y for y in starts if y > x and _meet(starts[x], kept.spans[x], starts[y], kept.spans[y])):
            common += 1
            ordered = any(all(i in before[j] for i in users[p] for j in users[q]) for p, q in ((x, y), (y, x)))
            if not ordered or x in fixed or y in fixed:
                found.add((x, y))
    return found, common


def _meet(a: int, size: int, b: int, other: int) -> bool:
    return a < b + other and b < a + size


class Calls:
    """Forward and backward of a spec on a GPU that is not there."""

    def __init__(self, name: str) -> None:
        spec = specs.get(name)
        plan, entry = prepare(spec)
        self.spec, self.plan = spec, plan
        self.backend = VectorTritonBackend(plan, load(entry)) if plan.vector else TritonBackend(plan, load(entry), 16)
        sizes = SIZES.of_vector() if plan.vector else SIZES
        scalars = make_scalars(spec)
        self.inputs = tuple(x.detach() for x in make_inputs(spec, sizes, torch.bfloat16, "cpu", scalars))
        values = Checks(analyse(spec)).constants([scalars[one.name] for one in spec.scalars], sizes.H)
        self.constants = tuple(torch.tensor(value, dtype=torch.float32) for value in values)

    def states(self, N: int) -> tuple[torch.Tensor, ...]:
        F = count(SIZES.K, self.plan.taylor) if self.plan.taylor else SIZES.K
        dtype = torch.complex64 if self.plan.complex else torch.float32
        state = torch.zeros(N, SIZES.H, F, SIZES.V, dtype=dtype)
        sums = (torch.zeros(N, SIZES.H, F),) if self.plan.normalized else ()
        return state, *sums, *((torch.zeros(N, SIZES.H),) if self.plan.stabilized else ())

    def forward(self, memory, inputs, initial=(), cu_seqlens=None, save=True):
        """What was launched, what it made of the results, and the results."""
        memory.define((*inputs, *self.constants, *initial, cu_seqlens))
        found = self.backend.forward(inputs, self.constants, 0.5, initial, cu_seqlens, bool(initial), save)
        results = self.results = (found.o, *found.final, *found.saved)
        return [one[:4] for one in memory.launches], [memory.at.get(x.data_ptr()) for x in results], found

    def backward(self, memory, inputs, found, initial=(), cu_seqlens=None):
        do = torch.ones_like(found.o)
        ends = tuple(torch.ones_like(x) for x in initial[:2]) or (None,) * (1 + self.plan.normalized)
        memory.define((do, *ends, found.o, *found.saved, *inputs, *self.constants, cu_seqlens))
        grads, d_initial = self.backend.backward(
            do, ends, found.o, found.saved, inputs, self.constants, 0.5, initial, cu_seqlens,
            (True,) * len(inputs), bool(initial),
        )  # fmt: skip
        results = self.results = (*grads, *d_initial)
        assert all(x is not None for x in results)
        shapes = [(x.shape, x.stride(), x.dtype) for x in results]
        return [one[:4] for one in memory.launches], [memory.at.get(x.data_ptr()) for x in results], shapes

    def thrice(self, memory: Memory, call: Callable[[], Any]) -> tuple[list[Any], int]:
        """What a call gives that the launcher does, one that is recorded, and one that is replayed; how many pairs of
        what was allocated have bytes in common in the last. Fails if both of a pair are there at a time."""
        with Kept() as kept:
            first, results = call(), self.results
        model = list(memory.launches)
        recorded = call()
        memory.model = model
        try:
            again = call()
        finally:
            memory.model = None
        found, common = clashes(kept, results, model, memory.launches)
        assert not found
        return [first, recorded, again], common

    def without_torch(self, values: list) -> list:
        """The values of results that the last record has from kernels, not from operators of torch."""
        program = self.programs()[-1]
        torchs = {one[1] for one in program.actions if one[0] == "torch" and "zeros" not in str(one[2])}
        return [None if slot in torchs else value for value, slot in zip(values, program.ends, strict=True)]

    def programs(self) -> list[Program]:
        return [one for one in self.backend._replay._forms.values() if isinstance(one, Program)]


class Stream:
    """A stream of the GPU that is not there, which notes among the launches what it waits for."""

    memory = Memory()
    count = 0

    def __init__(self, device: Any = None, handle: int | None = None) -> None:
        Stream.count += 1
        self.cuda_stream, self.device = handle or 1000 + Stream.count, device

    def wait_stream(self, other: Stream) -> None:
        self.memory.launches.append(("wait", self.cuda_stream, other.cuda_stream))


def stream_beside(calls: Calls, memory: Memory, monkeypatch: Any) -> None:
    """Has the launchers of a spec fork streams, which are there for a test."""

    @contextlib.contextmanager
    def on(stream: Stream | None) -> Iterator[None]:
        before, memory.stream = memory.stream, stream.cuda_stream if stream else memory.stream
        yield
        memory.stream = before

    decided = calls.backend.schedule
    monkeypatch.setattr(calls.backend, "schedule", lambda *given: dataclasses.replace(decided(*given), beside=True))
    monkeypatch.setattr(Stream, "memory", memory)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(device, memory.stream))
    launchers = calls.backend._replay.launchers.bwd.__globals__
    # tensors on the CPU have no streams
    for name, function in (
        ("fork", lambda like, wanted: forked(like.device) if wanted else (None, None)),
        ("join", lambda sides: joined([side for side in sides if side is not None])),
    ):
        monkeypatch.setattr(launchers[name], "function", function)


class _Utils:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
        return name, f"{name} {hash(kernel)}", 32, 0, 1024


class FakeDriver:
    def __init__(self, memory: Memory, target: GPUTarget) -> None:
        self.memory, self.target = memory, target
        self.utils = _Utils()

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: Any) -> int:
        return self.memory.stream

    def launcher_cls(self, src: Any, metadata: Any) -> Any:
        kinds = [src.signature[name] for name in src.fn.arg_names]

        if self.memory.quiet:
            return lambda *arguments: None

        def launch(x: int, y: int, z: int, stream: int, function: str, packed: Any, _: Any, *rest: Any) -> None:
            arguments = rest[2:]
            assert len(arguments) == len(kinds)
            places = [i for i, kind in enumerate(kinds) if kind.startswith("*") and arguments[i] is not None]
            shown = [
                "address" if i in places else "constexpr" if kind == "constexpr" else one
                for i, (kind, one) in enumerate(zip(kinds, arguments, strict=True))
            ]
            self.memory.launch(function, packed, (x, y, z), arguments, places, shown, stream)

        return launch


@contextlib.contextmanager
def fake_gpu() -> Iterator[Memory]:
    """Inside, launches go to the memory that this yields."""
    memory, before = Memory(), driver._active
    driver.set_active(FakeDriver(memory, GPUTarget("cuda", 90, 32)))
    try:
        yield memory
    finally:
        driver._active = before


@contextlib.contextmanager
def uncompiled(memory: Memory) -> Iterator[None]:
    """Inside, kernels are not compiled: a launch is noted as it is."""

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        given = {**dict(zip(kernel.arg_names, args, strict=False)), **named}
        ordered = [given.pop(name, one.default) for name, one in zip(kernel.arg_names, kernel.params, strict=True)]
        places = [i for i, x in enumerate(ordered) if isinstance(x, Tensor)]
        packed = tuple(given[name] for name in ("num_warps", "num_stages") if name in given)

        def launch(x: int, y: int, z: int, stream: int, function: str, packed: Any, *rest: Any) -> None:
            shown = ["address" if i in places else one for i, one in enumerate(rest[3:])]
            memory.launch(function, packed, (x, y, z), rest[3:], places, shown, stream)

        launch(*(*grid, 1, 1)[:3], memory.stream, kernel.__name__, packed, None, None, None, *ordered)
        return SimpleNamespace(run=launch, function=kernel.__name__, packed_metadata=packed)

    before = JITFunction.run
    JITFunction.run = run
    try:
        yield
    finally:
        JITFunction.run = before

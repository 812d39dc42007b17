"""Runs a benchmark: checks, times, and keeps a row for each figure as it comes; stops cleanly at a limit of time."""

from __future__ import annotations

import dataclasses
import functools
import math
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import bench_check, bench_child, bench_measure, cli_pool, cost, peers
from .bench import Case, Row, case_of, fitted, nbytes, provenance
from .bench_compile import PeerUnit, Unit, warm
from .bench_report import SOFTMAX
from .compiler import compile
from .errors import FlagenError
from .samples import make_scalars
from .schedule import Shape, rows_of_state

if TYPE_CHECKING:
    from .op import Op
    from .spec import Spec

MB = 1 << 20
CALLS = ("fwd", "fwd+bwd", "memory", "graph")
STARTS = ("cold", "warm")
START_SECONDS = 900.0  # for a new process
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


class Broken(FlagenError):
    """The device answers no more, as after a wrong address: this process can measure nothing further."""


@dataclass(frozen=True, slots=True)
class Settings:
    """device: cpu or cuda; what: of bench_shapes.WHATS; against: libraries of flagen.peers; jobs: processes that
    compile before; limit: seconds, after which nothing is begun."""

    device: str
    dtype: str
    what: tuple[str, ...]
    against: tuple[str, ...] = ()
    backend: str = "auto"
    jobs: int = 1
    limit: float = math.inf

    @property
    def torch_dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, DTYPES[self.dtype])
        return found

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")


@dataclass(slots=True)
class Runner:
    """say: takes messages; keep: takes each row as it comes. wrong: what was checked and found wrong; missing: what was
    not run, and why."""

    settings: Settings
    say: Callable[[str], None]
    keep: Callable[[Row], None]
    wrong: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    copy: float | None = None
    common: dict[str, Any] = field(default_factory=dict)
    gates: dict[tuple[str, int, int], str] = field(default_factory=dict)

    def run(self, chosen: Iterable[Spec], shapes: dict[str, Shape]) -> None:
        """Every spec at every shape. Shapes of one token are for decode, the others for all else."""
        specs = list(chosen)
        self.common = provenance(self.settings.device)
        self._compile(specs, shapes)
        self.copy = bench_measure.copy_bandwidth(self.settings.device)
        if self.copy is not None:
            self.say(f"{self.common['device']}: copies at {self.copy / 1e12:.3f} TB/s")
        units = [(one, name, fitted(one, shape)) for one in specs for name, shape in shapes.items()]
        first = next((name for name, shape in shapes.items() if shape.T > 1), "")
        for number, (spec, name, shape) in enumerate(units):
            try:
                self._one(spec, name, shape, name == first)
            except Broken as error:
                self.missing += [f"{spec.name} {name}: {error}" for spec, name, _ in units[number:]]
                break

    def _one(self, spec: Spec, name: str, shape: Shape, first: bool) -> None:
        what = self.settings.what
        wanted = tuple(one for one in what if (one == "decode" if shape.T == 1 else one in CALLS))
        if wanted and not self._over(f"{spec.name} {name} {' '.join(wanted)}"):
            op = compile(spec, backend=self.settings.backend)
            if self._right(op, name, shape):
                (self._decode if shape.T == 1 else self._calls)(op, name, shape)
        starts = tuple(one for one in STARTS if one in what)
        if first and starts and not self._over(f"{spec.name} {name} {' '.join(starts)}"):
            self._starts(spec, name, shape, starts)

    # --- what is run

    def _calls(self, op: Op, name: str, shape: Shape) -> None:
        """Forward, backward, memory and graphs of an op, and of its peers."""
        spec, settings = op.spec, self.settings
        predicted = self._estimate(spec, shape)
        try:
            case = case_of(op, shape, settings.torch_dtype, settings.device)
            fault = bench_check.sampled(op, case, shape, settings.torch_dtype)
        except Exception as error:
            self._failed(self._row(spec.name, "flagen", "", name, shape, "check", "ms"), error)
            return
        if fault:
            self.wrong.append(f"{spec.name} {name}: {fault}")
            fault = f"WRONG: {fault}"
        self._time(self._row(spec.name, "flagen", op.backend, name, shape, "", "ms", note=fault), case, predicted)
        del case
        for library in settings.against:
            label = SOFTMAX if library == "sdpa" else spec.name
            for call, make in peers.calls(library, spec.name).items():
                like = self._row(label, library, call, name, shape, "", "ms")
                done = any(
                    (one.library, one.op, one.shape, one.spec) == (library, call, name, label) for one in self.rows
                )
                if done or self._over(f"{label} {name} {library}"):
                    continue
                try:
                    inputs, run = make(shape, settings.torch_dtype, settings.device)
                except Exception as error:
                    self._failed(like, error)
                    continue
                self._time(like, Case(inputs, run), None)

    def _time(self, like: Row, case: Case, predicted: cost.Estimate | None) -> None:
        """A row for each thing to measure of a case."""
        settings = self.settings
        for what in (one for one in CALLS if one in settings.what):
            if what == "graph" and not settings.on_gpu:
                continue
            try:
                output = case.forward()
                do, (forward, both) = torch.randn_like(output), case.floors(output)
                del output
                if what == "memory":
                    self._memory(like, case, do, predicted)
                    continue
                runs: list[tuple[str, Callable[[], Any], int]] = [
                    ("fwd", case.forward, forward),
                    ("fwd+bwd", functools.partial(case.both, do), both),
                ]
                for part, run, floor in runs:
                    if what not in (part, "graph"):
                        continue
                    timed = bench_measure.graphed(run) if what == "graph" else run
                    value = bench_measure.milliseconds(timed, settings.device)
                    stage = None if predicted is None else predicted.forward if part == "fwd" else predicted.both
                    self._add(like, what if what == part else f"graph {part}", value, self._floor(floor),
                              math.nan if stage is None else 1e3 * stage.seconds)  # fmt: skip
            except Exception as error:
                self._failed(_replaced(like, what=what), error)
            finally:
                if settings.on_gpu:
                    torch.cuda.empty_cache()

    def _memory(self, like: Row, case: Case, do: Tensor, predicted: cost.Estimate | None) -> None:
        found = bench_measure.peak(lambda: case.both(do), self.settings.device)
        if found is None:
            return
        results = nbytes(do) + sum(map(nbytes, case.inputs))
        inputs = sum(map(nbytes, case.inputs))
        extra = found - results
        if extra < 0:
            raise FlagenError(
                f"the peak of {found} bytes is less than the {results} bytes of the results; something that was held "
                "before was freed meanwhile: run it again"
            )
        note = f"{extra / inputs:.0%} of the inputs" + (f"; {like.note}" if like.note else "")
        expected = math.nan if predicted is None else predicted.extra / MB
        self._add(_replaced(like, unit="MB", note=note), "memory", extra / MB, math.nan, expected)

    def _decode(self, op: Op, name: str, shape: Shape) -> None:
        """One token of many sequences, the state in place."""
        spec, settings = op.spec, self.settings
        like = self._row(spec.name, "flagen", op.backend, name, shape, "decode", "ms")
        try:
            case = case_of(op, shape, settings.torch_dtype, settings.device)
            state = _state(op, shape, settings.device)
            moved = 2 * sum(map(nbytes, state)) + sum(map(nbytes, case.inputs)) + nbytes(case.forward())
            scalars: dict[str, Any] = make_scalars(spec)
            given = state if spec.normalizer is not None else state[0]
            now = tuple(x.detach() for x in case.inputs)
            value = bench_measure.milliseconds(lambda: op.step(*now, **scalars, state=given), settings.device)
        except Exception as error:
            self._failed(like, error)
            return
        predicted = self._estimate(spec, shape)
        self._add(
            like, "decode", value, self._floor(moved), math.nan if predicted is None else 1e3 * predicted.step.seconds
        )

    def _starts(self, spec: Spec, name: str, shape: Shape, starts: tuple[str, ...]) -> None:
        """New processes: one with empty caches, and one with those that the first left."""
        settings = self.settings
        with tempfile.TemporaryDirectory(prefix="flagen-bench-") as folder:
            for start in STARTS[: 1 + ("warm" in starts)]:
                like = self._row(spec.name, "flagen", settings.backend, name, shape, start, "s")
                left = settings.limit - (time.monotonic() - self.began)
                try:
                    found = bench_child.first_call(
                        spec.to_json(), shape[:5], DTYPES[settings.dtype], settings.device, settings.backend,
                        Path(folder), min(START_SECONDS, max(60.0, left)),
                    )  # fmt: skip
                except FlagenError as error:
                    self._failed(like, error)
                    return
                if start in starts:
                    note = f"forward {found['forward']:.2f}, backward {found['backward']:.2f}"
                    self._add(_replaced(like, note=note), start, sum(found.values()))

    # --- parts

    def _compile(self, specs: list[Spec], shapes: dict[str, Shape]) -> None:
        settings = self.settings
        if settings.jobs < 2 or not settings.on_gpu:
            return
        pairs = [(spec, fitted(spec, shape)[:5]) for spec in specs for shape in shapes.values()]
        last = DTYPES[settings.dtype], settings.device
        units: list[Unit | PeerUnit] = [
            PeerUnit(library, name, call, size, *last)
            for library in settings.against
            if library != "sdpa"  # which compiles nothing
            # a peer compiles anew for other heads and channels, not for other lengths
            for (name, _), size in {(spec.name, size[2:]): size for spec, size in pairs if size[1] > 1}.items()
            for call in peers.calls(library, name)
        ]
        if settings.backend != "torch":
            units += [Unit(text, size, *last) for text, size in sorted({(x.to_json(), size) for x, size in pairs})]
        self.say(f"compiling {len(units)} calls in {settings.jobs} processes")
        for unit, found in cli_pool.run(warm, units, settings.jobs):
            if not isinstance(found, int):
                self.say(f"compiling {unit.sizes}: {_line(found or 'the process died')}")

    def _right(self, op: Op, name: str, shape: Shape) -> bool:
        """Whether a small call at these head sizes is right; if not, nothing is timed."""
        key = op.spec.name, shape.K, shape.V
        if key not in self.gates:
            try:
                self.gates[key] = bench_check.small(op, shape, self.settings.torch_dtype, self.settings.device)
            except Exception as error:
                self._healthy()
                self.gates[key] = f"{type(error).__name__}: {_line(error)}"
        if fault := self.gates[key]:
            self.wrong.append(f"{op.spec.name} K={shape.K} V={shape.V}: {fault}")
            row = self._row(op.spec.name, "flagen", op.backend, name, shape, "check", "ms", note=f"WRONG: {fault}")
            self._keep(row)
        return not self.gates[key]

    def _estimate(self, spec: Spec, shape: Shape) -> cost.Estimate | None:
        """What the cost model predicts with this run's bandwidth, if it knows the device and the spec has kernels."""
        if not self.settings.on_gpu or self.settings.backend == "torch":
            return None
        try:
            machine = cost.machine_of(self.common["device"], self.copy)
            return cost.estimate(spec, shape, self.settings.torch_dtype, machine)
        except FlagenError:
            return None

    def _floor(self, moved: int) -> float:
        return math.nan if self.copy is None else 1e3 * moved / self.copy

    def _row(
        self, spec: str, library: str, op: str, name: str, shape: Shape, what: str, unit: str, note: str = ""
    ) -> Row:
        copy = math.nan if self.copy is None else self.copy
        return Row(spec, library, op, name, *shape[:5], self.settings.dtype, what, math.nan, unit, note=note,
                   copy=copy, **self.common)  # fmt: skip

    def _add(self, like: Row, what: str, value: float, floor: float = math.nan, predicted: float = math.nan) -> None:
        self._keep(_replaced(like, what=what, value=value, floor=floor, predicted=predicted))

    def _keep(self, row: Row) -> None:
        self.rows.append(row)
        self.keep(row)

    def _failed(self, like: Row, error: Exception) -> None:
        """A row without a figure, and the reason; raises Broken where the device is beyond use."""
        self._keep(_replaced(like, note=f"{type(error).__name__}: {_line(error)}"))
        self.missing.append(f"{like.spec} {like.shape} {like.library} {like.what}: {_line(error)}")
        self._healthy()

    def _healthy(self) -> None:
        if not self.settings.on_gpu:
            return
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            raise Broken(f"the device failed: {_line(error)}") from None

    def _over(self, label: str) -> bool:
        if time.monotonic() - self.began < self.settings.limit:
            return False
        self.missing.append(f"{label}: the time limit of {self.settings.limit:.0f} s was reached")
        return True


def _replaced(row: Row, **changes: Any) -> Row:
    return dataclasses.replace(row, **changes)


def _line(error: object) -> str:
    """The first line of a message, not too long."""
    return (str(error).strip().splitlines() or [""])[0][:200]


def _state(op: Op, shape: Shape, device: str) -> tuple[Tensor, ...]:
    """Of random numbers: what it holds changes nothing in how long a step takes."""
    rows = shape.K if op.plan is None else rows_of_state(op.plan, shape.K)
    kind = torch.float32 if op.spec.phase is None else torch.complex64
    if op.spec.vector:
        return (torch.randn(shape.N, shape.H * shape.V, dtype=kind, device=device),)
    state = torch.randn(shape.N, shape.H, rows, shape.V, dtype=kind, device=device)
    others = torch.rand(shape.N, shape.H, rows, device=device) + 1, torch.zeros(shape.N, shape.H, device=device)
    return (state, *others)[: op.spec.state_parts]

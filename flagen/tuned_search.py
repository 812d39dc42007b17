"""Times a handful of schedules beside the one that arithmetic gives, and says which, if any, is better for good.

Everything is checked before it is timed. Candidates and the default are timed in turn, round after round: a candidate
wins only if it is quicker than the default by MARGIN in every round, so that a GPU that is busy for a while decides
nothing; and if the default's own times are further apart than SPREAD, the GPU is busy and nothing is decided at all.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .compare import kind_of, limit_of, measure
from .errors import FlagenError
from .functions import evaluate_host
from .samples import make_scalars
from .tuned_tables import SHARED_CHUNKS, Choice, TableError, applied

if TYPE_CHECKING:
    from .op import Op
    from .schedule import Schedule, Shape

MOST = 6  # candidates for the forward, and for the backward
ROUNDS, MARGIN, SPREAD = 5, 0.03, 0.10
PARTS = ("fwd", "bwd")


class BusyError(FlagenError):
    """The times of the same thing are too far apart to compare others by."""


@dataclass(frozen=True, slots=True)
class Found:
    """What was found for a part. choice: {} for the default; times: medians over the rounds, by the text of the choice;
    refused: candidates that did not run or were wrong, and why."""

    part: str
    choice: Choice
    default_ms: float
    ms: float
    times: Mapping[str, float]
    refused: Mapping[str, str]


def candidates(schedule: Schedule, shape: Shape, part: str) -> list[Choice]:
    """At most MOST changes of the tiles of a part, "fwd" or "bwd": each is one step away from the schedule."""
    tile, pieces = getattr(schedule, part), f"{part}_L"
    partner = dict(SHARED_CHUNKS)[part]
    wide = tile.num_warps * 2 if tile.num_warps < 8 else tile.num_warps // 2
    steps: list[Choice] = [
        {part: {"num_stages": 2 if tile.num_stages == 1 else tile.num_stages - 1}},
        {part: {"num_warps": wide}},
        {part: {"BV": tile.BV // 2, "num_warps": max(4, tile.num_warps // 2)}},
        {part: {"BV": tile.BV * 2, "num_warps": min(8, tile.num_warps * 2)}},
        {name: {"BT": tile.BT // 2 if tile.BT > 32 else tile.BT * 2} for name in (part, partner)},
    ]
    tokens = _other_pieces(getattr(schedule, pieces), schedule.LC, shape)
    steps += [{pieces: tokens}] if tokens < shape.T else []
    found: list[Choice] = []
    for one in steps:
        if one.get(part, {}).get("BV", 0) > max(16, tile.BV) and tile.BV >= shape.V:
            continue  # all of V is in one block already
        try:
            if applied(schedule, one) != schedule:
                found.append(one)
        except TableError:
            continue
    return found[:MOST]


def _other_pieces(now: int, LC: int, shape: Shape) -> int:
    """Twice as many pieces as now."""
    pieces = 2 * (-(-shape.T // now) if now else 1)
    return -(-shape.T // pieces // LC) * LC


def winner(times: Mapping[str, list[float]], default: str, margin: float = MARGIN, spread: float = SPREAD) -> str:
    """The name of the quickest of those that beat `default` by the margin in every round; `default` if none does.

    times: by name, one for each round. Raises BusyError where those of the default differ by more than the spread.
    """
    own = times[default]
    if max(own) > (1 + spread) * min(own):
        raise BusyError(
            f"the same kernels took {min(own):.4f} to {max(own):.4f} ms: the GPU is busy, or its clocks change; "
            "nothing is decided, run it again when it is quiet"
        )
    better = [
        name for name, taken in times.items()
        if name != default and all(x <= (1 - margin) * y for x, y in zip(taken, own, strict=True))
    ]  # fmt: skip
    return min(better, key=lambda name: statistics.median(times[name]), default=default)


def in_turn(
    runs: Mapping[str, Callable[[], Any]], timer: Callable[[Callable[[], Any]], float], rounds: int = ROUNDS
) -> dict[str, list[float]]:
    """The times of each run, all of them in every round; every other round in the opposite order."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        names = list(runs) if number % 2 == 0 else list(runs)[::-1]
        for name in names:
            times[name].append(timer(runs[name]))
    return times


class Bench:
    """The forward and the backward of an op's kernels at a shape, under any choice."""

    def __init__(self, op: Op, inputs: tuple[Tensor, ...], make_backend: Callable[[], Any]) -> None:
        self.op, self.inputs, self.make_backend = op, tuple(x.detach() for x in inputs), make_backend
        spec, scalars = op.spec, make_scalars(op.spec)
        sizes = {axis: size for one, x in zip(spec.inputs, inputs, strict=True)
                 for axis, size in zip(one.axes, x.shape, strict=True)}  # fmt: skip
        self.constants = tuple(
            torch.tensor(evaluate_host(expr, scalars, sizes["h"]), dtype=torch.float32, device=inputs[0].device)
            for _, expr in op.analysis.constants
        )
        self.scale = spec.scale if spec.scale is not None else sizes["k"] ** -0.5
        out = self.forward(self.backend({}))
        generator = torch.Generator().manual_seed(3)
        token = torch.randn(out.o.shape[2:], generator=generator)
        self.do = token.to(out.o.device, out.o.dtype).expand(out.o.shape).contiguous()

    def backend(self, choice: Choice) -> Any:
        """A backend whose schedules have the choice."""
        made = self.make_backend()
        decided = made.schedule
        made.schedule = lambda inputs, sizes: applied(decided(inputs, sizes), choice)
        return made

    def forward(self, backend: Any) -> Any:
        return backend.forward(self.inputs, self.constants, self.scale, (), None, False, True)

    def backward(self, backend: Any, out: Any) -> tuple[Tensor | None, ...]:
        ends, needs = (None,) * (1 + (self.op.spec.normalizer is not None)), (True,) * len(self.inputs)
        gradients: tuple[Tensor | None, ...] = backend.backward(
            self.do, ends, out.o, out.saved, self.inputs, self.constants, self.scale, (), None, needs, False
        )[0]
        return gradients

    def results(self, choice: Choice) -> list[tuple[str, str, Tensor]]:
        """Kind, as in TOLERANCES, name and value of the output and of each gradient."""
        backend = self.backend(choice)
        out = self.forward(backend)
        found = [("o", "o", out.o)]
        for one, x in zip(self.op.spec.inputs, self.backward(backend, out), strict=True):
            if x is not None:
                found.append((kind_of(self.op.spec, one), f"d {one.name}", x))
        return found


def compared(got: list[tuple[str, str, Tensor]], want: list[tuple[str, str, Tensor]], dtype: torch.dtype) -> str:
    """What two results differ in by more than twice the limit of either against the reference, or nothing."""
    for (kind, name, x), (_, _, y) in zip(got, want, strict=True):
        error = measure(x, y)
        if not error.within(2 * limit_of(dtype, kind)):
            return f"{name} differs from the default's: rms {error.rms:.1e}, worst row {error.worst:.1e}"
    return ""


def search(
    bench: Bench,
    shape: Shape,
    dtype: torch.dtype,
    timer: Callable[[Callable[[], Any]], float],
    say: Callable[[str], None],
    rounds: int = ROUNDS,
) -> list[Found]:
    """The best choice for the forward and for the backward, right together too. Raises BusyError, see winner."""
    want = bench.results({})
    decided = bench.backend({}).schedule(bench.inputs, shape)
    found = [_best(bench, part, candidates(decided, shape, part), want, dtype, timer, say, rounds) for part in PARTS]
    if all(one.choice for one in found) and (fault := _fault(bench, merged(found), want, dtype)):
        say(f"the choices for both are wrong together, so that the default is kept: {fault}")
        found = [dataclasses.replace(one, choice={}, ms=one.default_ms) for one in found]
    return found


def _best(
    bench: Bench,
    part: str,
    choices: list[Choice],
    want: list[tuple[str, str, Tensor]],
    dtype: torch.dtype,
    timer: Callable[[Callable[[], Any]], float],
    say: Callable[[str], None],
    rounds: int,
) -> Found:
    refused = {text_of(one): fault for one in choices if (fault := _fault(bench, one, want, dtype))}
    for name, fault in refused.items():
        say(f"{part}: {name} is refused: {fault}")
    kept: dict[str, Choice] = {"default": {}}
    kept |= {text_of(one): one for one in choices if text_of(one) not in refused}
    times = in_turn({name: _run(bench, one, part) for name, one in kept.items()}, timer, rounds)
    best = winner(times, "default")
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    for name, value in medians.items():
        say(f"{part}: {name}: {value:.4f} ms{'  <- chosen' if name == best else ''}")
    return Found(part, kept[best], medians["default"], medians[best], medians, refused)


def _fault(bench: Bench, choice: Choice, want: list[tuple[str, str, Tensor]], dtype: torch.dtype) -> str:
    """Why a candidate must not be used: it does not compile, is wrong, or is not the same twice."""
    try:
        first, again = bench.results(choice), bench.results(choice)
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
    if fault := compared(first, want, dtype):
        return fault
    if not all(torch.equal(x, y) for (_, _, x), (_, _, y) in zip(first, again, strict=True)):
        return "two runs gave different results"
    return ""


def _run(bench: Bench, choice: Choice, part: str) -> Callable[[], Any]:
    backend = bench.backend(choice)
    if part == "fwd":
        return lambda: bench.forward(backend)
    out = bench.forward(backend)
    return lambda: bench.backward(backend, out)


def text_of(choice: Choice) -> str:
    """A choice on a line: fwd.BV=64 fwd.num_warps=4 bwd_L=4096."""
    parts = []
    for name, value in choice.items():
        parts += (
            [f"{name}.{key}={x}" for key, x in value.items()] if isinstance(value, Mapping) else [f"{name}={value}"]
        )
    return " ".join(parts)


def merged(found: list[Found]) -> Choice:
    """The choices of both parts as one."""
    whole: dict[str, Any] = {}
    for one in found:
        whole |= one.choice
    return whole

"""The hunt for failures: draws trials by Hypothesis, judges them, and shrinks each new failure to its smallest spec.

A hunt is cut into rounds, so that it may go on in several processes and end at any time. A trial is written to a
journal before it runs: if the process dies of it, whoever reads the journal can name it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings

from .fuzz import Trial, decay_kind, features
from .fuzz_judge import Outcome, judge
from .fuzz_specs import PROFILES, Profile, trials

# Hypothesis varies what it has drawn after ten examples: a search of ten has as many specs as examples
EXAMPLES = 10
APART_SECONDS = 300  # for one trial in a process of its own


@dataclass(frozen=True)
class Line:
    """What became of one trial. digest: of its spec. worst: the largest error in units of its limit."""

    digest: str
    kind: str
    features: tuple[str, ...]
    dtype: str
    status: str
    what: str
    worst: float


@dataclass(frozen=True)
class Finding:
    """A failure. trial, drawn: in JSON, as small as it could be made and as it was drawn. search: the seed of the
    search that drew it. lost: the process was of no use after it, so that it is not shrunk.
    """

    status: str
    what: str
    text: str
    features: tuple[str, ...]
    trial: str
    drawn: str
    search: int
    lost: bool = False

    def explains(self, status: str, what: str, others: frozenset[str]) -> bool:
        """Whether another failure is likely the same: the same exception, or a difference in a trial that has all of
        this one's features.
        """
        if self.status != status:
            return False
        return self.what == what if status == "raised" else set(self.features) <= others


class Found(Exception):
    """A new failure, for Hypothesis to shrink."""


class Lost(KeyboardInterrupt):
    """The process is of no more use: Hypothesis lets this pass."""


@dataclass
class Hunt:
    """known: failures that are not looked for again. until: when to draw no more, on `clock`; shrink_seconds: for one
    failure. most: the most specs. target: only this trial is run, and what it shrinks to.
    """

    profile: Profile
    until: float
    shrink_seconds: float = 60.0
    known: list[Finding] = field(default_factory=list)
    journal: Path | None = None
    most: int = 1 << 60  # specs
    judge: Callable[[Trial], Outcome] = judge
    target: Trial | None = None
    clock: Callable[[], float] = time.time
    findings: list[Finding] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    specs: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.outcomes: dict[Trial, Outcome] = {}
        self._begin(0)

    def _begin(self, search: int) -> None:
        self.search = search
        self.shrinking: Outcome | None = None
        self.drawn: Trial | None = None
        self.smallest: Trial | None = None  # of those that failed
        self.shrink_until = 0.0

    def run(self, number: int) -> None:
        """Searches until the time is over. number: of the round, from which the seeds follow. Raises Lost where the
        process is of no more use.
        """
        search = number * 100_000
        while self.clock() < self.until and len(self.specs) < self.most:
            finding = self.searched(search)
            if finding is not None:
                self.findings.append(finding)
                self.known.append(finding)
            search += 1

    def searched(self, search: int) -> Finding | None:
        """The failure that a search of a few examples finds, shrunk, if any."""
        self._begin(search)

        @seed(search)
        @settings(
            max_examples=EXAMPLES, database=None, deadline=None, derandomize=False, report_multiple_bugs=False,
            phases=(Phase.generate, Phase.shrink), suppress_health_check=list(HealthCheck), verbosity=Verbosity.quiet,
            print_blob=False,
        )  # fmt: skip
        @given(trials(self.profile))
        def each(found: tuple[Trial, ...]) -> None:
            for trial in found:
                self._try(trial)

        try:
            with reproducible():
                each()
        except Found:
            assert self.smallest is not None and self.drawn is not None
            return finding_of(self.smallest, self.drawn, self.outcomes[self.smallest], search)
        return None

    def _try(self, trial: Trial) -> None:
        outcome = self._outcome(trial)
        if not outcome.failed:
            return
        if self.shrinking is None:
            had = features(trial)
            if self.target is None and any(one.explains(outcome.status, outcome.what, had) for one in self.known):
                return
            self.shrinking, self.drawn = outcome, trial
            self.shrink_until = self.clock() + self.shrink_seconds
        elif outcome.status != self.shrinking.status or (
            outcome.status == "raised" and outcome.what != self.shrinking.what
        ):
            return  # another failure, which another search will find
        self.smallest = trial
        raise Found

    def _outcome(self, trial: Trial) -> Outcome:
        if trial in self.outcomes:
            return self.outcomes[trial]
        if self.shrinking is None:
            late = self.clock() >= self.until or (len(self.specs) >= self.most and trial.digest not in self.specs)
            if late or (self.target is not None and trial != self.target):
                return Outcome("ok")
        elif self.clock() >= self.shrink_until:
            return Outcome("ok")
        if self.target is None and any(one.explains("died", "", features(trial)) for one in self.known):
            return Outcome("ok")  # it would take this process with it
        self._write({"trial": trial.to_json(), "search": self.search, "shrinking": self.shrinking is not None})
        outcome = self.judge(trial)
        self.outcomes[trial] = outcome
        if self.shrinking is None:
            self.specs.add(trial.digest)
            self.lines.append(line(trial, outcome))
        self._write({"line": asdict(line(trial, outcome)), "shrinking": self.shrinking is not None})
        if outcome.status == "raised" and trial.device.startswith("cuda") and self.judge is judge and not usable():
            self.findings.append(finding_of(trial, trial, outcome, self.search, lost=self.shrinking is None))
            raise Lost
        return outcome

    def _write(self, entry: dict[str, object]) -> None:
        if self.journal is not None:
            with self.journal.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")


@contextlib.contextmanager
def reproducible() -> Iterator[None]:
    """What Hypothesis draws follows from the seed alone. By itself, in versions that do so, it takes some numbers from
    the sources of the modules that are loaded, such as generated kernels.
    """
    providers: Any = importlib.import_module("hypothesis.internal.conjecture.providers")
    find, found = (getattr(providers, name, None) for name in ("_get_local_constants", "CONSTANTS_CACHE"))
    if find is None or found is None:
        yield
        return
    nothing = providers.Constants()
    providers._get_local_constants, providers.CONSTANTS_CACHE = lambda: nothing, type(found)(1024)
    try:
        yield
    finally:
        providers._get_local_constants, providers.CONSTANTS_CACHE = find, found


def finding_of(trial: Trial, drawn: Trial, outcome: Outcome, search: int, lost: bool = False) -> Finding:
    had, texts = tuple(sorted(features(trial))), (trial.to_json(), drawn.to_json())
    return Finding("died" if lost else outcome.status, outcome.what, outcome.text, had, *texts, search, lost)


def line(trial: Trial, outcome: Outcome) -> Line:
    kind, had = decay_kind(trial.spec), tuple(sorted(features(trial)))
    return Line(trial.digest, kind, had, trial.dtype, outcome.status, outcome.what, outcome.worst)


def usable() -> bool:
    """Whether the GPU still answers this process."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def judge_apart(trial: Trial) -> Outcome:
    """As judge, in a fresh Python process that runs the trial's snippet; it may die of it."""
    root = str(Path(__file__).parents[1])
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        done = subprocess.run(
            [sys.executable, "-c", repr(trial)], env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True,
            timeout=APART_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Outcome("died", f"no end within {APART_SECONDS} s", worst=float("inf"))
    if done.returncode == 0:
        return Outcome("ok")
    return Outcome("died", death(done.returncode), done.stderr[-3000:], float("inf"))


def death(code: int | None) -> str:
    """What an exit code says."""
    if code is None or code >= 0:
        return f"exit status {code}"
    try:
        return f"died of {signal.Signals(-code).name}"
    except ValueError:
        return f"died of signal {-code}"


# --- rounds, in processes


@dataclass(frozen=True)
class Round:
    """A unit of work for a process. target: a finding that a process was lost to, to be shrunk: its search is done
    again, with each trial in a process of its own.
    """

    number: int
    profile: str
    device: str
    backend: str
    until: float
    shrink_seconds: float
    most: int
    known: tuple[Finding, ...]
    journal: str
    target: Finding | None = None


def run_round(round: Round) -> tuple[tuple[list[Line], list[Finding]], bool]:
    """Its lines and findings, and whether the process can go on: a function for cli_pool."""
    hunt, usable = hunt_of(round), True
    if round.target is not None:
        found = hunt.searched(round.target.search)
        return ([], [] if found is None else [found]), True
    try:
        hunt.run(round.number)
    except Lost:
        usable = False
    return (hunt.lines, hunt.findings), usable


def hunt_of(round: Round) -> Hunt:
    """The hunt of a round."""
    profile = replace(PROFILES[round.profile], device=round.device, backend=round.backend)
    target = None if round.target is None else Trial.from_json(round.target.drawn)
    return Hunt(
        profile, round.until, round.shrink_seconds, list(round.known), Path(round.journal), round.most,
        judge if target is None else judge_apart, target,
    )  # fmt: skip


def journalled(path: Path) -> tuple[list[Line], list[Finding]]:
    """What a process that died has left in its journal: the lines, and the trial that it died of."""
    entries = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    given = [entry["line"] for entry in entries if "line" in entry and not entry["shrinking"]]
    lines = [Line(**one | {"features": tuple(one["features"])}) for one in given]
    if not entries or "trial" not in entries[-1]:
        return lines, []
    last = entries[-1]
    trial, outcome = Trial.from_json(last["trial"]), Outcome("died", "the process died of it")
    return lines, [finding_of(trial, trial, outcome, last["search"], lost=not last["shrinking"])]

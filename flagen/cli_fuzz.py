"""fuzz: specs at random against their reference, till the time is over; failures as snippets to paste; a table at last.

Several processes draw, run and judge trials (fuzz_hunt.py). A failure is shrunk to the smallest spec that fails alike,
printed, and not reported again; a process that dies is replaced, and the trial that it died of is named.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from . import cli_pool
from .cli_progress import Progress
from .errors import FlagenError

if TYPE_CHECKING:
    from .fuzz_hunt import Finding, Line, Round

ROUND_SECONDS = {"cpu": 20.0, "cuda": 45.0}  # after which a process reports
SHRINK_SECONDS = {"cpu": 60.0, "cuda": 150.0}  # a kernel takes seconds to compile
PATIENCE = 900.0  # seconds beyond which a process hangs
NO_LIMIT = 1 << 60
DTYPES = ("float32", "bfloat16", "float16", "float64")


def fuzz(arguments: argparse.Namespace) -> int:
    """Status 1 if anything failed, or nothing was run."""
    if find_spec("hypothesis") is None:
        raise FlagenError("fuzz: needs Hypothesis, which draws the specs; pip install 'flagen[fuzz]'")
    device = _device(arguments.device, arguments.backend)
    seed = arguments.seed if arguments.seed is not None else int.from_bytes(os.urandom(3), "big")
    devices = cli_pool.gpus(device)
    jobs = arguments.jobs or max(1, cli_pool.most_jobs(devices) - (device != "cpu"))
    seconds = 60 * arguments.minutes
    print(f"fuzz: {device}, backend {arguments.backend}, seed {seed}, {seconds:.0f} s, {jobs} processes")
    with contextlib.ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flagen-fuzz-")))
        # thousands of kernels are of no use to anybody later
        caches = {"FLAGEN_CACHE_DIR": str(home / "flagen"), "TRITON_CACHE_DIR": str(home / "triton")}
        stack.enter_context(cli_pool.environment(**caches))
        log = stack.enter_context(Path(arguments.save).open("w", encoding="utf-8")) if arguments.save else None
        hunt = Tally(device, arguments.backend, seed, seconds, arguments.max_specs or NO_LIMIT, jobs, home, log)
        from .fuzz_hunt import run_round

        bar = stack.enter_context(Progress(int(seconds), "fuzzing"))
        with contextlib.suppress(KeyboardInterrupt):  # what is known by then is printed
            for unit, result in cli_pool.run(run_round, hunt, jobs, PATIENCE, devices):
                bar.clear()
                hunt.take(unit, result)
                bar.step(hunt.summary(), advance=max(0, min(int(hunt.elapsed), bar.total) - bar.done))
    print("\n".join(table(hunt.lines)))
    print(f"\n{hunt.summary()}; seed {seed}")
    return 1 if hunt.findings or not hunt.lines else 0


def _device(name: str, backend: str) -> str:
    import torch

    kind = name.partition(":")[0]
    if kind not in ROUND_SECONDS:
        raise FlagenError(f"--device {name}: fuzz runs on cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise FlagenError(
            f"--device {name}: torch {torch.__version__} finds no CUDA device here; leave --device out for the CPU"
        )
    if kind == "cpu" and backend == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        raise FlagenError(
            "--backend triton on the CPU needs Triton's interpreter; set TRITON_INTERPRET=1, or leave --backend out"
        )
    return name


@dataclass
class Tally:
    """What the parent of the processes knows. Iterates over rounds till the time is over or there are enough specs,
    each with what is known when it begins; a trial that a process was lost to gets one round more.
    """

    device: str
    backend: str
    seed: int
    seconds: float
    most: int
    jobs: int
    home: Path
    log: TextIO | None = None
    lines: list[Line] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)  # reported
    lost: list[Finding] = field(default_factory=list)  # to be shrunk
    number: int = 0

    def __post_init__(self) -> None:
        self.began = time.time()
        self.specs: set[str] = set()

    @property
    def elapsed(self) -> float:
        return time.time() - self.began

    @property
    def profile(self) -> str:
        if self.device != "cpu":
            return "cuda"
        return "interpreter" if os.environ.get("TRITON_INTERPRET") == "1" and self.backend != "torch" else "cpu"

    def __iter__(self) -> Iterator[Round]:
        return self

    def __next__(self) -> Round:
        from .fuzz_hunt import Round

        kind, left = self.device.partition(":")[0], max(0.0, self.seconds - self.elapsed)
        target = self.lost.pop(0) if self.lost else None
        if target is None and (not left or len(self.specs) >= self.most):
            raise StopIteration  # for now: a process that is lost later gives a target
        self.number += 1
        return Round(
            number=self.seed * 10_000 + self.number,
            profile=self.profile,
            device=self.device,
            backend=self.backend,
            until=time.time() + (min(left, ROUND_SECONDS[kind]) if target is None else SHRINK_SECONDS[kind]),
            shrink_seconds=min(SHRINK_SECONDS[kind], left + 30),
            # the simplest spec comes up in every round
            most=1 - (-(self.most - len(self.specs)) // self.jobs),
            known=tuple(self.findings),
            journal=str(self.home / f"{self.number}.jsonl"),
            target=target,
        )

    def take(self, unit: Round, result: tuple[list[Line], list[Finding]] | None) -> None:
        """The result of a round; None where its process died."""
        from .fuzz_hunt import journalled

        lines, findings = journalled(Path(unit.journal)) if result is None else result
        for line in lines:
            self.lines.append(line)
            self.specs.add(line.digest)
            self._save("line", line)
        if unit.target is not None:
            # what is not seen again in a process of its own is reported as it was drawn
            findings = [one for one in findings if not one.lost] or [unit.target]
        elif result is None and not findings:
            print("fuzz: a process died before it ran anything", file=sys.stderr)
        for one in findings:
            if one.lost and unit.target is None:
                self.lost.append(one)
            else:
                self._report(one)
        self.lost = [one for one in self.lost if not self._is_known(one)]

    def _is_known(self, found: Finding) -> bool:
        return any(one.explains(found.status, found.what, frozenset(found.features)) for one in self.findings)

    def _report(self, found: Finding) -> None:
        from .fuzz import Trial

        if self._is_known(found):
            return  # two processes found it at once
        self.findings.append(found)
        self._save("finding", found)
        shown = "\n".join(f"# {line}".rstrip() for line in found.text.splitlines())
        print(
            f"\n# failure {len(self.findings)}: {found.status}: {found.what}\n{Trial.from_json(found.trial)}{shown}\n"
        )
        sys.stdout.flush()

    def _save(self, name: str, value: Line | Finding) -> None:
        if self.log is not None:
            self.log.write(json.dumps({name: asdict(value)}) + "\n")
            self.log.flush()

    def summary(self) -> str:
        """What there is so far, in a line."""
        failed = sum(line.status not in ("ok", "ill") for line in self.lines)
        ill = sum(line.status == "ill" for line in self.lines)
        distinct = f"{len(self.findings)} distinct" if failed or self.findings else ""
        parts = [f"{len(self.specs)} specs", f"{len(self.lines)} cases", f"{failed} failed", distinct, f"{ill} ill"]
        return ", ".join(filter(None, parts))


# --- the table


def table(lines: Iterable[Line]) -> list[str]:
    """By decay and by feature: specs, cases, failures, ill-conditioned ones, and the largest error of each dtype that
    is no failure, in units of its limit.
    """
    groups: dict[str, list[Line]] = {"all": []}
    lines = list(lines)
    for kind in sorted({line.kind for line in lines}):
        groups[f"decay: {kind}"] = [line for line in lines if line.kind == kind]
    # the decay is above; dtypes are columns
    names = sorted({name for line in lines for name in line.features if not name.startswith(("decay", "dtype"))})
    for name in names:
        groups[name] = [line for line in lines if name in line.features]
    groups["all"] = lines
    dtypes = [dtype for dtype in DTYPES if any(line.dtype == dtype for line in lines)]
    header = f"{'':26} {'specs':>6} {'cases':>6} {'failed':>6} {'ill':>4}" + "".join(f" {dtype:>9}" for dtype in dtypes)
    text = [header, "-" * len(header)]
    for name, group in groups.items():
        failed = sum(line.status not in ("ok", "ill") for line in group)
        counts = f"{len({line.digest for line in group}):6} {len(group):6} {failed:6}"
        ill = sum(line.status == "ill" for line in group)
        text.append(f"{name:26} {counts} {ill:4}" + "".join(f" {_worst(group, dtype):>9}" for dtype in dtypes))
    return [*text, "errors are in units of their limits"]


def _worst(group: list[Line], dtype: str) -> str:
    found = [line.worst for line in group if line.dtype == dtype and line.status in ("ok", "ill")]
    return f"{max(found):.2f}" if found else "-"

"""Specs at random for the tests on every push: as many as fit into a budget of CPU time, the same ones each time. And
those that runs on a GPU have found, in found.jsonl: a name for what was wrong, and the trial as it was shrunk.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from flagen.fuzz import Trial
from flagen.fuzz_hunt import Hunt
from flagen.fuzz_judge import Outcome, judge
from flagen.fuzz_specs import Profile
from flagen.spec import SpecWarning


def hold(profile: Profile, seconds: float, seed: int, judge: Callable[[Trial], Outcome] = judge) -> Hunt:
    """The hunt, when it is over; AssertionError with a snippet, shrunk to the smallest spec, where an op differs.

    seconds: of this process's own time, so that a busy machine draws as many specs; a slow one draws fewer.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors: more threads would wait for each other, and count
    try:
        hunt = Hunt(profile, time.process_time() + seconds, judge=judge, clock=time.process_time)
        hunt.run(seed)
    finally:
        torch.set_num_threads(threads)
    shown = [f"{found.status}: {found.what}\n{Trial.from_json(found.trial)}\n{found.text}" for found in hunt.findings]
    assert not shown, "\n\n".join(shown)
    return hunt


def found_trials() -> dict[str, Trial]:
    """What was found before, by name, for a CPU."""
    lines = (Path(__file__).parent / "found.jsonl").read_text(encoding="utf-8").splitlines()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SpecWarning)
        return {one["name"]: Trial.from_json(json.dumps(one["trial"])) for one in map(json.loads, lines)}

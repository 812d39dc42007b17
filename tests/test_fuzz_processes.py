"""`flagen fuzz` and its processes: those that die of a trial, those that hang, and the units that they are given."""

from __future__ import annotations

import math
import os
import time
from dataclasses import replace

import pytest

from flagen import cli_fuzz, cli_pool, fuzz_hunt
from flagen.fuzz import Trial, features
from flagen.fuzz_hunt import Hunt, Round
from flagen.fuzz_judge import Outcome
from flagen.fuzz_specs import PROFILES


def test_a_journal_names_what_a_process_died_of(tmp_path):
    journal = tmp_path / "journal"

    def judged(trial):
        if "phase" in features(trial):
            raise KeyboardInterrupt  # as good as an end of the process
        return Outcome("ok", worst=0.25)

    hunt = Hunt(PROFILES["cpu"], time.time() + 60, judge=judged, journal=journal)
    with pytest.raises(KeyboardInterrupt):
        hunt.run(2)
    lines, (finding,) = fuzz_hunt.journalled(journal)
    assert lines == hunt.lines and lines
    assert finding.status == "died" and finding.lost and "phase" in features(Trial.from_json(finding.trial))
    assert fuzz_hunt.journalled(tmp_path / "none") == ([], [])


def dying_round(unit: Round):
    """As run_round, with a judge that ends its process at a phase."""

    def judged(trial):
        if "phase" in features(trial):
            os._exit(7)
        return Outcome("ok")

    if unit.target is not None:

        def apart(trial):
            return Outcome("died", "exit status 7", "", math.inf) if "phase" in features(trial) else Outcome("ok")

        hunt = replace(fuzz_hunt.hunt_of(unit), judge=apart)
        found = hunt.searched(unit.target.search)
        return ([], [found] if found else []), True
    hunt = replace(fuzz_hunt.hunt_of(unit), judge=judged)
    hunt.run(unit.number)
    return (hunt.lines, hunt.findings), True


def test_a_process_that_dies_is_replaced_and_its_trial_shrunk(tmp_path, capsys):
    tally = cli_fuzz.Tally("cpu", "torch", 1, 600.0, 25, 1, tmp_path)
    for unit, result in cli_pool.run(dying_round, tally, 1):
        tally.take(unit, result)
    assert len(tally.specs) >= 25
    (found,) = tally.findings
    trial = Trial.from_json(found.trial)
    assert found.status == "died" and found.what == "exit status 7"
    assert features(trial) == {"phase"} and trial.T == 1
    out = capsys.readouterr().out
    assert "# failure 1: died: exit status 7" in out and "phase=" in out and "check(\n    spec," in out


def slow(unit):
    time.sleep(600 if unit == "hang" else 0)
    return unit, True


def test_pool_takes_units_as_they_come_and_kills_what_hangs():
    given_, seen = iter(["a", "hang", "b"]), []

    class Units:
        def __iter__(self):
            return self

        def __next__(self):
            seen.append(len(found))
            return next(given_)

    found: list[object] = []
    for unit, result in cli_pool.run(slow, Units(), 1, patience=2.0):
        found.append((unit, result))
    assert found == [("a", "a"), ("hang", None), ("b", "b")]
    assert seen == [0, 1, 2, 3]  # each asked for when the one before is done

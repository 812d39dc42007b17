"""Specs drawn at random, through compile and the torch backend, against the reference."""

from __future__ import annotations

import dataclasses

import pytest
from random_specs import hold

from flagen.fuzz_judge import Outcome, judge
from flagen.fuzz_specs import PROFILES

SECONDS = 18


def test_random_specs_agree_with_their_reference():
    hunt = hold(PROFILES["cpu"], SECONDS, seed=1)
    assert len(hunt.specs) >= 25  # 120 or so
    kinds, had = {line.kind for line in hunt.lines}, {name for line in hunt.lines for name in line.features}
    assert {"none", "constant", "scalar", "key", "value"} <= kinds
    assert {"bonus", "phase", "normalize", "feature map", "packed", "grouped", "erase decayed"} <= had
    # a rule that lets go of answers that are not sharp must let go of few
    assert sum(line.status == "ill" for line in hunt.lines) <= 0.02 * len(hunt.lines) + 1


def test_a_difference_is_reported_with_the_smallest_spec():
    def judged(trial):
        return Outcome("differs", "o", "o  2.0") if trial.spec.bonus is not None else judge(trial)

    profile = dataclasses.replace(PROFILES["cpu"], builds=(1,), runs=(1,))
    shown = r"differs: o\nimport torch\n(?s:.*)\n    bonus=[^\n]*,\n\)\ncheck\((?s:.*)o  2\.0"
    with pytest.raises(AssertionError, match=shown):
        hold(profile, 4, seed=2, judge=judged)

"""What runs on a GPU have found that the interpreter shows as well, with its bf16 repaired."""

from __future__ import annotations

from dataclasses import replace

import bf16_interpreter
import pytest
from random_specs import found_trials

from flagen.fuzz_judge import judge

# the others take minutes here, or have tiles that only a GPU gets wrong
NAMES = (
    "an input of query and value", "an angle per channel", "a decay per channel beside angles",
    "a decay per channel in fp32", "an angle whose gradient nobody asks for", "a normaliser that cancels",
    "l2norm of an input as it is", "bf16 values beside fp32 keys", "bf16 values beside fp16 keys",
    "a decay per channel in long chunks beside angles", "a bonus of constants", "an empty sequence",
    "a bonus of constants beside a normaliser",
)  # fmt: skip
FOUND = found_trials()


@pytest.mark.filterwarnings("ignore::flagen.spec.SpecWarning")
@pytest.mark.parametrize("name", NAMES)
def test_what_was_found_before(name, monkeypatch):
    bf16_interpreter.repair(monkeypatch)
    outcome = judge(replace(FOUND[name], backend="triton"))
    assert outcome.status in ("ok", "ill"), outcome.text

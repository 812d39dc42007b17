"""Specs drawn at random through the Triton kernels, under the interpreter, against the reference."""

from __future__ import annotations

import dataclasses

import bf16_interpreter
import pytest
from random_specs import hold

from flagen.expr import Input, logsigmoid
from flagen.fuzz import Trial
from flagen.fuzz_judge import judge
from flagen.fuzz_specs import PROFILES
from flagen.spec import Spec

PROFILE = PROFILES["interpreter"]


def test_fp32_and_fp16():
    hunt = hold(PROFILE, 20, seed=1)
    assert len(hunt.specs) >= 8
    assert len({line.kind for line in hunt.lines}) >= 3


def test_bf16(monkeypatch):
    bf16_interpreter.repair(monkeypatch)
    # as on a GPU, not one key channel alone: four roundings in a row and nothing to average them are at the limit, with
    # a decay per value channel 2.7e-3 to 4.6e-3 for 13 seeds
    keys = tuple(one for one in PROFILE.keys if one > 1)
    dtypes = {"dtypes": ("bfloat16",), "gate_dtypes": (None, "float32", "bfloat16")}
    profile = dataclasses.replace(PROFILE, **dtypes, keys=keys)
    hunt = hold(profile, 20, seed=2)
    assert len(hunt.specs) >= 8


@pytest.mark.parametrize("bounds", [(0, 1, 1), (0, 5, 17, 17), (0, 3, 3, 3)])
def test_an_empty_sequence_at_the_end(bounds):
    """Its final state is its initial state, or zero, and some program must write it."""
    spec = Spec("ends", log_decay=logsigmoid(Input("gs", "b t h")))
    sizes = {"T": bounds[-1], "H": 1, "K": 5, "V": 3, "chunk_size": 16}
    found = judge(Trial(spec, **sizes, cu_seqlens=bounds, final_state=True, backend="triton"))
    assert found.status == "ok", found.text

"""Specs drawn at random, through compile and the torch backend, against the reference."""

from __future__ import annotations

import pytest
import torch
from random_specs import random_spec

import flagen
from flagen.spec import Spec
from flagen.testing import check

SEEDS = range(60)
SIZES = {"H": 2, "K": 5, "V": 3}


@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_spec_agrees_with_its_reference(seed):
    op = flagen.compile(random_spec(seed), backend="torch", chunk_size=16)
    for dtype in (torch.float64, torch.bfloat16):
        check(op, **SIZES, T=37, dtype=dtype, device="cpu")
        check(op, **SIZES, T=44, cu_seqlens=[0, 3, 3, 40], dtype=dtype, device="cpu", seed=1)


def test_a_seed_is_a_spec_and_the_draw_is_wide():
    drawn = [random_spec(seed) for seed in SEEDS]
    assert drawn == [random_spec(seed) for seed in SEEDS]
    decays = {None if spec.log_decay is None else spec.log_decay.axes for spec in drawn}
    assert decays >= {None, "h", "bth", "bthk", "bthv", "hk", "bh"}
    assert {spec.taylor for spec in drawn} == {0, 1, 2}
    assert {(spec.bonus is None, spec.phase is None, spec.normalizer is None) for spec in drawn} >= {
        (True, True, True),
        (False, True, True),
        (True, False, True),
        (True, True, False),
        (False, False, True),
        (False, True, False),
    }
    assert all(Spec.from_json(spec.to_json()) == spec for spec in drawn)

"""The bodies of test_causality.py with the Triton kernels under the interpreter."""

from __future__ import annotations

import bf16_interpreter
import pytest
import torch
from hostile import BRIEF, EVERY, FEWER, INTERPRETER, Place, some
from test_causality import a_changed_token, a_head_that_is_nan, a_sequence_that_is_nan


@EVERY
def test_a_changed_token(spec):
    a_changed_token(BRIEF, spec, at=21, cut=True, heads=1, tokens=24)


@some("gla", "rwkv6", "phase_key_u")
@pytest.mark.parametrize("at", [32, 37])
def test_a_token_whose_decay_becomes_strong(spec, at, monkeypatch):
    """In bf16 pairs of a decay per key channel are taken by the tree where a row is far from its chunk's start, which
    the changed token makes so, else by quotients: rows before it are not touched."""
    bf16_interpreter.repair(monkeypatch)
    a_changed_token(Place("triton", "cpu", torch.bfloat16), spec, at, cut=True, heads=1)


@FEWER
def test_the_first_token_of_a_piece(spec):
    a_changed_token(INTERPRETER, spec, at=32, cut=True, heads=1)


@FEWER
def test_a_sequence_that_is_nan(spec):
    a_sequence_that_is_nan(BRIEF, spec, cut=True, heads=1)


@FEWER
def test_a_head_that_is_nan(spec):
    a_head_that_is_nan(INTERPRETER, spec, cut=False, tokens=20)

"""The bodies of test_causality.py with the Triton kernels under the interpreter."""

from __future__ import annotations

from hostile import BRIEF, EVERY, FEWER, INTERPRETER
from test_causality import a_changed_token, a_head_that_is_nan, a_sequence_that_is_nan


@EVERY
def test_a_changed_token(spec):
    a_changed_token(BRIEF, spec, at=21, cut=True, heads=1, tokens=24)


@FEWER
def test_the_first_token_of_a_piece(spec):
    a_changed_token(INTERPRETER, spec, at=32, cut=True, heads=1)


@FEWER
def test_a_sequence_that_is_nan(spec):
    a_sequence_that_is_nan(BRIEF, spec, cut=True, heads=1)


@FEWER
def test_a_head_that_is_nan(spec):
    a_head_that_is_nan(INTERPRETER, spec, cut=False, tokens=20)

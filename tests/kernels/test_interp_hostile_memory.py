"""The bodies of test_hostile_memory.py with the Triton kernels under the interpreter."""

from __future__ import annotations

import pytest
from hostile import FEWER, INTERPRETER
from test_hostile_memory import (
    SPANS,
    between_bands_of_nan,
    nan_past_the_last_sequence,
    one_token_between_bands_of_nan,
)


@FEWER
@pytest.mark.parametrize(("cu", "cut"), [(None, False), (SPANS, True)], ids=["dense", "packed pieces"])
def test_between_bands_of_nan(spec, cu, cut):
    between_bands_of_nan(INTERPRETER, spec, cu, cut, heads=1)


@FEWER
def test_one_token_between_bands_of_nan(spec):
    one_token_between_bands_of_nan(INTERPRETER, spec)


@FEWER
def test_nan_past_the_last_sequence(spec):
    nan_past_the_last_sequence(INTERPRETER, spec, cut=True, heads=1)

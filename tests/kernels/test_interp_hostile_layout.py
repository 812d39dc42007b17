"""The bodies of test_hostile_layout.py with the Triton kernels under the interpreter."""

from __future__ import annotations

import pytest
from hostile import INTERPRETER, some
from test_hostile_layout import (
    SQUARE,
    any_subset_of_gradients,
    at_odd_addresses,
    bounds_in_any_form,
    expanded,
    laid_out,
    the_same_tensor_twice,
)

SOME = some("rwkv6", "key_u_norm", "phase_key_u")


@SOME
def test_at_odd_addresses(spec):
    at_odd_addresses(INTERPRETER, spec)


@SOME
def test_laid_out(spec):
    laid_out(INTERPRETER, spec, "reversed")


@SOME
@pytest.mark.parametrize("axis", "k")
def test_expanded(spec, axis):
    expanded(INTERPRETER, spec, axis)


@some("plain")
def test_any_subset_of_gradients(spec):
    any_subset_of_gradients(INTERPRETER, spec)


@pytest.mark.parametrize("spec", SQUARE[3:], ids=lambda spec: spec.name)
def test_the_same_tensor_twice(spec):
    the_same_tensor_twice(INTERPRETER, spec)


@some("scalar")
def test_bounds_in_any_form(spec):
    bounds_in_any_form(INTERPRETER, spec)

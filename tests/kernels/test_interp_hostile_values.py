"""The bodies of test_hostile_values.py with the Triton kernels under the interpreter."""

from __future__ import annotations

import numpy as np
import pytest
from hostile import BRIEF, FEWER, INTERPRETER, some
from test_hostile_values import (
    EDGES,
    RAW,
    SIZES,
    a_gate_that_is_nan,
    channels_of_any_size,
    decays_all_alike,
    decays_mixed_in_a_chunk,
    no_tokens,
    one_token,
    sequences_of_no_tokens,
)
from triton.runtime.interpreter import InterpreterBuilder

import flagen


@pytest.mark.parametrize("spec", RAW.values(), ids=lambda spec: spec.name)
def test_decays_mixed_in_a_chunk(spec):
    decays_mixed_in_a_chunk(BRIEF, spec)


@pytest.mark.parametrize("which", [2, 8], ids=lambda i: f"{EDGES[i]:g}")
@pytest.mark.parametrize("name", ["raw", "raw_key", "raw_value"])
def test_decays_all_alike(name, which):
    decays_all_alike(INTERPRETER, RAW[name], which)


@pytest.mark.parametrize("cu", [[0, 0, 7, 7, 18], [0, 0, 0]], ids=["some", "all"])
@FEWER
def test_sequences_of_no_tokens(spec, cu):
    sequences_of_no_tokens(INTERPRETER, spec, cu)


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "pieces"])
@some("gla", "key_u_norm", "shared")
def test_a_sequence_of_no_tokens_at_the_end(spec, cut):
    sequences_of_no_tokens(INTERPRETER, spec, [0, 18, 18], cut)


@some("gla", "key_u_norm", "shared")
def test_a_sequence_of_no_tokens_where_a_piece_begins(spec):
    sequences_of_no_tokens(BRIEF, spec, [0, 16, 16, 20], cut=True)


@pytest.mark.parametrize("cu", [None, [0, 0, 0]], ids=["dense", "two"])
@some("gla", "key_u_norm", "phase_key_u", "shared")
def test_no_tokens(spec, cu):
    no_tokens(INTERPRETER, spec, cu)


@FEWER
def test_one_token(spec):
    one_token(INTERPRETER, spec, [0, 0, 1])


@pytest.mark.parametrize("name", ["raw", "raw_key", "raw_value"])
def test_a_gate_that_is_nan(name, monkeypatch):
    # the interpreter has one maximum of floats, which keeps NaN; that of GPUs gives the other number unless asked
    def larger_number(self, lhs, rhs):
        return self.binary_op(lhs, rhs, np.fmax)

    monkeypatch.setattr(InterpreterBuilder, "create_maxnumf", larger_number)
    a_gate_that_is_nan(INTERPRETER, RAW[name])


@pytest.mark.parametrize(
    ("name", "which"),
    [
        *(("rwkv6", which) for which in ("huge key", "huge query and value", "huge key and value", "tiny", "nothing")),
        *((name, "huge query and key") for name in ("gateloop", "linear", "mamba2")),
    ],
)
def test_channels_of_any_size(name, which):
    channels_of_any_size(INTERPRETER, flagen.specs.get(name), SIZES[which])

"""The Triton kernels under the interpreter against the reference in fp64: forward, states and every gradient.

Every spec meets every feature once; sizes vary from one to the next so that pairs of features meet too. What the
launchers allocate is full of NaN, so that nothing unwritten is read.
"""

from __future__ import annotations

import pytest
import torch
from cases import ALL, SHIPPED
from harness import blocks_of_v, compare, pieces

EVERY = pytest.mark.parametrize("spec", ALL, ids=lambda spec: spec.name)
SPANS = [0, 21, 21, 38, 52]  # an empty sequence, sequences that begin and end inside a chunk, tokens past the last


def _width(spec, wide: int) -> int:
    """Key channels: a taylor map squares them."""
    return 6 if spec.taylor else wide


@EVERY
def test_one_token(spec):
    compare(spec, 2, 1, 2, _width(spec, 16), 16)


@EVERY
def test_less_than_a_chunk_and_channels_that_are_no_powers_of_two(spec):
    compare(spec, 1, 15, 2, _width(spec, 20), 37, want_final=False)


@EVERY
def test_a_whole_chunk_and_more_key_than_value_channels(spec):
    compare(spec, 1, 16, 1, 10 if spec.taylor else 33, 1, start=False)


@EVERY
def test_a_checkpoint_after_each_chunk(spec):
    compare(spec, 2, 33, 1, _width(spec, 16), 16, checkpoint=16)


@EVERY
def test_two_chunks_to_a_checkpoint_and_a_token_more(spec):
    compare(spec, 1, 65, 1, _width(spec, 9), 5, chunk=32, checkpoint=64, start=False, want_final=False)


@EVERY
def test_packed_sequences(spec):
    out, gradients = compare(spec, 1, 60, 2, _width(spec, 6), 5, cu=SPANS)
    assert not out.o[:, SPANS[-1] :].any()
    for one, gradient in zip(spec.inputs, gradients, strict=True):
        if "t" in one.axes:
            assert not gradient[:, SPANS[-1] :].any()


@EVERY
def test_pieces(spec):
    compare(spec, 2, 75, 1, _width(spec, 6), 5, patch=pieces(32), start=spec.taylor != 2)


@EVERY
def test_blocks_of_v_in_pieces_of_packed_sequences(spec):
    def patch(s):
        return pieces(32)(blocks_of_v(16)(s))

    compare(spec, 1, 60, 1, _width(spec, 6), 20, cu=[0, 40, 40, 56], checkpoint=16, patch=patch, start=not spec.taylor)


@EVERY
def test_heads_that_share_an_input(spec):
    groups = {"q": 4, "r": 4, "k": 2, "v": 1, "gs": 1, "gk": 2, "gv": 2, "g": 2, "gb": 2, "u": 1, "th": 1, "dt": 2}
    groups |= {"wk": 2, "ut": 2, "ths": 2, "w": 1, "gbk": 2, "wv": 2, "A_log": 2, "theta": 1}
    groups |= {} if any(one.name in ("q", "r") for one in spec.inputs) else {"k": 4}
    compare(spec, 1, 18, 4, 4, 5, groups=groups)


@pytest.mark.parametrize("spec", SHIPPED, ids=lambda spec: spec.name)
def test_heads_that_share_an_input_in_packed_pieces(spec):
    groups = {"k": 2, "v": 1, "g": 2, "u": 1, "dt": 2, "A_log": 2, "w": 2, "theta": 1}
    groups |= {} if any(one.name in ("q", "r") for one in spec.inputs) else {"k": 4}
    compare(spec, 1, 60, 4, 4, 5, groups=groups, cu=SPANS, patch=pieces(32), dtype=torch.float32)


@pytest.mark.parametrize("spec", SHIPPED, ids=lambda spec: spec.name)
def test_the_schedules_own_chunks(spec):
    """Nothing forced: the chunk, the checkpoint and the pieces that a call gets."""
    compare(spec, 1, 140, 1, 8 if spec.taylor else 32, 32, chunk=None, checkpoint=256)

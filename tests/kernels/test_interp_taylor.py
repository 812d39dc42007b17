"""The kernels of a Taylor map of order 2 without decay, which hold its features in tiles, under the interpreter."""

from __future__ import annotations

import pytest
import torch
from cases import gs, make, wk
from harness import backend_of, blocks_of_v, compare, pieces

from flagen import specs
from flagen.expr import abs as absolute
from flagen.expr import k, maximum, q, sigmoid, v
from flagen.schedule import checkpoint_of
from flagen.spec import Spec, taylor
from flagen.triton_backend import TritonBackend

BASED = specs.get("based")
PLAIN = Spec("plain", feature_map=taylor(2))
# one gate for all roles, parameters, and another function of the sum
GATED = Spec(
    "gated",
    feature_map=taylor(2),
    query=q * sigmoid(gs),
    key=k * sigmoid(wk) * gs,
    value=v * gs,
    normalize=lambda n: maximum(absolute(n), 1),
)


def small(schedule):
    """Pieces of 32 tokens and blocks of 16 channels of v: gradients in parts."""
    return blocks_of_v(16)(pieces(32)(schedule))


@pytest.mark.parametrize("key", [1, 2, 15, 16, 17, 24, 32])
def test_every_number_of_channels(key):
    """From one tile of features to nine; where channels and their one do not fit a block of the channels."""
    compare(BASED, 1, 40, 1, key, 20, patch=small)


@pytest.mark.parametrize("spec", [BASED, PLAIN, GATED], ids=lambda spec: spec.name)
@pytest.mark.parametrize("packed", [None, [0, 7, 7, 60, 93]], ids=["dense", "packed"])
def test_pieces_and_parts(spec, packed):
    compare(spec, 1, 101, 2, 6, 40, cu=packed, patch=small)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_one_piece_and_one_block(dtype):
    compare(BASED, 2, 70, 2, 16, 48, dtype=dtype)


def test_sequences_that_begin_inside_a_chunk():
    """Whole, so that the count of tokens goes on after a first chunk that is not full."""
    compare(BASED, 1, 101, 1, 6, 20, cu=[0, 7, 7, 60, 93])


def test_blocks_hold_a_channel_of_ones():
    for key in range(1, 33):
        for dtype in (torch.bfloat16, torch.float32):
            inputs = tuple(torch.empty(1, 64, 1, c, dtype=dtype, device="meta") for c in (key, key, 128))
            backend = backend_of(BASED, chunk=None)
            found = backend.schedule(inputs, backend._sizes(inputs, None))
            assert key < found.BK and found.BF * found.fwd.BV <= 1 << 13


def test_kept_states_are_small_beside_the_inputs():
    """At K = 16 a state has the size of hundreds of tokens: it is kept every 1024."""
    plan = backend_of(BASED).plan
    inputs = tuple(torch.empty(1, 8192, 4, c, dtype=torch.bfloat16, device="meta") for c in (16, 16, 128))
    saved = TritonBackend(plan, backend_of(BASED).module).saved_like(inputs, None)
    size = sum(x.numel() * x.element_size() for x in inputs)
    assert sum(x.numel() * x.element_size() for x in saved) < 0.2 * size and checkpoint_of(plan) == 1024


def test_only_what_is_asked_for():
    backend = backend_of(GATED, patch=small)
    inputs = tuple(x.float() for x in make(GATED, 1, 40, 1, 4, 20))
    out = backend.forward(inputs, (), 0.5, (), None, False, True)
    for needs in ((True,) + (False,) * (len(inputs) - 1), (False,) * (len(inputs) - 1) + (True,)):
        got, _ = backend.backward(
            torch.ones_like(out.o), (None, None), out.o, out.saved, inputs, (), 0.5, (), None, needs, False
        )
        assert [x is not None for x in got] == list(needs) and all(x is None or x.isfinite().all() for x in got)

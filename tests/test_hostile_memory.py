"""Memory: what is read before it is written, what is read or written out of bounds, inputs that are written.

New tensors are full of NaN and lie between bands of NaN (hostile.Memory), so that whatever reads what nobody wrote, or
what lies beside a tensor, changes a result; bands and inputs must be as they were. The bodies run with PyTorch on a
CPU, with the kernels on a GPU, and by test_interp_hostile_memory.py with the kernels under the interpreter.
"""

from __future__ import annotations

import math

import pytest
import torch
from hostile import CUT, EVERYWHERE, FEW_EVERYWHERE, Memory, Run, constants_of, inputs_of, nan_like, same, states_of

TOKENS = 40
SPANS = [0, 0, 11, 28, 28, 33]  # empty sequences, one of them first, and tokens past the last
# on a GPU the half of it: whole sequences dense, packed ones in pieces
FORMS = pytest.mark.parametrize(
    ("place", "spec", "cu", "cut"),
    [
        pytest.param(*one.values, cu, cut, marks=one.marks, id=f"{one.id}-{name}-{'pieces' if cut else 'whole'}")
        for one in EVERYWHERE.args[1]
        for name, cu in (("dense", None), ("packed", SPANS))
        for cut in (False, True)
        if not one.marks or cut == (cu is not None)
    ],
)


def between_bands_of_nan(place, spec, cu, cut, heads=2):
    """All results keep every bit when all memory is hostile."""
    batch = 1 if cu else 2
    inputs = inputs_of(place, spec, batch, TOKENS, cu, heads=heads)
    states = states_of(place, spec, len(cu) - 1 if cu else batch, heads)
    with Memory() as memory:
        placed, initial = (tuple(memory.place(x) for x in tensors) for tensors in (inputs, states))
        run = Run(place, spec, placed, cu=cu, cut=cut, initial=initial)
        run.do, run.dfinal = memory.place(run.do), tuple(memory.place(x) for x in run.dfinal)
        got = run.everything()
    memory.check()  # first: without bands, what is written out of bounds may end the process
    same(got, Run(place, spec, inputs, cu=cu, cut=cut).everything())


def one_token_between_bands_of_nan(place, spec):
    """A step, whose state alone is written."""
    inputs, states = inputs_of(place, spec, 2, 1), states_of(place, spec, 2)
    with Memory() as memory:
        placed = tuple(memory.place(x) for x in inputs)
        kept = tuple(memory.place(x, written=True) for x in states)
        constants = constants_of(place, spec, 2)
        o = place.backend_of(spec).step(placed, constants, 0.4, kept)
    memory.check()
    want = Run(place, spec, inputs)
    narrow = place.dtype == torch.bfloat16
    for x, y, z in zip((o, *kept), (want.out.o, *want.out.final), (None, *states), strict=True):
        assert torch.allclose(x, y, rtol=0, atol=(3e-2 if narrow else 2e-5) * float(y.abs().max()))
        assert z is None or not torch.equal(x, z)


def nan_past_the_last_sequence(place, spec, cut, heads=2):
    """Tokens that no sequence has: their output and gradients are zero, and nothing else sees them."""
    end = SPANS[-1]
    inputs = inputs_of(place, spec, 1, TOKENS, SPANS, heads=heads)
    hurt = tuple(x.clone() for x in inputs)
    for one, x in zip(spec.inputs, hurt, strict=True):
        if "t" in one.axes:
            x[:, end:] = math.nan
    want = Run(place, spec, inputs, cu=SPANS, cut=cut).everything()
    run = Run(place, spec, hurt, cu=SPANS, cut=cut)
    run.do[:, end:] = math.nan
    got = run.everything()
    same(got, want)
    for one in spec.inputs:
        if "t" in one.axes:
            assert not got[f"d {one.name}"][:, end:].any() and got[f"d {one.name}"][:, :end].any()
    assert not got["o"][:, end:].any() and got["o"][:, :end].any()


@FORMS
def test_between_bands_of_nan(place, spec, cu, cut):
    between_bands_of_nan(place, spec, cu, cut)


@EVERYWHERE
def test_one_token_between_bands_of_nan(place, spec):
    one_token_between_bands_of_nan(place, spec)


@FEW_EVERYWHERE
@CUT
def test_nan_past_the_last_sequence(place, spec, cut):
    nan_past_the_last_sequence(place, spec, cut)


# --- the memory itself


def test_makers_give_nan_between_bands():
    like = torch.zeros(3, 4).t()
    with Memory() as memory:
        unwritten = [
            torch.empty(2, 3),
            torch.empty((2, 3), dtype=torch.bfloat16),
            torch.empty_like(like),
            torch.empty_like(like, dtype=torch.complex64),
            like.new_empty((5,)),
            torch.empty_strided((2, 2), (1, 2)),
        ]
        written = [torch.zeros(3), torch.ones(2, 2), torch.zeros_like(like), like.new_zeros(4), torch.full((2,), 7.0)]
        counts = torch.empty(4, dtype=torch.int32)
    assert all(x.isnan().all() for x in unwritten) and unwritten[2].stride() == like.stride()
    assert [float(x.sum()) for x in written] == [0, 4, 0, 0, 14] and (counts == -1).all()
    memory.check()
    assert not torch.empty(100).untyped_storage().nbytes() > 400, "after it memory is as ever"


@pytest.mark.parametrize("at", [-1, 6])
def test_a_write_out_of_bounds_is_seen(at):
    with Memory() as memory:
        x = torch.empty(6)
    base = x.as_strided((1,), (1,), x.storage_offset() + at)
    assert base.isnan().all()  # and a read as well, by what becomes of it
    base.fill_(0.0)
    with pytest.raises(AssertionError, match="memory beside a tensor of empty was written"):
        memory.check()


def test_a_written_input_is_seen():
    with Memory() as memory:
        x = memory.place(torch.arange(4.0))
        y = memory.place(torch.arange(4.0), written=True)
    y += 1
    memory.check()
    x += 1
    with pytest.raises(AssertionError, match="an input"):
        memory.check()


def test_nan_is_no_number():
    x = nan_like(torch.zeros(2))
    with pytest.raises(AssertionError, match="not finite"):
        same({"o": x}, {"o": x})

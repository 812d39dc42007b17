"""The Triton kernels of vector states under the interpreter against the reference in fp64: every gradient.

Tiles are small, so that short sequences have several segments, rows, blocks of channels and pieces.
"""

from __future__ import annotations

import dataclasses
import math

import bf16_interpreter
import bounds
import pytest
import torch
from cases import VECTORS, extreme, make, make_states
from harness import backend_of, compare

from flagen.compare import measure
from flagen.expr import Input, exp, log, maximum, sigmoid, softplus
from flagen.schedule_vector import VectorTile
from flagen.spec import Spec

EVERY = pytest.mark.parametrize("spec", VECTORS, ids=lambda spec: spec.name)
FEW = pytest.mark.parametrize("spec", [one for one in VECTORS if one.name in ("hgrn", "shared_vector")],
                              ids=lambda spec: spec.name)  # fmt: skip
SPANS = [0, 21, 21, 38, 52]  # an empty sequence, sequences that begin and end inside a segment, tokens past the last
ROW = 4  # tokens of a row of the backward, and between checkpoints
x, g, gate, theta = (Input(name, "b t d") for name in ("x", "g", "gate", "theta"))
pace, per, lam = Input("pace", "b t"), Input("per", "b d"), Input("lam", "d")


def tiles(fwd=(4, 4, 4), bwd=(2, ROW, 4), tokens=0):
    """Rows, tokens of a row and channels of both ways, and tokens of a piece: of any schedule."""
    made = [VectorTile(*one, num_warps=2) for one in (fwd, bwd)]
    return lambda s: dataclasses.replace(s, fwd=made[0], bwd=made[1], step=VectorTile(1, 1, 4, 1), LC=ROW, L=tokens)


def run(spec, batch, time, channels, patch=None, **options):
    return compare(spec, batch, time, 1, 1, channels, checkpoint=ROW, patch=patch or tiles(), **options)


@EVERY
def test_one_token(spec):
    run(spec, 2, 1, 4)


@EVERY
def test_less_than_a_segment_and_channels_that_are_no_power_of_two(spec):
    run(spec, 1, 7, 7, want_final=False)


@EVERY
def test_segments_and_a_token_more(spec):
    run(spec, 2, 19, 3, start=False)


@EVERY
def test_a_row_to_a_segment(spec):
    """No rows side by side, and so no scan over rows."""
    run(spec, 1, 19, 8, tiles((1, 2, 8), (1, ROW, 8)))


@EVERY
@pytest.mark.parametrize("tokens", [0, 16], ids=["whole", "pieces"])
def test_rows_of_several_checkpoints(spec, tokens):
    """Those of the forward are as long as two of the backward."""
    run(spec, 2, 37, 3, tiles(fwd=(2, 2 * ROW, 4), tokens=tokens))
    run(spec, 1, 52, 3, tiles(fwd=(2, 2 * ROW, 4), tokens=tokens), cu=SPANS, want_final=False)


@EVERY
def test_packed_sequences(spec):
    out, gradients = run(spec, 1, 60, 3, cu=SPANS)
    assert not out.o[:, SPANS[-1] :].any()
    for one, gradient in zip(spec.inputs, gradients, strict=True):
        assert "t" not in one.axes or not gradient[:, SPANS[-1] :].any()


@EVERY
@pytest.mark.parametrize("tokens", [0, 8], ids=["whole", "pieces"])
def test_empty_sequences_read_nothing_before_the_tensors(spec, tokens, monkeypatch):
    counts = bounds.watch(monkeypatch)
    run(spec, 1, 20, 4, tiles(tokens=tokens), cu=[0, 0, 1, 1, 18, 18])
    assert sum(counts) > 500


@EVERY
def test_pieces(spec):
    run(spec, 2, 43, 3, tiles((4, 2, 4), tokens=16), start=False)


@EVERY
def test_pieces_of_packed_sequences(spec):
    run(spec, 1, 60, 3, tiles((2, 4, 4), (4, ROW, 4), tokens=16), cu=SPANS)


@EVERY
def test_the_schedules_own_tiles(spec):
    compare(spec, 1, 40, 1, 1, 5, checkpoint=None)


@FEW
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bits_beside_fp32_gates(spec, dtype, monkeypatch):
    if dtype == torch.bfloat16:
        bf16_interpreter.repair(monkeypatch)
    run(spec, 1, 20, 4, dtype=dtype, gates=torch.float32)
    run(spec, 1, 20, 4, dtype=dtype)


@pytest.mark.parametrize("tokens", [0, 32], ids=["whole", "pieces"])
@pytest.mark.parametrize("phase", [None, theta], ids=["real", "complex"])
def test_decays_from_zero_to_minus_infinity(phase, tokens):
    spec = Spec("extreme", value=x, log_decay=g, phase=phase)
    inputs = list(make(spec, 1, 70, 1, 1, 6))
    where = spec.inputs.index(g)
    inputs[where] = extreme(inputs[where].shape, torch.Generator().manual_seed(3))
    out, gradients = run(spec, 1, 70, 6, tiles(tokens=tokens), inputs=tuple(inputs))
    assert all(one.isfinite().all() for one in (out.o, *gradients))
    assert not gradients[where][inputs[where] == -math.inf].any()


def test_what_expressions_share_of_every_axis():
    """Evaluated once: of a token, of a channel, of a sequence, and of all three."""
    own, rate, of_all = exp(-softplus(pace)), softplus(per), sigmoid(gate) * exp(lam)
    spec = Spec("sharing", value=x * own * of_all * (1 - own), log_decay=-rate * of_all * own - rate)
    made = backend(spec)[0].plan
    axes = {"".join(sorted(one.leaf.axes)) for one in made.shared.values()}
    assert {"bt", "bd", "d", "bdt"} <= axes
    run(spec, 2, 21, 6, tiles(tokens=8))
    run(spec, 1, 52, 5, cu=SPANS)


def test_gates_far_from_zero():
    """exp overflows in what sigmoids take, and results below 2^-126 are zero."""
    spec = Spec("far", value=x * sigmoid(gate), log_decay=-softplus(gate))
    inputs = list(make(spec, 1, 30, 1, 1, 5))
    where = spec.inputs.index(gate)
    inputs[where][:, 5:25:2] = torch.tensor([-300.0, -100, -88, -40, 0, 40, 87, 100, 300, 3])[None, :, None]
    out, gradients = run(spec, 1, 30, 5, inputs=tuple(inputs))
    assert all(one.isfinite().all() for one in (out.o, *gradients))


@pytest.mark.parametrize("size", [3.0, 1e3, 1e30])
def test_angles_of_any_size_turn_and_do_not_grow(size):
    """Beyond some thousand an angle in fp32 means little, but the state must stay bounded."""
    spec = Spec("turning", value=x, log_decay=g, phase=theta)
    inputs = list(make(spec, 1, 40, 1, 1, 5))
    where = spec.inputs.index(theta)
    inputs[where] = inputs[where] / inputs[where].abs().max() * size
    if size == 3.0:
        run(spec, 1, 40, 5, inputs=tuple(inputs))
        return
    inputs[spec.inputs.index(g)].zero_()
    made, constants = backend(spec)
    out = made.forward(tuple(inputs), constants, 1.0, (), None, True, False)
    most = inputs[spec.inputs.index(x)].abs().sum(1).max()
    assert out.o.isfinite().all() and out.o.abs().max() <= most


def test_a_gate_whose_derivative_is_infinite_at_a_reset():
    spec = Spec("infinite", value=x, log_decay=log(maximum(gate, 0)))
    inputs = list(make(spec, 1, 30, 1, 1, 5))
    where = spec.inputs.index(gate)
    inputs[where] = torch.sigmoid(inputs[where])
    inputs[where][:, 10:14] = 0
    _, gradients = run(spec, 1, 30, 5, inputs=tuple(inputs))
    found = gradients[where]
    assert found.isfinite().all() and not found[:, 10:14].any() and found[:, 15:].any()


# --- the backend alone


def backend(spec, tokens=0):
    made = backend_of(spec, checkpoint=ROW, patch=tiles(tokens=tokens))
    constants = tuple(torch.tensor([0.7]) for _ in made.plan.analysis.constants)
    return made, constants


def everything(spec, inputs, tokens=0, do=None, cu=None):
    """Output, final state and gradients."""
    made, constants = backend(spec, tokens)
    cu_seqlens = None if cu is None else torch.tensor(cu, dtype=torch.int32)
    out = made.forward(inputs, constants, 0.5, (), cu_seqlens, True, True)
    do = torch.ones_like(out.o) if do is None else do
    gradients, _ = made.backward(
        do, (None,), out.o, out.saved, inputs, constants, 0.5, (), cu_seqlens, (True,) * len(inputs), False
    )
    return out.o, out.final[0], gradients


@FEW
@pytest.mark.parametrize("at", [13, 16, 32])
def test_a_later_token_changes_no_bit_of_what_is_before(spec, at):
    inputs = [one.float() for one in make(spec, 1, 40, 1, 1, 6)]
    changed = [one.clone() for one in inputs]
    for one, y in zip(spec.inputs, changed, strict=True):
        if "t" in one.axes:
            y[:, at:] *= 1.5
    do = torch.ones(1, 40, 6)
    do[:, at:] = 0
    (o, _, d), (p, _, e) = (everything(spec, tuple(y), 32, do) for y in (inputs, changed))
    assert torch.equal(o[:, :at], p[:, :at])
    assert not torch.equal(o[:, at], p[:, at])
    for one, y, z in zip(spec.inputs, d, e, strict=True):
        if "t" in one.axes:
            assert torch.equal(y[:, :at], z[:, :at]) and not y[:, at:].any() and y.any()


@FEW
def test_a_sequence_that_is_nan_hurts_no_other(spec):
    inputs = [one.float() for one in make(spec, 1, 60, 1, 1, 6, sequences=4)]
    hurt = [one.clone() for one in inputs]
    for one, y in zip(spec.inputs, hurt, strict=True):
        if "t" in one.axes:
            y[:, SPANS[2] : SPANS[3]] = math.nan
    (o, last, d), (p, end, e) = (everything(spec, tuple(y), 16, cu=SPANS) for y in (inputs, hurt))
    others = torch.ones(60, dtype=torch.bool)
    others[SPANS[2] : SPANS[3]] = False
    assert torch.equal(o[:, others], p[:, others]) and p[:, ~others].isnan().all()
    rows = torch.tensor([0, 1, 3])
    assert torch.equal(last[rows], end[rows])
    for one, y, z in zip(spec.inputs, d, e, strict=True):
        if "t" in one.axes:
            assert torch.equal(y[:, others], z[:, others])


@FEW
def test_any_strides(spec):
    inputs = [one.float() for one in make(spec, 2, 21, 1, 1, 6)]
    want = everything(spec, tuple(inputs))
    # time before batch, every second channel, and a slice of more channels
    for turn in (
        lambda y: y.transpose(0, 1).contiguous().transpose(0, 1),
        lambda y: torch.stack((y, y * math.nan), -1)[..., 0],
        lambda y: torch.cat((y, y * math.nan), -1)[..., : y.shape[-1]],
    ):
        turned = tuple(turn(y) if "t" in one.axes else y for one, y in zip(spec.inputs, inputs, strict=True))
        do = turn(torch.ones_like(want[0]))
        got = everything(spec, turned, do=do)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
        assert all(torch.equal(y, z) for y, z in zip(got[2], want[2], strict=True))


@EVERY
def test_gradients_that_nobody_asks_for_are_not_made(spec):
    made, constants = backend(spec)
    inputs = tuple(one.float() for one in make(spec, 2, 9, 1, 1, 6))
    out = made.forward(inputs, constants, 0.5, (), None, False, True)
    whole = everything(spec, inputs)[2]
    for i in range(len(inputs)):
        needs = tuple(i == j for j in range(len(inputs)))
        got, _ = made.backward(
            torch.ones_like(out.o), (None,), out.o, out.saved, inputs, constants, 0.5, (), None, needs, False
        )
        assert [y is not None for y in got] == list(needs)
        assert torch.equal(got[i], whole[i])


@EVERY
def test_step_by_step_equals_forward(spec):
    made, constants = backend(spec)
    inputs = tuple(one.float() for one in make(spec, 2, 9, 1, 1, 21))
    (start,) = make_states(spec, 2, 1, 1, 21)
    start = start.to(torch.complex64 if start.is_complex() else torch.float32)
    whole = made.forward(inputs, constants, 0.4, (start,), None, True, False)
    kept = start.clone()
    for t in range(9):
        named = zip(spec.inputs, inputs, strict=True)
        now = tuple(y.narrow(one.axes.index("t"), t, 1) if "t" in one.axes else y for one, y in named)
        o = made.step(now, constants, 0.4, (kept,))
        assert o.shape == (2, 1, 21) and measure(o, whole.o[:, t : t + 1]).within(1e-5)
    assert measure(kept, whole.final[0]).within(1e-5)


def test_no_tokens():
    spec = Spec("empty", value=x, log_decay=g)
    made, _ = backend(spec)
    inputs, start = (torch.zeros(2, 0, 3), torch.zeros(2, 0, 3)), torch.randn(2, 3)
    out = made.forward(inputs, (), 1.0, (start,), None, True, True)
    assert out.o.shape == (2, 0, 3) and torch.equal(out.final[0], start) and out.saved[0].shape == (0,)
    none = made.forward(inputs, (), 1.0, (), None, True, False)
    assert not none.final[0].any() and none.final[0].shape == (2, 3)

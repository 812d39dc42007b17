"""Causality, bit for bit: what a change of one token, sequence, row or head must not reach.

A finite change of token t changes no output before it, no state up to it and no gradient of a query before it; no
gradient of a key or a value after it; and where the loss looks at tokens before t alone, no gradient at all. The
gradient of a decay is a sum of products of what lies on both sides, of which the parts that are zero cancel up to
rounding. The bodies run with PyTorch on a CPU, with the kernels on a GPU, and by test_interp_hostile_causality.py with
the kernels under the interpreter.
"""

from __future__ import annotations

import math

import pytest
import torch
from hostile import EVERYWHERE, FEW_EVERYWHERE, Run, inputs_of, multiplied, roles_of, timed

from flagen.compare import measure

TOKENS = 40  # more than one piece of 32, the last chunk in part
SPANS = [0, 11, 11, 28, 36]  # sequences that begin and end inside a chunk, an empty one, tokens past the last
AT = pytest.mark.parametrize(
    ("at", "cut"), [(37, False), (37, True), (32, True)], ids=["in a chunk", "in a piece", "first of a piece"]
)


def _rounding(place, spec) -> float:
    """How far the gradients of key and value may move when an earlier token changes: as a rule by no bit.

    With a phase, by rounding: query and key are turned into the frame of the chunk's start (by PyTorch and by the
    kernels), by the sum of the phases of the chunk's tokens up to them. A gradient is made in that frame and turned
    back, and an earlier token moves the frame: the same number by way of other angles. An output and a query's gradient
    know no later token, and a later token moves no earlier frame, so that these keep every bit. With a decay per token
    or key channel and bf16 inputs the kernels take the decay between two tokens as the difference of sums from the
    chunk's start, which an earlier token moves likewise.
    """
    narrow = place.dtype == torch.bfloat16
    axes = set() if spec.log_decay is None else set(spec.log_decay.axes)
    differences = narrow and "t" in axes and "v" not in axes
    return (2e-2 if narrow else 2e-6) if spec.phase is not None or differences else 0.0


def a_changed_token(place, spec, at, cut, heads=2, tokens=TOKENS):
    """Token `at`, and for the first two parts the gradient of its output."""
    inputs = inputs_of(place, spec, 1, tokens, heads=heads)
    run = Run(place, spec, inputs, cut=cut)
    other = Run(place, spec, multiplied(spec, inputs, at), cut=cut)
    _what_is_before(run, other, at)
    _what_is_before_and_after(run, other, at)
    _what_no_loss_looks_at(run, other, at)


def _what_is_before(run, other, at):
    assert torch.equal(run.out.o[:, :at], other.out.o[:, :at])
    assert not torch.equal(run.out.o[:, at], other.out.o[:, at])
    states = list(zip(run.kept_states(at), other.kept_states(at), strict=True))
    assert states and all(torch.equal(x, y) for x, y in states)


def _what_is_before_and_after(run, other, at):
    do = run.do.clone()
    do[:, at] *= -7
    (got, _), (again, _) = run.backward(), other.backward(do)
    for one in timed(run.spec):
        roles, x, y = roles_of(run.spec, one), got[one.name], again[one.name]
        if roles == {"query"}:
            assert torch.equal(x[:, :at], y[:, :at]), one.name
            assert not torch.equal(x[:, at], y[:, at]), one.name
        # a normaliser divides by what earlier keys gave, so that later gradients depend on them
        if roles <= {"key", "value"} and run.spec.normalizer is None:
            limit = _rounding(run.place, run.spec)
            assert measure(x[:, at + 1 :], y[:, at + 1 :]).within(limit), one.name
            assert not torch.equal(x[:, : at + 1], y[:, : at + 1]), one.name


def _what_no_loss_looks_at(run, other, at):
    """The loss ends before the token: it changes no gradient, and neither it nor a later one has any."""
    do = run.do.clone()
    do[:, at:] = 0
    none = (None,) * len(run.dfinal)
    (got, initial), (again, initial_again) = run.backward(do, none), other.backward(do, none)
    limit = 2e-2 if run.place.dtype == torch.bfloat16 else 2e-6
    for one in run.spec.inputs:
        x, y = got[one.name], again[one.name]
        assert x.isfinite().all() and x.any(), one.name
        exact = not roles_of(run.spec, one) & {"log_decay", "phase"}
        if "t" not in one.axes:
            assert torch.equal(x, y) if exact else measure(x, y).within(limit), one.name
            continue
        early, late = (x[:, :at], y[:, :at]), (x[:, at:], y[:, at:])
        if exact:
            assert torch.equal(*early) and not late[0].any() and not late[1].any(), one.name
        else:
            assert measure(*early).within(limit), one.name
            # what cancels may be as large as the gradients that the loss has
            assert max(float(z.abs().max()) for z in late) <= limit * float(x.abs().max() + 1), one.name
    assert all(torch.equal(x, y) for x, y in zip(initial, initial_again, strict=True))


def a_sequence_that_is_nan(place, spec, cut, heads=2):
    """One of several sequences that share chunks and pieces: all that the others have keeps every bit."""
    inputs = inputs_of(place, spec, 1, TOKENS, SPANS, heads=heads)
    hurt = tuple(x.clone() for x in inputs)
    for one, x in zip(spec.inputs, hurt, strict=True):
        if "t" in one.axes:
            x[:, SPANS[2] : SPANS[3]] = math.nan
        elif "b" in one.axes:
            x[2] = math.nan
    run, other = (Run(place, spec, x, cu=SPANS, cut=cut) for x in (inputs, hurt))
    want, got = run.everything(), other.everything()
    tokens = torch.ones(TOKENS, dtype=torch.bool)
    tokens[SPANS[2] : SPANS[3]] = False
    rows = torch.tensor([0, 1, 3])
    axes = {f"d {one.name}": one.axes for one in spec.inputs} | {"o": "bthv"}
    for name, x in got.items():
        if "t" in axes.get(name, ""):
            x, y = x[:, tokens], want[name][:, tokens]
        elif "b" in axes.get(name, "b"):
            x, y = x[rows], want[name][rows]
        else:
            continue  # the gradient of what all sequences share
        assert x.isfinite().all() and torch.equal(x, y), name
    assert got["o"][:, ~tokens].isnan().all()


def a_head_that_is_nan(place, spec, cut, tokens=TOKENS):
    """One head of one row of the batch: the other row, and the row's other head, keep every bit."""
    inputs = inputs_of(place, spec, 2, tokens)
    hurt = tuple(x.clone() for x in inputs)
    for one, x in zip(spec.inputs, hurt, strict=True):
        if one.axes.startswith("bth"):
            x[1, :, 1] = math.nan
        elif one.axes.startswith("bh"):
            x[1, 1] = math.nan
    run, other = (Run(place, spec, x, cut=cut) for x in (inputs, hurt))
    want, got = run.everything(), other.everything()
    axes = {f"d {one.name}": one.axes for one in spec.inputs} | {"o": "bthv"}
    for name, x in got.items():
        its, y = axes.get(name, "bhkv"), want[name]
        if its.startswith("h"):
            assert torch.equal(x[0], y[0]), name
            continue
        if "t" in its:
            x, y = x.transpose(1, 2), y.transpose(1, 2)
        assert torch.equal(x[0], y[0]) and torch.equal(x[1, 0], y[1, 0]) and x[0].isfinite().all(), name
    assert got["o"][1, :, 1].isnan().any()


@EVERYWHERE
@AT
def test_a_changed_token(place, spec, at, cut):
    a_changed_token(place, spec, at, cut)


@EVERYWHERE
def test_a_sequence_that_is_nan(place, spec):
    a_sequence_that_is_nan(place, spec, cut=True)


@FEW_EVERYWHERE
def test_a_head_that_is_nan(place, spec):
    a_head_that_is_nan(place, spec, cut=True)

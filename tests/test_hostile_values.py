"""Values at the edges of what numbers can be: decays from none to a reset, huge and tiny channels, no tokens at all.

The bodies run with PyTorch on a CPU, with the kernels on a GPU, and by test_interp_hostile_values.py with the kernels
under the interpreter; each holds output, states, gradients and decode against the reference.
"""

from __future__ import annotations

import math
import warnings
from itertools import pairwise

import pytest
import torch
from cases import gb, gk, gs, gv, th, u, wk, wv
from hostile import FEW_EVERYWHERE, GPU, NAMED, PLACE, TORCH, Run, agrees, inputs_of, sizes_of, wherever

import flagen
from flagen import reference
from flagen.compare import measure
from flagen.expr import elu, exp, logsigmoid
from flagen.spec import Spec, SpecWarning, taylor
from flagen.testing import check, make_inputs

TOKENS = 40

with warnings.catch_warnings():
    warnings.simplefilter("ignore", SpecWarning)
    # the log decay is an input as it is, so that a test chooses its every value
    RAW = {
        spec.name: spec
        for spec in (
            Spec("raw", log_decay=gs),
            Spec("raw_u", log_decay=gs, bonus=u),
            Spec("raw_phase_u", log_decay=gs, phase=th, bonus=u),
            Spec("raw_norm", log_decay=gs, normalize=True, feature_map=lambda x: elu(x) + 1),
            Spec("raw_taylor", log_decay=gs, feature_map=taylor(2)),
            Spec("raw_key", log_decay=gk),
            Spec("raw_key_u", log_decay=gk, bonus=u),
            Spec("raw_key_phase", log_decay=gk, phase=th),
            Spec("raw_key_norm", log_decay=gk, normalize=True, feature_map=lambda x: elu(x) + 1),
            Spec("raw_value", log_decay=gv),
            Spec("raw_value_u", log_decay=gv, bonus=u),
            Spec("raw_value_taylor", log_decay=gv, feature_map=taylor(2)),
            Spec("raw_row", log_decay=gb),
            Spec("raw_fixed_key", log_decay=-exp(wk)),
            Spec("raw_fixed_value", log_decay=-exp(wv)),
        )
    }
GATES = {gs, gk, gv, gb, wk, wv}
EDGES = (0.0, -0.0, -1e-42, -1e-30, -1e-7, -1e-3, -1.0, -30.0, -87.5, -100.0, -128.0, -1e4, -3e38, -math.inf)
# of exp: 0 (in fp32 from -104 on), tiny, one, a reset in a few steps, in one, and beyond fp32
EXPONENTS = (-200.0, -90.0, -20.0, 0.0, 3.0, 5.0, 60.0, 100.0)


def op_of(place, spec):
    return flagen.compile(spec, chunk_size=16, backend=place.backend)


def _gated(place, spec, time, choose):
    """Inputs whose gates hold the values of EDGES that `choose` makes of random indices."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for one, x in zip(spec.inputs, inputs_of(place, spec, 1, time), strict=True):
        if one in GATES:
            values = torch.tensor(EXPONENTS if one in (wk, wv) else EDGES)
            index = choose(torch.randint(len(values), x.shape, generator=generator), len(values))
            x = values[index].to(place.device, place.dtype)
        found.append(x)
    return tuple(found)


def decays_mixed_in_a_chunk(place, spec, cut=True):
    """Every value of EDGES beside every other."""
    agrees(Run(place, spec, _gated(place, spec, TOKENS, lambda index, _: index), cut=cut))


def decays_all_alike(place, spec, which):
    """One value of EDGES for every token, head and channel."""
    inputs = _gated(place, spec, 20, lambda index, count: torch.full_like(index, which % count))
    agrees(Run(place, spec, inputs))


def sequences_of_no_tokens(place, spec, cu, cut=False):
    """The final state of such a sequence is its initial state, and so are their gradients."""
    run = Run(place, spec, inputs_of(place, spec, 1, max(cu[-1], 3), cu), cu=cu, cut=cut)
    agrees(run)
    found = run.everything()
    for n, (begin, end) in enumerate(pairwise(cu)):
        if begin == end:
            for i, (start, d_end) in enumerate(zip(run.initial, run.dfinal, strict=True)):
                assert torch.equal(found[f"final {i}"][n], start[n])
                assert torch.equal(found[f"d initial {i}"][n], d_end[n])


def no_tokens(place, spec, cu):
    """T = 0, in a batch or with sequences: the state passes through, and so does its gradient; the rest is empty."""
    inputs = inputs_of(place, spec, 1 if cu else 2, 0, cu)
    run = Run(place, spec, inputs, cu=cu)
    gradients, initial = run.backward()
    assert run.out.o.shape[1] == 0 and run.out.o.shape[0] == (1 if cu else 2)
    pairs = (run.out.final, run.initial), (initial, run.dfinal)
    assert all(torch.equal(x, y) for these, those in pairs for x, y in zip(these, those, strict=True))
    for one, x in zip(spec.inputs, inputs, strict=True):
        assert gradients[one.name].shape == x.shape and not gradients[one.name].any(), one.name


def one_token(place, spec, cu):
    agrees(Run(place, spec, inputs_of(place, spec, 1 if cu else 2, 1, cu), cu=cu))


def a_gate_that_is_nan(place, spec):
    """It is not hidden: from that token on there are no numbers. What is before it in its chunk may be lost as well."""
    at = 19
    inputs = inputs_of(place, spec, 1, 24)
    (gate,) = (x for x, one in zip(inputs, spec.inputs, strict=True) if one in GATES)
    gate.copy_(-gate.abs())
    gate[:, at] = math.nan
    run = Run(place, spec, inputs)
    assert run.out.o[:, :16].isfinite().all() and run.out.o[:, at:].isnan().all()
    assert all(x.isnan().all() for x in run.out.final)


# factors of query, key and value, of which all products that the recurrence forms are finite in fp32
SIZES = {
    "huge query": (1e18, 1.0, 1.0),
    "huge key": (1.0, 1e18, 1.0),
    "huge value": (1.0, 1.0, 1e18),
    "huge query and key": (1e18, 1e18, 1e-18),
    "huge query and value": (1e18, 1e-18, 1e18),
    "huge key and value": (1e-18, 1e18, 1e18),
    "tiny": (1e-18, 1e-18, 1e-18),
    "tiny query": (1e-30, 1.0, 1.0),
    "tiny key": (1.0, 1e-30, 1e30),
    "nothing": (0.0, 0.0, 0.0),
}


def channels_of_any_size(place, spec, factors):
    """Finite wherever the reference in fp32 is, and close to it where that is no denormal number.

    With bf16 operands only half as far: pairs are products with decays since the chunk's start, which are on the way up
    to exp(SPAN) times what they give.
    """
    if place.dtype == torch.bfloat16:
        factors = tuple(factor**0.5 for factor in factors)
    key, value = sizes_of(spec)
    made = make_inputs(spec, T=TOKENS, H=2, K=key, V=value)
    roles = dict(zip(("q", "k", "v"), factors, strict=True))
    roles["r"] = roles["q"]
    inputs = [(x * roles.get(name, 1.0)).to(place.device, place.dtype) for name, x in made.items()]
    scalars = flagen.testing.make_scalars(spec)

    def run(function, tensors):
        leaves = [x.clone().requires_grad_() for x in tensors]
        o, _ = function(*leaves)
        return (o, *torch.autograd.grad(o, leaves, torch.ones_like(o)))

    got = run(lambda *x: op_of(place, spec)(*x, **scalars), inputs)
    want = run(lambda *x: reference.run(spec, x, scalars=scalars), [x.float() for x in inputs])
    seen = 0
    # features of tiny channels are all alike, and gradients of their ratios nothing but rounding
    close = ("o", "v") if spec.normalizer is not None else ("o", *made)
    limit = 3e-2 if place.dtype == torch.bfloat16 else 1e-4
    for name, x, y in zip(("o", *made), got, want, strict=True):
        if not y.isfinite().all():
            continue
        assert x.isfinite().all(), f"{name} is not finite, {spec.name}"
        seen += 1
        if name in close and y.abs().max() > 1e-30:
            assert measure(x, y, floor=1e-30).within(limit), (spec.name, name, measure(x, y))
    assert seen >= 2


ALIKE = ("raw", "raw_key", "raw_value", "raw_key_phase", "raw_row", "raw_fixed_key")


@pytest.mark.parametrize(
    ("place", "name"),
    [
        pytest.param(*at, name, marks=marks, id=f"{at[0]}-{name}")
        for at, marks in [((TORCH,), ()), *((one.values, one.marks) for one in GPU)]
        for name in (ALIKE if at[0].dtype == torch.bfloat16 else RAW)
    ],
)
def test_decays_mixed_in_a_chunk(place, name):
    decays_mixed_in_a_chunk(place, RAW[name])


@PLACE
@pytest.mark.parametrize("which", range(len(EDGES)), ids=[f"{x:g}" for x in EDGES])
@pytest.mark.parametrize("name", ALIKE)
def test_decays_all_alike(place, name, which):
    decays_all_alike(place, RAW[name], which)


LENGTHS = pytest.mark.parametrize(
    "cu",
    [[0, 0, 7, 20], [0, 7, 7, 7, 20], [0, 0, 0], [0, 0, 1, 1, 3]],
    ids=["first", "middle", "all", "one token"],
)


@FEW_EVERYWHERE
@LENGTHS
def test_sequences_of_no_tokens(place, spec, cu):
    sequences_of_no_tokens(place, spec, cu)


@FEW_EVERYWHERE
def test_a_sequence_of_no_tokens_at_the_end(place, spec):
    sequences_of_no_tokens(place, spec, [0, 18, 20, 20])


@FEW_EVERYWHERE
def test_a_sequence_of_no_tokens_where_a_piece_begins(place, spec):
    sequences_of_no_tokens(place, spec, [0, 32, 32, 40], cut=True)


@FEW_EVERYWHERE
@pytest.mark.parametrize("cu", [None, [0, 0], [0, 0, 0]], ids=["dense", "one", "two"])
def test_no_tokens(place, spec, cu):
    no_tokens(place, spec, cu)


@FEW_EVERYWHERE
@pytest.mark.parametrize("cu", [None, [0, 1], [0, 0, 1]], ids=["dense", "one", "two"])
def test_one_token(place, spec, cu):
    one_token(place, spec, cu)


@PLACE
@pytest.mark.parametrize("name", ["raw", "raw_key", "raw_value"])
def test_a_gate_that_is_nan(place, name):
    a_gate_that_is_nan(place, RAW[name])


SIZED = ("mamba2", "gla", "rwkv6", "gateloop", "linear")


@wherever([NAMED[name] for name in SIZED], SIZED, ["mamba2", "gla"])
@pytest.mark.parametrize("factors", SIZES.values(), ids=SIZES)
def test_channels_of_any_size(place, spec, factors):
    channels_of_any_size(place, spec, factors)


def test_a_gate_far_beyond_its_saturation():
    """logsigmoid(x) of +-1e4 and +-inf: no decay and a reset, with finite gradients."""
    spec = Spec("saturated", log_decay=logsigmoid(gk))
    inputs = make_inputs(spec, B=1, T=TOKENS, H=2, K=6, V=5)
    index = torch.randint(6, inputs["gk"].shape, generator=torch.Generator().manual_seed(3))
    inputs["gk"] = torch.tensor([1e4, -1e4, math.inf, -math.inf, 0.0, -100.0])[index]
    check(flagen.compile(spec, backend="torch", chunk_size=16), inputs=inputs, device="cpu")

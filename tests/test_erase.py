"""Correction terms: erase and l2norm in the language, in the analysis and in the reference."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch.nn.functional import normalize

from flagen import reference
from flagen.analysis import analyse, derivative_texts, restored
from flagen.errors import PlanError, SpecError
from flagen.expr import Input, Scalar, exp, head, k, l2norm, logsigmoid, q, sigmoid, silu, tanh, taylor, to_text, v
from flagen.functions import evaluate
from flagen.intervals import interval
from flagen.parse import parse
from flagen.plan import make_plan, without_kernels
from flagen.spec import Spec

a, b, r = Input("a", "b t h k"), Input("b", "b t h k"), Input("r", "b t h k")
beta, gs, gk, gv = Input("beta", "b t h"), Input("gs", "b t h"), Input("gk", "b t h k"), Input("gv", "b t h v")
u, theta = Input("u", "h k"), Input("theta", "b t h")

DELTA = Spec("delta", query=l2norm(q), key=beta * l2norm(k), erase=(l2norm(k), beta * l2norm(k)))
GATED = DELTA.replace("gated", log_decay=gs)
PLUS_LOW_RANK = Spec("plus_low_rank", query=r, log_decay=gk, erase=(-a, b), erase_reads="previous", scale=1)
SPECS = [
    DELTA,
    GATED,
    DELTA.replace("channels", log_decay=gk),
    DELTA.replace("channels_previous", log_decay=gk, erase_reads="previous"),
    PLUS_LOW_RANK,
    PLUS_LOW_RANK.replace("low_rank_decayed", erase_reads="decayed"),
    Spec("low_rank", erase=(a, b)),
    Spec("scalar_low_rank", log_decay=gs, erase=(a, sigmoid(gs) * b), erase_reads="previous"),
    Spec("reflected", query=q - tanh(u) * k, log_decay=logsigmoid(gs), erase=(a, 2 * sigmoid(beta) * a)),
]
EVERY = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)


def drawn(spec, batch=2, time=6, heads=2, key=4, value=3, seed=0):
    """Inputs of moderate size: log decays <= 0, vectors of about unit norm."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for one in spec.inputs:
        sizes = {"b": batch, "t": time, "h": heads, "k": key, "v": value}
        x = torch.randn([sizes[axis] for axis in one.axes], generator=generator, dtype=torch.float64)
        if one.name in ("gs", "gk"):
            x = -x.abs() / 2
        if one.name in ("a", "b"):
            x = x * key**-0.5
        if one.name == "beta":
            x = 2 * torch.sigmoid(x)
        found.append(x)
    return tuple(found)


# --- the language


def test_equations():
    assert GATED.equations == [
        "S_t = X_t - (beta_t * l2norm(k_t)) (l2norm(k_t)^T X_t) + (beta_t * l2norm(k_t)) v_t^T",
        "X_t = exp(gs_t) S_{t-1}",
        "o_t = scale * l2norm(q_t)^T S_t",
    ]
    assert PLUS_LOW_RANK.equations[0] == "S_t = diag(exp(gk_t)) S_{t-1} - b_t ((-a_t)^T S_{t-1}) + k_t v_t^T"
    assert Spec("s", erase=(a, b)).equations[0] == "S_t = S_{t-1} - b_t (a_t^T S_{t-1}) + k_t v_t^T"
    assert Spec("s", log_decay=gs, erase=(a, b)).latex().split(" \\\\\n") == [
        r"S_t &= X_t - b_{t} \left(a_{t}^{\top} X_t\right) + k_{t}\, v_{t}^{\top}",
        r"X_t &= \exp\left(\mathrm{gs}_{t}\right)\, S_{t-1}",
        r"o_t &= s\, q_{t}^{\top} S_t",
    ]
    assert r"\operatorname{l2norm}\left(k_{t}\right)" in DELTA.latex()


@EVERY
def test_specs_travel(spec):
    assert Spec.from_json(spec.to_json()) == spec and spec.replace(spec.name) == spec
    assert hash(Spec.from_json(spec.to_json())) == hash(spec)
    assert restored(spec, json.loads(json.dumps(derivative_texts(analyse(spec))))) == analyse(spec)
    assert "erase=(" in repr(spec) and str(spec).startswith(f"{spec.name}\n    S_t = ")


def test_inputs_of_erase_come_last():
    assert [one.name for one in PLUS_LOW_RANK.inputs] == ["r", "k", "v", "gk", "a", "b"]
    assert [one.name for one in GATED.inputs] == ["q", "k", "beta", "v", "gs"]


def test_erase_is_part_of_a_specs_value():
    other = PLUS_LOW_RANK.replace("plus_low_rank", erase_reads="decayed")
    assert other != PLUS_LOW_RANK and other.to_json() != PLUS_LOW_RANK.to_json()
    assert "erase_reads='previous'" in repr(PLUS_LOW_RANK) and "erase_reads" not in repr(other)
    assert PLUS_LOW_RANK.replace("s", erase=None).erase_reads == "decayed"
    assert DELTA.replace("s", erase=(k, k)) != DELTA


REFUSED = [
    (lambda: Spec("s", erase=k), "erase must be a pair .* got Input"),
    (lambda: Spec("s", erase=(k, k, k)), "erase must be a pair .* got 3 of them"),
    (lambda: Spec("s", erase=(k, None)), "erase needs both"),
    (lambda: Spec("s", erase=("k", k)), "erase_a: expected an expression"),
    (lambda: Spec("s", erase=(k, exp)), "erase_b must be an expression of inputs, got a function"),
    (lambda: Spec("s", erase=(k, v)), "erase_b = v has the axis v"),
    (lambda: Spec("s", erase=(beta, k)), "erase_a = beta lacks the axes k"),
    (lambda: Spec("s", erase=(u, k)), "erase_a = u lacks the axes b t"),
    (lambda: Spec("s", erase=(k, k), erase_reads="next"), "erase_reads must be 'decayed' .* got 'next'"),
    (lambda: Spec("s", erase=(k, k), erase_reads=None), "erase_reads must be"),
    (lambda: Spec("s", erase_reads="previous"), "there is no erase; drop it"),
    (lambda: Spec("s", erase=(k, k), log_decay=logsigmoid(gv)), "erase with a decay per value channel"),
    (lambda: Spec("s", erase=(k, k), phase=theta), "erase with a phase"),
    (lambda: Spec("s", erase=(k, k), bonus=u), "erase with a bonus"),
    (lambda: Spec("s", erase=(k, k), feature_map=taylor(2)), "erase with taylor"),
    (lambda: Spec("s", erase=(k, k), normalize=lambda n: n * n + 1), "erase with normalize"),
    (lambda: Spec("s", value=v * l2norm(v)), "value uses l2norm\\(v\\); l2norm is of a vector of key channels"),
    (lambda: Spec("s", log_decay=-(l2norm(k) ** 2)), "log_decay uses l2norm"),
    (lambda: Spec("s", bonus=l2norm(u)), "bonus uses l2norm"),
    (lambda: Spec("s", key=k * l2norm(beta)), "beta has no axis k"),
    (lambda: Spec("s", key=l2norm(k * l2norm(q))), "l2norm within l2norm"),
    (lambda: Spec("s", normalize=lambda n: l2norm(n) + 2), "normalize uses l2norm"),
    (lambda: Spec("s", log_decay=-exp(Input("l2norm", "h"))), "a function of the language"),
    (lambda: Spec("s", log_decay=-exp(Input("unit0", "h"))), "generated kernels use"),
    (lambda: Spec("s", key=l2norm(k / 0)), "finite value|divides by 0"),
    (lambda: Spec("s", key=l2norm((((k**16) ** 16) ** 16) ** 16)), "use smaller powers"),
]  # fmt: skip


@pytest.mark.parametrize(("declare", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refused(declare, message):
    with pytest.raises(SpecError, match=message) as caught:
        declare()
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"erase": ["k"]}, "must list two expressions"),
        ({"erase": "k"}, "'erase' must be list"),
        ({"erase": ["k", 3]}, "erase_b: an expression must be text"),
        ({"erase": ["k", "bta * k"]}, "unknown name 'bta'; did you mean 'beta'"),
        ({"erase": ["k", "l2norm(k, 2)"]}, "takes 1 argument"),
        ({"erase_reads": "next"}, "erase_reads must be"),
        ({"erase_reads": 1}, "'erase_reads' must be str"),
        ({"scalars": ["rate"]}, "used by no expression"),
    ],
)
def test_bad_json(change, message):
    data = json.loads(DELTA.to_json()) | change
    with pytest.raises(SpecError, match=message):
        Spec.from_json(json.dumps(data))


def test_a_scalar_of_erase_alone_travels():
    spec = Spec("s", erase=(k, k * Scalar("rate")))
    assert [one.name for one in spec.scalars] == ["rate"] and Spec.from_json(spec.to_json()) == spec


def test_l2norm():
    assert to_text(l2norm(silu(k)) * beta) == "l2norm(silu(k)) * beta"
    assert parse("l2norm(k) / 2", {"k": k}) == l2norm(k) / 2
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(evaluate(l2norm(k), {"k": x}, 4), normalize(x, dim=-1), rtol=1e-5, atol=0)
    turned = evaluate(l2norm(k) * 2, {"k": x.mT}, 4, channel=-2)
    torch.testing.assert_close(turned, evaluate(l2norm(k) * 2, {"k": x}, 4).mT)
    assert not evaluate(l2norm(k), {"k": 0 * x}, 4).any()
    found = interval(l2norm(exp(k)))
    assert (found.low, found.high, found.is_positive) == (0, 1, True)
    assert (interval(l2norm(k)).low, interval(l2norm(k)).high) == (-1, 1)


def test_a_feature_map_may_normalise():
    spec = Spec("s", feature_map=lambda x: l2norm(silu(x)))
    assert spec.key == l2norm(silu(k)) and Spec.from_json(spec.to_json()) == spec


# --- the analysis


@pytest.mark.parametrize(
    ("arguments", "kind", "factors"),
    [
        ({"key": beta * k, "erase": (k, beta * k)}, "delta", ("v * beta", "beta")),
        ({"erase": (k, k)}, "delta", ("v", "1")),
        ({"erase": (-k, k)}, "delta", ("v", "-1")),
        ({"key": k / beta, "erase": (2 * k, -k * sigmoid(gs))}, "delta", ("v * (1 / beta)", "sigmoid(gs) * -2")),
        ({"key": sigmoid(a) * k, "erase": (k * sigmoid(a) * beta, sigmoid(a) * (k * head))}, "delta",
         ("v", "c0 * beta")),
        ({"erase": (a, beta * a)}, "householder", None),
        ({"erase": (k, k * sigmoid(a))}, "general", None),
        ({"erase": (a, k)}, "general", None),
        ({"key": k + k, "erase": (k, k)}, "householder", None),
    ],
)  # fmt: skip
def test_structures(arguments, kind, factors):
    analysis = analyse(Spec("s", **arguments))
    assert analysis.erase == kind
    if factors is not None:
        assert (str(analysis.role("value")), str(analysis.role("erase"))) == factors
        assert analysis.role("erase_a") is analysis.role("erase_b") is None
    else:
        assert analysis.role("erase_a") is not None and analysis.role("erase") is None


def test_facts():
    analysis = analyse(GATED)
    assert (analysis.erase, analysis.erase_previous, analysis.decay) == ("delta", False, "scalar")
    assert [(one.name, one.axes, str(expr)) for one, expr in analysis.units] == [
        ("unit0", "bthk", "q"),
        ("unit1", "bthk", "k"),
    ]
    assert {(role, one.name): str(expr) for role, one, expr in analysis.gradients} == {
        ("query", "unit0"): "1",
        ("key", "unit1"): "1",
        ("value", "v"): "beta",
        ("value", "beta"): "v",
        ("log_decay", "gs"): "1",
        ("erase", "beta"): "1",
        ("unit0", "q"): "1",
        ("unit1", "k"): "1",
    }
    assert analyse(PLUS_LOW_RANK).erase_previous and analyse(Spec("s")).erase == "none"
    assert "erase: delta, reads the decayed state" in str(analysis)


def test_there_are_no_kernels_and_one_place_says_so():
    assert not without_kernels(analyse(Spec("s")))
    for spec, what in ((DELTA, "erase"), (Spec("s", key=l2norm(k)), "l2norm")):
        assert without_kernels(analyse(spec)) == f"there are no Triton kernels for {what} yet"
        with pytest.raises(PlanError, match=f"{spec.name}: there are no Triton kernels for {what} yet; compile it"):
            make_plan(analyse(spec))


# --- the reference


def by_hand(spec, inputs, state, scale):
    """The recurrence with matrices, in the order in which it is read."""
    values = {one.name: x for one, x in zip(spec.inputs, inputs, strict=True)}

    def of(expr, t):
        now = {}
        for one in spec.inputs:
            x = values[one.name]
            x = x.select(one.axes.index("t"), t) if "t" in one.axes else x.unsqueeze(0)
            now[one.name] = x if one.axes[-1] in "kv" else x.unsqueeze(-1)
        return evaluate(expr, now, 2)

    outputs = []
    for t in range(inputs[0].shape[1]):
        previous = state
        decayed = state if spec.log_decay is None else of(spec.log_decay, t).exp().unsqueeze(-1) * state
        erase_a, erase_b = (of(expr, t) for expr in spec.erase)
        read = torch.einsum("bhk,bhkv->bhv", erase_a, previous if spec.erase_reads == "previous" else decayed)
        state = decayed - torch.einsum("bhk,bhv->bhkv", erase_b, read)
        state = state + torch.einsum("bhk,bhv->bhkv", of(spec.key, t), of(spec.value, t))
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", of(spec.query, t), state))
    return torch.stack(outputs, 1), state


@EVERY
def test_the_reference_is_the_recurrence(spec):
    inputs = drawn(spec)
    start = torch.randn(2, 2, 4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    want, want_final = by_hand(spec, inputs, start, 0.7)
    o, final = reference.run(spec, inputs, scale=0.7, initial_state=start, output_final_state=True)
    torch.testing.assert_close(o, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(final, want_final, rtol=1e-12, atol=1e-12)


@EVERY
@pytest.mark.parametrize("segment", [None, 2])
def test_autograd_agrees_with_finite_differences(spec, segment):
    inputs = [x.requires_grad_() for x in drawn(spec, time=4, key=3, value=2)]
    start = torch.randn(2, 2, 3, 2, dtype=torch.float64, requires_grad=True)

    def outputs(*tensors):
        *given, state = tensors
        return reference.run(spec, given, initial_state=state, output_final_state=True, segment=segment)

    assert torch.autograd.gradcheck(outputs, (*inputs, start), fast_mode=True)


@EVERY
def test_the_whole_equals_its_pieces_with_carried_state(spec):
    inputs = drawn(spec, time=9)
    whole, final = reference.run(spec, inputs, output_final_state=True)
    pieces, state = [], None
    for begin, end in ((0, 1), (1, 5), (5, 5), (5, 9)):
        now = [x[:, begin:end] if "t" in one.axes else x for one, x in zip(spec.inputs, inputs, strict=True)]
        o, state = reference.run(spec, now, initial_state=state, output_final_state=True)
        pieces.append(o)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=1e-12, atol=1e-12)


def test_sequences_in_one_row_equal_separate_calls():
    inputs = drawn(GATED, batch=1, time=9)
    together, final = reference.run(GATED, inputs, cu_seqlens=[0, 4, 4, 8], output_final_state=True)
    for i, (begin, end) in enumerate(((0, 4), (4, 4), (4, 8))):
        o, state = reference.run(GATED, [x[:, begin:end] for x in inputs], output_final_state=True)
        torch.testing.assert_close(together[:, begin:end], o)
        torch.testing.assert_close(final[i : i + 1], state)
    assert not together[:, 8:].any()


def test_a_full_erase_replaces_what_a_key_holds():
    """With beta = 1 and a unit key the state answers that key with the last value, whatever it held before."""
    query, key, rate, value = drawn(DELTA, batch=1, heads=1)
    rate = torch.ones_like(rate)
    o, final = reference.run(DELTA, (key, key, rate, value), scale=1.0)
    torch.testing.assert_close(o, value, rtol=1e-5, atol=1e-5)
    assert final is None


def test_a_reset_forgets_only_what_is_not_read_before_it():
    for spec, forgets in ((PLUS_LOW_RANK.replace("decayed", erase_reads="decayed"), True), (PLUS_LOW_RANK, False)):
        inputs = list(drawn(spec, batch=1))
        inputs[spec.inputs.index(gk)][:, 3] = -math.inf
        inputs = [x.requires_grad_() for x in inputs]
        o, _ = reference.run(spec, inputs)
        fresh, _ = reference.run(spec, [x[:, 3:] for x in inputs])
        assert torch.allclose(o[:, 3:], fresh) == forgets
        gradients = torch.autograd.grad(o.sum(), inputs)
        assert all(x.isfinite().all() for x in gradients)
        assert not gradients[spec.inputs.index(gk)][:, 3].any()

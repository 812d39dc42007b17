"""Correction terms: erase and l2norm in the language, in the analysis and in the reference."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from cases import ALL, SCALARS, WITHOUT_KERNELS, a, b, beta, constants_of, error, expected, extreme, gk, gs, gv, make, u
from torch.nn.functional import normalize

import flagen
from flagen import op, reference
from flagen.analysis import analyse, derivative_texts, restored
from flagen.errors import PlanError, SpecError
from flagen.expr import Input, Scalar, exp, head, k, l2norm, logsigmoid, q, sigmoid, silu, taylor, to_text, v
from flagen.functions import evaluate
from flagen.intervals import interval
from flagen.parse import parse
from flagen.plan import make_plan
from flagen.samples import make_inputs, make_scalars
from flagen.spec import Spec
from flagen.testing import check
from flagen.torch_backend import TorchBackend

r, theta = Input("r", "b t h k"), Input("theta", "b t h")
NAMED = {spec.name: spec for spec in ALL + WITHOUT_KERNELS}
DELTA = Spec("delta", query=l2norm(q), key=beta * l2norm(k), erase=(l2norm(k), beta * l2norm(k)))
GATED = DELTA.replace("gated", log_decay=gs)
PLUS_LOW_RANK = Spec("plus_low_rank", query=r, log_decay=gk, erase=(-a, b), erase_reads="previous", scale=1)
ERASING = [spec for spec in ALL if spec.erase is not None]
EVERY = pytest.mark.parametrize("spec", ERASING, ids=lambda spec: spec.name)
TRAVELLERS = pytest.mark.parametrize("spec", ERASING + WITHOUT_KERNELS, ids=lambda spec: spec.name)


def drawn(spec, batch=2, time=6, heads=2, key=4, value=3, seed=0):
    """Inputs as cases makes them, but for gates that are log decays themselves."""
    inputs = make(spec, batch, time, heads, key, value, seed=seed)
    direct = spec.log_decay in (gs, gk)
    return tuple(
        -x.abs() if direct and one == spec.log_decay else x for one, x in zip(spec.inputs, inputs, strict=True)
    )


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


@TRAVELLERS
def test_specs_travel(spec):
    assert Spec.from_json(spec.to_json()) == spec and spec.replace(spec.name) == spec
    assert hash(Spec.from_json(spec.to_json())) == hash(spec)
    assert restored(spec, json.loads(json.dumps(derivative_texts(analyse(spec))))) == analyse(spec)
    assert ("erase=(" in repr(spec)) == (spec.erase is not None) and str(spec).startswith(f"{spec.name}\n    S_t = ")


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
    assert not analyse(Spec("s")).without_kernels
    assert not analyse(DELTA).without_kernels and make_plan(analyse(DELTA)).erase
    fixed = DELTA.replace("fixed", erase=(beta * l2norm(u), beta * l2norm(u)))
    timeless = "an erase with l2norm of a vector without time"
    for spec, what in ((fixed, timeless), (Spec("s", key=l2norm(k)), "l2norm")):
        assert analyse(spec).without_kernels == f"there are no Triton kernels for {what} yet"
        with pytest.raises(PlanError, match=f"{spec.name}: there are no Triton kernels for {what} yet; compile it"):
            make_plan(analyse(spec))


# --- the reference


def run(spec, inputs, **options):
    return reference.run(spec, inputs, scalars=SCALARS, **options)


def by_hand(spec, inputs, state, scale):
    """The recurrence with matrices, in the order in which it is read."""
    values = {one.name: x for one, x in zip(spec.inputs, inputs, strict=True)}

    def of(expr, t):
        now = dict(SCALARS) | {"head": torch.arange(2.0, dtype=torch.float64).view(-1, 1)}
        for one in spec.inputs:
            x = values[one.name]
            x = x.select(one.axes.index("t"), t) if "t" in one.axes else x
            x = x if "b" in one.axes else x.unsqueeze(0)
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
    o, final = run(spec, inputs, scale=0.7, initial_state=start, output_final_state=True)
    torch.testing.assert_close(o, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(final, want_final, rtol=1e-12, atol=1e-12)


@EVERY
@pytest.mark.parametrize("segment", [None, 2])
def test_autograd_agrees_with_finite_differences(spec, segment):
    inputs = [x.requires_grad_() for x in drawn(spec, time=4, key=3, value=2)]
    start = torch.randn(2, 2, 3, 2, dtype=torch.float64, requires_grad=True)

    def outputs(*tensors):
        *given, state = tensors
        return run(spec, given, initial_state=state, output_final_state=True, segment=segment)

    assert torch.autograd.gradcheck(outputs, (*inputs, start), fast_mode=True)


@EVERY
def test_the_whole_equals_its_pieces_with_carried_state(spec):
    inputs = drawn(spec, time=9)
    whole, final = run(spec, inputs, output_final_state=True)
    pieces, state = [], None
    for begin, end in ((0, 1), (1, 5), (5, 5), (5, 9)):
        now = [x[:, begin:end] if "t" in one.axes else x for one, x in zip(spec.inputs, inputs, strict=True)]
        o, state = run(spec, now, initial_state=state, output_final_state=True)
        pieces.append(o)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=1e-12, atol=1e-12)


def test_sequences_in_one_row_equal_separate_calls():
    inputs = drawn(GATED, batch=1, time=9)
    together, final = run(GATED, inputs, cu_seqlens=[0, 4, 4, 8], output_final_state=True)
    for i, (begin, end) in enumerate(((0, 4), (4, 4), (4, 8))):
        o, state = run(GATED, [x[:, begin:end] for x in inputs], output_final_state=True)
        torch.testing.assert_close(together[:, begin:end], o)
        torch.testing.assert_close(final[i : i + 1], state)
    assert not together[:, 8:].any()


def test_a_full_erase_replaces_what_a_key_holds():
    """With beta = 1 and a unit key the state answers that key with the last value, whatever it held before."""
    _, key, rate, value = drawn(DELTA, batch=1, heads=1)
    rate = torch.ones_like(rate)
    o, final = run(DELTA, (key, key, rate, value), scale=1.0)
    torch.testing.assert_close(o, value, rtol=1e-5, atol=1e-5)
    assert final is None


def test_a_reset_forgets_only_what_is_not_read_before_it():
    for spec, forgets in ((PLUS_LOW_RANK.replace("decayed", erase_reads="decayed"), True), (PLUS_LOW_RANK, False)):
        inputs = list(drawn(spec, batch=1))
        inputs[spec.inputs.index(gk)][:, 3] = -math.inf
        inputs = [x.requires_grad_() for x in inputs]
        o, _ = run(spec, inputs)
        fresh, _ = run(spec, [x[:, 3:] for x in inputs])
        assert torch.allclose(o[:, 3:], fresh) == forgets
        gradients = torch.autograd.grad(o.sum(), inputs)
        assert all(x.isfinite().all() for x in gradients)
        assert not gradients[spec.inputs.index(gk)][:, 3].any()


# --- the torch path, beyond what test_torch_backend asks of every spec


def compared(spec, inputs, *, dtype=torch.float64, chunk=None, start=True):
    """The largest error of output, state and gradients of the torch path, and its gradients."""
    backend = TorchBackend(analyse(spec), chunk)
    inputs = tuple(x.to(dtype) for x in inputs)
    sizes = {one.name: x for one, x in zip(spec.inputs, inputs, strict=True)}
    heads, key, value = *sizes["k"].shape[2:], sizes["v"].shape[-1]
    generator = torch.Generator().manual_seed(5)
    initial = (torch.randn(1, heads, key, value, generator=generator, dtype=torch.float64),) if start else ()
    constants = constants_of(backend.analysis, heads)
    o, final, do, dfinal, want = expected(spec, inputs, 0.3, initial, None)
    out = backend.forward(inputs, constants, 0.3, initial, None, True, True)
    got, d_initial = backend.backward(
        do, dfinal, out.o, out.saved, inputs, constants, 0.3, initial, None, (True,) * len(inputs), start
    )
    pairs = zip((out.o, *out.final, *got, *d_initial), (o, *final, *want), strict=True)
    return max(error(x, y) for x, y in pairs), dict(zip((one.name for one in spec.inputs), got, strict=True))


@pytest.mark.parametrize("dtype,chunk,limit", [(torch.float64, 16, 1e-11), (torch.float32, None, 5e-6)])
@pytest.mark.parametrize("reads", ["decayed", "previous"])
@pytest.mark.parametrize("gate", [gs, gk], ids=lambda gate: gate.name)
@pytest.mark.parametrize("erase", [(k, beta * k), (a, b)], ids=["delta", "low_rank"])
def test_decays_from_zero_to_minus_infinity(erase, gate, reads, chunk, dtype, limit):
    key = beta * k if erase[0] == k else k
    spec = Spec("extreme", key=key, log_decay=gate, erase=erase, erase_reads=reads)
    inputs = dict(zip(spec.inputs, make(spec, 1, 80, 2, 16, 12), strict=True))
    inputs[k] = normalize(inputs[k], dim=-1)
    inputs[gate] = extreme(inputs[gate].shape, torch.Generator().manual_seed(3))
    worst, gradients = compared(spec, inputs.values(), dtype=dtype, chunk=chunk)
    assert worst < limit
    assert all(x.isfinite().all() for x in gradients.values())
    assert not gradients[gate.name][inputs[gate] == -math.inf].any()


@pytest.mark.parametrize("size,most,limit", [(1.0, 2.0, 3e-6), (1.3, 1.0, 1e-5), (0.2, 2.0, 3e-6), (1.0, 0.0, 3e-6)])
@pytest.mark.parametrize("gated", [False, True])
def test_reflections_and_keys_of_any_norm(size, most, limit, gated):
    """beta up to 2, where what a key holds is turned round, and keys for which the state grows with every token."""
    spec = Spec("any_norm", key=beta * k, log_decay=logsigmoid(gs + 3) if gated else None, erase=(k, beta * k))
    inputs = dict(zip(spec.inputs, make(spec, 1, 100, 1, 16, 12), strict=True))
    inputs[k] = size * normalize(inputs[k], dim=-1)
    inputs[beta] = torch.full_like(inputs[beta], most)
    assert compared(spec, inputs.values())[0] < 1e-11
    assert compared(spec, inputs.values(), dtype=torch.float32)[0] < limit


def test_the_same_key_again_and_again():
    """The chunk's matrix is then as full as can be."""
    spec = Spec("again", key=beta * k, erase=(k, beta * k))
    inputs = dict(zip(spec.inputs, make(spec, 1, 130, 2, 8, 6), strict=True))
    inputs[k] = normalize(inputs[k][:, :1], dim=-1).expand(-1, 130, -1, -1)
    for most, limit in ((0.05, 2e-6), (1.0, 2e-6), (2.0, 4e-5)):
        inputs[beta] = torch.full_like(inputs[beta], most)
        assert compared(spec, inputs.values())[0] < 1e-11
        assert compared(spec, inputs.values(), dtype=torch.float32)[0] < limit


@pytest.mark.parametrize(
    "name", ["delta_key_previous", "delta_fixed_key", "low_rank", "low_rank_key", "low_rank_scalar"]
)
def test_a_later_token_changes_no_bit_of_an_earlier_output(name):
    spec = NAMED[name]
    inputs = make(spec, 1, 100, 2, 16, 16, dtype=torch.float32)
    changed = tuple(x.clone() for x in inputs)
    for one, x in zip(spec.inputs, changed, strict=True):
        if "t" in one.axes:
            x[:, 37:] *= 50 if one.name in ("q", "v") else 2
    backend, constants = TorchBackend(analyse(spec)), ()
    out, other = (backend.forward(x, constants, 0.4, (), None, False, False).o for x in (inputs, changed))
    assert torch.equal(out[:, :37], other[:, :37]) and not torch.equal(out, other)


@pytest.mark.parametrize("name", ["delta_key_previous", "low_rank_key", "low_rank_row_previous", "normed"])
def test_only_what_is_asked_for(name):
    spec = NAMED[name]
    backend = TorchBackend(analyse(spec), 16)
    inputs = make(spec, 2, 40, 2, 6, 5)
    out = backend.forward(inputs, (), 0.4, (), None, True, True)
    do = torch.randn(out.o.shape, dtype=torch.float64)
    common = (out.o, out.saved, inputs, (), 0.4, (), None)
    every, _ = backend.backward(do, out.final, *common, (True,) * len(inputs), False)
    for i in range(len(inputs)):
        needs = tuple(i == j for j in range(len(inputs)))
        one, _ = backend.backward(do, out.final, *common, needs, False)
        assert [x is not None for x in one] == list(needs)
        assert error(one[i], every[i]) < 1e-12


# --- through the pipeline


def test_there_are_no_kernels_to_ask_for(monkeypatch):
    monkeypatch.setattr(op, "_interpreted", lambda: True)  # where other specs would run their kernels on the CPU
    assert flagen.compile(GATED)._checks.triton == {"cuda", "cpu"}
    assert flagen.compile(NAMED["normed"])._checks.triton == frozenset()
    assert flagen.compile(NAMED["normed"]).plan is None
    assert flagen.compile(NAMED["normed"]).source.startswith("# normed: there are no Triton kernels for l2norm yet")
    with pytest.raises(PlanError, match="normed: there are no Triton kernels for l2norm yet; compile it with backend="):
        flagen.compile(NAMED["normed"], backend="triton")
    with pytest.raises(PlanError, match="there are no Triton kernels for l2norm yet"):
        flagen.emit(NAMED["normed"])


def test_a_warm_start_needs_no_sympy(tmp_path):
    code = (
        "import sys, flagen, torch; from flagen import k, l2norm;"
        "op = flagen.compile(flagen.Spec('warm', erase=(l2norm(k), k)));"
        "x = torch.randn(1, 5, 1, 4); op(x, x, x);"
        "print(*(name for name in ('sympy', 'jinja2', 'triton') if name in sys.modules))"
    )
    environment = os.environ | {"FLAGEN_CACHE_DIR": str(tmp_path)}
    found = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True).stdout
        for _ in range(2)
    ]
    assert [text.split() for text in found] == [["sympy", "jinja2"], []]


@EVERY
def test_check(spec):
    compiled = flagen.compile(spec, chunk_size=16, backend="torch")
    check(compiled, B=1, T=21, H=2, K=6, V=5, dtype=torch.bfloat16, device="cpu")
    check(compiled, T=30, H=2, K=6, V=5, device="cpu", cu_seqlens=[0, 3, 3, 27], seed=1)


def test_autocast_casts_vectors_and_no_numbers():
    compiled = flagen.compile(GATED, backend="torch")
    assert dict(zip((one.name for one in GATED.inputs), compiled._casts, strict=True)) == {
        "q": True, "k": True, "beta": False, "v": True, "gs": False
    }  # fmt: skip
    assert flagen.compile(PLUS_LOW_RANK)._casts == (True, True, True, False, True, True)


def test_samples_keep_the_state():
    for spec in ERASING:
        inputs = make_inputs(spec, B=1, T=400, H=1, K=16, V=8)
        o, _ = reference.run(spec, tuple(inputs.values()), scalars=make_scalars(spec))
        early, late = o[:, 20:60].square().mean(), o[:, -40:].square().mean()
        assert o.isfinite().all() and 1e-3 < late / early < 1e6, spec.name
    strength = make_inputs(DELTA, T=500)["beta"]
    assert (strength > 0).all() and (strength < 1).all() and float(strength.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(make_inputs(PLUS_LOW_RANK, K=64)["a"].norm(dim=-1).mean()) == pytest.approx(0.5, rel=0.02)
    bare = Spec("bare", key=beta * k, erase=(k, beta * k))
    assert float(make_inputs(bare, K=64)["k"].norm(dim=-1).mean()) == pytest.approx(1, rel=0.02)
    assert float(make_inputs(DELTA, K=64)["k"].norm(dim=-1).mean()) == pytest.approx(8, rel=0.02)

"""The reference against itself, against closed forms, and against numerical derivatives."""

from __future__ import annotations

import math
import warnings
from itertools import pairwise

import pytest
import torch

from flagen import reference, specs
from flagen.expr import (
    Input,
    Scalar,
    exp,
    head,
    heads,
    k,
    log,
    logsigmoid,
    maximum,
    q,
    sigmoid,
    softplus,
    sqrt,
    v,
)
from flagen.expr import abs as absolute
from flagen.samples import make_inputs, make_scalars, make_state
from flagen.spec import Spec, SpecWarning, taylor

gs, gk, gv = Input("gs", "b t h"), Input("gk", "b t h k"), Input("gv", "b t h v")
gb, wk, u, ut = Input("gb", "b h"), Input("wk", "h k"), Input("u", "h k"), Input("ut", "b t h k")
th = Input("th", "b t h k")
SHIPPED = [specs.get(name) for name in specs.names() if not specs.get(name).vector]  # those have tests of their own

with warnings.catch_warnings():
    warnings.simplefilter("ignore", SpecWarning)
    OTHERS = [
        Spec("plain"),
        Spec("row", log_decay=logsigmoid(gb) * (1 + head) / heads * Scalar("rate")),
        Spec("fixed_key", log_decay=-exp(wk), bonus=ut),
        Spec("per_value", log_decay=logsigmoid(gv), bonus=u, key=softplus(k)),
        Spec("norm_max", log_decay=logsigmoid(gs), normalize=lambda n: maximum(absolute(n), 1)),
        Spec("norm_bonus", log_decay=logsigmoid(gk), bonus=absolute(u), feature_map=exp, normalize=True),
        Spec("taylor_1", log_decay=logsigmoid(gs), feature_map=taylor(1)),
        Spec("taylor_value", log_decay=logsigmoid(gv), feature_map=taylor(2)),
        Spec("phase_alone", phase=gb),
        Spec("phase_bonus", log_decay=logsigmoid(gs), phase=th, bonus=u),
        Spec("shared", query=q * sigmoid(gs), value=v * gs, log_decay=logsigmoid(gs)),
    ]
ALL = SHIPPED + OTHERS
EVERY = pytest.mark.parametrize("spec", ALL, ids=lambda spec: spec.name)


def drawn(spec, *, double=True, **sizes):
    found = make_inputs(spec, dtype=torch.float64 if double else torch.float32, **sizes)
    return tuple(found.values())


def run(spec, inputs, **options):
    return reference.run(spec, inputs, scalars=make_scalars(spec), **options)


def leaves(tensors):
    return tuple(x.detach().clone().requires_grad_() for x in tensors)


def parts_of(state):
    return (state,) if isinstance(state, torch.Tensor) else tuple(state)


def whole_state(spec, parts):
    return parts if spec.normalizer is not None else parts[0]


def _unheld(*state):
    """S and z, times what a stabilised state is held divided by."""
    scale = state[2].exp() if len(state) == 3 else None
    return [x if scale is None else x * scale.view(*scale.shape, *(1 for _ in x.shape[2:])) for x in state[:2]]


def gradients_of(spec, inputs, states, o, final):
    """Of fixed weights of the output and of the state."""
    weights = [torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view(x.shape) for x in (o, *final)]
    loss = sum((x.real * w).sum() + (x.imag * w).sum() if x.is_complex() else (x * w).sum()
               for x, w in zip((o, *final), weights, strict=True))  # fmt: skip
    return torch.autograd.grad(loss, (*inputs, *states), allow_unused=True, materialize_grads=True)


# --- derivatives


@EVERY
@pytest.mark.parametrize("segment", [None, 2])
def test_autograd_agrees_with_finite_differences(spec, segment):
    sizes = {"H": 2, "K": 3, "V": 2}
    inputs = leaves(drawn(spec, B=2, T=5, **sizes))
    states = parts_of(make_state(spec, N=2, dtype=torch.float64, **sizes))
    # what a state is held divided by counts as a constant: the state itself has derivatives
    states, held = leaves(states[:2]), states[2:]

    def outputs(*tensors):
        given = whole_state(spec, (*tensors[len(inputs) :], *held))
        o, final = run(spec, tensors[: len(inputs)], initial_state=given, output_final_state=True, segment=segment)
        return o, *_unheld(*parts_of(final))

    assert torch.autograd.gradcheck(outputs, (*inputs, *states), fast_mode=True)


def test_every_entry_of_the_jacobian_for_a_spec_of_many_roles():
    spec = Spec("many", log_decay=logsigmoid(gk) / 2, phase=th, bonus=u, key=softplus(k))
    inputs = leaves(drawn(spec, B=1, T=3, H=1, K=2, V=2))
    assert torch.autograd.gradcheck(lambda *x: run(spec, x, output_final_state=True), inputs)


# --- the parts make the whole


@EVERY
def test_the_whole_equals_its_pieces_with_carried_state(spec):
    inputs, state = drawn(spec, B=2, T=11, H=2, K=4, V=3), make_state(spec, H=2, K=4, V=3, dtype=torch.float64)
    whole, final = run(spec, inputs, initial_state=state, output_final_state=True)
    pieces = []
    for begin, end in ((0, 1), (1, 6), (6, 6), (6, 11)):
        now = [x[:, begin:end] if "t" in one.axes else x for one, x in zip(spec.inputs, inputs, strict=True)]
        o, state = run(spec, now, initial_state=state, output_final_state=True)
        pieces.append(o)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-12, atol=1e-12)
    for x, y in zip(parts_of(state), parts_of(final), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@EVERY
def test_segments_change_no_bit_of_the_output_and_no_gradient(spec):
    found = []
    for segment in (1, 3, 50):
        inputs = leaves(drawn(spec, B=1, T=10, H=2, K=4, V=3))
        states = leaves(parts_of(make_state(spec, N=1, H=2, K=4, V=3, dtype=torch.float64)))
        given = whole_state(spec, states)
        o, final = run(spec, inputs, initial_state=given, output_final_state=True, segment=segment)
        found.append((o, *parts_of(final), *gradients_of(spec, inputs, states, o, parts_of(final))))
    for others in found[1:]:
        assert torch.equal(others[0], found[0][0])
        for x, y in zip(others, found[0], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13)


@EVERY
def test_sequences_in_one_row_equal_separate_calls(spec):
    limits = [0, 4, 4, 9]
    inputs = leaves(drawn(spec, B=1, T=12, H=2, K=4, V=3, N=3))
    states = leaves(parts_of(make_state(spec, N=3, H=2, K=4, V=3, dtype=torch.float64)))
    options = {"output_final_state": True}
    together, final = run(spec, inputs, initial_state=whole_state(spec, states), cu_seqlens=limits, **options)
    outputs, finals = [], []
    for i, (begin, end) in enumerate(pairwise(limits)):
        now = []
        for one, x in zip(spec.inputs, inputs, strict=True):
            now.append(x[:, begin:end] if "t" in one.axes else x[i : i + 1] if "b" in one.axes else x)
        state = whole_state(spec, tuple(x[i : i + 1] for x in states))
        o, last = run(spec, now, initial_state=state, **options)
        outputs.append(o)
        finals.append(parts_of(last))
    apart = torch.cat([*outputs, torch.zeros(1, 3, 2, 3, dtype=torch.float64)], 1)
    torch.testing.assert_close(together, apart, rtol=1e-12, atol=1e-12)
    joined = [torch.cat(x) for x in zip(*finals, strict=True)]
    for x, y in zip(parts_of(final), joined, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
    got = gradients_of(spec, inputs, states, together, parts_of(final))
    want = gradients_of(spec, inputs, states, apart, joined)
    for one, x, y in zip([*spec.inputs, *states], got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-12)
        if isinstance(one, Input) and "t" in one.axes:
            assert not x[:, 9:].any() and x[:, :9].any()


def test_tokens_past_the_last_sequence_may_hold_anything():
    spec = specs.get("gla")
    inputs = drawn(spec, B=1, T=6, H=2, K=3, V=2)
    spoilt = [x.clone() for x in inputs]
    for x in spoilt:
        x[:, 4:] = math.nan
    spoilt[3][:, 4] = 1.0  # a positive log decay
    o, _ = run(spec, spoilt, cu_seqlens=torch.tensor([0, 4]))
    want, _ = run(spec, [x[:, :4] for x in inputs])
    assert torch.equal(o[:, :4], want) and not o[:, 4:].any()


@EVERY
def test_no_tokens(spec):
    inputs = leaves(drawn(spec, B=2, T=0, H=2, K=4, V=3))
    states = leaves(parts_of(make_state(spec, H=2, K=4, V=3, dtype=torch.float64)))
    o, final = run(spec, inputs, initial_state=whole_state(spec, states), output_final_state=True)
    assert o.shape == (2, 0, 2, 3) and o.requires_grad
    for x, y in zip(parts_of(final), states, strict=True):
        assert torch.equal(x, y)
    run(spec, inputs)[0].sum().backward()
    assert all(x.grad is None or not x.grad.any() for x in inputs)


# --- closed forms


def test_retnet_as_one_matrix():
    spec, (batch, time, number) = specs.get("retnet"), (2, 9, 3)
    query, key, value = inputs = leaves(drawn(spec, B=batch, T=time, H=number, K=4, V=5))
    gamma = torch.tensor([1 - 2.0 ** (-5 - i) for i in range(number)], dtype=torch.float64)
    distance = torch.arange(time).view(-1, 1) - torch.arange(time)
    matrix = torch.where(distance >= 0, gamma.view(-1, 1, 1) ** distance.clamp(min=0), 0.0)
    scores = torch.einsum("bthk,bshk->bhts", query, key) * 4**-0.5 * matrix
    want = torch.einsum("bhts,bshv->bthv", scores, value)
    o, none = run(spec, inputs)
    assert none is None
    torch.testing.assert_close(o, want, rtol=1e-12, atol=1e-12)
    for x, y in zip(torch.autograd.grad(o.sum(), inputs), torch.autograd.grad(want.sum(), inputs), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-12)


def test_the_decay_of_a_late_head_is_not_rounded_to_one():
    spec = specs.get("retnet")
    value = torch.zeros(1, 2000, 32, 1)
    value[:, 0] = 1
    ones = torch.ones(1, 2000, 32, 1)
    # in fp32 1 - 2 ** -21 is a number, but its logarithm by fp32 arithmetic is 7 % off
    o, _ = run(spec, (ones, ones, value), scale=1.0)
    assert float(-o[0, -1, 16].double().log()) == pytest.approx(1999 * 2.0**-21, rel=0.1)
    o, _ = run(spec, (ones.double(), ones.double(), value.double()), scale=1.0)
    assert float(-o[0, -1, 31].log()) == pytest.approx(1999 * 2.0**-36, rel=1e-4)


def test_based_as_a_quadratic_form():
    spec = specs.get("based")
    query, key, value = inputs = drawn(spec, B=2, T=8, H=2, K=5, V=3)
    scores = torch.einsum("bthk,bshk->bhts", query, key) * 0.3
    weights = (1 + scores + scores**2 / 2).tril()
    want = torch.einsum("bhts,bshv->bthv", weights, value) / (weights.sum(-1).mT.unsqueeze(-1) + 1e-6)
    o, (state, sums) = run(spec, inputs, scale=0.3, output_final_state=True)
    torch.testing.assert_close(o, want, rtol=1e-12, atol=1e-12)
    # the layout of the features: 1, k_i, k_i k_j for i <= j, without the scale
    monomials = [torch.ones_like(key[..., 0]), *key.unbind(-1)]
    monomials += [key[..., i] * key[..., j] for i in range(5) for j in range(i, 5)]
    features = torch.stack(monomials, -1)
    torch.testing.assert_close(state, torch.einsum("bthf,bthv->bhfv", features, value))
    torch.testing.assert_close(sums, features.sum(1))


def test_gateloop_with_complex_numbers():
    spec = specs.get("gateloop")
    query, key, value, g, theta = inputs = drawn(spec, B=1, T=7, H=2, K=3, V=4)
    total = torch.complex(g, theta).cumsum(1)
    start = make_state(spec, N=1, H=2, K=3, V=4, dtype=torch.float64)
    want = torch.zeros(1, 7, 2, 4, dtype=torch.complex128)
    for t in range(7):
        for s in range(t + 1):
            weight = (query[:, t] * (total[:, t] - total[:, s]).exp() * key[:, s]).sum(-1, keepdim=True)
            want[:, t] += weight * value[:, s]
        want[:, t] += torch.einsum("bhk,bhkv->bhv", query[:, t] * total[:, t].exp(), start)
    o, final = run(spec, inputs, initial_state=start, output_final_state=True)
    torch.testing.assert_close(o, want.real, rtol=1e-12, atol=1e-12)
    last = torch.einsum("bthk,bthv->bhkv", (total[:, -1:] - total).exp() * key, value.to(total.dtype))
    torch.testing.assert_close(final, last + total[:, -1].exp().unsqueeze(-1) * start)


@pytest.mark.parametrize("decay", ["gk", "gv"])
def test_a_bonus_reads_the_state_before_the_token(decay):
    gate = {"gk": gk, "gv": gv}[decay]
    spec = Spec("bonus", log_decay=logsigmoid(gate), bonus=u)
    named = make_inputs(spec, B=1, T=6, H=2, K=3, V=3, dtype=torch.float64)
    query, key, value, weight = (named[name][0] for name in ("q", "k", "v", decay))
    factor = sigmoid_of(weight)
    state = torch.zeros(2, 3, 3, dtype=torch.float64)
    want = []
    for t in range(6):
        update = torch.einsum("hk,hv->hkv", key[t], value[t])
        read = state + named["u"].unsqueeze(-1) * update
        want.append(torch.einsum("hk,hkv->hv", query[t] * 3**-0.5, read))
        state = (factor[t].unsqueeze(-1) if decay == "gk" else factor[t].unsqueeze(-2)) * state + update
    o, final = run(spec, tuple(named.values()), output_final_state=True)
    torch.testing.assert_close(o[0], torch.stack(want), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(final[0], state, rtol=1e-12, atol=1e-12)


def sigmoid_of(x):
    return 1 / (1 + (-x).exp())


@pytest.mark.parametrize("limits", [None, [0, 2, 3]])
def test_a_value_may_begin_with_a_parameter(limits):
    """The sizes are those of the call, not of the value's first input."""
    weight = Input("wv", "h v")
    inputs = drawn(Spec("weighted", value=weight * v), B=1, T=4, H=2, K=3, V=5)
    query, key, value, by = inputs
    o, _ = run(Spec("weighted", value=weight * v), inputs, cu_seqlens=limits)
    want, _ = run(Spec("plain"), (query, key, value * by), cu_seqlens=limits)
    torch.testing.assert_close(o, want)


def test_a_normalised_attention_sums_to_one():
    spec = specs.get("linear")
    query, key, value = drawn(spec, B=1, T=9, H=2, K=4, V=3)
    o, _ = run(spec, (query, key, torch.ones_like(value)))
    torch.testing.assert_close(o, torch.ones_like(o), rtol=1e-5, atol=1e-5)
    # the scale cancels but for eps
    one, three = (run(spec, (query, key, value), scale=scale)[0] for scale in (1.0, 3.0))
    torch.testing.assert_close(one, three, rtol=1e-4, atol=1e-5)


def test_the_scale_multiplies_the_query():
    spec = Spec("halved", scale=0.5)
    query, key, value = drawn(spec, B=1, T=5, H=1, K=4, V=3)
    own, _ = run(spec, (query, key, value))
    torch.testing.assert_close(own, run(spec, (query, key, value), scale=0.25)[0] * 2)
    torch.testing.assert_close(run(Spec("plain"), (query, key, value))[0], own)  # 4 ** -0.5


# --- resets


@pytest.mark.parametrize("gate", [gs, gk, gv], ids=lambda gate: gate.name)
def test_minus_infinity_forgets_and_has_no_gradient(gate):
    spec = Spec("reset", log_decay=gate)
    inputs = list(drawn(spec, B=1, T=8, H=2, K=3, V=3))
    where = spec.inputs.index(gate)
    inputs[where][:, 5] = -math.inf
    inputs = leaves(inputs)
    o, final = run(spec, inputs, output_final_state=True)
    fresh, last = run(spec, [x[:, 5:] for x in inputs], output_final_state=True)
    torch.testing.assert_close(o[:, 5:], fresh)
    torch.testing.assert_close(final, last)
    found = torch.autograd.grad(o.sum() + final.sum(), inputs)
    assert all(x.isfinite().all() for x in found)
    assert not found[where][:, 5].any() and found[where][:, 4].any() and found[where][:, 6].any()


@pytest.mark.parametrize("gate", [gs, gk, gv, wk], ids=lambda gate: gate.name)
@pytest.mark.parametrize("form", ["log", "root"])
def test_a_gate_with_an_infinite_derivative_at_a_reset_has_none(gate, form):
    shared = Input("a", "h")
    decay = log(maximum(gate, 0)) if form == "log" else -shared / sqrt(maximum(gate, 0))
    spec = Spec("infinite", log_decay=decay)
    generator = torch.Generator().manual_seed(0)
    sizes = {"b": 1, "t": 8, "h": 2, "k": 3, "v": 3}
    inputs = []
    for one in spec.inputs:
        x = torch.rand([sizes[axis] for axis in one.axes], generator=generator, dtype=torch.float64)
        inputs.append(x)
    where = spec.inputs.index(gate)
    zero = torch.rand(inputs[where].shape, generator=generator) < 0.3
    inputs[where][zero] = 0
    inputs = leaves(inputs)
    o, _ = run_plain(spec, inputs)
    found = torch.autograd.grad(o.sum(), inputs)
    assert all(x.isfinite().all() for x in found)
    assert zero.any() and not found[where][zero].any() and found[where][~zero].any()
    # elsewhere the gradient is that of a small gate in its place
    near = leaves(torch.where(zero, 1e-300, x) if i == where else x for i, x in enumerate(inputs))
    by_limit = torch.autograd.grad(run_plain(spec, near)[0].sum(), near)
    torch.testing.assert_close(found[where][~zero], by_limit[where][~zero])
    for i, (x, y) in enumerate(zip(found, by_limit, strict=True)):
        if i != where:
            torch.testing.assert_close(x, y)


def run_plain(spec, inputs, **options):
    return reference.run(spec, inputs, **options)


def test_a_reset_does_not_touch_other_roles_of_the_same_input():
    spec = Spec("both", value=v * exp(gs), log_decay=gs)
    inputs = list(drawn(spec, B=1, T=5, H=1, K=2, V=2))
    where = spec.inputs.index(gs)
    inputs[where][:, 2] = -1000.0  # exp is 0 in fp64
    inputs = leaves(inputs)
    o, _ = run(spec, inputs)
    found = torch.autograd.grad(o.sum(), inputs)
    assert all(x.isfinite().all() for x in found) and not found[where][:, 2].any()


# --- dtypes, heads, errors


def test_dtypes():
    spec = specs.get("gla")
    inputs = [x.bfloat16() for x in drawn(spec, double=False, B=1, T=4, H=2, K=3, V=2)]
    o, final = run(spec, inputs, output_final_state=True)
    assert (o.dtype, final.dtype) == (torch.bfloat16, torch.float32)
    exact, _ = run(spec, [x.float() for x in inputs])
    assert torch.equal(o, exact.bfloat16())  # computed in fp32, rounded once
    o, final = run(spec, [inputs[0].double(), *inputs[1:]], output_final_state=True)
    assert (o.dtype, final.dtype) == (torch.bfloat16, torch.float64)
    turned = specs.get("gateloop")
    _, final = run(turned, drawn(turned, double=False, B=1, T=4, H=2, K=3, V=2), output_final_state=True)
    assert final.dtype == torch.complex64


def test_autocast_changes_nothing():
    spec = specs.get("based")
    inputs = drawn(spec, double=False, B=1, T=4, H=2, K=3, V=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, _ = run(spec, inputs)
    assert torch.equal(o, run(spec, inputs)[0])


@pytest.mark.parametrize("spec", [specs.get("rwkv6"), *OTHERS[1:4]], ids=lambda spec: spec.name)
def test_heads_that_share_an_input_equal_copies_of_it(spec):
    heads_of = {one.name: 1 + i % 3 for i, one in enumerate(spec.inputs) if "h" in one.axes} | {"k": 2, "v": 6}
    inputs = drawn(spec, B=2, T=5, H=6, K=3, V=2, heads=heads_of)
    copies = []
    for one, x in zip(spec.inputs, inputs, strict=True):
        axis = one.axes.index("h")
        copies.append(x.repeat_interleave(6 // x.shape[axis], axis))
    assert {x.shape[one.axes.index("h")] for one, x in zip(spec.inputs, inputs, strict=True)} > {2, 6}
    assert torch.equal(run(spec, inputs)[0], run(spec, copies)[0])


def test_a_positive_log_decay_is_an_error():
    spec = specs.get("gla")
    inputs = list(drawn(spec, B=1, T=4, H=2, K=3, V=2))
    inputs[3] = inputs[3].clone()
    inputs[3][0, 2, 1, 0] = 1e-9
    with pytest.raises(
        ValueError, match=r"gla: log_decay = g is positive in 1 of 24 places, up to 1e-09; it is .* <= 0"
    ):
        run(spec, inputs)
    late = specs.get("transnormer")
    inputs = drawn(late, B=1, T=2, K=3, V=2)
    with pytest.raises(ValueError, match="positive in 3 of 4 places"):
        reference.run(late, inputs, scalars={"layer": 5, "layers": 4})


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda x: x[:3], "gla: takes 4 inputs (q, k, v, g), got 3"),
        (lambda x: [*x[:3], x[3][..., 0]], "gla: g must have the axes b t h k, got shape (1, 4, 6)"),
        (lambda x: [x[0], x[1][:, :3], *x[2:]], "gla: k has the size 3 in its axis t, by q it must be 4"),
        (lambda x: [*x[:2], x[2][:, :, :4], x[3]], "gla: v has 4 heads, which do not divide 6"),
    ],
)  # fmt: skip
def test_inputs_that_do_not_fit(change, message):
    spec = specs.get("gla")
    inputs = drawn(spec, B=1, T=4, H=6, K=3, V=2)
    with pytest.raises(ValueError) as error:
        run(spec, change(list(inputs)))
    assert str(error.value) == message


@pytest.mark.parametrize(
    "limits,message",
    [
        ([1, 3], "must rise from 0"),
        ([0, 3, 2], "must rise from 0"),
        ([0], "must rise from 0"),
        ([0, 5], "ends at 5, beyond the 4 tokens"),
    ],
)
def test_bounds_that_do_not_fit(limits, message):
    spec = specs.get("retnet")
    with pytest.raises(ValueError, match=message):
        run(spec, drawn(spec, B=1, T=4, K=3, V=2), cu_seqlens=limits)
    with pytest.raises(ValueError, match=r"q has the size 2 in its axis b, by cu_seqlens it must be 1"):
        run(spec, drawn(spec, B=2, T=4, K=3, V=2), cu_seqlens=[0, 4])


def test_states_and_scalars_that_do_not_fit():
    spec = specs.get("linear")
    inputs = drawn(spec, B=1, T=4, H=2, K=3, V=2)
    with pytest.raises(ValueError, match=r"linear: initial_state must be a pair of tensors \(S, z\) of shape "):
        run(spec, inputs, initial_state=torch.zeros(1, 2, 3, 2))
    plain = specs.get("transnormer")
    with pytest.raises(ValueError, match="transnormer: the scalar 'layers' is missing"):
        reference.run(plain, inputs, scalars={"layer": 1})
    with pytest.raises(
        ValueError, match=r"initial_state must be one tensor of shape \(1, 2, 3, 2\), got \(1, 2, 2, 3\)"
    ):
        run(plain, inputs, initial_state=torch.zeros(1, 2, 2, 3))


def test_segments_bound_the_memory():
    """What autograd keeps: all states of the sequence, or next to nothing outside the segments."""
    spec = specs.get("gla")
    kept = {}
    for segment in (400, 20):
        inputs = leaves(drawn(spec, B=1, T=400, H=1, K=32, V=33))
        sizes = []

        def pack(x, sizes=sizes):
            sizes.append(x.nbytes)
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            o, _ = run(spec, inputs, segment=segment)
        kept[segment] = sum(sizes)
        o.sum().backward()
        assert all(x.grad.isfinite().all() and x.grad.any() for x in inputs)
    states = 400 * 32 * 33 * 8
    assert kept[400] > states > 4 * kept[20]

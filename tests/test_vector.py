"""Vector states, the axis d: the language, the reference, the torch path and the op."""

from __future__ import annotations

import json
import math

import pytest
import torch
from cases import VECTORS, error, extreme

import flagen
from flagen import compiler, plan_vector, reference, schedule_vector, specs
from flagen.analysis import analyse, derivative_texts, restored
from flagen.errors import SpecError
from flagen.expr import (
    Input,
    exp,
    head,
    l2norm,
    log,
    logsigmoid,
    maximum,
    q,
    sigmoid,
    softplus,
    sqrt,
    taylor,
)
from flagen.functions import evaluate, fold
from flagen.schedule import HOPPER, Shape
from flagen.spec import Spec
from flagen.testing import check
from flagen.torch_vector import VectorBackend, scan

x, g, gate, theta = (Input(name, "b t d") for name in ("x", "g", "gate", "theta"))
qd, kd, vd = (Input(name, "b t d") for name in "qkv")
lam, per, pace = Input("lam", "d"), Input("per", "b d"), Input("pace", "b t")
SCALARS = {"layer": 0.3}
EVERY = pytest.mark.parametrize("spec", VECTORS, ids=lambda spec: spec.name)


def drawn(spec, batch=2, time=6, channels=5, sequences=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for one in spec.inputs:
        sizes = {"b": batch, "t": time, "d": channels}
        if sequences is not None and "t" not in one.axes:
            sizes["b"] = sequences
        values = torch.randn([sizes[axis] for axis in one.axes], generator=generator, dtype=torch.float64)
        found.append(-values.abs() if one == spec.log_decay else values)
    return tuple(found)


def start_of(spec, count, channels=5, seed=1):
    kind = torch.complex128 if spec.phase is not None else torch.float64
    return torch.randn(count, channels, generator=torch.Generator().manual_seed(seed), dtype=kind)


def run(spec, inputs, **options):
    return reference.run(spec, inputs, scalars=SCALARS, **options)


# --- the language


def test_equations():
    assert specs.get("hgrn").equations == ["h_t = exp(g_t) h_{t-1} + x_t", "o_t = scale * h_t"]
    assert specs.get("gateloop_elementwise").equations == [
        "h_t = exp(g_t + i theta_t) h_{t-1} + k_t v_t",
        "o_t = Re(scale * q_t h_t)",
    ]
    assert Spec("s", value=x).equations[0] == "h_t = h_{t-1} + x_t"
    assert specs.get("gateloop_elementwise").latex() == (
        r"h_t &= \exp\left(g_{t} + i\, \theta_{t}\right) \odot h_{t-1} + k_{t} \odot v_{t} \\" + "\n"
        r"o_t &= \operatorname{Re}\left(s\, q_{t} \odot h_t\right)"
    )
    assert str(specs.get("hgrn")).endswith("inputs: x [B, T, D], g [B, T, D]\n  scale: 1 by default")


@EVERY
def test_specs_travel(spec):
    assert Spec.from_json(spec.to_json()) == spec and spec.replace(spec.name) == spec and spec.vector
    analysis = analyse(spec)
    assert restored(spec, json.loads(json.dumps(derivative_texts(analysis)))) == analysis
    assert analysis.vector and analysis.decay == ("none" if spec.log_decay is None else "scalar")
    assert not analysis.without_kernels


def test_a_matrix_state_is_none():
    assert not any(specs.get(name).vector or analyse(specs.get(name)).vector for name in ("gla", "kda", "based"))


REFUSED = [
    (lambda: Spec("s", log_decay=g), "log_decay uses g with the axes b t d|query uses q with the axes b t h k"),
    (lambda: Spec("s", value=x, query=q * 2), "query uses q with the axes b t h k"),
    (lambda: Spec("s", value=x, log_decay=-exp(Input("a", "b t h"))), "log_decay uses a with the axes b t h"),
    (lambda: Spec("s", value=lam), "value = lam must vary over b t d"),
    (lambda: Spec("s", value=x, log_decay=log(1 - 2 ** (-5 - head))), "no heads; use a Scalar"),
    (lambda: Spec("s", value=x, erase=(g, g)), "erase with a vector state"),
    (lambda: Spec("s", value=x, bonus=g), "a bonus with a vector state"),
    (lambda: Spec("s", value=x, query=qd, key=kd, feature_map=exp), "a feature map with a vector state"),
    (lambda: Spec("s", value=x, query=qd, key=kd, feature_map=taylor(2)), "a feature map with a vector state"),
    (lambda: Spec("s", value=x, normalize=lambda n: n * n + 1), "normalize with a vector state"),
    (lambda: Spec("s", value=x, query=l2norm(qd)), "has no axis k"),
    (lambda: Spec("s", value=x, log_decay=softplus(g)), "positive whatever its inputs"),
    (lambda: Input("x", "b d t"), "out of order; write 'b t d'"),
    (lambda: Input("x", "b t e"), "or of a vector state b, t and d"),
]


@pytest.mark.parametrize(("declare", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refused(declare, message):
    with pytest.raises(SpecError, match=message) as caught:
        declare()
    assert len(str(caught.value)) < 400


# --- the reference


@EVERY
def test_the_reference_is_the_recurrence(spec):
    inputs, state = drawn(spec), start_of(spec, 2)
    values = {}
    for one, given in zip(spec.inputs, inputs, strict=True):
        for i, axis in enumerate("btd"):
            given = given if axis in one.axes else given.unsqueeze(i)
        values[one.name] = given
    values |= SCALARS

    zero = torch.zeros(2, 6, 5, dtype=torch.float64)

    def of(expr):
        value = flagen.functions.evaluate(expr, values, 1)
        return (value if isinstance(value, torch.Tensor) else zero + value).expand(2, 6, 5)

    angle = zero if spec.phase is None else of(spec.phase)
    factor = torch.complex(zero if spec.log_decay is None else of(spec.log_decay), angle).exp()
    want, now = [], state.to(torch.complex128)
    for t in range(6):
        now = factor[:, t] * now + of(spec.key)[:, t] * of(spec.value)[:, t]
        want.append((0.7 * of(spec.query)[:, t] * now).real)
    o, final = run(spec, inputs, scale=0.7, initial_state=state, output_final_state=True)
    torch.testing.assert_close(o, torch.stack(want, 1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(final.to(now.dtype), now, rtol=1e-12, atol=1e-12)


@EVERY
def test_autograd_agrees_with_finite_differences(spec):
    inputs = [one.requires_grad_() for one in drawn(spec, time=4, channels=3)]
    state = start_of(spec, 2, 3).requires_grad_()

    def outputs(*tensors):
        return run(spec, tensors[:-1], initial_state=tensors[-1], output_final_state=True, segment=2)

    assert torch.autograd.gradcheck(outputs, (*inputs, state), fast_mode=True)


@EVERY
def test_the_whole_equals_its_pieces_with_carried_state(spec):
    inputs = drawn(spec, time=9)
    whole, final = run(spec, inputs, output_final_state=True)
    pieces, state = [], None
    for begin, end in ((0, 1), (1, 5), (5, 5), (5, 9)):
        now = [y[:, begin:end] if "t" in one.axes else y for one, y in zip(spec.inputs, inputs, strict=True)]
        o, state = run(spec, now, initial_state=state, output_final_state=True)
        pieces.append(o)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=1e-12, atol=1e-12)


# --- the torch path


@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 63, 64, 200])
def test_the_scan_is_the_recurrence(tokens):
    generator = torch.Generator().manual_seed(2)
    factor = torch.rand(2, tokens, 3, generator=generator, dtype=torch.float64)
    update = torch.randn(2, tokens, 3, generator=generator, dtype=torch.float64)
    state = start = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    found = scan(factor, update, start)
    assert found.shape == (2, tokens, 3)
    for t in range(tokens):
        state = factor[:, t] * state + update[:, t]
        torch.testing.assert_close(found[:, t], state, rtol=1e-12, atol=1e-12)


def constants_of(analysis, channels):
    return tuple(torch.full((channels,), SCALARS["layer"], dtype=torch.float64) for _ in analysis.constants)


def compared(spec, inputs, *, limits=None, dtype=torch.float64, needs=None, channels=5):
    """The largest error of the backend's output, state and gradients, and its gradients."""
    backend = VectorBackend(analyse(spec))
    constants = constants_of(backend.analysis, channels)
    inputs = tuple(y.to(dtype) for y in inputs)
    count = len(limits) - 1 if limits else next(
        y.shape[0] for one, y in zip(spec.inputs, inputs, strict=True) if {"b", "t"} <= set(one.axes)
    )  # fmt: skip
    start = start_of(spec, count, channels)
    leaves = [y.double().requires_grad_() for y in inputs]
    state = start.clone().requires_grad_()
    o, final = run(spec, leaves, scale=0.7, initial_state=state, output_final_state=True, cu_seqlens=limits)
    generator = torch.Generator().manual_seed(3)
    do, dfinal = (torch.randn(y.shape, generator=generator, dtype=y.dtype) for y in (o, final))
    want = torch.autograd.grad((o, final), (*leaves, state), (do, dfinal))
    cu_seqlens = None if limits is None else torch.tensor(limits, dtype=torch.int32)
    out = backend.forward(inputs, constants, 0.7, (start,), cu_seqlens, True, True)
    needs = needs or (True,) * len(inputs)
    got, d_start = backend.backward(
        do, (dfinal,), out.o, out.saved, inputs, constants, 0.7, (start,), cu_seqlens, needs, True
    )
    assert [y.shape for y in out.saved] == [y.shape for y in backend.saved_like(inputs, cu_seqlens)]
    assert [y is not None for y in got] == list(needs)
    pairs = zip((out.o, *out.final, *got, *d_start), (o.detach(), final.detach(), *want), strict=True)
    return max(error(y, z) for y, z in pairs if y is not None), got


@EVERY
@pytest.mark.parametrize("tokens", [1, 7, 150])
def test_the_torch_path_is_the_reference(spec, tokens):
    inputs = drawn(spec, time=tokens)
    assert compared(spec, inputs)[0] < 1e-12
    assert compared(spec, inputs, dtype=torch.float32)[0] < 3e-6
    for i in range(len(inputs)):
        assert compared(spec, inputs, needs=tuple(i == j for j in range(len(inputs))))[0] < 1e-12


@EVERY
def test_sequences_in_one_row(spec):
    limits = [0, 20, 20, 33, 50]
    inputs = drawn(spec, batch=1, time=57, sequences=4)
    worst, gradients = compared(spec, inputs, limits=limits)
    assert worst < 1e-12
    for one, gradient in zip(spec.inputs, gradients, strict=True):
        assert "t" not in one.axes or not gradient[:, 50:].any()


@pytest.mark.parametrize("phase", [None, theta])
def test_decays_from_zero_to_minus_infinity(phase):
    spec = Spec("extreme", value=x, log_decay=g, phase=phase)
    inputs = dict(zip(spec.inputs, drawn(spec, time=150), strict=True))
    inputs[g] = extreme(inputs[g].shape, torch.Generator().manual_seed(3))
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 3e-6)):
        worst, gradients = compared(spec, inputs.values(), dtype=dtype)
        found = dict(zip(spec.inputs, gradients, strict=True))
        assert worst < limit and all(y.isfinite().all() for y in gradients)
        assert not found[g][inputs[g] == -math.inf].any() and found[g].any()


def test_a_gate_whose_derivative_is_infinite_at_a_reset():
    spec = Spec("infinite", value=x, log_decay=log(maximum(gate, 0)))
    inputs = dict(zip(spec.inputs, drawn(spec, time=40), strict=True))
    inputs[gate] = torch.sigmoid(inputs[gate])
    inputs[gate][:, 10:14] = 0
    worst, gradients = compared(spec, inputs.values())
    found = dict(zip(spec.inputs, gradients, strict=True))[gate]
    assert worst < 1e-12 and found.isfinite().all() and not found[:, 10:14].any() and found[:, 15:].any()


@EVERY
def test_step_by_step_equals_forward(spec):
    backend = VectorBackend(analyse(spec))
    inputs, constants, start = drawn(spec, time=9), constants_of(backend.analysis, 5), start_of(spec, 2)
    whole = backend.forward(inputs, constants, 0.4, (start,), None, True, False)
    kept = start.clone()
    for t in range(9):
        named = zip(spec.inputs, inputs, strict=True)
        now = tuple(y.narrow(one.axes.index("t"), t, 1) if "t" in one.axes else y for one, y in named)
        o = backend.step(now, constants, 0.4, (kept,))
        assert o.shape == (2, 1, 5) and error(o, whole.o[:, t : t + 1]) < 1e-12
    assert error(kept, whole.final[0]) < 1e-12


def test_a_later_token_changes_no_bit_of_an_earlier_output():
    spec = specs.get("gateloop_elementwise")
    inputs = [y.float() for y in drawn(spec, batch=1, time=100)]
    changed = [y.clone() for y in inputs]
    for y in changed:
        y[:, 37:] *= 50
    backend = VectorBackend(analyse(spec))
    out, other = (backend.forward(tuple(y), (), 0.4, (), None, False, False).o for y in (inputs, changed))
    assert torch.equal(out[:, :37], other[:, :37]) and not torch.equal(out, other)


# --- the op


@EVERY
def test_check(spec):
    op = flagen.compile(spec)
    assert op.plan.vector
    scalars = SCALARS if spec.scalars else None
    check(op, T=37, H=1, V=6, device="cpu", dtype=torch.bfloat16, scalars=scalars)
    check(op, T=44, H=2, V=3, device="cpu", cu_seqlens=[0, 3, 3, 40], scalars=scalars, layout="sliced")


def test_no_tokens():
    op = flagen.compile("hgrn")
    inputs = [torch.zeros(2, 0, 3, requires_grad=True) for _ in range(2)]
    start = torch.randn(2, 3, requires_grad=True)
    o, final = op(*inputs, initial_state=start, output_final_state=True)
    assert o.shape == (2, 0, 3) and torch.equal(final, start)
    final.sum().backward()
    assert torch.equal(start.grad, torch.ones(2, 3))


def test_wrong_calls():
    op = flagen.compile("hgrn")
    y = torch.zeros(2, 4, 3)
    with pytest.raises(ValueError, match=r"hgrn: g must have shape \[B, T, D\] = \(2, 4, 3\), got \(2, 4, 5\)"):
        op(y, torch.zeros(2, 4, 5))
    with pytest.raises(ValueError, match=r"x is empty: \[B, T, D\] = \(2, 4, 0\)"):
        op(torch.zeros(2, 4, 0), torch.zeros(2, 4, 0))
    with pytest.raises(ValueError, match=r"initial_state must have shape \[N, D\] = \(2, 3\), got \(2, 3, 1\)"):
        op(y, y, initial_state=torch.zeros(2, 3, 1))
    with pytest.raises(ValueError, match="initial_state must be complex64"):
        flagen.compile("gateloop_elementwise")(y, y, y, y, y, initial_state=torch.zeros(2, 3))
    with pytest.raises(ValueError, match="takes one token"):
        op.step(y, y, state=torch.zeros(2, 3))
    with pytest.raises(ValueError, match="initial_state must be one tensor of shape"):
        run(specs.get("hgrn"), (y, y), initial_state=torch.zeros(2, 4))


def test_what_help_shows():
    text = flagen.compile("gateloop_elementwise").__doc__
    assert "q: [B, T, D], the query." in text and "initial_state: [N, D] complex64" in text
    assert "Returns o [B, T, D]" in text and "heads" not in text and "None: 1." in text


# --- texts of kernels


a, b = Input("a", "b t d"), Input("b", "b t d")
REWRITTEN = [
    a * (3 * (b * -lam)) / 6,
    -(a / (b * b + 2)) * exp(-a * 2),
    a / sqrt(b * b + 1) / (-lam),
    exp(2 * (lam * sigmoid(a) * -8)) - exp(-8 * (sigmoid(a) * lam)),
    softplus(3 - a) * -1 - 2 * -b,
]


@pytest.mark.parametrize("expr", REWRITTEN, ids=str)
def test_products_in_one_order_have_the_same_value(expr):
    generator = torch.Generator().manual_seed(0)
    named = {one.name: torch.rand(7, generator=generator, dtype=torch.float64) + 0.5 for one in expr.inputs}
    log_decay = plan_vector.canonical(-8 * lam * sigmoid(a))
    found = plan_vector.canonical(fold(expr), log_decay)
    torch.testing.assert_close(evaluate(found, named, 1), evaluate(expr, named, 1), rtol=1e-12, atol=0)
    assert plan_vector.canonical(found, log_decay) == found


def test_a_decay_is_evaluated_once_wherever_it_stands():
    log_decay = -8 * softplus(lam) * sigmoid(a)
    plan = compiler.prepare(Spec("alike", value=sqrt(1 - exp(2 * log_decay)) * b, log_decay=log_decay))[0]
    (block,) = [one.block for one in plan.shared.values() if one.text.startswith("exp(-8.0")]
    assert plan.decay_text == block
    below = plan.shared_by("update")
    assert [one.block for one in below if block in one.text]
    texts = [plan.value.text, *(term.text for one in plan.gradients for term in one.terms)]
    texts += [one.text for one in plan.shared.values()]
    assert all(word not in text for text in texts for word in ("tl.exp", "tl.sigmoid", "-16.0"))
    assert sum("softplus" in text or "tl.log" in text for text in texts) == 1


def test_more_that_a_token_keeps_leaves_shorter_rows():
    rows = [schedule_vector.row_tokens(compiler.prepare(specs.get(name))[0]) for name in ("hgrn", "min_gru", "rg_lru")]
    assert rows == [16, 6, 4]
    assert schedule_vector.row_tokens(compiler.prepare(specs.get("gateloop_elementwise"))[0]) == 8
    plans = [compiler.prepare(specs.get(name))[0] for name in ("hgrn", "min_gru", "rg_lru", "gateloop_elementwise")]
    assert [schedule_vector.forward_tokens(plan, schedule_vector.row_tokens(plan)) for plan in plans] == [16, 12, 8, 8]


@pytest.mark.parametrize(
    ("name", "channels", "block", "warps"),
    [
        ("hgrn", 12288, 32, 4),
        ("hgrn", 2048, 32, 8),
        ("min_gru", 12288, 32, 4),
        ("min_gru", 2048, 16, 4),
        ("min_gru", 512, 32, 8),
    ],
)
def test_few_channels_come_in_narrow_blocks(name, channels, block, warps):
    plan, shape = compiler.prepare(specs.get(name))[0], Shape.dense(2, 16384, 1, 1, channels).of_vector()
    found = schedule_vector.vector_schedule(plan, shape, torch.bfloat16, device=HOPPER)
    assert {(one.BD, one.num_warps) for one in (found.fwd, found.bwd)} == {(block, warps)}
    assert all(warps * 64 == one.BP * one.BD for one in (found.fwd, found.bwd))
    assert (found.L > 0) == (channels == 512)


@pytest.mark.parametrize("log_decay", [-softplus(a), logsigmoid(-a)], ids=str)
def test_the_decay_of_a_sigmoid_takes_no_logarithm(log_decay):
    plan = compiler.prepare(Spec("gated", value=b, log_decay=log_decay))[0]
    assert plan.decay_text == "sigmoid_of_minus(b_a_)"

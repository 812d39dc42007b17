"""flagen.testing: the comparison fails when it should, samples suit their spec, and check finds each kind of fault."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from flagen import reference, specs, testing
from flagen.expr import Input, Scalar, exp, k, log, logsigmoid, maximum, minimum, q, softplus, sqrt, v
from flagen.expr import abs as absolute
from flagen.intervals import interval
from flagen.samples import STATE_TOKENS
from flagen.spec import Spec, SpecWarning
from flagen.testing import TOLERANCES, WORST_ROW, assert_close, check, kind_of, make_inputs, make_state, measure

SHIPPED = [specs.get(name) for name in specs.names()]
NAMES = pytest.mark.parametrize("spec", SHIPPED, ids=lambda spec: spec.name)
gs, gk, u = Input("gs", "b t h"), Input("gk", "b t h k"), Input("u", "h k")


# --- the comparison


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_table_is_whole_and_ordered():
    for limits in TOLERANCES.values():
        assert set(limits) == {"o", "gradient", "gate"}
        assert 0 < limits["o"] <= limits["gradient"] <= limits["gate"] <= 2e-2
    kinds = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
    assert [TOLERANCES[kind]["o"] for kind in kinds] == sorted(limits["o"] for limits in TOLERANCES.values())


def test_equal_tensors_have_no_error():
    x = randn(2, 5, 3)
    assert measure(x, x).rms == measure(x, x).worst == 0
    assert measure(torch.zeros(3, 2), torch.zeros(3, 2)).rms == 0
    assert measure(torch.zeros(0, 2), torch.zeros(0, 2)).worst == 0
    assert_close("x", x.float(), x.float())


def test_the_errors_are_what_they_are_said_to_be():
    want = randn(40, 8)
    got = want + 1e-3 * randn(40, 8, seed=1)
    error = measure(got, want)
    assert error.rms == pytest.approx(float((got - want).norm() / want.norm()))
    rows = (got - want).norm(dim=-1) / want.norm(dim=-1).clamp(min=float(want.square().sum(-1).mean().sqrt()))
    assert error.worst == pytest.approx(float(rows.max())) and error.index == (int(rows.argmax()),)
    single = measure(got, want, channels=False)
    assert single.rms == pytest.approx(error.rms) and single.worst > error.worst and len(single.index) == 2


def test_a_small_row_is_compared_with_the_whole():
    want = randn(40, 8)
    want[7] *= 1e-6
    got = want.clone()
    got[7] += 1e-6
    assert measure(got, want).worst < 1e-5


def test_one_wrong_row_fails_although_the_rms_passes():
    want = randn(4096, 64)
    got = want.clone()
    got[1234] *= 1.1
    assert measure(got, want).rms < TOLERANCES[torch.bfloat16]["o"]
    assert_close("o", want, want, dtype=torch.bfloat16, kind="o")
    told = r"^o: relative RMS error 1\.\d\de-03 \(limit 4e-03\), worst row \d\.\d+e-0\d at \(1234,\) \(limit 4e-02\)$"
    with pytest.raises(AssertionError, match=told):
        assert_close("o", got, want, dtype=torch.bfloat16, kind="o")


def test_a_small_error_everywhere_fails_although_no_row_is_bad():
    want = randn(100, 16)
    got = want + 8e-3 * randn(100, 16, seed=1)
    assert measure(got, want).worst < WORST_ROW * TOLERANCES[torch.bfloat16]["gradient"]
    with pytest.raises(AssertionError, match="d q: relative RMS error"):
        assert_close("d q", got, want, dtype=torch.bfloat16)
    assert_close("d g", got, want, dtype=torch.bfloat16, kind="gate")


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_fails_wherever_it_stands(wrong):
    want = randn(6, 5, 4)
    for index in ((0, 0, 0), (3, 2, 1), (5, 4, 3)):
        got = want.clone()
        got[index] = wrong
        assert measure(got, want).index == index[:2]
        with pytest.raises(AssertionError, match=r"x: .* worst row (nan|inf)"):
            assert_close("x", got, want, dtype=torch.bfloat16, kind="gate")
        with pytest.raises(AssertionError):
            assert_close("x", want, got, dtype=torch.bfloat16, kind="gate")


def test_shapes_are_not_broadcast():
    with pytest.raises(AssertionError, match=r"o: the shape is \(1, 3\), it should be \(2, 3\)"):
        assert_close("o", torch.ones(1, 3), torch.ones(2, 3))


def test_anything_is_too_much_where_zero_is_wanted():
    got = torch.zeros(3, 2)
    got[2, 1] = 1e-30
    error = measure(got, torch.zeros(3, 2))
    assert error.rms == error.worst == math.inf and error.index == (2,)
    assert measure(got, torch.zeros(3, 2), floor=1.0).worst < 1e-29


def test_complex_tensors():
    want = torch.complex(randn(5, 4), randn(5, 4, seed=1))
    assert measure(want * torch.exp(torch.tensor(1e-3j)), want).rms == pytest.approx(1e-3, rel=1e-4)
    assert_close("S", want.to(torch.complex64), want)
    with pytest.raises(AssertionError):
        assert_close("S", want.conj().to(torch.complex64), want)


def test_what_has_no_tolerance():
    with pytest.raises(ValueError, match=r"no tolerance for torch.int32 'gradient'; there are torch.bfloat16, "):
        assert_close("x", torch.ones(2, dtype=torch.int32), torch.ones(2))
    with pytest.raises(ValueError, match="kinds o, gradient, gate"):
        assert_close("x", torch.ones(2), torch.ones(2), kind="grad")


def test_kinds_of_gradients():
    kinds = {spec.name: {one.name: kind_of(spec, one) for one in spec.inputs} for spec in SHIPPED}
    plain = {"q": "gradient", "k": "gradient", "v": "gradient"}
    assert kinds["retnet"] == plain and kinds["gla"] == plain | {"g": "gate"}
    assert kinds["mamba2"] == plain | {"dt": "gate", "A_log": "gate"}
    assert kinds["rwkv6"]["u"] == kinds["rwkv6"]["w"] == "gate" and kinds["rwkv6"]["r"] == "gradient"
    assert kinds["gateloop"]["theta"] == "gate"
    summed = Spec("summed", value=v * gs, key=k * gk)
    assert (kind_of(summed, gs), kind_of(summed, gk)) == ("gate", "gradient")


# --- samples


def log_decays(spec, inputs, scalars=None):
    """The values of log_decay, by the reference's own evaluation."""
    scalars = testing.make_scalars(spec) if scalars is None else scalars
    sizes = reference._sizes(spec, tuple(inputs.values()), None)
    values = reference._values(spec, tuple(inputs.values()), scalars, sizes, None, torch.float64)
    return reference._log_decay(spec, values, sizes["h"], torch.empty(0, dtype=torch.float64))


rate = Scalar("rate")
GATED = [
    Spec("direct", log_decay=gk),
    Spec("any_sign", log_decay=logsigmoid(gk) / 16),
    Spec("product", log_decay=-exp(u) * gk),
    Spec("of_decay", log_decay=log(gk)),
    Spec("of_both", log_decay=log(maximum(gs, 0))),
    Spec("complement", log_decay=log(1 - gs)),
    Spec("root", log_decay=-sqrt(gs), key=k * log(gs)),
    Spec("narrow", log_decay=gs, value=v * log(gs + 1)),
    Spec("bounded", log_decay=Input("ga", "b t h k", high=-0.25)),
    Spec("between", log_decay=log(Input("ga", "b t h", low=0.5, high=1))),
    Spec("positive", log_decay=-Input("ga", "b t h", low=0)),
    Spec("scaled", log_decay=-rate * softplus(gs)),
    Spec("falling", log_decay=(rate - Scalar("most")) * softplus(gs)),
    Spec("unproven", log_decay=minimum(gs, -gs)),
    Spec("two", log_decay=gs * gk),
]


@pytest.mark.parametrize("spec", [*SHIPPED, *GATED], ids=lambda spec: spec.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_log_decays_are_never_positive_and_all_is_finite(spec, dtype):
    inputs = make_inputs(spec, B=2, T=100, H=4, K=8, V=5, dtype=dtype)
    assert list(inputs) == [one.name for one in spec.inputs]
    if spec.log_decay is not None:
        decay = log_decays(spec, inputs)
        assert (decay <= 0).all()
        if spec.log_decay.inputs:
            # neither all forgotten nor all kept
            assert 1e-3 < float(-decay.median()) < 3
    scalars = testing.make_scalars(spec)
    state = make_state(spec, N=2, H=4, K=8, V=5)
    o, _ = reference.run(spec, tuple(inputs.values()), scalars=scalars, initial_state=state)
    assert o.isfinite().all() and o.any()
    for one in spec.inputs:
        x = inputs[one.name]
        assert one.low is None or (x >= one.low).all()
        assert one.high is None or (x <= one.high).all()


def test_inputs_that_may_be_anything_are_normal():
    inputs = make_inputs(Spec("any_sign", log_decay=logsigmoid(gk), bonus=u), T=1000, H=8)
    for name in ("q", "k", "v", "gk"):
        assert abs(float(inputs[name].mean())) < 0.01 and float(inputs[name].std()) == pytest.approx(1, rel=0.01)
    assert float(inputs["u"].std()) == pytest.approx(0.5, rel=0.1)
    step = make_inputs(specs.get("mamba2"))["dt"]
    assert (step > 0).all() and 0.05 < float(step.mean()) < 0.3


@NAMES
def test_samples_are_decided_by_the_seed(spec):
    sizes = {"B": 1, "T": 20, "H": 2, "K": 8, "V": 4}
    first, again, other = (make_inputs(spec, **sizes, seed=seed) for seed in (3, 3, 4))
    rounded = make_inputs(spec, **sizes, seed=3, dtype=torch.bfloat16)
    for name, x in first.items():
        assert torch.equal(x, again[name]) and not torch.equal(x, other[name])
        assert torch.equal(x.bfloat16(), rounded[name])
    torch.manual_seed(1)
    state = torch.get_rng_state()
    make_state(spec, N=1, H=2, K=8, V=4)
    assert torch.equal(state, torch.get_rng_state())


def test_forms_of_the_samples():
    spec = specs.get("mamba2")
    inputs = make_inputs(spec, B=1, T=7, H=6, K=4, V=3, N=5, dtype=torch.float16, gate_dtype=torch.float32,
                         heads={"q": 2, "k": 1})  # fmt: skip
    assert [tuple(x.shape) for x in inputs.values()] == [(1, 7, 2, 4), (1, 7, 1, 4), (1, 7, 6, 3), (1, 7, 6), (6,)]
    assert [x.dtype for x in inputs.values()] == [torch.float16] * 3 + [torch.float32] * 2
    rows = make_inputs(Spec("rows", log_decay=logsigmoid(Input("gb", "b h"))), B=1, T=7, N=5)
    assert rows["gb"].shape == (5, 4) and rows["q"].shape[0] == 1
    assert make_inputs(Spec("rows", log_decay=logsigmoid(Input("gb", "b h"))), B=3)["gb"].shape == (3, 4)


def test_states_are_those_of_the_op():
    assert STATE_TOKENS > 1
    state, sums = make_state(specs.get("based"), N=3, H=2, K=4, V=5)
    assert state.shape == (3, 2, 15, 5) and sums.shape == (3, 2, 15)
    turned = make_state(specs.get("gateloop"), K=4, V=5, dtype=torch.float64)
    assert turned.dtype == torch.complex128 and turned.imag.abs().max() > 0.1
    assert make_state(specs.get("gla"), K=4, V=5).dtype == torch.float32


def test_no_inputs_suit_a_decay_that_grows():
    spec = Spec("grows", log_decay=exp(gs) + Input("ga", "h", low=-1e-3))
    assert not interval(spec.log_decay).is_positive  # or it could not be declared
    with pytest.raises(
        ValueError, match=r"grows: no inputs were found .* log_decay = exp\(gs\) \+ ga <= 0; declare bounds"
    ):
        make_inputs(spec)


# --- check


class Honest:
    """An op that is the reference itself in the dtype of its inputs, and may be spoilt."""

    def __init__(self, spec):
        self.spec = spec

    def __call__(self, *inputs, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None, **scalars):
        options = {"scale": scale, "initial_state": initial_state, "cu_seqlens": cu_seqlens, "scalars": scalars}
        return reference.run(self.spec, inputs, **options, output_final_state=output_final_state)

    def step(self, *inputs, state, scale=None, **scalars):
        o, after = self(*inputs, scale=scale, initial_state=state, output_final_state=True, **scalars)
        for old, new in zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (state, after)), strict=True):
            old.copy_(new)
        return o


SMALL = {"B": 1, "T": 12, "H": 2, "K": 6, "V": 4}


@NAMES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_check_believes_an_honest_op(spec, dtype):
    report = check(Honest(spec), **SMALL, dtype=dtype, device="cpu")
    assert report.ok and report.failures == () and all(math.isfinite(row.rms) for row in report.rows)
    found = [row.tensor for row in report.rows]
    parts = list("Szm"[: spec.state_parts])
    wanted = ["o", *(f"final_state {x}" for x in parts), *(f"d {one.name}" for one in spec.inputs)]
    wanted += [f"d initial_state {x}" for x in parts] + ["step o", *(f"step state {x}" for x in parts)]
    assert found == wanted
    assert str(report).splitlines()[0].startswith(f"{spec.name}: B=1 T=12 H=2 K=6 V=4 ")
    assert len(str(report).splitlines()) == len(found) + 2


@pytest.mark.parametrize(
    "options",
    [
        {"T": 1},
        {"T": 1, "initial_state": False},
        {"T": 2, "initial_state": False, "decode": 9},
        {"initial_state": False, "decode": 0},
        {"cu_seqlens": [0, 3, 3, 8]},
        {"cu_seqlens": torch.tensor([0, 3, 3, 8]), "initial_state": False, "scale": 0.2},
        {"heads": {"k": 1, "q": 1}, "gate_dtype": torch.float32},
        {"segment": 3},
    ],
    ids=str,
)
@NAMES
def test_check_in_other_circumstances(spec, options):
    check(Honest(spec), **(SMALL | options), dtype=torch.float16, device="cpu")


def test_a_limit_is_that_of_the_dtype_of_products():
    # v is bf16, as an input of log_decay, and so are the output and the operands of products; q and k are fp16
    spec = Spec("mixed", log_decay=-softplus(v))
    report = check(Honest(spec), **SMALL, dtype=torch.float16, gate_dtype=torch.bfloat16, device="cpu")
    limits = {row.tensor: row.limit for row in report.rows}
    coarse, fine = TOLERANCES[torch.bfloat16], TOLERANCES[torch.float16]
    assert coarse["o"] > fine["o"]
    assert {limits[x] for x in ("o", "final_state S", "step o", "step state S")} == {coarse["o"]}
    assert {limits[f"d {x}"] for x in ("q", "k", "initial_state S")} == {coarse["gradient"]}


def test_check_of_sequences_has_no_decode():
    report = check(Honest(specs.get("gla")), H=2, K=4, V=4, device="cpu", cu_seqlens=[0, 3, 9])
    assert [row.tensor for row in report.rows if "step" in row.tensor] == [] and " T=9 " in report.title
    with pytest.raises(ValueError, match="gla: cu_seqlens bounds sequences of one row, so B must be 1, got 2"):
        check(Honest(specs.get("gla")), B=2, cu_seqlens=[0, 3, 9])


def test_check_takes_inputs():
    spec = specs.get("gla")
    inputs = make_inputs(spec, B=3, T=9, H=2, K=5, V=4, dtype=torch.bfloat16, gate_dtype=torch.float32)
    report = check(Honest(spec), inputs=inputs, device="cpu")
    assert report.title.startswith("gla: B=3 T=9 H=2 K=5 V=4 bfloat16/float32 on cpu")
    assert report.rows[0].limit == TOLERANCES[torch.bfloat16]["o"]
    with pytest.raises(ValueError, match="gla: inputs lacks 'g'; give all of q, k, v, g"):
        check(Honest(spec), inputs={name: inputs[name] for name in "qkv"}, device="cpu")


class _Added(torch.autograd.Function):
    """Right forward, a gradient with something added."""

    @staticmethod
    def forward(ctx, x, more):
        ctx.more = more
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient + ctx.more, None


def test_a_gradient_that_is_a_sum_is_compared_with_the_size_of_its_terms():
    c, wide = Input("c", "h"), Input("c", "b t h")
    spec, each = Spec("summed", value=v * exp(c)), Spec("each", value=v * exp(wide))
    sizes = {"B": 2, "T": 30, "H": 1, "K": 4, "V": 4}

    def terms(seed):
        """The terms of c's gradient, as check's own random gradients have them."""
        given = {name: x.double() for name, x in make_inputs(spec, **sizes, seed=seed).items()}
        given["c"] = given["c"].expand(2, 30, 1).clone().requires_grad_()
        o, _ = reference.run(each, tuple(given.values()))
        do = torch.randn(o.shape, generator=torch.Generator().manual_seed(seed + 1))
        return torch.autograd.grad(o, given["c"], do.to(o))[0]

    found = ((seed, terms(seed)) for seed in range(500))
    seed, cancelled = next((seed, x) for seed, x in found if x.sum().abs() < x.square().sum().sqrt() / 20)
    size = float(cancelled.square().sum().sqrt())

    class Off(Honest):
        def __call__(self, q, k, v, c, **options):
            return super().__call__(q, k, v, _Added.apply(c, self.more), **options)

    options = {**sizes, "seed": seed, "device": "cpu", "decode": 0, "initial_state": False, "final_state": False}
    op = Off(spec)
    op.more = 0.9 * TOLERANCES[torch.float32]["gate"] * size  # 18 times the limit, of the sum itself
    assert check(op, **options).ok
    op.more *= 1.3
    with pytest.raises(AssertionError, match="d c"):
        check(op, **options)


class _Scaled(torch.autograd.Function):
    """Right forward, a gradient times a factor."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


def spoilt(fault):
    """An op for gla that is wrong in one way."""

    class Spoilt(Honest):
        def __call__(self, *inputs, initial_state=None, **options):
            inputs = list(inputs)
            if fault == "d k":
                inputs[1] = _Scaled.apply(inputs[1], 1.02)
            if fault == "d g":
                inputs[3] = _Scaled.apply(inputs[3], 0.0)
            if fault == "d initial_state S":
                initial_state = _Scaled.apply(initial_state, math.nan)
            o, state = super().__call__(*inputs, initial_state=initial_state, **options)
            if fault == "o" and o.shape[1] > 5:
                wrong = torch.zeros_like(o)
                wrong[0, 5, 1, 2] = 1.0
                o = o + wrong
            if fault == "final_state S":
                state = state + 0.02 * state.detach()
            if fault == "shape":
                o = o[:, :-1]
            if fault == "dtype":
                o = o.double()
            return o, state

        def step(self, *inputs, state, **options):
            if fault == "step state S":
                state = state.clone()  # not updated in place
            o = super().step(*inputs, state=state, **options)
            return o * 1.1 if fault == "step o" else o

    return Spoilt(specs.get("gla"))


@pytest.mark.parametrize(
    "fault", ["o", "final_state S", "d k", "d g", "d initial_state S", "step o", "step state S", "shape", "dtype"]
)
def test_check_finds_a_fault_and_names_the_tensor(fault):
    report = check(spoilt(fault), **SMALL, decode=1, device="cpu", raises=False)
    named = "o" if fault in ("shape", "dtype") else fault
    # a wrong final state also decodes wrongly
    assert not report.ok and report.failures[0].tensor == named
    if fault != "shape":  # for which the gradients of the output differ too
        assert {row.tensor for row in report.failures} <= {named, "step o", "step state S"}
    with pytest.raises(AssertionError) as error:
        check(spoilt(fault), **SMALL, decode=1, device="cpu")
    message = str(error.value)
    assert "gla: B=1 T=12 H=2 K=6 V=4 float32 on cpu: " in message and "tensors differ" in message
    assert any(line.startswith(f"{named} ") for line in message.splitlines())
    told = {"shape": "shape (1, 11, 2, 4), not (1, 12, 2, 4)", "dtype": "torch.float64, not torch.float32"}
    assert told.get(fault, "DIFFERS") in message


def test_check_measures_what_a_normaliser_divides_out_against_its_terms():
    """At a first token o is v: the gradient of q is rounding, small beside its terms but not beside itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SpecWarning)
        spec = Spec("sums", feature_map=exp, normalize=lambda n: maximum(absolute(n), 1e-9))
    options = {**SMALL, "T": 1, "initial_state": False, "device": "cpu"}
    check(Honest(spec), **options)

    class Undivided(Honest):
        def __call__(self, *inputs, **options):
            o, state = super().__call__(*inputs, **options)
            return o + 1e-2 * (inputs[0] - inputs[0].detach()).sum(), state

    with pytest.raises(AssertionError, match="d q"):
        check(Undivided(spec), **options)


@pytest.mark.parametrize("name", ["gla", "based"])
def test_check_compiles_a_spec(name):
    report = check(specs.get(name), T=70, H=2, K=8, V=6, device="cpu", backend="torch")
    assert report.ok
    by_name = check(name, T=70, H=2, K=8, V=6, device="cpu", backend="torch", chunk_size=16, dtype=torch.bfloat16)
    assert by_name.ok


def test_a_query_of_many_inputs():
    spec = Spec("many", query=q * softplus(gs), log_decay=logsigmoid(gk), bonus=u)
    check(Honest(spec), **SMALL, device="cpu", dtype=torch.bfloat16)


# --- what is asked for, and how inputs lie


@pytest.mark.parametrize("name", ["gla", "based", "gateloop", "rwkv6"])
@pytest.mark.parametrize("asked", [(), ("initial_state",), ("v",), None])
def test_check_asks_for_some_gradients(name, asked):
    report = check(Honest(specs.get(name)), **SMALL, device="cpu", requires_grad=asked)
    every = check(Honest(specs.get(name)), **SMALL, device="cpu")
    found = {row.tensor for row in every.rows} - {row.tensor for row in report.rows}
    wanted = [f"d {one.name}" for one in specs.get(name).inputs] + ["d initial_state S", "d initial_state z"]
    if asked is not None:
        assert {row.tensor.split()[1] for row in report.rows if row.tensor.startswith("d ")} == set(asked)
    assert report.ok and all(tensor in wanted for tensor in found)


def test_check_without_the_final_state_passes_on_what_is_asked():
    seen = []

    class Recording(Honest):
        def __call__(self, *inputs, **options):
            seen.append((options["output_final_state"], [x.requires_grad for x in inputs]))
            return super().__call__(*inputs, **options)

    report = check(Recording(specs.get("gla")), **SMALL, device="cpu", final_state=False, requires_grad=("k", "g"))
    assert seen[0] == (False, [False, True, False, True])
    assert [row.tensor for row in report.rows if row.tensor.startswith("final")] == [] and report.ok
    # the output's gradient alone: that of the last token's decay is not what it is with the state's
    with_final = check(Recording(specs.get("gla")), **SMALL, device="cpu", requires_grad=("k", "g"))
    assert [row.tensor for row in with_final.rows if row.tensor.startswith("final")] == ["final_state S"]


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_check_lays_inputs_out(layout):
    strides = []

    class Recording(Honest):
        def __call__(self, *inputs, **options):
            strides.append([(tuple(x.shape), x.stride()) for x in inputs])
            assert all(x.is_leaf and x.isfinite().all() for x in inputs)
            return super().__call__(*inputs, **options)

    sizes = {"B": 2, "T": 5, "H": 3, "K": 6, "V": 4}
    assert check(Recording(specs.get("rwkv6")), **sizes, device="cpu", layout=layout).ok
    (shape, r), *_, (_, u) = strides[0]
    assert shape == (2, 5, 3, 6)
    wanted = {
        "contiguous": ((90, 18, 6, 1), (6, 1)),
        "heads_first": ((90, 6, 30, 1), (6, 1)),
        "sliced": ((270, 54, 18, 1), (18, 1)),
        "reversed": ((1, 2, 10, 30), (1, 3)),
        "spread": ((180, 36, 12, 2), (12, 2)),
    }
    assert (r, u) == wanted[layout]


def test_check_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="gla: requires_grad names 'w'; there are q, k, v, g, initial_state"):
        check(Honest(specs.get("gla")), **SMALL, device="cpu", requires_grad=("w",))
    with pytest.raises(ValueError, match="gla: layout='odd' is not allowed; use one of contiguous, heads_first,"):
        check(Honest(specs.get("gla")), **SMALL, device="cpu", layout="odd")


def test_a_coarse_input_is_held_to_its_own_dtype():
    """The gradient of a bf16 gate beside fp32 inputs is bf16, and so is an output whose value begins with one."""
    sizes = SMALL | {"dtype": torch.float32, "gate_dtype": torch.bfloat16, "device": "cpu"}
    limits = {row.tensor: row.limit for row in check(Honest(specs.get("gla")), **sizes).rows}
    assert limits["d g"] == TOLERANCES[torch.bfloat16]["gate"]
    assert limits["d k"] == TOLERANCES[torch.float32]["gradient"] and limits["o"] == TOLERANCES[torch.float32]["o"]
    with pytest.raises(AssertionError, match="d g"):
        check(spoilt("d g"), **sizes)
    gated = Spec("gated", value=gs * v, log_decay=logsigmoid(gs))
    report = check(Honest(gated), **sizes)
    first = next(row for row in report.rows if row.tensor == "o")
    assert first.limit == TOLERANCES[torch.bfloat16]["o"] and report.ok

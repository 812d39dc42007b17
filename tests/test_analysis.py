"""Analysis: the facts that follow from a spec, and the interval arithmetic under its bounds."""

import json
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from flagen import specs
from flagen.analysis import analyse, derivative_texts, restored
from flagen.errors import SpecError
from flagen.expr import (
    NORM,
    Call,
    Input,
    Number,
    Scalar,
    abs,
    elu,
    exp,
    head,
    heads,
    k,
    log,
    logsigmoid,
    maximum,
    minimum,
    q,
    relu,
    sigmoid,
    silu,
    softplus,
    sqrt,
    substitute,
    tanh,
    taylor,
    v,
)
from flagen.functions import evaluate_host, host_power
from flagen.intervals import interval
from flagen.parse import parse, parse_derivative
from flagen.spec import Spec

g = Input("g", "b t h k")
x, y = Input("x", "b t h"), Input("y", "b t h")


@pytest.mark.parametrize(
    ("name", "decay", "varies", "low", "constants"),
    [
        ("retnet", "scalar", False, math.log(1 - 1 / 32), ["log(1 - 2 ** (-5 - head))"]),
        ("transnormer", "scalar", False, None, ["-(8 / heads) * (1 - layer / layers) * head"]),
        ("gla", "key", True, None, []),
        ("rwkv6", "key", True, None, []),
        ("gateloop", "key", True, None, []),
        ("based", "none", False, None, []),
        ("mamba2", "scalar", True, None, []),
        ("hgrn2", "key", True, None, []),
        ("linear", "none", False, None, []),
        ("delta_net", "none", False, None, []),
        ("gated_delta_net", "scalar", True, None, []),
        ("kda", "key", True, None, []),
        ("comba", "scalar", True, None, []),
        ("rwkv7", "key", True, None, []),
    ],
)
def test_facts_of_the_shipped_specs(name, decay, varies, low, constants):
    analysis = analyse(specs.get(name))
    assert (analysis.decay, analysis.decay_varies, analysis.decay_low) == (decay, varies, low)
    assert [str(expr) for _, expr in analysis.constants] == constants
    assert analysis.inputs == analysis.spec.inputs
    assert analysis.is_complex == (name == "gateloop")
    assert analysis.exclusive == (name == "rwkv6")
    assert analysis.taylor == (2 if name == "based" else 0)
    assert (analysis.normalizer is not None) == (name in ("based", "linear"))
    kinds = {"delta_net": "delta", "gated_delta_net": "delta", "kda": "delta", "comba": "delta", "rwkv7": "general"}
    assert analysis.erase == kinds.get(name, "none")
    assert analysis.erase_previous == (name in ("comba", "rwkv7"))
    assert [role for role, _ in analysis.roles][:3] == ["query", "key", "value"]
    assert str(analysis).startswith(name)


def test_mamba2_in_full():
    analysis = analyse(specs.get("mamba2"))
    a_log, dt = analysis.inputs[4], analysis.inputs[3]
    assert analysis.role("log_decay") == -exp(a_log) * dt
    assert analysis.role("phase") is None
    gradients = {(role, one.name): str(expr) for role, one, expr in analysis.gradients}
    assert gradients == {
        ("query", "q"): "1",
        ("key", "k"): "1",
        ("value", "v"): "dt",
        ("value", "dt"): "v",
        ("log_decay", "dt"): "-exp(A_log)",
        ("log_decay", "A_log"): "-dt * exp(A_log)",
    }


def test_constants_are_the_largest_subexpressions_without_tensors():
    rate = Scalar("rate")
    spec = Spec(
        "s", query=q / sqrt(heads), key=k * (rate + 1) * (Number(1) / 4), log_decay=-softplus(g + head) * (rate + 1)
    )
    analysis = analyse(spec)
    assert [(one.name, one.axes, str(expr)) for one, expr in analysis.constants] == [
        ("c0", "h", "sqrt(heads)"),
        ("c1", "h", "rate + 1"),
        ("c2", "h", "head"),
    ]
    assert str(analysis.role("query")) == "q / c0"
    assert str(analysis.role("key")) == "k * c1 * 0.25"
    assert str(analysis.role("log_decay")) == "-softplus(g + c2) * c1"
    gradients = {(role, one.name): str(expr) for role, one, expr in analysis.gradients}
    assert gradients[("log_decay", "g")] == "-c1 * sigmoid(c2 + g)"
    assert not any(one.name.startswith("c") for _, one, _ in analysis.gradients)
    assert evaluate_host(analysis.constants[1][1], {"rate": 0.5}, 2) == [1.5, 1.5]


def test_a_constant_decay_of_a_number_is_folded():
    analysis = analyse(Spec("s", log_decay=log(Number(1) / 2)))
    assert analysis.role("log_decay") == Number(math.log(0.5))
    assert (analysis.decay, analysis.decay_varies, analysis.decay_low) == ("scalar", False, math.log(0.5))


@pytest.mark.parametrize(
    ("axes", "kind", "varies"),
    [("b t h", "scalar", True), ("h", "scalar", False), ("b h", "scalar", False), ("h k", "key", False),
     ("b t h v", "value", True), ("h v", "value", False), ("t", "scalar", True)],
)  # fmt: skip
def test_kinds_of_decay(axes, kind, varies):
    analysis = analyse(Spec("s", log_decay=logsigmoid(Input("a", axes))))
    assert (analysis.decay, analysis.decay_varies) == (kind, varies)


def test_bounds_of_the_decay():
    def low(expr):
        return analyse(Spec("s", log_decay=expr)).decay_low

    assert low(-softplus(g)) is None
    assert low(maximum(g, -5)) == -5
    assert low(-5 * sigmoid(g)) == -5
    assert low(Input("g", "b t h k", low=-3, high=0)) == -3
    assert low(logsigmoid(Input("g", "b t h k", low=-2))) == pytest.approx(-math.log1p(math.exp(2)))


def test_the_normalizer_and_its_derivative():
    analysis = analyse(Spec("s", feature_map=elu_plus_one, normalize=True, eps=0.5))
    assert (analysis.normalizer, analysis.normalizer_gradient) == (NORM + 0.5, Number(1))
    analysis = analyse(Spec("s", normalize=lambda n: maximum(abs(n), 1)))
    assert str(analysis.normalizer) == "maximum(abs(n), 1)"
    assert str(analysis.normalizer_gradient) == "half_step(abs(n) - 1) * sign(n)"


def elu_plus_one(x):
    return elu(x) + 1


def test_shared_inputs_have_a_gradient_per_role():
    analysis = analyse(specs.get("hgrn2"))
    assert [(role, one.name) for role, one, _ in analysis.gradients if one.name == "g"] == [
        ("key", "g"),
        ("log_decay", "g"),
    ]


def test_analyses_are_values():
    assert analyse(specs.get("gla")) == analyse(Spec.from_json(specs.get("gla").to_json()))
    with pytest.raises(AttributeError):
        analyse(specs.get("gla")).decay = "none"


# --- intervals

positive, nonnegative, unit = Input("p", "h", low=0.5), Input("n", "h", low=0), Input("u", "h", low=-1, high=1)


@pytest.mark.parametrize(
    ("expr", "low", "high", "low_open", "high_open"),
    [
        (softplus(x), 0, math.inf, True, True),
        (relu(x), 0, math.inf, False, True),
        (x * x, 0, math.inf, False, True),
        (x**2, 0, math.inf, False, True),
        (elu(x) + 1, 0, math.inf, True, True),
        (sigmoid(x) - 1, -1, 0, True, True),
        (2 ** (-5 - head), 0, 1 / 32, True, False),
        (log(1 - 2 ** (-5 - head)), math.log(1 - 1 / 32), 0, False, True),
        (8 / heads, 0, 8, True, False),
        (exp(unit), math.exp(-1), math.exp(1), False, False),
        (1 / positive, 0, 2, True, False),
        (-1 / exp(x), -math.inf, 0, False, True),
        (sqrt(nonnegative), 0, math.inf, False, True),
        (nonnegative**0.5, 0, math.inf, False, True),
        (abs(unit), 0, 1, False, False),
        (minimum(x, 0), -math.inf, 0, False, False),
        (minimum(exp(x), 1), 0, 1, True, False),
        (silu(x), -0.27846454276107384, math.inf, False, True),
        (unit**3, -1, 1, False, False),
        (unit**-2, 1, math.inf, False, True),
    ],
)
def test_intervals(expr, low, high, low_open, high_open):
    found = interval(expr)
    assert (found.low, found.high) == (low, high)
    assert (found.low_open or low == -math.inf, found.high_open or high == math.inf) == (
        low_open or low == -math.inf,
        high_open,
    )


def test_signs():
    assert interval(softplus(x)).is_positive
    assert not interval(relu(x)).is_positive
    assert interval(relu(x)).is_nonnegative
    assert interval(-exp(x)).is_negative
    assert not interval(x / x).is_positive
    assert (interval(log(x)).low, interval(log(x)).high) == (-math.inf, math.inf)
    assert host_power(2.0, -5.0) == 1 / 32


bounded = [unit, Input("a", "h", low=0, high=3), Input("c", "h", low=-4, high=-0.5)]
trees = st.recursive(
    st.one_of(st.sampled_from(bounded), st.sampled_from([0, 0.5, 2, -1, 3, -2.5]).map(lambda n: Number(n))),
    lambda children: st.one_of(
        *[
            st.tuples(children, children).map(lambda p, n=n: Call(n, p))
            for n in ("add", "sub", "mul", "div", "minimum", "maximum", "pow")
        ],
        *[
            children.map(lambda c, f=f: f(c))
            for f in (exp, log, sqrt, abs, sigmoid, logsigmoid, softplus, tanh, relu, silu, elu)
        ],
        st.tuples(children, st.integers(-3, 4)).map(lambda p: p[0] ** p[1]),
    ),
    max_leaves=6,
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(trees, st.integers(0, 2**32 - 1))
def test_no_value_lies_outside_its_interval(tree, seed):
    found = interval(tree)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(8):
        values = {
            one.name: one.low + (one.high - one.low) * float(torch.rand(1, generator=generator)) for one in bounded
        }
        value = evaluate_host(substitute(tree, {one: Scalar(one.name) for one in bounded}), values, 1)[0]
        if math.isfinite(value):
            slack = 1e-9 * max(1.0, math.fabs(value))
            assert found.low - slack <= value <= found.high + slack, f"{tree} = {value} outside {found}"


def test_specs_need_no_sympy_jinja_or_triton():
    code = (
        "import sys; from flagen import specs; [specs.get(name).to_json() for name in specs.names()];"
        "sys.exit(', '.join(m for m in ('sympy', 'jinja2', 'triton') if m in sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stderr.strip() == ""


def test_taylor_of_both_orders():
    for order in (1, 2):
        spec = Spec("s", feature_map=taylor(order), value=v)
        assert analyse(spec).taylor == order


# --- analyses from the text of their derivatives


def through_json(spec):
    """The analysis as the next process gets it from the cache."""
    return restored(spec, json.loads(json.dumps(derivative_texts(analyse(spec)))))


@pytest.mark.parametrize("name", specs.names())
def test_the_shipped_specs_come_back_from_text(name):
    assert through_json(specs.get(name)) == analyse(specs.get(name))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(trees, trees, st.sampled_from(["log_decay", "bonus", "phase"]))
def test_any_analysis_comes_back_from_text(tree, other, role):
    try:
        spec = Spec("s", value=v * tree, key=k / (other + heads), **{role: -exp(other) * Scalar("rate")})
        expected = analyse(spec)
    except SpecError:
        assume(False)
    assert through_json(spec) == expected


@pytest.mark.parametrize(
    "normalize", [True, lambda n: maximum(abs(n), 1), lambda n: sqrt(n * n + 0.1), lambda n: relu(n) + minimum(n, 2)]
)
def test_normalizers_come_back_from_text(normalize):
    spec = Spec("s", feature_map=elu_plus_one, normalize=normalize)
    assert through_json(spec) == analyse(spec)


def test_a_derivative_larger_than_a_user_may_write_comes_back_from_text():
    tree = x
    for _ in range(18):
        tree = tanh(tree * silu(x)) + y
    spec = Spec("s", value=v * tree)
    expected = analyse(spec)
    text = max((text for _, _, text in derivative_texts(expected)["gradients"]), key=len)
    names = {one.name: one for one in spec.inputs}
    with pytest.raises(SpecError, match=r"limit is|more than"):
        parse(text, names)
    assert through_json(spec) == expected


@pytest.mark.parametrize("name", ["sign", "step", "half_step"])
def test_functions_of_derivatives_are_for_derivatives(name):
    assert parse_derivative(f"{name}(x) * 2", {"x": x}) == Call("mul", (Call(name, (x,)), Number(2)))
    with pytest.raises(SpecError, match=f"unknown function '{name}'"):
        parse(f"{name}(x) * 2", {"x": x})
    with pytest.raises(SpecError, match="takes 1 argument"):
        parse_derivative(f"{name}(x, x)", {"x": x})
    with pytest.raises(SpecError, match="unknown function"):
        parse_derivative("open(x)", {"x": x})

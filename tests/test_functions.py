"""The functions' three forms, Python, torch and Triton text, agree everywhere, at extreme values too."""

import math
import types

import numpy as np
import pytest
import torch

from flagen.errors import SpecError
from flagen.expr import (
    DERIVATIVE_FUNCTIONS,
    FUNCTION_ARITY,
    Call,
    Input,
    Number,
    Scalar,
    elu,
    exp,
    head,
    heads,
    log,
    logsigmoid,
    maximum,
    q,
    softplus,
    sqrt,
    tanh,
)
from flagen.functions import FUNCTIONS, evaluate, evaluate_host, fold, triton_text

x, y = Input("x", "bth"), Input("y", "bth")
NAMES = {x: "b_x", y: "b_y", q: "b_q"}
EXTREMES = [
    0.0,
    -0.0,
    1e-30,
    -1e-30,
    1e-4,
    -1e-4,
    0.5,
    -0.5,
    1.0,
    -1.0,
    20.0,
    -20.0,
    88.0,
    -88.0,
    104.0,
    -104.0,
    1e4,
    -1e4,
]
POSITIVE = ("log", "sqrt")  # only these are not defined everywhere

# what the texts may use of triton.language, in numpy, in fp32 as kernels compute
tl = types.SimpleNamespace(
    exp=np.exp,
    exp2=np.exp2,
    log=np.log,
    sqrt=np.sqrt,
    abs=np.abs,
    sigmoid=lambda x: 1 / (1 + np.exp(-x)),
    minimum=lambda x, y: np.minimum(x, np.float32(y)) if isinstance(y, float) else np.minimum(x, y),
    maximum=lambda x, y: np.maximum(x, np.float32(y)) if isinstance(y, float) else np.maximum(x, y),
    where=lambda c, x, y: np.where(c, *(np.float32(z) if isinstance(z, float) else z for z in (x, y))),
)  # fmt: skip


def run_text(text, **values):
    with np.errstate(all="ignore"):
        arrays = {f"b_{name}": np.asarray(value, np.float32) for name, value in values.items()}
        return eval(text, {"__builtins__": {}, "tl": tl}, arrays)  # our own text, printed a line above


def run_torch(expr, dtype=torch.float64, **values):
    env = {name: torch.tensor(np.asarray(value, np.float32), dtype=dtype) for name, value in values.items()}
    return evaluate(expr, env, 4)


def sample(name=None):
    random = np.random.default_rng(0)
    values = np.concatenate([EXTREMES, random.normal(size=300), random.normal(size=100) * 30]).astype(np.float32)
    return np.abs(values) if name in POSITIVE else values


def assert_near(got, expected, atol=3e-7, rtol=2e-6):
    np.testing.assert_allclose(np.broadcast_to(got, expected.shape), expected, atol=atol, rtol=rtol, equal_nan=True)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_three_forms_agree(name):
    function = FUNCTIONS[name]
    values = {"x": sample(name)} | ({"y": sample(name)[::-1].copy()} if function.arity == 2 else {})
    expr = Call(name, (x, y)[: function.arity])
    expected = run_torch(expr, **values).numpy()
    with np.errstate(over="ignore"):
        as_float32 = expected.astype(np.float32).astype(np.float64)
    text = triton_text(expr, NAMES)
    result = run_text(text, **values)
    assert result.dtype == np.float32
    assert_near(result.astype(np.float64), as_float32)
    python = [function.python(*map(float, row)) for row in zip(*values.values(), strict=True)]
    assert_near(np.array(python), expected, atol=1e-300, rtol=1e-13)


@pytest.mark.parametrize(
    ("name", "at_minus_infinity", "at_infinity"),
    [
        ("exp", 0.0, math.inf), ("sigmoid", 0.0, 1.0), ("logsigmoid", -math.inf, 0.0), ("softplus", 0.0, math.inf),
        ("tanh", -1.0, 1.0), ("relu", 0.0, math.inf), ("elu", -1.0, math.inf), ("abs", math.inf, math.inf),
    ],
)  # fmt: skip
def test_infinities_have_their_limits(name, at_minus_infinity, at_infinity):
    expr, ends = Call(name, (x,)), [-math.inf, math.inf]
    limits = [at_minus_infinity, at_infinity]
    assert list(run_text(triton_text(expr, NAMES), x=ends)) == limits
    assert run_torch(expr, x=ends).tolist() == limits
    assert [FUNCTIONS[name].python(end) for end in ends] == limits


def test_every_function_of_the_language_is_there():
    assert list(FUNCTIONS) == [*FUNCTION_ARITY, *DERIVATIVE_FUNCTIONS]
    assert all(FUNCTIONS[name].arity == arity for name, arity in FUNCTION_ARITY.items())


@pytest.mark.parametrize(
    ("expr", "text"),
    [
        (-exp(x) * y, "-tl.exp(b_x) * b_y"),
        (logsigmoid(x) / 16, "(tl.minimum(b_x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(b_x)))) / 16.0"),
        (x - (y - x), "b_x - (b_y - b_x)"),
        (x - softplus(y), "b_x - (tl.maximum(b_y, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(b_y))))"),
        (x * tanh(x + y), "b_x * (2.0 * tl.sigmoid(2.0 * (b_x + b_y)) - 1.0)"),
        (
            elu(x + 1),
            "tl.where(b_x + 1.0 > 0.0, b_x + 1.0, tl.exp2(tl.minimum(b_x + 1.0, 0.0) * 1.4426950408889634) - 1.0)",
        ),
        (x**2, "b_x * b_x"),
        ((x + y) ** 3, "(b_x + b_y) * (b_x + b_y) * (b_x + b_y)"),
        (x**4, "(b_x * b_x) * (b_x * b_x)"),
        (y / x**2, "b_y / (b_x * b_x)"),
        (x**-1, "1.0 / b_x"),
        (x**0.5, "tl.sqrt(b_x)"),
        (x**2.5, "tl.exp(2.5 * tl.log(b_x))"),
        (2**x, "tl.exp2(b_x)"),
        (3 ** (x + 1), f"tl.exp((b_x + 1.0) * {math.log(3)!r})"),
        (x * (Number(1) / 3 - 1), "b_x * -0.6666666666666667"),
        (-(x * y), "-(b_x * b_y)"),
        (x**2 * y, "b_x * b_x * b_y"),
        (y * x**2, "b_y * (b_x * b_x)"),
    ],
)
def test_triton_text(expr, text):
    assert triton_text(expr, NAMES) == text
    values = {"x": np.linspace(0.1, 3, 50), "y": np.linspace(-2, 2, 50)}
    assert_near(run_text(text, **values), run_torch(expr, **values).numpy(), rtol=1e-5)


@pytest.mark.parametrize("n", range(-16, 17))
def test_powers_are_products(n):
    values = {"x": [-3.0, -1.0, -0.5, 0.25, 1.0, 2.0], "y": [1.0] * 6}
    text = triton_text(y * x**n, NAMES)
    assert "log" not in text
    assert_near(run_text(text, **values), run_torch(y * x**n, **values).numpy(), atol=0, rtol=1e-5)


def test_towers_of_powers_are_refused_before_they_grow():
    with pytest.raises(SpecError, match="smaller powers"):
        triton_text(((((x**16) ** 16) ** 16) ** 16) ** 16, NAMES)


def test_evaluate_keeps_the_dtype_and_mixes_floats():
    gate = Input("g", "bth")
    env = {"g": torch.randn(2, 3, 4), "head": torch.arange(4), "rate": 0.5}
    expr = maximum(gate, -1) * exp(Scalar("rate") * head / heads) + sqrt(2)
    for dtype in (torch.float32, torch.float64):
        result = evaluate(expr, env | {"g": env["g"].to(dtype), "head": env["head"].to(dtype)}, 4)
        assert result.dtype == dtype
        factor = torch.exp(0.5 * torch.arange(4) / 4)
        torch.testing.assert_close(result, (env["g"].clamp(min=-1) * factor + 2**0.5).to(dtype))
    assert evaluate(exp(Scalar("rate")) * 2, env, 4) == 2 * math.exp(0.5)


def test_host_values_are_exact_where_fp32_is_not():
    retnet = log(1 - 2 ** (-5 - head))
    values = evaluate_host(retnet, {}, 96)
    assert len(values) == 96
    assert values[0] == math.log(1 - 1 / 32)
    assert values[30] != 0.0 == np.float32(values[0]) * 0
    assert evaluate_host(Scalar("s") / sqrt(heads), {"s": 3.0}, 4) == [1.5] * 4
    with pytest.raises(SpecError, match="is a tensor"):
        evaluate_host(x * head, {}, 2)


def test_host_arithmetic_never_raises():
    s = Scalar("s")
    one = [1 / s, -1 / s, 0 / s, log(s), log(s - 1), sqrt(s - 1), exp(s + 1000), (s - 2) ** 0.5, s**-1, (s + 10) ** 400]
    inf, nan = math.inf, math.nan
    values = [evaluate_host(expr, {"s": 0.0}, 1)[0] for expr in one]
    np.testing.assert_equal(values, [inf, -inf, nan, -inf, nan, nan, inf, nan, inf, inf])


def test_fold():
    assert fold(x * (Number(1) / 2 + 1)) == x * 1.5
    assert fold(exp(Number(0)) * 2) == Number(2)
    assert fold(head * 1 + x) == head * 1 + x
    with pytest.raises(SpecError, match="finite"):
        fold(x + 1 / Number(0))
    with pytest.raises(SpecError, match="finite"):
        fold(Number(9) ** (Number(9) ** Number(99)))

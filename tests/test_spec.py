"""Specs: what they mean, what they refuse and with which words, how they print and travel."""

import copy
import json
import pickle
import warnings

import pytest
from timing import within

from flagen import specs
from flagen.errors import SpecError
from flagen.expr import (
    FEATURE,
    NORM,
    Call,
    Input,
    Number,
    Scalar,
    abs,
    elu,
    exp,
    head,
    k,
    log,
    logsigmoid,
    maximum,
    q,
    relu,
    sigmoid,
    softplus,
    sqrt,
    tanh,
    taylor,
    to_text,
    v,
)
from flagen.spec import Spec, SpecWarning, Taylor

g = Input("g", "b t h k")
gv = Input("gv", "b t h v")
gs = Input("gs", "b t h")
u = Input("u", "h k")
theta = Input("theta", "b t h k")


@pytest.mark.parametrize("name", specs.names())
def test_shipped_specs(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spec = specs.get(name)
    assert spec.name == name
    assert specs.get(name) is spec
    assert Spec.from_json(spec.to_json()) == spec
    state = "h_t" if spec.vector else "S_t"
    assert str(spec).startswith(f"{name}\n    {state} = ")
    assert f"{state} &= " in spec.latex()


def test_names_of_arguments_in_order():
    order = {name: [one.name for one in specs.get(name).inputs] for name in specs.names()}
    assert order == {
        "retnet": ["q", "k", "v"],
        "transnormer": ["q", "k", "v"],
        "gla": ["q", "k", "v", "g"],
        "rwkv6": ["r", "k", "v", "w", "u"],
        "gateloop": ["q", "k", "v", "g", "theta"],
        "based": ["q", "k", "v"],
        "mamba2": ["q", "k", "v", "dt", "A_log"],
        "hgrn2": ["q", "g", "v"],
        "linear": ["q", "k", "v"],
        "delta_net": ["q", "k", "v", "beta"],
        "gated_delta_net": ["q", "k", "v", "g", "beta"],
        "kda": ["q", "k", "v", "g", "beta"],
        "comba": ["q", "k", "v", "g", "beta", "b", "d"],
        "rwkv7": ["r", "k", "v", "w", "a", "b"],
        "hgrn": ["x", "g"],
        "gateloop_elementwise": ["q", "k", "v", "g", "theta"],
        "min_gru": ["x", "gate"],
        "mlstm": ["q", "k", "v", "ig", "fg"],
        "rg_lru": ["x", "input_gate", "recurrence_gate", "lam"],
    }
    assert [one.name for one in specs.get("transnormer").scalars] == ["layer", "layers"]
    assert [specs.get(name).scale for name in ("gla", "rwkv6", "mamba2", "gateloop")] == [None, 1, 1, 1]


def test_an_unknown_shipped_spec():
    with pytest.raises(SpecError, match="did you mean 'rwkv6'"):
        specs.get("rwkv_6")


def test_within_one_expression_q_k_v_come_first():
    spec = Spec(
        "s",
        query=Input("a", "b t h k") * q,
        value=v * Input("b", "b t h") * Input("aa", "h v"),
        log_decay=g * 0 - exp(gs),
    )
    assert [one.name for one in spec.inputs] == ["q", "a", "k", "v", "aa", "b", "g", "gs"]


def test_a_feature_map_is_composed_and_replace_starts_from_the_bare_query():
    linear = specs.get("linear")
    assert linear.query == elu(q) + 1
    assert linear.key == elu(k) + 1
    assert linear.feature_map == elu(FEATURE) + 1
    assert linear.normalizer == NORM + 1e-6
    r = Input("r", "b t h k")
    other = linear.replace("other", query=r)
    assert other.query == elu(r) + 1
    assert linear.replace("other", feature_map=relu).key == relu(k)
    assert linear.replace("other", feature_map=None, normalize=False).key == k
    assert linear.replace("linear") == linear
    assert specs.get("based").taylor == 2
    assert specs.get("based").query == q
    assert linear.taylor == 0


def test_replace():
    gla = specs.get("gla")
    mine = gla.replace("my_gla", log_decay=logsigmoid(g) / 16)
    assert (mine.name, to_text(mine.log_decay), mine.query) == ("my_gla", "logsigmoid(g) / 16", q)
    assert gla.replace("x1", scale=2).scale == 2.0
    linear = specs.get("linear").replace("l", eps=1e-3)
    assert linear.normalizer == NORM + 1e-3
    assert linear.replace("m", normalize=lambda n: maximum(abs(n), 1)).eps == 1e-6
    with pytest.raises(SpecError, match="unknown argument 'decay'"):
        gla.replace("x", decay=g)
    ordered = gla.replace("o", inputs=("g", "q", "k", "v"))
    assert [one.name for one in ordered.replace("p", scale=1).inputs] == ["g", "q", "k", "v"]
    assert [one.name for one in ordered.replace("p", inputs=None).inputs] == ["q", "k", "v", "g"]
    with pytest.raises(SpecError, match="inputs leaves out gs"):
        ordered.replace("p", log_decay=g * sigmoid(gs))


def test_specs_are_values():
    one, other = Spec("s", log_decay=g / 2.0), Spec("s", log_decay=g / 2)
    assert one == other
    assert hash(one) == hash(other)
    assert one.to_json() == other.to_json()
    assert one != Spec("t", log_decay=g / 2)
    assert copy.deepcopy(one) == pickle.loads(pickle.dumps(one)) == one
    with pytest.raises(AttributeError):
        one.name = "t"


REFUSED = [
    # names
    (lambda: Spec("Gla"), "a spec's name must be"),
    (lambda: Spec("g" * 42), "a spec's name must be"),
    (lambda: Spec("lambda"), "keyword of Python"),
    (lambda: Spec("match"), "keyword of Python"),
    (lambda: Spec(3), "a spec's name must be"),
    *[(lambda n=n: Spec("s", log_decay=-exp(Input(n, "b t h"))), "argument of every op")
      for n in ("scale", "initial_state", "output_final_state", "cu_seqlens", "state")],
    (lambda: Spec("s", log_decay=Input("head", "h")), "the index of the heads"),
    (lambda: Spec("s", log_decay=Input("heads", "h")), "the number of the heads"),
    (lambda: Spec("s", log_decay=Input("exp", "h")), "a function of the language"),
    (lambda: Spec("s", log_decay=Input("taylor", "h")), "a function of the language"),
    (lambda: Spec("s", log_decay=Input("yield", "h")), "keyword of Python"),
    *[(lambda n=n: Spec("s", log_decay=Input(n, "h")), "generated kernels use")
      for n in ("b_g", "p_g", "i_t", "o_t", "m_t", "c0", "h0", "do", "tl", "h", "z", "s", "t", "at", "den", "en",
                "locate", "G_q", "q_sb", "x_st", "x_sh", "x_sp", "gla_fwd_kernel", "monomials", "num_warps")],
    *[(lambda n=n: Spec("s", log_decay=Input(n, "h")), "the gradient d\\w+, a name that generated code needs")
      for n in ("el", "ef")],
    *[(lambda n=n: Spec("s", log_decay=Input(n, "h")), "all capitals") for n in ("T", "BT", "USE_G", "A2")],
    (lambda: Spec("s", log_decay=Input("_g", "h")), "begins or ends with _"),
    (lambda: Spec("s", log_decay=Input("len", "h")), "built-in of Python"),
    (lambda: Spec("s", log_decay=g * Input("dg", "h")), "the gradient of 'g'"),
    (lambda: Spec("s", log_decay=g * Input("eg", "h")), "a sum of 'g' in generated code"),
    (lambda: Spec("s", log_decay=g * Scalar("scale")), "argument of every op"),
    (lambda: Spec("s", log_decay=Input("g", "")), "has no axes"),
    # inputs
    (lambda: Spec("s", log_decay=g, bonus=Input("g", "h k")), "two different axes, 'b t h k' and 'h k'"),
    (lambda: Spec("s", log_decay=g, bonus=Input("g", "b t h k", low=0)), "two different bounds"),
    (lambda: Spec("s", log_decay=g * Scalar("g")), "both an Input and a Scalar"),
    (lambda: Spec("s", inputs=("q", "k")), "inputs leaves out v"),
    (lambda: Spec("s", inputs=("q", "k", "v", "g")), "'g', which no expression uses"),
    (lambda: Spec("s", inputs=("q", "k", "v", "v")), "lists 'v' twice"),
    (lambda: Spec("s", inputs=(q, k, Input("v", "h v"))), "unlike the expressions do"),
    (lambda: Spec("s", inputs="qkv"), "must be a tuple"),
    (lambda: Spec("s", inputs=(1, 2, 3)), "must hold names or Inputs"),
    # axes
    (lambda: Spec("s", log_decay=g * gv), "varies over key and value channels"),
    (lambda: Spec("s", phase=theta * gv), "varies over key and value channels"),
    (lambda: Spec("s", phase=gv), "rotate the output"),
    (lambda: Spec("s", bonus=gv), "bonus = gv has the axis v"),
    (lambda: Spec("s", query=q * gv), "query = q \\* gv has the axis v"),
    (lambda: Spec("s", key=v), "key = v has the axis v"),
    (lambda: Spec("s", value=v * k), "value = v \\* k has the axis k"),
    (lambda: Spec("s", query=gs), "lacks the axes k"),
    (lambda: Spec("s", value=Number(1)), "lacks the axes b t h v"),
    # combinations
    (lambda: Spec("s", feature_map=taylor(2), bonus=u), "a bonus with taylor"),
    (lambda: Spec("s", feature_map=taylor(2), log_decay=g), "a decay per key channel with taylor"),
    (lambda: Spec("s", feature_map=taylor(1), phase=theta), "a phase with taylor"),
    (lambda: Spec("s", normalize=True, log_decay=gv), "normalize with a decay per value channel"),
    (lambda: Spec("s", normalize=True, phase=theta), "normalize with a phase"),
    (lambda: Spec("s", normalize=lambda n: n * n + 1, phase=theta), "normalize with a phase"),
    (lambda: Spec("s", phase=theta, log_decay=gv), "a phase with a decay per value channel"),
    # expressions
    (lambda: Spec("s", log_decay=softplus(g)), "positive whatever its inputs"),
    (lambda: Spec("s", log_decay=exp(gs) * 2), "positive whatever its inputs"),
    (lambda: Spec("s", log_decay=0.1), "positive whatever its inputs"),
    (lambda: Spec("s", log_decay=Input("g", "b t h", low=0.5)), "positive whatever its inputs"),
    (lambda: Spec("s", log_decay="-exp(g)"), "log_decay: expected an expression or a number"),
    (lambda: Spec("s", log_decay=exp), "got a function"),
    (lambda: Spec("s", log_decay=True), "expected an expression"),
    (lambda: Spec("s", query=None), "query cannot be None"),
    (lambda: Spec("s", log_decay=-(gs**17)), "an exponent must lie within -16 to 16"),
    (lambda: Spec("s", log_decay=-((head + 1) ** 5000)), "within -1024 to 1024"),
    (lambda: Spec("s", log_decay=(-exp(gs)) ** 0.5), "always negative"),
    (lambda: Spec("s", log_decay=log(-exp(gs))), "never a number"),
    (lambda: Spec("s", log_decay=sqrt(-exp(gs) - 1)), "never a number"),
    (lambda: Spec("s", log_decay=Call("step", (gs,))), "only derivatives may"),
    # options
    (lambda: taylor(3), "must be 1 or 2"),
    (lambda: taylor(True), "must be 1 or 2"),
    (lambda: Spec("s", feature_map=2), "feature_map must be"),
    (lambda: Spec("s", feature_map="elu"), "feature_map must be"),
    (lambda: Spec("s", feature_map=lambda x: x * g), "uses the input 'g'"),
    (lambda: Spec("s", feature_map=lambda x: 1), "ignores its argument"),
    (lambda: Spec("s", feature_map=lambda x: "x"), "must give an expression"),
    (lambda: Spec("s", feature_map=lambda x, y: x), "must take one expression"),
    (lambda: Spec("s", feature_map=lambda x: x * Scalar("x")), "rename the scalar"),
    (lambda: Spec("s", normalize=1), "normalize must be"),
    (lambda: Spec("s", normalize=lambda n: n + g), "uses the input 'g'"),
    (lambda: Spec("s", normalize=lambda n: n + head), "n and numbers alone"),
    (lambda: Spec("s", normalize=True, eps="1"), "eps must be a number"),
    (lambda: Spec("s", normalize=True, eps=-1), "eps must be a number"),
    (lambda: Spec("s", eps=0.1), "normalize=True only"),
    (lambda: Spec("s", scale="1"), "scale must be"),
    (lambda: Spec("s", scale=float("nan")), "scale must be"),
]  # fmt: skip


@pytest.mark.parametrize(("declare", "message"), REFUSED, ids=[message for _, message in REFUSED])
@pytest.mark.filterwarnings("ignore::flagen.spec.SpecWarning")
def test_refused(declare, message):
    with pytest.raises(SpecError, match=message) as caught:
        declare()
    assert len(str(caught.value)) < 400


def test_messages_differ():
    texts = set()
    for declare, _ in REFUSED:
        with pytest.raises(SpecError) as caught, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            declare()
        texts.add(str(caught.value))
    assert len(texts) >= len(REFUSED) - 2


@pytest.mark.parametrize(
    "declare",
    [
        lambda: Spec("s", phase=theta, log_decay=g, bonus=u),
        lambda: Spec("s", phase=gs, log_decay=g),
        lambda: Spec("s", phase=theta, log_decay=-exp(gs)),
        lambda: Spec("s", phase=0.1 * head),
        lambda: Spec("s", log_decay=gv, bonus=u, key=softplus(k)),
        lambda: Spec("s", feature_map=taylor(1), log_decay=gv),
        lambda: Spec("s", feature_map=taylor(2), normalize=True, log_decay=gs),
        lambda: Spec("s", feature_map=exp, normalize=True, log_decay=g, bonus=Input("u", "h k", low=0)),
        lambda: Spec("s", bonus=Input("u", "b t h k")),
        lambda: Spec("s", bonus=0.5),
        lambda: Spec("s", log_decay=0),
        lambda: Spec("s", log_decay=Input("g", "t h")),
        lambda: Spec("s", query=q * Input("a", "k"), value=v * sigmoid(Input("y", "b t h v"))),
    ],
)
def test_allowed_and_round_trips(declare):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spec = declare()
        assert Spec.from_json(spec.to_json()) == spec
    assert spec.latex() and str(spec) and repr(spec)


@pytest.mark.parametrize(
    ("arguments", "warns"),
    [
        ({}, True),
        ({"feature_map": taylor(1)}, True),
        ({"feature_map": tanh}, True),
        ({"feature_map": relu, "bonus": u}, True),
        ({"feature_map": taylor(2)}, False),
        ({"feature_map": lambda x: elu(x) + 1}, False),
        ({"feature_map": exp}, False),
        ({"feature_map": relu}, False),
        ({"feature_map": sigmoid}, False),
        ({"feature_map": lambda x: x * x}, False),
        ({"feature_map": lambda x: x**2}, False),
        ({"query": Input("q", "b t h k", low=0), "key": Input("k", "b t h k", low=0)}, False),
        ({"normalize": lambda n: maximum(abs(n), 1)}, False),
    ],
)
def test_a_normalizer_that_may_be_zero_warns(arguments, warns):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Spec("s", **({"normalize": True} | arguments))
    assert [one.category for one in caught] == [SpecWarning] * warns
    if warns:
        assert caught[0].filename == __file__


def test_shared_subtrees_cannot_make_an_expression_explode():
    tree = g
    for _ in range(50):
        tree = tree * tree
    deep = g
    for _ in range(100_000):
        deep = -deep
    with within(1):
        with pytest.raises(SpecError, match="more than 500 nodes"):
            Spec("s", log_decay=tree)
        with pytest.raises(SpecError, match="nested more than 60 deep"):
            Spec("s", feature_map=lambda x: sum([x] * 400, x))
        with pytest.raises(SpecError, match="s: query has more than 500 nodes"):
            Spec(
                "s",
                query=q + q + q,
                feature_map=lambda x: ((x + x) * (x - x)) ** 2 * exp(x * x * x) - sum([x] * 50, x) * sum([x] * 50, x),
            )
        with pytest.raises(SpecError, match="nested more than"):
            Spec("s", log_decay=deep)


# --- text


def test_text_of_the_recurrence():
    def equations(name):
        return specs.get(name).equations

    assert equations("retnet") == ["S_t = (1 - 2 ** (-5 - head)) S_{t-1} + k_t v_t^T", "o_t = scale * q_t^T S_t"]
    assert equations("gla")[0] == "S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T"
    assert equations("rwkv6")[1] == "o_t = scale * r_t^T (S_{t-1} + diag(u) k_t v_t^T)"
    assert equations("gateloop") == [
        "S_t = diag(exp(g_t + i theta_t)) S_{t-1} + k_t v_t^T",
        "o_t = Re(scale * q_t^T S_t)",
    ]
    assert equations("mamba2")[0] == "S_t = exp(-exp(A_log) * dt_t) S_{t-1} + k_t (v_t * dt_t)^T"
    assert equations("hgrn2")[0] == "S_t = diag(exp(g_t)) S_{t-1} + (1 - exp(g_t)) v_t^T"
    assert equations("linear")[1] == "o_t = scale * (elu(q_t) + 1)^T S_t / (n + 1e-06)"
    assert equations("based")[1] == "o_t = f(scale * q_t)^T S_t / (n + 1e-06)"
    assert Spec("s", log_decay=gv).equations[0] == "S_t = S_{t-1} diag(exp(gv_t)) + k_t v_t^T"
    assert Spec("s").equations[0] == "S_t = S_{t-1} + k_t v_t^T"
    mlstm = Spec("s", normalize=lambda n: maximum(abs(n), 1))
    assert mlstm.equations[1] == "o_t = scale * q_t^T S_t / maximum(abs(n), 1)"


def test_print():
    assert str(specs.get("mamba2")).split("\n") == [
        "mamba2",
        "    S_t = exp(-exp(A_log) * dt_t) S_{t-1} + k_t (v_t * dt_t)^T",
        "    o_t = scale * q_t^T S_t",
        "  inputs: q [B, T, H, K], k [B, T, H, K], v [B, T, H, V], dt [B, T, H], A_log [H]",
        "  scale: 1 by default",
    ]
    assert "scalars: layer, layers" in str(specs.get("transnormer"))
    assert "\n" not in specs.get("based").recurrence
    assert repr(specs.get("linear")) == "Spec('linear', feature_map=elu(x) + 1, normalize=True)"


def test_latex():
    assert specs.get("gla").latex() == (
        r"S_t &= \operatorname{diag}\left(\exp\left(g_{t}\right)\right)\, S_{t-1} + k_{t}\, v_{t}^{\top} \\" + "\n"
        r"o_t &= s\, q_{t}^{\top} S_t"
    )
    assert r"\theta_{t}" in specs.get("gateloop").latex()
    assert r"A_{\mathrm{log}}" in specs.get("mamba2").latex()
    assert r"\frac{8}{\mathrm{heads}}" in specs.get("transnormer").latex()
    for name in specs.names():
        text = specs.get(name).latex()
        assert text.count("{") == text.count("}")
        assert text.count(r"\left") == text.count(r"\right")


# --- JSON


def gla_json(**changes):
    data = json.loads(specs.get("gla").to_json())
    data.update(changes)
    return json.dumps({key: value for key, value in data.items() if value is not ...})


def test_json_is_readable():
    assert json.loads(specs.get("linear").to_json()) == {
        "flagen_spec": 1,
        "name": "linear",
        "inputs": [
            {"name": "q", "axes": "b t h k"},
            {"name": "k", "axes": "b t h k"},
            {"name": "v", "axes": "b t h v"},
        ],
        "query": "q",
        "key": "k",
        "value": "v",
        "feature_map": "elu(x) + 1",
        "normalize": True,
    }


@pytest.mark.filterwarnings("ignore::flagen.spec.SpecWarning")
def test_json_keeps_every_field():
    rate = Scalar("rate")
    bounded = Input("g", "b t h", low=-5, high=0)
    spec = Spec(
        "full", query=q * 0.1, key=k / sqrt(rate), value=-v, log_decay=bounded * 1e-3, bonus=u + 1,
        feature_map=lambda x: exp(x * rate), normalize=True, eps=1e-4, scale=0.3, inputs=("u", "g", "v", "k", "q"),
    )  # fmt: skip
    again = Spec.from_json(spec.to_json())
    assert again == spec
    assert [one.name for one in again.inputs] == ["u", "g", "v", "k", "q"]
    assert again.inputs[1] == bounded
    assert again.replace("full", feature_map=None) == spec.replace("full", feature_map=None)
    spec = Spec("s", normalize=lambda n: maximum(abs(n), 1))
    assert json.loads(spec.to_json())["normalize"] == "maximum(abs(n), 1)"
    assert Spec.from_json(spec.to_json()) == spec
    assert Spec.from_json(specs.get("based").to_json()).feature_map == Taylor(2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[]", "must be a JSON object"),
        ("{", "not JSON"),
        (None, "takes text"),
        (b"{}", "takes text"),
        (" " * 70_000, "the limit is 65536"),
        ("[" * 60_000, "nested too deeply|not JSON"),
        ('{"a":' * 10_000, "nested too deeply|not JSON"),
        ('{"name": "a", "name": "b"}', "'name' is given twice"),
        (gla_json(decay="g"), "no field 'decay'"),
        (gla_json(query=...), "lacks the field 'query'"),
        (gla_json(flagen_spec=2), "this flagen reads format 1"),
        (gla_json(flagen_spec=True), "must be int"),
        (gla_json(query=3), "'query' must be str"),
        (gla_json(log_decay=None), "leave out what is absent"),
        (gla_json(scale="1"), "'scale' must be int or float"),
        (gla_json(scale=True), "'scale' must be int or float"),
        (gla_json(normalize=1), "'normalize' must be bool or str"),
        (gla_json(name="../x"), "a spec's name must be"),
        (gla_json().replace('"g"}', '"g"}').replace('"flagen_spec": 1', '"flagen_spec": NaN'), "NaN is not allowed"),
        (gla_json(scale=10**400), "not JSON|scale must be"),
        (gla_json(log_decay="__import__('os')"), "not part of the language"),
        (gla_json(log_decay="gg"), "did you mean 'g'"),
        (gla_json(log_decay="9 ** 9 ** 9 ** 9 * g"), "finite value"),
        (gla_json(log_decay="g ** 99999"), "an exponent must lie within"),
        (gla_json(log_decay="(((g ** 16) ** 16) ** 16) ** 16"), "use smaller powers"),
        (gla_json(log_decay="g / 0 ** 2"), "finite value"),
        (gla_json(log_decay="(" * 3000), "nested more than"),
        (gla_json(log_decay="g" + "+g" * 1900), "nested|more than"),
        (gla_json(scalars=["sc"]), "used by no expression"),
        (gla_json(scalars=["g"]), "both an input and a scalar"),
        (gla_json(scalars=["sc", "sc"]), "listed twice"),
        (gla_json(scalars=[1]), "must be a string"),
        (gla_json(scalars=["sc"] * 100), "the limit is 16"),
        (gla_json(feature_map="taylor(3)"), "unknown function 'taylor'"),
        (gla_json(feature_map="q * x"), "unknown name 'q'"),
        (gla_json(normalize="n + g"), "unknown name 'g'"),
        (gla_json(inputs=[]), "unknown name"),
        (gla_json(inputs=["q"]), "must be an object"),
        (gla_json(inputs=[{"name": "q"}]), "lacks the field 'axes'"),
        (gla_json(inputs=[{"name": "q", "axes": "b t h k", "dtype": "bf16"}]), "no field 'dtype'"),
        (gla_json(inputs=[{"name": "q", "axes": "x"}]), "unknown axis"),
        (gla_json(inputs=[{"name": "q", "axes": "b"}] * 2), "listed twice"),
        (gla_json(inputs=[{"name": "scale", "axes": "b"}]), "argument of every op"),
        (gla_json(inputs=[{"name": "q", "axes": "b"}] * 200), "the limit is 16"),
    ],
    ids=lambda value: str(value)[:40].replace("\0", ""),
)
def test_bad_json_is_refused_at_once(text, message):
    with within(0.1), pytest.raises(SpecError, match=message) as caught:
        Spec.from_json(text)
    assert len(str(caught.value)) < 700


def test_json_reports_a_caret():
    with pytest.raises(SpecError) as caught:
        Spec.from_json(gla_json(log_decay="-exp(gt) / 16"))
    assert str(caught.value).split("\n") == [
        "gla: log_decay:",
        "    -exp(gt) / 16",
        "         ^ unknown name 'gt'; did you mean 'g'? known: g, head, heads, k, q, v",
    ]

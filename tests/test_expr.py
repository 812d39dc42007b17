"""Expressions: the tree, its text, the parser that reads the text back."""

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from timing import within

from flagen.errors import SpecError
from flagen.expr import (
    FUNCTION_ARITY,
    OPERATORS,
    Call,
    Input,
    Number,
    Scalar,
    exp,
    head,
    heads,
    k,
    log,
    maximum,
    q,
    sigmoid,
    substitute,
    to_text,
)
from flagen.parse import parse

layer = Scalar("layer")
LEAVES = {"q": q, "k": k, "layer": layer, "head": head, "heads": heads}


def numbers():
    return (
        st.one_of(st.integers(-20, 20), st.floats(-1e6, 1e6, allow_nan=False))
        .map(lambda value: q + value)
        .map(lambda sum_: sum_.args[1])
    )


def extend(children):
    calls = [
        st.tuples(children, children).map(lambda pair, name=name: Call(name, pair))
        for name in (*OPERATORS[:5], "minimum", "maximum")
    ]
    calls += [children.map(lambda child, name=name: Call(name, (child,))) for name in ("exp", "abs", "elu")]
    return st.one_of(children.map(lambda child: -child), *calls)


trees = st.recursive(st.one_of(numbers(), st.sampled_from(list(LEAVES.values()))), extend, max_leaves=12)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(trees)
def test_text_parses_back_to_an_equal_tree(tree):
    assert parse(to_text(tree), LEAVES) == tree


@settings(max_examples=100, deadline=None, derandomize=True)
@given(trees)
def test_text_has_no_parentheses_to_spare(tree):
    text = to_text(tree)
    pairs, stack = [], []
    for column, character in enumerate(text):
        if character == "(":
            stack.append(column)
        elif character == ")":
            pairs.append((stack.pop(), column))
    for opening, closing in pairs:
        if opening and text[opening - 1].isalnum():
            continue  # of a call
        without = text[:opening] + text[opening + 1 : closing] + text[closing + 1 :]
        with contextlib.suppress(SpecError):  # a comma or the like
            assert parse(without, LEAVES) != tree, f"{text}: the pair at {opening} is not needed"


@pytest.mark.parametrize(
    ("expr", "text"),
    [
        (log(1 - 2 ** (-5 - head)), "log(1 - 2 ** (-5 - head))"),
        (-(8 / heads) * (1 - layer / 3) * head, "-(8 / heads) * (1 - layer / 3) * head"),
        ((-q) ** 2, "(-q) ** 2"),
        (-(q**2), "-q ** 2"),
        (q - (k - q), "q - (k - q)"),
        (q - k - q, "q - k - q"),
        (q / (k * q), "q / (k * q)"),
        (-q * k, "-q * k"),
        (-(q * k), "-(q * k)"),
        ((q**k) ** q, "(q ** k) ** q"),
        (q**k**q, "q ** k ** q"),
        (2**-q, "2 ** -q"),
        (maximum(-q, 0.5) * 1e-6, "maximum(-q, 0.5) * 1e-06"),
    ],
)
def test_text(expr, text):
    assert str(expr) == text
    assert parse(text, LEAVES) == expr


def test_numbers_have_one_form():
    numpy = pytest.importorskip("numpy")
    assert to_text(q * 2.0) == to_text(q * numpy.float64(2)) == "q * 2"
    assert -Number(5) == Number(-5)
    with pytest.raises(SpecError, match="finite"):
        q * float("inf")
    with pytest.raises(SpecError, match=r"2 \*\* 53"):
        q * 10**400


def test_the_builtin_abs_is_the_languages():
    assert abs(q + 1) == Call("abs", (q + 1,))


def test_axes_and_leaves():
    u = Input("u", "h k")
    expr = exp(u) * q + head * layer
    assert u.axes == "hk"
    assert expr.axes == "bthk"
    assert expr.inputs == (u, q)
    assert expr.scalars == (layer,)
    assert (head * layer).is_constant
    assert (head * layer).axes == "h"
    assert substitute(expr, {u: -k}) == exp(-k) * q + head * layer


def test_operators_refuse_what_is_no_number():
    for wrong in ("1", None, True, [1]):
        with pytest.raises(SpecError, match="expected an expression or a number"):
            q + wrong
    with pytest.raises(SpecError, match="truth value"):
        max(q, k)
    with pytest.raises(SpecError, match="takes 2 arguments"):
        maximum(q)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        (("g", "b t x"), {}, "unknown axis 'x'"),
        (("g", "t b"), {}, "out of order; write 'b t'"),
        (("g", "b b t"), {}, "repeats an axis"),
        (("g", None), {}, "axes must be a string"),
        (("2g", "b t"), {}, "is no identifier"),
        (("θ", "b t"), {}, "is no identifier"),
        (("g" * 41, "b t"), {}, "is no identifier"),
        ((3, "b t"), {}, "must be a string"),
        (("g", "b t"), {"low": 1, "high": 0}, "above high"),
        (("g", "b t"), {"low": float("nan")}, "finite number"),
        (("g", "b t"), {"high": "0"}, "finite number"),
    ],
)
def test_inputs_are_checked(args, kwargs, message):
    with pytest.raises(SpecError, match=message):
        Input(*args, **kwargs)


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ("-exp(A_lg) * q", 5, "unknown name 'A_lg'"),
        ("q + layr", 4, "did you mean 'layer'"),
        ("sigmod(q)", 0, "did you mean 'sigmoid'"),
        ("max(q, k)", 0, "did you mean 'maximum'"),
        ("exp(q, k)", 0, "takes 1 argument"),
        ("exp(*q)", 0, "plain arguments"),
        ("exp(x=q)", 0, "plain arguments"),
        ("exp", 0, "exp is a function"),
        ("q(k)", 0, "q is not a function"),
        ("q.real", 0, "attributes"),
        ("q[0]", 0, "indexing"),
        ("(q) ^ 2", 4, "write **"),
        ("q // k", 2, "write /"),
        ("q @ k", 2, "element by element"),
        ("q < k", 0, "comparisons"),
        ("q if k else q", 0, "if is not part"),
        ("lambda: q", 0, "lambda"),
        ("[q]", 0, "List is not part"),
        ("(q, k)", 0, "Tuple is not part"),
        ("q := k", 2, "is not an expression"),
        ("True", 0, "bool is not part"),
        ("1j", 0, "complex is not part"),
        ("1e999", 0, "beyond the range"),
        ("q * 99999999999999999999", 4, "2 ** 53"),
        ("'q'", 0, "not part of the language"),
        ("q;k", 1, "not part of the language"),
        ("q\n+ k", 1, "not part of the language"),
        ("θ", 0, "not part of the language"),
        ("q +", 3, "is not an expression"),
        ("", 0, "is empty"),
        (" q", 0, "begins with a space"),
        ("__import__", 0, "unknown name"),
        ("not q", 0, "not part"),
        ("step(q)", 0, "unknown function"),
    ],
)
def test_faults_have_a_caret(text, column, message):
    with pytest.raises(SpecError) as caught:
        parse(text, LEAVES, "gla: log_decay")
    first, shown, caret = str(caught.value).split("\n")
    assert first == "gla: log_decay:"
    assert caret.index("^") - 4 == column, str(caught.value)
    assert message in caret
    assert len(shown) == len(text) + 4


@pytest.mark.parametrize(
    "text",
    [
        "(" * 4000,
        "-" * 4000,
        "-" * 3999 + "q",
        "q" + " + q" * 900,
        "exp(" * 900 + "q" + ")" * 300,
        "9" * 4000,
        "9**9**9**9**9" + "**9" * 500,
        "q" * 100_000,
        "q" + "(q)" * 1000,
        "[" * 3000,
        "\0" * 10,
    ],
    ids=lambda text: text[:12],
)
def test_hostile_text_is_refused_at_once(text):
    with within(0.1), pytest.raises(SpecError) as caught:
        parse(text, LEAVES)
    assert len(str(caught.value)) < 600


def test_a_fault_far_into_long_text_stays_readable():
    with pytest.raises(SpecError) as caught:
        parse(" + ".join(["q"] * 40 + ["oops"] + ["q"] * 10), LEAVES)
    _, shown, caret = str(caught.value).split("\n")
    assert shown[caret.index("^") :].startswith("oops")


def test_giant_powers_are_never_computed():
    # the parser only builds the tree; folding it is the analysis' matter, in floats
    assert parse("9 ** 9 ** 9 ** 9", {}) == Number(9) ** (Number(9) ** (Number(9) ** Number(9)))


def test_every_function_is_known_to_the_parser():
    for name, arity in FUNCTION_ARITY.items():
        assert parse(f"{name}({', '.join(['q'] * arity)})", LEAVES) == Call(name, (q,) * arity)
    assert parse("+q", LEAVES) == q
    assert parse("1_000 * 0x10", LEAVES) == Number(1000) * Number(16)
    assert parse("sigmoid((q))", LEAVES) == sigmoid(q)

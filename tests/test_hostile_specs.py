"""Nothing that a user writes reaches generated code but through the printer and checked identifiers.

Hostile specs, in Python, in JSON and on the command line, are refused in milliseconds; and of the text of those that
are accepted every name and every string is one that flagen means.
"""

from __future__ import annotations

import ast
import functools
import json
import os
import re
import symtable
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cases
import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from timing import within

from flagen import specs
from flagen.__main__ import main
from flagen.analysis import analyse
from flagen.errors import SpecError
from flagen.expr import Call, Expr, Index, Input, Number, Scalar, Taylor, exp, head, q, taylor
from flagen.plan import make_plan
from flagen.plan_parts import block_name
from flagen.render import render, render_standalone
from flagen.spec import Spec
from flagen.standalone import make_standalone
from flagen.validate import check_argument_name

pytestmark = pytest.mark.filterwarnings("ignore::flagen.spec.SpecWarning")
gs = Input("gs", "b t h")
LIMIT = 0.5  # seconds for what takes a few milliseconds


def refused(declare: Callable[[], Any]) -> str:
    """The message with which something is refused, at once and in few words."""
    with within(LIMIT), pytest.raises(SpecError) as caught:
        declare()
    message = str(caught.value)
    assert len(message) < 700
    assert all(line.isprintable() for line in message.splitlines()), ascii(message)
    return message


# --- values that are no expressions, or only look like ones


class Lying(str):
    """What it is checked as is not what it prints as."""

    def __str__(self) -> str:
        return "__import__('os')"

    def __format__(self, form: str) -> str:
        return "__import__('os')"


class LyingFloat(float):
    def __repr__(self) -> str:
        return "__import__('os')"


class Foreign(Expr):
    __slots__ = ()


HUGE = 10**5000  # more digits than Python turns into text
IN_PYTHON: dict[str, Callable[[], Any]] = {
    "a number of code": lambda: Number("__import__('os')"),
    "a number that prints code": lambda: Number(LyingFloat(0.5)),
    "a number that is an expression": lambda: exp(gs) * Number(gs),
    "an index of code": lambda: Index("__import__('os').getpid()"),
    "an index that prints code": lambda: Index(Lying("head")),
    "a function of code": lambda: Call("__import__('os').system", (gs,)),
    "a function that prints code": lambda: Call(Lying("exp"), (gs,)),
    "too many arguments": lambda: Call("exp", (gs, gs)),
    "no argument": lambda: Call("exp", ()),
    "an argument of code": lambda: Call("exp", ("__import__('os')",)),
    "a node of another kind": lambda: Spec("s", log_decay=Foreign()),
    "an argument of another kind": lambda: exp(Foreign()),
    "a bare node": lambda: Spec("s", log_decay=-exp(Expr())),
    "an order of code": lambda: Taylor("2) + __import__('os'"),
    "an order of 7": lambda: Taylor(7),
    "an order of 2.0": lambda: taylor(2.0),
    "a name that prints code": lambda: Input(Lying("g"), "b t h"),
    "a scalar that prints code": lambda: Scalar(Lying("g")),
    "axes that print code": lambda: Input("g", Lying("b t h")),
    "a spec's name that prints code": lambda: Spec(Lying("s")),
    "a huge number": lambda: Spec("s", log_decay=-exp(gs) * HUGE),
    "a huge exponent": lambda: Spec("s", log_decay=-(gs**HUGE)),
    "a huge scale": lambda: Spec("s", scale=HUGE),
    "a huge eps": lambda: Spec("s", normalize=True, eps=HUGE),
    "a huge bound": lambda: Input("g", "b t h", low=-HUGE),
    "a huge name": lambda: Spec(HUGE),
    "a huge input": lambda: Input(HUGE, "b"),
    "huge axes": lambda: Input("g", HUGE),
    "a huge list": lambda: Spec("s", inputs=[HUGE] * 100_000),
    "a huge order": lambda: Taylor(HUGE),
    "long text": lambda: Spec("s", log_decay="x" * 1_000_000),
    "a long name": lambda: Input("x" * 1_000_000, "b"),
    "a long spec's name": lambda: Spec("x" * 1_000_000),
    "long axes": lambda: Input("g", "b" * 100_000),
    "long axes that are none": lambda: Input("g", "x" * 100_000),
    "a long list": lambda: Spec("s", log_decay=["x"] * 100_000),
    "a long list of inputs": lambda: Spec("s", inputs=["q"] * 100_000),
    "a long name in inputs": lambda: Spec("s", inputs=["x" * 100_000]),
    "a deep list": lambda: Spec("s", query=functools.reduce(lambda x, _: [x], range(900), [])),
    "bytes": lambda: Spec("s", log_decay=b"g"),
    "nan": lambda: Spec("s", log_decay=-exp(gs) * float("nan")),
    "infinity": lambda: Spec("s", log_decay=-exp(gs) / float("inf")),
    "minus infinity as scale": lambda: Spec("s", scale=float("-inf")),
    "a power of powers": lambda: Spec("s", log_decay=-((((gs**16) ** 16) ** 16) ** 16)),
    "a power of the head": lambda: Spec("s", log_decay=-((2 + head) ** 1e300)),
}


@pytest.mark.parametrize("declare", IN_PYTHON.values(), ids=IN_PYTHON.keys())
def test_hostile_values_are_refused_at_once(declare):
    message = refused(declare)
    assert "0" * 100 not in message
    assert "x" * 100 not in message


# --- JSON

GLA = json.loads(specs.get("gla").to_json())
CODE = [
    "__import__('os').system('true')",
    "__import__",
    "os.system",
    "g.__class__.__mro__",
    "g if g else g",
    "lambda: g",
    "[g for g in g]",
    "(g := g)",
    "f'{g}'",
    "exec('g')",
    "eval(g)",
    "print(g)",
    "g); import os; (g",
    "g\nimport os",
    "g # a comment\n",
    "g\\\n",
    'g"""',
    "g'''",
    '"""\nimport os\n"""',
    "{{ 7 * 7 }}",
    "{% import os %}",
    "{# #}",
    "{g}",
    "g}}",
    "%(g)s",
    "$g",
    "`g`",
    "g\x00",
    "g\u202e",
    "\ufeffg",
    "\ud800",
    "ｇ",  # noqa: RUF001 - Python itself would take this letter for g
    "ℌ",  # noqa: RUF001
    "ĝ",
    "µ",
    "🙂",
    "../../g",
    "g/../g",
    "class",
    "None",
    "True",
    "match",
    "__builtins__",
    "__class__",
    "_",
    "self",
    "tl",
    "torch",
    "b_g",
    "i_t",
    "",
    " ",
    "\t",
    "-" * 5000 + "g",
    "(" * 5000,
    "g" * 20_000,
    "9" * 5000,
    "1e999",
    "nan",
    "inf",
    "1j",
    "0x" + "f" * 4000,
]
# generated names begin with the spec's, so these harm nothing
SPECS_MAY_BE_NAMED = {"self", "tl", "torch", "b_g", "i_t", "nan", "inf"}
NUMBERS: list[Any] = [1e999, -1e999, float("nan"), 10**400, -(10**4000), True, None, [], {}, "1 2", ["g"] * 5000]
ROLES = ("query", "key", "value", "log_decay", "phase", "bonus", "feature_map", "normalize")


def changed(**changes: Any) -> str:
    return json.dumps(GLA | changes)


def with_input(**changes: Any) -> str:
    return changed(inputs=[*GLA["inputs"][:3], GLA["inputs"][3] | changes])


@pytest.mark.parametrize("text", CODE, ids=lambda text: ascii(text)[1:30])
def test_code_in_any_field_is_refused(text):
    for role in ROLES:
        refused(lambda role=role: Spec.from_json(changed(**{role: text})))
    if text not in SPECS_MAY_BE_NAMED:
        refused(lambda: Spec.from_json(changed(name=text)))
    refused(lambda: Spec.from_json(with_input(name=text)))
    refused(lambda: Spec.from_json(with_input(axes=text or "x")))
    refused(lambda: Spec.from_json(with_input(**{text: 1})))
    refused(lambda: Spec.from_json(changed(scalars=[text])))
    # no free text: a docstring of the user's would end up in a comment or a docstring
    for field in ("doc", "docstring", "paper", "comment", "description", text):
        assert "has no field" in refused(lambda field=field: Spec.from_json(changed(**{field: text})))


@pytest.mark.parametrize("value", NUMBERS, ids=lambda value: ascii(value)[:20])
def test_what_is_no_number_is_refused(value):
    for field in ("scale", "eps"):
        refused(lambda field=field: Spec.from_json(changed(normalize=True, **{field: value})))
    for bound in ("low", "high"):
        refused(lambda bound=bound: Spec.from_json(with_input(**{bound: value})))
    for field in ("flagen_spec", "name", "inputs", *ROLES[:7]):
        refused(lambda field=field: Spec.from_json(changed(**{field: value})))


FORMS = {
    "constants": json.dumps(GLA).replace('"g"}', '"g", "scale": -Infinity}'),
    "twice": json.dumps(GLA)[:-1] + ', "log_decay": "g * 2"}',
    "twice in an input": json.dumps(GLA).replace('"name": "q"', '"name": "x", "name": "q"'),
    "twice, written otherwise": json.dumps(GLA)[:-1] + ', "log_deca\\u0079": "g * 2"}',
    "many times": "{" + ",".join(f'"name{i % 2000}": 1' for i in range(4000)) + "}",
    "many inputs": changed(inputs=[{"name": f"x{i}", "axes": "b"} for i in range(1000)]),
    "many fields": changed(**{f"x{i}": i for i in range(3000)}),
    "too long": json.dumps(GLA) + " " * 70_000,
    "a number of many digits": json.dumps(GLA)[:-1] + ', "scale": ' + "9" * 60_000 + "}",
    "a fraction of many digits": json.dumps(GLA)[:-1] + ', "scale": 1' + "0" * 60_000 + ".5}",
    "an exponent of many digits": json.dumps(GLA)[:-1] + ', "scale": 1e' + "9" * 60_000 + "}",
    "a comment": json.dumps(GLA) + " // comment",
    "two objects": json.dumps(GLA) * 2,
    "text": '"gla"',
    "a mark before it": "\ufeff" + json.dumps(GLA),
    "python": repr(GLA),
}


@pytest.mark.parametrize("text", FORMS.values(), ids=FORMS.keys())
def test_json_out_of_form_is_refused(text):
    refused(lambda: Spec.from_json(text))


@pytest.mark.parametrize("depth", [50, 900, 980, 985, 990, 20_000])
@pytest.mark.parametrize("brackets", ["[]", '{"a":1}'])
def test_deep_json_is_refused_wherever_it_stands(brackets, depth):
    opening, closing = ("[", "]") if brackets == "[]" else ('{"a":', "}")
    deep = opening * depth + "1" + closing * depth
    for text in (deep, json.dumps(GLA)[:-1] + f', "scale": {deep}}}', json.dumps(GLA).replace('"gla"', deep)):
        refused(lambda text=text: Spec.from_json(text))
    refused(lambda: Spec.from_json(json.dumps(GLA).replace('"inputs": [', f'"inputs": [{deep}, ')))


SIMPLE = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
VALUES = st.recursive(
    SIMPLE | st.sampled_from([*CODE[:20], "g", "q"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
ALPHABET = st.text(alphabet="gqx0159.+-*/^%()[]{},;:_'\"\\ =<>@!~#\n", max_size=30)


@settings(max_examples=150)
@given(field=st.sampled_from([*GLA, "scale", "eps", "scalars", "phase", "normalize"]), value=VALUES | ALPHABET)
def test_whatever_stands_in_a_field_is_refused_or_harmless(field, value):
    with within(LIMIT):
        try:
            spec = Spec.from_json(json.dumps(GLA | {field: value}))
        except SpecError as error:
            assert len(str(error)) < 700
        else:
            assert Spec.from_json(spec.to_json()) == spec
            assert re.fullmatch(r"[a-z][a-z0-9_]*", spec.name)
            # everything that templates print of a spec is made of these
            assert re.fullmatch(r"[A-Za-z0-9_ ().,+\-*/^{}=]*", spec.recurrence), spec.recurrence


# --- the command line

ARGUMENTS = [
    "../../../etc/passwd", "", "-", "x" * 100_000, "a\0b", "{}", json.dumps(GLA), "gla\n", "os:system", "os:no",
    "no_such_module:spec", ":", "a:b:c", "..:x", "flagen.specs.gla:__class__", "gla;ls", "$(ls)", "/", ".", "~",
]  # fmt: skip


@pytest.mark.parametrize("command", ["show", "emit"])
@pytest.mark.parametrize("argument", ARGUMENTS, ids=lambda text: ascii(text)[1:25])
def test_a_hostile_argument_is_one_line(command, argument, capsys):
    assert main([command, "--", argument]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert 0 < len(error.splitlines()) <= 4
    assert "Traceback" not in error


FILES = {
    "code in a name": changed(name="__import__('os')"),
    "code in an input": with_input(name="g): import os; (g"),
    "code in an expression": changed(log_decay="__import__('os').system('true')"),
    "braces": changed(log_decay="{{ plan }}"),
    "a docstring": changed(doc='"""\nimport os\n"""'),
    "a line's end": changed(name="gla\nimport os"),
    "deep": "[" * 100_000,
    "empty": "",
    "bytes": b"\xff\xfe\x00",
    "a number of many digits": json.dumps(GLA)[:-1] + ', "scale": ' + "9" * 60_000 + "}",
}


@pytest.mark.parametrize("command", ["show", "emit"])
@pytest.mark.parametrize("content", FILES.values(), ids=FILES.keys())
def test_a_hostile_file_is_one_message_and_writes_nothing(command, content, capsys, tmp_path):
    path, target = tmp_path / "spec.json", tmp_path / "out.py"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    output = ["-o", str(target)] if command == "emit" else []
    with within(2 * LIMIT):  # with the command line itself
        assert main([command, str(path), *output]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert 0 < len(error) < 700
    assert "Traceback" not in error
    assert not target.exists()


def test_a_file_without_end_is_not_read(capsys, tmp_path):
    path = tmp_path / "spec.json"
    path.touch()
    os.truncate(path, 1 << 27)  # a hole, which takes no room on the disk
    assert main(["show", str(path)]) == 2
    assert "is 65537 characters long, the limit is 65536" in capsys.readouterr().err


# --- the text that is made of what is accepted

MARK = "zqz"


def marked(spec: Spec) -> Spec:
    """The spec with its inputs and scalars named zqz0, zqz1, ... and zspec as its name."""
    data = json.loads(spec.to_json())
    names = [one["name"] for one in data["inputs"]] + data.get("scalars", [])
    new = {name: f"{MARK}{number}" for number, name in enumerate(names)}

    def renamed(text: str) -> str:
        return re.sub(r"\b[A-Za-z_]\w*", lambda word: new.get(word[0], word[0]), text)

    for one in data["inputs"]:
        one["name"] = new[one["name"]]
    if "scalars" in data:
        data["scalars"] = [new[name] for name in data["scalars"]]
    data |= {role: renamed(data[role]) for role in ROLES[:6] if role in data}
    if "erase" in data:
        data["erase"] = [renamed(text) for text in data["erase"]]
    return Spec.from_json(json.dumps(data | {"name": "zspec"}))


@functools.cache
def texts() -> tuple[tuple[str, str], ...]:
    """(the spec's own name, text) of every combination of the language, as an emitted file, which holds the module."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plans = [(spec.name, make_plan(analyse(marked(spec)))) for spec in cases.ALL]
    found = tuple((name, render_standalone(plan)) for name, plan in plans)
    assert all(render(plan).split("\n\n", 1)[1] in text for (_, plan), (_, text) in zip(plans[:3], found, strict=False))
    return found


def tables(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    for child in table.get_children():
        yield child
        yield from tables(child)


def test_the_only_free_names_are_pythons():
    """What a module reads and does not define: built-ins that run no text."""
    allowed = {
        "range", "max", "min", "any", "tuple", "dict", "int", "float", "str", "bool", "len", "zip", "enumerate", "all",
        "getattr", "hasattr", "classmethod", "staticmethod", "property", "object", "isinstance", "list", "set", "sum",
        "sorted", "reversed", "ValueError", "TypeError", "RuntimeError", "NotImplementedError", "super", "print", "abs",
        "map", "next",
    } - {"print"}  # fmt: skip
    for name, text in texts():
        top = symtable.symtable(text, name, "exec")
        defined = {symbol.get_name() for symbol in top.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
        defined |= {symbol.get_name() for symbol in top.get_symbols() if symbol.is_namespace()}
        read = {symbol.get_name() for symbol in top.get_symbols() if symbol.is_referenced()}
        read |= {one.get_name() for table in tables(top) for one in table.get_symbols() if one.is_global()}
        assert read - defined <= allowed, name
        assert not any(MARK in free for free in read - defined), name


def test_no_text_of_the_users_stands_in_a_string():
    """String constants are flagen's own; only docstrings and comments show the recurrence, in harmless characters.
    The emitted file names the inputs in the facts that it reads them by.
    """
    for name, text in texts():
        assert re.fullmatch(r"[ -~\n]*", text), name
        tree = ast.parse(text)
        documented = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            text_of = getattr(node, "value", None) if isinstance(node, ast.Constant) else None
            if isinstance(text_of, str) and MARK in text_of and id(node) not in documented:
                names = {one.id for one in ast.walk(ast.parse(text_of, mode="eval")) if isinstance(one, ast.Name)}
                assert all(re.fullmatch(rf"tl|(b_)?{MARK}\d|b_c\d|b_rise", one) for one in names), text_of


# the last statement of _constants, which reads the scalar before it takes its name
HARMLESS = {("values", "values")}


def test_no_name_that_is_accepted_meets_one_of_the_kernels():
    """For every name that the texts use, and every name that a made-up one like d<name> could meet: either it is
    refused as an argument, or no function has another variable of any name that would be made of it.
    """
    scopes: set[tuple[frozenset[str], frozenset[str]]] = set()
    for name, text in texts():
        for table in tables(symtable.symtable(text, name, "exec")):
            names = set(table.get_identifiers())
            if users := {one for one in names if MARK in one}:
                inner = {one.get_name() for child in tables(table) for one in child.get_symbols() if one.is_global()}
                users = {re.sub(rf"{MARK}\d", MARK, one) for one in users}
                scopes.add((frozenset(users), frozenset(one for one in names | inner if MARK not in one)))
    used = set().union(*(others for _, others in scopes))
    assert len(used) > 200
    candidates = used | {one.removeprefix(start) for one in used for start in ("b_", "d", "e", "p_", "b_d", "G_")}
    candidates |= {one.rsplit("_", 1)[0] for one in candidates} | {f"{one}_" for one in used}
    met = set()
    for candidate in filter(_is_accepted, sorted(candidates)):
        for users, others in scopes:
            made = {block_name(candidate) if one == f"b_{MARK}" else one.replace(MARK, candidate) for one in users}
            met |= {(candidate, one) for one in made & others}
    assert not met - HARMLESS, "refuse them in validate.check_argument_name; a block: plan_parts.OWN_BLOCKS"


def _is_accepted(name: str) -> bool:
    try:
        return Input(name, "b") is not None and check_argument_name("s", name) is None
    except SpecError:
        return False


def test_a_spec_may_have_any_builtins_name():
    """An emitted function of that name would hide it from what stands beside it, so it gets another."""
    plan = make_plan(analyse(specs.get("gla")))
    kernels = render(plan)
    for name in ("range", "tuple", "zip", "print", "functools", "dataclass", "schedule", "fwd", "float64", "tl"):
        renamed = make_plan(analyse(specs.get("gla").replace(name)))
        assert make_standalone(renamed, kernels).function == f"{name}_attention", name
    text = render_standalone(make_plan(analyse(specs.get("gla").replace("range"))))
    assert not re.search(r"^def range\(", text, flags=re.MULTILINE)
    assert "def range_attention(" in text


def test_names_of_the_language_are_all_refused():
    """Whatever an expression's text means by a word, an input cannot."""
    from flagen import expr

    words = {*expr.FUNCTION_ARITY, *expr.ROW_FUNCTIONS, *expr.DERIVATIVE_FUNCTIONS, *expr.INDICES, "taylor"}
    for word in words:
        assert not _is_accepted(word), word
    assert _is_accepted("A_log") and _is_accepted(q.name)


def test_every_template_prints_only_what_is_checked():
    """A template reads plan attributes and loops: nothing else of a user's is in reach. No filter undoes anything."""
    root = Path(analyse.__code__.co_filename).parent / "templates"
    for path in root.rglob("*.jinja"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\|\s*(safe|e|escape|tojson|pprint|xmlattr|urlize)\b", text), path.name
        assert not re.search(r"\b(spec|plan)\.(doc|paper|to_json|latex)\b", text), path.name

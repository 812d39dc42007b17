"""What may import what, what flagen adds to a process, what its sources know of models. (What is banned: bans.py.)"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

import flagen
from flagen import cache_key, config, specs

PACKAGE = Path(flagen.__file__).parent
MODULES = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.glob("*.py"))}
EVERY_FILE = [path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".jinja")]

# a module imports only from layers above its own, or within its own without a circle
LAYERS = (
    ("errors",),
    ("config",),
    ("logs", "private"),
    ("expr",),
    ("functions",),
    ("intervals", "parse", "stabilize"),
    ("validate",),
    ("validate_erase", "validate_stabilize", "validate_vector"),
    ("equations", "exchange"),
    ("spec",),
    ("specs", "peers"),
    ("derive", "rank_one"),
    ("analysis",),
    ("plan", "plan_*"),
    ("standalone",),
    ("render",),
    ("cache_key", "cache"),
    ("load",),
    ("schedule", "schedule_*"),
    ("kept",),
    ("tuned_tables",),
    ("torch_*",),
    ("triton_*",),
    ("reference",),
    ("samples", "compare", "kinks"),
    ("checks", "op", "op_*"),
    ("compiler",),
    ("cost", "cost_*"),
    ("testing",),
    ("fuzz", "fuzz_*"),
    ("demo*", "cli_*", "bench", "bench_*", "tuned_search"),
    ("__main__",),
)


def layer(name: str) -> int:
    found = [number for number, patterns in enumerate(LAYERS) if any(fnmatch(name, one) for one in patterns)]
    assert len(found) == 1, f"flagen/{name}.py is in {len(found)} layers; give it its place in LAYERS"
    return found[0]


def at_run_time(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those that only type checkers see."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from at_run_time(node)


def imports_of_flagen(tree: ast.AST) -> set[str]:
    """The modules of flagen that a module imports, anywhere in it. "flagen" is the public face."""
    found: set[str] = set()
    for node in at_run_time(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                root, _, rest = name.name.partition(".")
                found |= {rest.split(".")[0] or "flagen"} if root == "flagen" else set()
        elif isinstance(node, ast.ImportFrom):
            if node.level == 1:
                names = [node.module.split(".")[0]] if node.module else [one.name for one in node.names]
                found |= {name for name in names if name != "__version__"}
            elif node.level == 0 and (node.module or "").split(".")[0] == "flagen":
                rest = node.module.partition(".")[2]
                found.add(rest.split(".")[0] or "flagen")
    return found


GRAPH = {name: imports_of_flagen(tree) for name, tree in MODULES.items() if name != "__init__"}


@pytest.mark.parametrize("name", GRAPH)
def test_imports_point_one_way(name):
    for other in GRAPH[name]:
        if other == "flagen":
            assert layer(name) > layer("compiler"), f"flagen/{name}.py imports the public face of flagen"
            continue
        assert layer(other) <= layer(name), f"flagen/{name}.py imports flagen/{other}.py, which comes after it"
        assert name not in closure(other), f"flagen/{name}.py and flagen/{other}.py import each other"


def closure(name: str) -> set[str]:
    """What a module imports, directly or not, without itself."""
    found: set[str] = set()
    pending = [name]
    while pending:
        new = GRAPH.get(pending.pop(), set()) - found
        found |= new
        pending += new
    return found


def test_the_graph_is_not_empty():
    assert {"errors", "config", "cache_key", "private"} == closure("cache")
    assert {"derive", "spec", "parse"} <= GRAPH["analysis"] | closure("analysis")


@pytest.mark.parametrize(
    ("name", "forbidden"),
    [
        ("reference", {"analysis", "derive", "plan", "render", "schedule", "load", "op", "torch_backend"}),
        ("samples", {"plan", "render", "schedule", "load", "op", "torch_backend"}),
        ("analysis", {"plan", "cache"}),
        ("plan", {"render", "schedule", "cache", "load"}),
        ("op", {"compiler", "render", "cache", "load", "derive"}),
        ("config", set(MODULES) - {"errors"}),
        ("errors", set(MODULES)),
    ],
)
def test_what_a_module_never_leads_to(name, forbidden):
    assert not closure(name) & forbidden


def outside(tree: ast.AST) -> set[str]:
    """The packages that are imported when a module is, not later in a function."""
    found: set[str] = set()
    pending = list(ast.iter_child_nodes(tree))
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.FunctionDef, ast.Lambda)) or (
            isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        ):
            continue
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").split(".")[0])
        pending.extend(ast.iter_child_nodes(node))
    return found


STANDARD = set(sys.stdlib_module_names)
TORCH_MODULES = (
    "torch_*", "triton_*", "schedule*", "kept", "reference", "samples", "compare", "kinks", "testing", "checks", "op",
    "op_*", "demo*", "cli_*", "fuzz*", "cost*", "bench*", "tuned*",
)  # fmt: skip
HYPOTHESIS = ("fuzz_exprs", "fuzz_specs", "fuzz_hunt")  # which `flagen fuzz` alone needs


@pytest.mark.parametrize("name", MODULES)
def test_packages_that_a_module_imports(name):
    allowed = STANDARD | {"flagen"}
    if any(fnmatch(name, one) for one in TORCH_MODULES):
        allowed |= {"torch", "triton"}
    if name in HYPOTHESIS:
        allowed |= {"hypothesis"}
    assert outside(MODULES[name]) <= allowed


def test_the_cache_needs_the_standard_library_alone():
    for name in ("cache", "cache_key", "private", "config", "errors", "load", "logs"):
        every = {
            (alias.name if isinstance(node, ast.Import) else node.module or "").split(".")[0]
            for node in at_run_time(MODULES[name])
            if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and node.level == 0)
            for alias in node.names
        }
        assert every <= STANDARD, name


def test_sympy_and_jinja_have_one_place_each():
    for package, home in (("sympy", "derive"), ("jinja2", "render")):
        for name, tree in MODULES.items():
            uses = [node for node in at_run_time(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
            if any(package in ast.unparse(node) and "import_module" not in ast.unparse(node) for node in uses):
                assert name == home, f"flagen/{name}.py imports {package}"


# --- the cache's key


def test_the_key_covers_exactly_the_modules_that_shape_the_text():
    """A module left out would leave stale text; one too many would only make text again."""
    shaping = {path.stem for path in cache_key.shaping_files(PACKAGE) if path.suffix == ".py"}
    needed = {"analysis", "plan", "render", "spec"}.union(*map(closure, ("analysis", "plan", "render", "spec")))
    assert needed <= shaping, f"take {needed - shaping} out of cache_key.NOT_SHAPING"
    assert shaping <= needed, f"add {shaping - needed} to cache_key.NOT_SHAPING, no text depends on it"


def test_the_key_covers_every_template():
    templates = {path for path in cache_key.shaping_files(PACKAGE) if path.suffix == ".jinja"}
    assert templates == {path for path in (PACKAGE / "templates").rglob("*") if path.is_file()}


# --- a fresh process


def run(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_flagen_loads_nothing():
    code = "import sys; import flagen; print(sorted(m for m in sys.modules if m.split('.')[0] in {}))"
    heavy = {"flagen", "torch", "triton", "jinja2", "sympy", "numpy", "importlib.metadata"}
    assert run(code.format(heavy)) == "['flagen']"


def test_importing_flagen_is_light():
    code = (
        "import time, torch; began = time.process_time(); import flagen; flagen.__version__; "
        "print(time.process_time() - began)"
    )
    assert min(float(run(code)) for _ in range(3)) < 0.020


def test_declaring_a_spec_needs_no_torch():
    code = (
        "import sys; from flagen import Input, Spec, logsigmoid; "
        "print(Spec('s', log_decay=logsigmoid(Input('g', 'b t h k'))).to_json() != '', 'torch' in sys.modules)"
    )
    assert run(code) == "True False"


def test_a_star_hides_no_builtin():
    code = (
        "import builtins; from flagen import *; "
        "print([n for n in dir(builtins) if n in globals() and not n.startswith('__')], Spec, exp(q) + head, compile)"
    )
    assert run(code) == "[] <class 'flagen.spec.Spec'> exp(q) + head <built-in function compile>"


# --- the public face


def test_every_public_name_is_there():
    for name in flagen.__all__:
        assert getattr(flagen, name) is not None
        assert name in dir(flagen)
    assert flagen.abs(flagen.q) is not None
    assert callable(flagen.compile)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        flagen.nothing  # noqa: B018


def test_type_checkers_see_the_same_names():
    tree = MODULES["__init__"]
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    seen = {alias.name for node in block.body for alias in node.names}
    assert seen == {*flagen._HOME, *flagen._MODULES}


def test_every_variable_is_in_the_table():
    names = {variable.name for variable in config.VARIABLES}
    used = set()
    for path in EVERY_FILE:
        used |= set(re.findall(r"\bFLAGEN_[A-Z_]+\b", path.read_text(encoding="utf-8")))
    assert used == names
    assert not any(variable.affects_text for variable in config.VARIABLES)


# --- words


def docstrings(tree: ast.AST) -> set[int]:
    found = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            found.add(id(body[0].value))
    return found


@pytest.mark.parametrize("name", MODULES)
def test_no_module_knows_a_model(name):
    """Neither a branch on a spec's name nor an identifier after one; messages and docstrings may name one."""
    tree, models = MODULES[name], set(specs.names())
    skipped = docstrings(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and id(node) not in skipped:
            assert node.value not in models, f"flagen/{name}.py, line {node.lineno}: {node.value!r} is a model"
        identifier = getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "name", None)
        if isinstance(identifier, str):
            words = set(identifier.lower().split("_")) - {"linear", "based"}
            assert not words & models, f"flagen/{name}.py, line {node.lineno}: {identifier}"


def test_no_template_knows_a_model():
    words = "|".join(sorted(set(specs.names()) - {"linear", "based"}))
    for path in (PACKAGE / "templates").rglob("*.jinja"):
        assert not re.search(rf"\b({words})", path.read_text(encoding="utf-8")), path.name


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_small(name):
    lines = (PACKAGE / f"{name}.py").read_text(encoding="utf-8").count("\n")
    assert lines < 400, f"flagen/{name}.py has {lines} lines; split it"

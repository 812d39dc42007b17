"""The habits: the commands of `make check` pass, pre-commit runs the same ones, and what is banned is found."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import bans
import pytest
from conftest import compiled_by

ROOT = Path(__file__).parent.parent


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def check_commands() -> list[str]:
    """The commands of `make check`, without where the tools are."""
    recipe = re.search(r"^check: .*\n((?:\t.*\n)+)", text_of("Makefile"), flags=re.MULTILINE)
    return [line.strip().removeprefix("$(BIN)/") for line in recipe[1].splitlines()]


def test_pre_commit_runs_what_make_check_runs():
    entries = re.findall(r"^ +entry: \.venv/bin/(.+)$", text_of(".pre-commit-config.yaml"), flags=re.MULTILINE)
    assert entries == check_commands()
    assert "repo: local" in text_of(".pre-commit-config.yaml")
    assert "http" not in text_of(".pre-commit-config.yaml")


@pytest.mark.parametrize("tool", ["ruff", "mypy"])
def test_pins_agree(tool):
    (wanted,) = re.findall(rf'"{tool} == ([\d.]+)"', text_of("pyproject.toml"))
    assert re.findall(rf"^{tool}==(.+)$", text_of("constraints.txt"), flags=re.MULTILINE) == [wanted]


@pytest.mark.parametrize("command", ["ruff check", "ruff format --check", "mypy"])
def test_make_check_passes(command, tmp_path):
    """regen --check is held by test_generated.py, the bans by the tests below."""
    assert command in check_commands()
    pytest.importorskip(command.split()[0], reason="install the extra 'test'")
    cache = ["--cache-dir", str(tmp_path)] if command == "mypy" else []
    done = subprocess.run(
        [sys.executable, "-m", *command.split(), *cache], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


USER = """
import flagen
from flagen import Input, Spec, abs, compile, logsigmoid

g = Input("g", "b t h k")
spec: Spec = flagen.specs.get("gla").replace("mine", log_decay=-abs(g) / 16)
source: str = compile(spec).source
"""


def test_the_public_names_have_types_for_a_strict_user(tmp_path):
    """py.typed promises it; `Spec("s", log_decay="g")` is the type checker's to refuse."""
    pytest.importorskip("mypy", reason="install the extra 'test'")
    (tmp_path / "right.py").write_text(USER)
    (tmp_path / "wrong.py").write_text(
        USER.replace("-abs(g) / 16)", '-abs(g) / "16")').replace("source: str", "x: int")
    )
    command = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", "--cache-dir", str(tmp_path / "cache")]
    files = [str(tmp_path / name) for name in ("right.py", "wrong.py")]
    done = subprocess.run([*command, *files], cwd=ROOT, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert len(lines) == 2, done.stdout
    assert all("wrong.py" in line for line in lines), done.stdout


def test_the_core_is_strict():
    """A module may leave the strict types only where tensors are what it is about."""
    listed = re.search(r"tensors in, tensors out.*?module = \[(.*?)\]", text_of("pyproject.toml"), flags=re.DOTALL)
    lenient = set(re.findall(r'"flagen\.(\w+)"', listed[1]))
    core = "errors config logs private expr functions intervals parse validate equations exchange spec derive analysis"
    core += " plan plan_parts render standalone cache_key cache load compiler schedule"
    assert not lenient & set(core.split())
    assert lenient <= {path.stem for path in (ROOT / "flagen").glob("*.py")}, "a module that is no more"
    for name in lenient:
        assert "torch" in text_of(f"flagen/{name}.py"), name


# --- what must not occur


def test_nothing_banned_occurs():
    assert bans.faults(ROOT) == []


BANNED = {
    "eval": 'x = eval("1")',
    "exec": 'exec("x = 1")',
    "compile": 'compile("1", "", "eval")',
    "import": '__import__("os")',
    "a name for later": "run = eval",
    "of builtins": 'import builtins\nbuiltins.eval("1")',
    "imported": "from builtins import exec as run",
    "sympify": 'from sympy import sympify\nsympify("x")',
    "a method of sympy": 'import sympy\nsympy.parse_expr("x")',
    "sympy's S": 'import sympy\nsympy.S("x")',
    "S imported": "from sympy import S",
    "lambdify": 'import sympy\nsympy.lambdify("x", "x")',
    "pickle": "import pickle",
    "from pickle": "def f():\n    from pickle import loads",
    "marshal": "import json, marshal",
    "torch.load": "import torch\ntorch.load('x')",
    "block pointers": "p = tl.make_block_ptr(x)",
    "advance": "p = tl.advance(p, 1)",
    "a template from text": "jinja2.Template('x')",
    "a template of the environment": "environment().from_string('x')",
}


def planted(root: Path, name: str, text: str) -> list[str]:
    """What is found when `text` is the one file below `root`."""
    path = root / name
    path.parent.mkdir(parents=True)
    path.write_text(text + "\n")
    return bans.faults(root)


@pytest.mark.parametrize("text", BANNED.values(), ids=BANNED.keys())
def test_what_is_banned_is_found(tmp_path, text):
    ast.parse(text)
    found = planted(tmp_path, "flagen/deep/module.py", text)
    assert found
    assert all(re.fullmatch(r"flagen/deep/module\.py:\d: .+", fault) for fault in found)


@pytest.mark.parametrize("name", ["flagen/templates/x.py.jinja", "generated/x.py", "benchmarks/x.py"])
def test_every_shipped_folder_is_searched(tmp_path, name):
    assert planted(tmp_path, name, "p = tl.make_block_ptr(x)") == [f"{name}:1: make_block_ptr: " + bans.WORDS[
        r"\bmake_block_ptr\b"]]  # fmt: skip


@pytest.mark.parametrize("text", ["model.eval()", "re.compile('x')", "evaluate(x)", "flagen.compile(x)", "S = 1"])
def test_what_only_looks_like_it_is_not_found(tmp_path, text):
    assert planted(tmp_path, "flagen/module.py", text) == []


def test_the_exceptions_are_those_that_are_there(tmp_path):
    """Each exactly as often as allowed: one more in the same file is found, and none is allowed in vain."""
    loader = text_of("flagen/load.py")
    assert len(re.findall(r"exec\(compile\(source, filename", loader)) == 1
    assert planted(tmp_path / "same", "flagen/load.py", loader) == []
    (fault,) = planted(tmp_path / "more", "flagen/load.py", loader + "\n\nexec(input())\n")
    assert "exec may run text" in fault
    for (name, word), count in bans.ALLOWED.items():
        lines = text_of(name).splitlines()
        trees = [node for node in ast.walk(ast.parse("\n".join(lines))) if bans._runs_text(node) == word]
        assert len(trees) == count, (name, word)


# --- the map


def test_every_module_has_one_place_in_the_map():
    rows = re.findall(r"^\| ((?:`[^`]+` ?)+) \|", text_of("CONTRIBUTING.md"), flags=re.MULTILINE)
    patterns = [pattern for row in rows for pattern in re.findall(r"`([^`]+)`", row)]
    there = {path.stem for path in (ROOT / "flagen").glob("*.py")} - {"__init__"}
    there |= {f"{path.name}/" for path in (ROOT / "flagen").iterdir() if path.is_dir() and path.name != "__pycache__"}
    for name in there:
        assert sum(fnmatch(name, pattern) for pattern in patterns) == 1, (
            f"{name} has no place, or two, in CONTRIBUTING.md"
        )
    for pattern in patterns:
        assert any(fnmatch(name, pattern) for name in there), f"{pattern} in CONTRIBUTING.md is no module"


def test_contributing_names_what_is_there():
    """Each `module.NAME` and each path in the text."""
    text = text_of("CONTRIBUTING.md")
    for module, name in re.findall(r"`(\w+)\.([A-Za-z_]+)`", text):
        if name not in ("py", "toml", "txt"):
            assert re.search(rf"^\s*(def |class )?{name}\b", text_of(f"flagen/{module}.py"), flags=re.MULTILINE), name
    for path in re.findall(r"`((?:flagen|tests|generated)/[\w/.]*)`", text):
        assert path == "flagen/specs/NAME.py" or (ROOT / path).exists(), path
    targets = set(re.findall(r"^([a-z-]+):", text_of("Makefile"), flags=re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)`", text)) <= targets
    assert len(text.splitlines()) < 85, "one page"


# --- the suite itself


def test_tests_of_the_same_kernels_go_to_one_process():
    """On a GPU, whatever their other parameters are and in whatever order."""
    file = "tests/test_hostile_values.py::test"
    assert compiled_by(f"{file}[triton_cuda-gla-huge query]") == compiled_by(f"{file}_b[first-triton_cuda-gla]")
    others = (
        f"{file}[triton_cuda_bfloat16-gla-tiny]",
        f"{file}[triton_cuda-raw_key--1e-07]",
        "tests/test_hostile_layout.py::test[triton_cuda-gla-bth]",
        "tests/test_threads.py::test[gla]",
        "tests/test_threads.py::test[linear]",
    )
    assert len({compiled_by(one) for one in (f"{file}[triton_cuda-gla-tiny]", *others)}) == 6
    assert compiled_by("tests/test_hostile_layout.py::test_two_streams[gla]") == compiled_by(others[2])

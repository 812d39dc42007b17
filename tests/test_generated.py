"""generated/ is what the shipped specs are rendered to, byte for byte, in this process and in another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cases import SHIPPED, SHIPPED_VECTORS

from flagen import cli_regen

NAMES = [spec.name for spec in SHIPPED + SHIPPED_VECTORS]  # those that have kernels
GENERATED = Path(__file__).parent.parent / "generated"


@pytest.fixture(scope="module")
def rendered() -> dict[str, str]:
    return cli_regen.rendered()


def test_the_files_are_those_of_the_shipped_specs():
    assert {path.name for path in GENERATED.iterdir()} == {f"{name}.py" for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_as_rendered(name, rendered):
    assert (GENERATED / f"{name}.py").read_text(encoding="utf-8") == rendered[f"{name}.py"], "run: flagen regen"


def test_another_process_renders_the_same(rendered):
    code = "import json; from flagen import cli_regen; print(json.dumps(cli_regen.rendered()))"
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=GENERATED.parent
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == rendered


def pass_the_linter(folder):
    rules = ["--select", "E,F,B", "--ignore", "E501,E741"]
    command = [sys.executable, "-m", "ruff", "check", "--isolated", *rules, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_files_pass_the_linter():
    pass_the_linter(GENERATED)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_imports_only_torch_and_triton(name, rendered):
    lines = [line for line in rendered[f"{name}.py"].splitlines() if line.startswith(("import ", "from "))]
    assert lines == ["import torch", "import triton", "import triton.language as tl"]

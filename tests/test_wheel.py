"""The wheel: every source file, every template and py.typed are in it, and nothing else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import flagen

ROOT = Path(__file__).parent.parent

pytest.importorskip("hatchling", reason="builds without isolation; install the extra 'test'")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    directory = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(directory),
    ]
    done = subprocess.run([*command, str(ROOT)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = directory.glob("*.whl")
    return zipfile.ZipFile(path)


def test_holds_the_package_and_nothing_else(wheel):
    package = ROOT / "flagen"
    wanted = {
        path.relative_to(ROOT).as_posix()
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    names = [name for name in wheel.namelist() if ".dist-info/" not in name]
    assert len(names) == len(set(names))
    assert set(names) == wanted
    assert "flagen/py.typed" in names
    assert any(re.fullmatch(r"flagen/templates/\w+\.py\.jinja", name) for name in names)


def test_metadata(wheel):
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    text = wheel.read(name).decode()
    assert f"\nVersion: {flagen.__version__}\n" in text
    assert "\nRequires-Python: >=3.10\n" in text
    for needed in ("torch>=2.7", "triton>=3.5; sys_platform == 'linux'", "jinja2>=3.1", "sympy>=1.13"):
        assert f"\nRequires-Dist: {needed}\n" in text, needed
    entry_points = wheel.read(name.replace("METADATA", "entry_points.txt")).decode()
    assert "flagen = flagen.__main__:main" in entry_points
    assert any(one.endswith("/licenses/LICENSE") for one in wheel.namelist())


def test_runs_from_the_wheel(wheel, tmp_path):
    # as installed: no checkout beside it, and templates found as package data
    wheel.extractall(tmp_path)
    code = (
        "import sys, flagen; from flagen.__main__ import main; "
        "assert flagen.__file__.startswith(sys.argv[1]), flagen.__file__; sys.exit(main(['emit', 'retnet']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "import triton" in done.stdout

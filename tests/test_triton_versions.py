"""Other releases of Triton: the script that compiles the kernels under them, and what flagen's texts ask of Triton."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import triton
import triton.language as tl
import triton_versions
from triton_versions import INSTALLED, ROOT, VERSIONS, environment, found_version, main

# All that is asked of triton.language: it is in 3.6.0, 3.7.1 and 3.9.0. A name is added here when it was seen in them,
# at best by `make compile-matrix`.
NAMES = {
    "PropagateNan", "abs", "arange", "associative_scan", "bfloat16", "cdiv", "constexpr", "cos", "cumsum",
    "debug_barrier", "dot", "exp", "exp2", "float32", "floor", "fma", "full", "gather", "int32", "int64", "int8",
    "join", "load", "log", "max", "maximum", "min", "minimum", "program_id", "range", "reshape", "rsqrt", "sigmoid",
    "sin", "split", "sqrt", "static_range", "store", "sum", "trans", "where", "zeros", "zeros_like",
}  # fmt: skip


def texts() -> dict[Path, str]:
    found = [ROOT / "generated", ROOT / "flagen" / "templates", ROOT / "flagen"]
    paths = [path for folder in found for pattern in ("*.py", "*.jinja") for path in folder.glob(pattern)]
    return {path: path.read_text() for path in paths}


def test_the_texts_ask_for_no_other_names():
    asked: dict[str, Path] = {}
    for path, text in texts().items():
        asked |= dict.fromkeys(re.findall(r"\btl\.([A-Za-z_]\w*)", text), path)
    assert len(asked) > 20
    strange = {name: path.name for name, path in asked.items() if name not in NAMES}
    assert not strange, f"see that Triton 3.6 and 3.9 have them (make compile-matrix), then add to NAMES: {strange}"
    assert not [name for name in NAMES if not hasattr(tl, name)]


def test_the_readme_says_which_releases():
    readme = " ".join((ROOT / "README.md").read_text().split())
    pinned = re.search(r"^triton==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    assert f"Triton {pinned}" in readme
    for version in VERSIONS:
        assert version.removesuffix(".0") in readme


def test_cases_of_the_installed_release(capfd):
    assert main([INSTALLED, "-k", "gla and sm_90", "--collect-only"]) == 0
    out = capfd.readouterr().out
    assert f"--- Triton {triton.__version__}" in out
    assert "test_every_kernel_compiles_and_fits[gla-sm_90-bf16]" in out
    assert f"Triton {INSTALLED}: collected" in out


def test_an_expression_that_chooses_nothing_is_a_failure(capfd):
    assert main([INSTALLED, "-k", "no_such_case", "--collect-only"]) == 1
    assert "Triton installed: no case was chosen" in capfd.readouterr().out


def fake(folder: Path, version: str, text: str) -> None:
    """Something that looks like an installed release."""
    place = folder / version / "triton"
    place.mkdir(parents=True)
    (place / "__init__.py").write_text(text)


def test_a_release_that_is_another_is_a_failure(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(triton_versions, "install", lambda version, folder: None)
    fake(tmp_path, "3.6.0", "__version__ = '3.5.1'")
    fake(tmp_path, "3.9.0", "raise ImportError('no wheel for this machine')")
    assert found_version("3.6.0", tmp_path) == "3.5.1"
    assert main(["3.6.0", "3.9.0", "3.8.0", "--folder", str(tmp_path), "-k", "no_such_case"]) == 1
    out = capfd.readouterr().out
    assert "Triton 3.6.0: Triton 3.5.1, not 3.6.0" in out
    assert "Triton 3.9.0: Triton cannot be imported, not 3.9.0" in out
    # nothing in its folder: the release at hand is not taken for it
    assert f"Triton 3.8.0: Triton {triton.__version__}, not 3.8.0" in out


def test_a_release_is_installed_once(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(triton_versions.subprocess, "run", lambda command, check: commands.append(command))
    triton_versions.install("3.6.0", tmp_path)
    assert commands[0][-3:] == ["--target", str(tmp_path / "3.6.0"), "triton==3.6.0"]
    assert "--no-deps" in commands[0]
    fake(tmp_path, "3.6.0", "")
    triton_versions.install("3.6.0", tmp_path)
    assert len(commands) == 1


def test_the_process_of_a_release(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    found = environment("3.6.0", tmp_path)
    assert "TRITON_INTERPRET" not in found
    assert found["PYTHONPATH"].split(":") == [str(tmp_path / "3.6.0"), str(ROOT), "elsewhere"]
    assert found["TRITON_CACHE_DIR"].startswith(str(tmp_path / "3.6.0"))
    assert "TRITON_INTERPRET" not in environment(INSTALLED, tmp_path)


def test_failures_of_the_tests_are_failures(monkeypatch, tmp_path, capfd):
    kernels = tmp_path / "tests" / "kernels"
    kernels.mkdir(parents=True)
    (kernels / "test_compile_one.py").write_text("def test_it():\n    assert False\n")
    monkeypatch.setattr(triton_versions, "ROOT", tmp_path)
    assert main([INSTALLED]) == 1
    assert "Triton installed: pytest's exit status is 1" in capfd.readouterr().out


@pytest.mark.parametrize("version", VERSIONS)
def test_versions_are_releases(version):
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)

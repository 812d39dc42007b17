"""gpu_sanitizer.py: what it starts and what it makes of it, with a stand-in for the tool; and the tool on a GPU."""

from __future__ import annotations

import stat
import sys

import gpu_sanitizer
import pytest

STAND_IN = """#!{python}
import os, sys
at = sys.argv.index("application-only") + 1
assert os.access(sys.argv[at], os.X_OK) and sys.argv[at + 2] == "--run"
with open({log!r}, "a") as log:
    print(*sys.argv[1:at], os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING"), file=log)
sys.exit(42 if "{found}" in sys.argv else 0)
"""


def _stand_in(folder, found=""):
    path, log = folder / "compute-sanitizer", folder / "log"
    path.write_text(STAND_IN.format(python=sys.executable, log=str(log), found=found))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path), log


def test_tools_are_run_one_after_the_other(tmp_path, capfd):
    path, log = _stand_in(tmp_path)
    assert gpu_sanitizer.main(["--sanitizer", path, "--device", "cpu", "linear"]) == 0
    options = "--error-exitcode 42 --target-processes application-only"
    assert log.read_text().splitlines() == [f"--tool memcheck {options} 1", f"--tool racecheck {options} None"]
    # the program itself ran once before
    assert capfd.readouterr().out.splitlines() == [
        "compiling", "linear", "memcheck", "memcheck: nothing found", "racecheck", "racecheck: nothing found"
    ]  # fmt: skip


def test_what_a_tool_finds_is_a_failure(tmp_path, capsys, monkeypatch):
    path, _ = _stand_in(tmp_path, found="racecheck")
    monkeypatch.setattr(gpu_sanitizer, "TESTS", _program_that_does_nothing(tmp_path))
    assert gpu_sanitizer.main(["--sanitizer", path]) == 1
    assert "memcheck: nothing found\n" in (out := capsys.readouterr().out) and "racecheck: errors\n" in out


def _program_that_does_nothing(folder):
    (folder / "gpu_sanitizer.py").write_text("")
    return folder


def test_a_program_that_fails_is_a_failure(tmp_path, capfd):
    path, log = _stand_in(tmp_path)
    assert gpu_sanitizer.main(["--sanitizer", path, "--device", "cpu", "no_such_spec"]) != 0
    assert "without a tool it ended with 1" in capfd.readouterr().err and not log.exists()


def test_it_is_looked_for(tmp_path, monkeypatch, capsys):
    path, _ = _stand_in(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_sanitizer.found_sanitizer() == path
    (tmp_path / "bin").mkdir()
    (tmp_path / "compute-sanitizer").rename(tmp_path / "bin" / "compute-sanitizer")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert gpu_sanitizer.found_sanitizer() == str(tmp_path / "bin" / "compute-sanitizer")
    monkeypatch.setattr(gpu_sanitizer, "found_sanitizer", lambda: None)
    assert gpu_sanitizer.main([]) == 2 and "comes with the CUDA toolkit" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_kernels(tool):
    if gpu_sanitizer.found_sanitizer() is None:
        pytest.skip("compute-sanitizer is not installed")
    assert gpu_sanitizer.main(["--tool", tool]) == 0

"""gpu_sanitizer.py: what it starts and what it makes of it, with a stand-in for the tool; and the tool on a GPU."""

from __future__ import annotations

import ast
import stat
import sys

import gpu_sanitizer
import pytest

STAND_IN = """#!{python}
import os, sys
at = sys.argv.index("application-only") + 1
assert os.access(sys.argv[at], os.X_OK) and sys.argv[at + 4] == "--run"
with open({log!r}, "a") as log:
    print(*sys.argv[1:at], os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING"), file=log)
sys.exit(42 if "{found}" in sys.argv else 0)
"""


def _stand_in(folder, found=""):
    path, log = folder / "compute-sanitizer", folder / "log"
    path.write_text(STAND_IN.format(python=sys.executable, log=str(log), found=found))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path), log


def test_tools_are_run_one_after_the_other(tmp_path, capsys):
    path, log = _stand_in(tmp_path)
    assert gpu_sanitizer.main(["--sanitizer", path, "--device", "cpu", "--jobs", "1", "linear"]) == 0
    options = "--error-exitcode 42 --launch-timeout 600 --target-processes application-only"
    assert log.read_text().splitlines() == [f"--tool memcheck {options} 1", f"--tool racecheck {options} None"]
    assert capsys.readouterr().out.splitlines() == [
        "compiling for 4 runs, 1 processes", "memcheck: nothing found", "racecheck: nothing found"
    ]  # fmt: skip


def test_processes_share_the_runs(tmp_path, capfd, monkeypatch):
    folder, path = tmp_path / "program", _stand_in(tmp_path)[0]
    folder.mkdir()
    log = tmp_path / "runs"
    (folder / "gpu_sanitizer.py").write_text(f"import sys\nopen({str(log)!r}, 'a').write(repr(sys.argv[3:]) + '\\n')\n")
    monkeypatch.setattr(gpu_sanitizer, "TESTS", folder)
    arguments = ["--sanitizer", path, "--tool", "memcheck", "--jobs", "3", "--shard", "1/2", "linear", "gla", "based"]
    assert gpu_sanitizer.main(arguments) == 0
    found = [ast.literal_eval(line) for line in log.read_text().splitlines()]
    assert all(words[::2] == ["--run"] * (len(words) // 2) for words in found)
    assert sorted(len(words) // 2 for words in found) == [2, 2, 2]  # the tool is a stand-in and runs nothing
    runs = [word for words in found for word in words[1::2]]
    assert sorted(runs) == sorted(gpu_sanitizer.sharded(["linear", "gla", "based"], "1/2"))
    assert "compiling for 6 runs, 3 processes" in capfd.readouterr().out


def test_shards_are_samples_of_everything():
    names = gpu_sanitizer.shipped()
    for count in (1, 2, 3):
        parts = [gpu_sanitizer.sharded(names, f"{i + 1}/{count}") for i in range(count)]
        assert sorted(run for part in parts for run in part) == sorted(gpu_sanitizer.sharded(names, "1/1"))
        for part in parts:
            assert {run.partition(" ")[2] for run in part} == set(gpu_sanitizer.FORMS)
            assert len({run.split()[0] for run in part}) >= 0.6 * len(names)


def test_the_runs_run(capfd):
    gpu_sanitizer.main(["--run", "linear float32 packed", "--run", "gla bfloat16 whole", "--device", "cpu"])
    assert capfd.readouterr().out.splitlines() == ["linear float32 packed", "gla bfloat16 whole"]


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
    assert gpu_sanitizer.main(["--sanitizer", path, "--device", "cpu", "--jobs", "1", "no_such_spec"]) != 0
    out, err = capfd.readouterr()
    assert "without a tool it ended with 1" in err and "KeyError: 'no_such_spec'" in out and not log.exists()


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
    """Of a few specs; the program by itself takes all."""
    if gpu_sanitizer.found_sanitizer() is None:
        pytest.skip("compute-sanitizer is not installed")
    assert gpu_sanitizer.main(["--tool", tool, "--jobs", "3", "--shard", "1/4", "gla", "retnet", "linear"]) == 0

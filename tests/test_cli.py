"""The command line: what each command prints, its status, and that errors are one message."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import flagen
from flagen import cli_cache, cli_check, cli_pool, cli_progress, cli_regen, demo, specs
from flagen.__main__ import main, parser
from flagen.analysis import analyse
from flagen.cli_check import Grid, Line
from flagen.cli_spec import find_spec
from flagen.demo_example import my_attention
from flagen.expr import k, l2norm
from flagen.schedule import HOPPER
from flagen.spec import Spec

SMALL = Grid(sizes=((4, 6),), taylor_sizes=((4, 6),), lengths=(1, 9), packed=((3, 0, 5),), grouped=((4, 6),))


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    status = main(arguments)
    out, err = capsys.readouterr()
    return status, out, err


# --- naming a spec


def test_spec_by_name_file_and_attribute(tmp_path, monkeypatch):
    file = tmp_path / "mine.json"
    file.write_text(my_attention.to_json())
    assert find_spec("gla") is specs.get("gla")
    assert find_spec(str(file)) == my_attention
    assert find_spec("flagen.demo_example:my_attention") is my_attention
    (tmp_path / "my_models_of_test_cli.py").write_text("from flagen import Spec\nplain = Spec('plain')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [one for one in sys.path if one])
    assert find_spec("my_models_of_test_cli:plain") == Spec("plain")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("gal", "did you mean 'gla'?"),
        ("no_such_module_here:x", "there is no module 'no_such_module_here'"),
        ("flagen.demo_example:nothing", "has no such attribute; the specs in flagen.demo_example are: my_attention"),
        ("flagen.demo_example:gate", "there it is of type Input"),
        (":x", "is not module:attribute"),
        ("no_such_file.json", "No such file"),
    ],
)
def test_wrong_spec_is_one_message(capsys, spec, said):
    status, out, err = run(capsys, "show", spec)
    assert (status, out) == (2, "")
    assert err.startswith("flagen: ")
    assert said in err
    assert "Traceback" not in err


@pytest.mark.parametrize(("content", "said"), [(b"{", "not JSON"), (b"\xff\xfe", "UTF-8"), (b"{}", "lacks the field")])
def test_wrong_file_is_one_message(capsys, tmp_path, content, said):
    file = tmp_path / "bad.json"
    file.write_bytes(content)
    status, _, err = run(capsys, "show", str(file))
    assert status == 2
    assert said in err


def test_wrong_variable_is_one_message(capsys, monkeypatch):
    monkeypatch.setenv("FLAGEN_CACHE", "maybe")
    status, _, err = run(capsys, "demo", "--tokens", "1")
    assert status == 2
    assert "FLAGEN_CACHE='maybe' is not allowed" in err


@pytest.mark.parametrize(
    "arguments",
    [("frobnicate",), (), ("show",), ("show", "gla", "--shape", "1,2,3"), ("show", "gla", "--shape", "1,2,3,4,0"),
     ("check", "gla", "--dtype", "bf17"), ("check", "gla", "--shard", "3/2"), ("check", "gla", "--jobs", "0"),
     ("cache", "burn")],
)  # fmt: skip
def test_wrong_arguments_have_status_two(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage:" in capsys.readouterr().err


# --- list, show, emit


def test_list_has_every_spec(capsys):
    status, out, _ = run(capsys, "list")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines() if line[0] != " "] == list(specs.names())
    assert "S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T" in out


@pytest.mark.parametrize("name", specs.names())
def test_show_every_spec(capsys, name):
    status, out, _ = run(capsys, "show", name, "--shape", "2,100,3,16,24")
    assert status == 0
    spec = specs.get(name)
    assert all(line in out for line in spec.equations)
    for one in spec.inputs:
        sizes = ", ".join(str({"b": 2, "t": 100, "h": 3, "k": 16, "v": 24, "d": 72}[axis]) for axis in one.axes)
        assert f"[{sizes}]" in out
    analysis = analyse(spec)
    assert (f"{name}_fwd_kernel" if not analysis.without_kernels else f"none: {analysis.without_kernels}") in out
    assert (f"erase: {analysis.erase}" in out) == (spec.erase is not None)


def test_emit_of_what_has_no_kernels(capsys, tmp_path):
    file = tmp_path / "normed.json"
    file.write_text(Spec("normed", key=l2norm(k)).to_json())
    status, out, err = run(capsys, "emit", str(file))
    assert (status, out) == (2, "")
    assert err.startswith("flagen: normed: there are no Triton kernels for l2norm yet; compile it with")


def test_show_counts_bytes(capsys):
    # 3 heads, 2 bytes: q, k, g have 32 channels, v and o 64, and there is a state every 256 tokens
    _, out, _ = run(capsys, "show", "gla", "--shape", "2,100,3,32,64")
    numbers = {line.split()[0]: int(line.split()[1]) for line in out.split("bytes per token")[1].splitlines()[1:]}
    reads, output, saved = 3 * 2 * (3 * 32 + 64), 3 * 2 * 64, 3 * 2 * 32 * 64 // 256
    assert numbers["forward"] == reads + output
    assert numbers["training"] == reads + output + saved
    assert numbers["backward"] == 2 * reads + output + saved
    assert "decay: one per key channel and token" in out


def test_emit_needs_only_torch_and_triton(capsys, tmp_path):
    status, out, _ = run(capsys, "emit", "gla")
    assert status == 0
    imported = set()
    for node in ast.walk(ast.parse(out)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"torch", "triton"}
    file = tmp_path / "gla.py"
    status, nothing, _ = run(capsys, "emit", "gla", "-o", str(file))
    assert (status, nothing) == (0, "")
    assert file.read_text() == out


# --- regen


@pytest.fixture(scope="module")
def rendered() -> dict[str, str]:
    return cli_regen.rendered()


def test_regen_writes_checks_and_removes(capsys, tmp_path, monkeypatch, rendered):
    monkeypatch.setattr(cli_regen, "rendered", lambda: rendered)
    there = ("regen", "--directory", str(tmp_path / "generated"))
    assert run(capsys, *there, "--check")[0] == 1
    status, out, _ = run(capsys, *there)
    assert status == 0
    with_kernels = {name for name in specs.names() if not analyse(specs.get(name)).without_kernels}
    assert len(out.splitlines()) == len(with_kernels) > 8
    assert {path.stem for path in (tmp_path / "generated").iterdir()} == with_kernels
    assert run(capsys, *there, "--check") == (0, "", "")
    assert run(capsys, *there) == (0, "", "")
    edited, extra = tmp_path / "generated" / "gla.py", tmp_path / "generated" / "old.py"
    edited.write_text(edited.read_text().replace("import torch\n", "import torch  # edited\n", 1))
    extra.write_text("")
    status, out, err = run(capsys, *there, "--check")
    assert status == 1
    assert "-import torch  # edited\n+import torch\n" in out
    assert "generated/old.py: belongs to no shipped spec" in out
    assert "2 of the files" in err
    status, out, _ = run(capsys, *there)
    assert "written" in out
    assert "removed" in out
    assert run(capsys, *there, "--check")[0] == 0


def test_regen_without_a_checkout_asks_for_a_directory(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(cli_regen, "CHECKOUT", tmp_path)
    status, _, err = run(capsys, "regen", "--check")
    assert status == 2
    assert "give --directory" in err


# --- cache, env


def test_cache_commands(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("FLAGEN_CACHE_DIR", str(tmp_path / "cache"))
    assert run(capsys, "cache", "dir")[:2] == (0, f"{tmp_path / 'cache'}\n")
    assert run(capsys, "cache", "ls") == (0, "", "0 entries, 0 kB\n")
    flagen.compiler.prepare(my_attention)
    status, out, err = run(capsys, "cache", "ls")
    assert (status, err[:10]) == (0, "1 entries,")
    assert out.startswith("my_attention ")
    assert run(capsys, "cache", "verify")[0] == 0
    (kernels,) = (tmp_path / "cache").glob("v*/*/kernels.py")
    kernels.chmod(0o600)
    kernels.write_text(kernels.read_text() + "\n")
    status, out, err = run(capsys, "cache", "verify")
    assert status == 1
    assert "checksum" in out
    assert "1 damaged" in err
    assert "removed 1 entries" in run(capsys, "cache", "clear")[1]
    assert run(capsys, "cache", "ls")[1] == ""


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "0 s"), (59, "59 s"), (61, "1 min"), (7300, "2 h"), (1e6, "12 d")])
def test_age(seconds, text):
    assert cli_cache.age(seconds) == text


def test_env(capsys, monkeypatch):
    monkeypatch.setenv("FLAGEN_DEBUG", "1")
    status, out, _ = run(capsys, "env")
    assert status == 0
    assert f"flagen   {flagen.__version__}" in out
    assert "FLAGEN_DEBUG = '1'" in out
    assert all(one in out for one in ("torch", "triton", "FLAGEN_CACHE unset: on"))


# --- check


def test_shards_are_a_partition():
    arguments = parser().parse_args(["check", "--all"])
    everything = cli_check.units([specs.get(name) for name in specs.names()], arguments.dtype, "cuda")
    for count in (1, 4, 7, 1000):
        parts = [cli_check.sharded(everything, part, count) for part in range(1, count + 1)]
        assert sorted((unit for part in parts for unit in part), key=everything.index) == everything
        assert all(part == sorted(part, key=everything.index) for part in parts)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_shard_is_a_sample_of_everything():
    everything = cli_check.units([specs.get(name) for name in specs.names()], cli_check.DTYPES, "cuda")
    for count in (2, 3, 4, 8):  # 8 sizes and 3 dtypes of each spec lie side by side
        for part in range(1, count + 1):
            found = cli_check.sharded(everything, part, count)
            assert {unit.dtype for unit in found} == set(cli_check.DTYPES)
            assert len({(unit.K, unit.V) for unit in found}) >= 8
            assert len({unit.name for unit in found}) > 0.8 * len(specs.names())


def test_grid_on_a_gpu_is_that_of_the_issue():
    every = cli_check.units([specs.get(name) for name in specs.names()], cli_check.DTYPES, "cuda")
    sizes = {name: {(unit.K, unit.V) for unit in every if unit.name == name} for name in specs.names()}
    assert {(n, n) for n in (16, 60, 64, 100, 128, 256)} <= sizes["gla"]
    assert any(K != V for K, V in sizes["gla"])
    assert {K for K, _ in sizes["based"]} == {8, 16, 24, 32}
    assert max(K for K, _ in sizes["gateloop"]) == 128
    unit = next(unit for unit in every if unit.name == "gla")
    found = cli_check.cases(specs.get("gla"), unit)
    assert {1, 15, 63, 64, 65, 1000, 4096} <= {case["T"] for case in found if "cu_seqlens" not in case}
    packed = [case["cu_seqlens"] for case in found if "cu_seqlens" in case]
    assert any(begin == end for bounds in packed for begin, end in itertools.pairwise(bounds))
    # fewer heads of query and key take kernels of their own: at some sizes, for each spec that can have them
    grouped = {(u.name, u.dtype) for u in every if any("heads" in x for x in cli_check.cases(specs.get(u.name), u))}
    matrices = [name for name in specs.names() if not specs.get(name).vector]
    assert grouped == {(name, dtype) for name in matrices for dtype in cli_check.DTYPES}
    # and where there are more sequences and heads than multiprocessors, programs have more of a state each
    crowds = ((u.name, x["B"] * x["H"]) for u in every for x in cli_check.cases(specs.get(u.name), u))
    assert {name for name, programs in crowds if programs > HOPPER.multiprocessors} == set(specs.names()) - {"based"}


@pytest.mark.parametrize("spec", [my_attention, specs.get("based"), specs.get("gateloop")], ids=lambda spec: spec.name)
def test_unit_runs_every_case(monkeypatch, spec):
    monkeypatch.setitem(cli_check.GRIDS, "cpu", SMALL)
    (unit,) = cli_check.units([spec], ["fp32"], "cpu")
    lines, healthy = cli_check.run_unit(unit)
    assert healthy
    assert [line for line in lines if not line.ok] == []
    assert len({line.case for line in lines}) == len(cli_check.cases(spec, unit)) == 4
    tensors = {line.tensor for line in lines}
    assert {"o", "final_state S", "step o", *(f"d {one.name}" for one in spec.inputs)} <= tensors


def test_a_case_that_cannot_run_is_a_failure_among_the_others(monkeypatch):
    monkeypatch.setitem(cli_check.GRIDS, "cpu", dataclasses.replace(SMALL, packed=((3, -1),)))
    (unit,) = cli_check.units([my_attention], ["fp32"], "cpu")
    lines, healthy = cli_check.run_unit(unit)
    assert healthy
    (failed,) = [line for line in lines if not line.ok]
    assert "cu_seqlens" in failed.fault


def test_check_in_processes_saves_and_prints_its_table(capsys, tmp_path):
    file, saved = tmp_path / "mine.json", tmp_path / "results.jsonl"
    file.write_text(my_attention.to_json())
    status, out, err = run(capsys, "check", str(file), "--dtype", "fp32,bf16", "--jobs", "2", "--save", str(saved))
    assert (status, err) == (0, "")
    assert "0 beyond their limits" in out
    rows = [line.split() for line in out.splitlines() if line.startswith("my_attention")]
    assert {(row[1], row[2]) for row in rows} >= {
        (kind, name) for kind in ("fp32", "bf16") for name in ("o", "final_state")
    }
    assert run(capsys, "check", "--table", str(saved)) == (0, out, "")


def test_check_needs_a_spec_and_a_device_it_has(capsys):
    assert "name the specs, or give --all" in run(capsys, "check")[2]
    assert "runs on cpu or cuda" in run(capsys, "check", "gla", "--device", "tpu")[2]


def test_the_table_of_parts_is_the_same_in_any_order():
    lines = [
        Line(spec, dtype, case, tensor, 1e-3, 2e-3, 4e-3, 4e-2, ok=True)
        for spec in ("retnet", "gla")
        for dtype in ("fp32", "bf16")
        for case in ("T=1", "T=2")
        for tensor in ("o", "final_state S", "d q")
    ]
    whole = cli_check.table(lines)
    assert whole == cli_check.table([*lines[12:], *lines[:12]])
    assert [line.split()[:3] for line in whole[2:5]] == [
        ["gla", "bf16", "o"], ["gla", "bf16", "final_state"], ["gla", "bf16", "d"],
    ]  # fmt: skip
    assert all(line.split()[-5] == "2" for line in whole[2:])


def test_table_shows_the_worst_and_counts_failures(capsys):
    good = Line("gla", "bf16", "T=1", "o", 1e-3, 2e-3, 4e-3, 4e-2, ok=True)
    nan = dataclasses.replace(good, rms=float("nan"), worst=float("nan"), ok=False)
    text = cli_check.table([good, nan, dataclasses.replace(good, case="T=2", rms=3e-3)])
    assert len(text) == 3
    assert text[2].split()[3:5] == ["3", "inf"]
    assert text[2].endswith("1 FAILED")
    assert cli_check._finish([good], 5) == 0
    assert cli_check._finish([good, nan], 5) == 1
    assert cli_check._finish([], 5) == 1  # nothing was checked
    assert "gla bf16 T=1: o: rms nan (4e-03)" in capsys.readouterr().err


# --- processes


def work(unit: str) -> tuple[str, bool]:
    if unit == "die":
        os._exit(3)
    return f"did {unit}", unit != "sick"


def test_pool_survives_processes_that_die():
    units = ["a", "die", "b", "sick", "c", "d"]
    found = dict(cli_pool.run(work, units, jobs=2))
    assert found == {unit: None if unit == "die" else f"did {unit}" for unit in units}


def seen(unit: str) -> tuple[str, bool]:
    time.sleep(0.05)
    return f"{os.getpid()} {os.environ.get('CUDA_VISIBLE_DEVICES')}", unit != "sick"


def test_each_process_sees_one_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    done, held = set(), {}

    def units():
        yield from ("a", "sick", "b", "c")
        while "sick" not in done:  # however late its process begins
            yield "more"
        yield "d"

    for unit, result in cli_pool.run(seen, units(), 4, devices=("5", "7")):
        done.add(unit)
        held |= [result.split()]
    assert len(held) == 5  # one of four was replaced
    assert sorted(held.values()) in (["5", "5", "5", "7", "7"], ["5", "5", "7", "7", "7"])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5,7"
    assert [result.split()[1] for _, result in cli_pool.run(seen, ["a"], 1)] == ["5,7"]


def test_gpus_are_shared_where_there_are_several(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert cli_pool.gpus("cuda") == ("0", "1")
    assert cli_pool.gpus("cuda:1") == cli_pool.gpus("cpu") == ()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-7,3")
    assert cli_pool.gpus("cuda") == ("GPU-7", "3")
    monkeypatch.setattr(cli_pool, "cores", lambda: 24)
    assert (cli_pool.most_jobs(("0", "1")), cli_pool.most_jobs(())) == (24, 16)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert cli_pool.gpus("cuda") == ()


@pytest.mark.parametrize("command", ["check", "fuzz"])
def test_commands_use_every_gpu(monkeypatch, command):
    given = []

    def run(work, units, jobs, patience=None, devices=()):
        given.append((jobs, devices))
        return iter(())

    monkeypatch.setattr(cli_pool, "run", run)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    main([command, *(["gla"] if command == "check" else []), "--device", "cuda", "--jobs", "6"])
    assert given == [(6, ("0", "1", "2"))]


# --- progress


class Terminal:
    def __init__(self) -> None:
        self.text = ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass


def test_progress_on_a_terminal_only(monkeypatch, capsys):
    monkeypatch.setattr(cli_progress, "PATIENCE", 0.0)
    with cli_progress.Progress(2, "working") as bar:
        bar.step("one")
    assert capsys.readouterr() == ("", "")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with cli_progress.Progress(2, "working") as bar:
        bar.step("one")
        assert "1/2" in terminal.text
        assert terminal.text.endswith("one")
    assert terminal.text.endswith("\r\x1b[K")  # and it clears up after itself


def test_progress_is_silent_on_quick_work(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with cli_progress.Progress(1, "working") as bar:
        bar.step("one")
    assert terminal.text == ""


# --- demo, and the program as a whole


def test_demo(capsys):
    status, out, _ = run(capsys, "demo", "--tokens", "48", "--device", "cpu")
    assert status == 0
    names = [*specs.names(), "my_attention"]
    assert [line.split()[0] for line in out.splitlines() if line.split()[:1] and line.split()[0] in names] == names
    assert f"{len(names)} of {len(names)} specs agree" in out


def test_demo_compiles_in_other_processes_before(tmp_path, monkeypatch, capsys):
    """Where there is a GPU. What is wrong is left to the demo itself."""
    monkeypatch.setenv("FLAGEN_CACHE_DIR", str(tmp_path / "cache"))
    demo.compile_ahead([Spec("ahead", log_decay=-0.1), specs.get("hgrn")], "cpu", torch.float32, 20)
    assert {path.name.partition("-")[0] for path in (tmp_path / "cache" / "v1").iterdir()} >= {"ahead", "hgrn"}
    demo.compile_ahead([specs.get("hgrn")], "no such device", torch.float32, 20)
    first, second = capsys.readouterr().out.splitlines()
    assert "s by 1 processes" in second and first.startswith("kernels compiled in ")


@pytest.mark.gpu
def test_demo_and_check_on_a_gpu(capsys, monkeypatch):
    status, out, _ = run(capsys, "demo", "--tokens", "300", "--device", "cuda")
    assert status == 0
    assert out.startswith("Triton kernels on ")
    monkeypatch.setitem(cli_check.GRIDS, "cuda", SMALL)
    (unit,) = cli_check.units([my_attention], ["bf16"], "cuda")
    lines, healthy = cli_check.run_unit(unit)
    assert healthy
    assert [line for line in lines if not line.ok] == []


def test_demo_fails_where_a_spec_differs(capsys, monkeypatch):
    real = demo.run

    def wrong(*arguments):
        result = real(*arguments)
        bad = dataclasses.replace(result.report.rows[0], rms=1.0)
        return dataclasses.replace(
            result, report=dataclasses.replace(result.report, rows=(bad, *result.report.rows[1:]))
        )

    monkeypatch.setattr(demo, "run", wrong)
    monkeypatch.setattr(specs, "names", lambda: ("retnet",))
    status, out, _ = run(capsys, "demo", "--tokens", "16", "--device", "cpu")
    assert status == 1
    assert "DIFFERS: o" in out


def test_module_runs_and_ends_quietly_on_a_closed_pipe():
    command = f"{sys.executable} -m flagen list | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert (done.returncode, done.stderr) == (0, "")


def test_commands_have_help():
    commands = next(one for one in parser()._actions if isinstance(one, argparse._SubParsersAction))
    for name, one in commands.choices.items():
        assert one.format_help().startswith(f"usage: flagen {name}")

"""flagen bench, whole and in its parts, on the CPU at tiny sizes; on a GPU the same with graphs, memory and floors."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import gc
import math
import sys
import types
from pathlib import Path

import pytest
import torch

import flagen
from flagen import (
    bench,
    bench_check,
    bench_child,
    bench_compile,
    bench_measure,
    bench_report,
    bench_run,
    cli_bench_options,
    cost,
    peers,
    reference,
    specs,
)
from flagen.__main__ import main, parser
from flagen.bench import Row
from flagen.bench_shapes import DEFAULT_WHAT, GROUPS, SHAPES, WHATS
from flagen.compare import TOLERANCES
from flagen.errors import FlagenError
from flagen.expr import Input
from flagen.schedule import Shape

TINY = Shape.dense(2, 70, 3, 16, 12)
ROW = Row("gla", "flagen", "auto", "wide8k", 1, 8192, 96, 128, 128, "bf16", "fwd", 2.0, "ms", 0.5, 1.5,
          device="a GPU", copy=3e12, versions="flagen 0 torch 2", commit="abc")  # fmt: skip


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(bench_measure, "CPU_SECONDS", 0.0)


def run(capsys, *arguments):
    status = main(["bench", *arguments])
    out, err = capsys.readouterr()
    return status, out, err


def runner(what, **settings):
    rows: list[Row] = []
    made = bench_run.Runner(bench_run.Settings("cpu", "fp32", what, **settings), lambda text: None, rows.append)
    return made, rows


# --- the whole command


def test_it_runs_whole(capsys, tmp_path):
    shapes = ("--shapes", "1,64,2,16,16", "3,1,2,16,16")
    status, out, err = run(capsys, "retnet", "rwkv6", *shapes, "--what", "fwd,fwd+bwd,memory,decode",
                           "--against", "sdpa", "--out", str(tmp_path / "new"))  # fmt: skip
    assert status == 0, err
    rows = bench_report.read([tmp_path / "new" / "rows.csv"])
    assert [(one.spec, one.T, one.what) for one in rows] == [
        ("retnet", 64, "fwd"), ("retnet", 64, "fwd+bwd"), ("softmax", 64, "fwd"), ("softmax", 64, "fwd+bwd"),
        ("retnet", 1, "decode"), ("rwkv6", 64, "fwd"), ("rwkv6", 64, "fwd+bwd"), ("rwkv6", 1, "decode"),
    ]  # fmt: skip
    for one in rows:
        assert one.value > 0
        assert one.unit == "ms"
        assert one.dtype == "fp32"
        assert one.device == "cpu"
        assert f"torch {torch.__version__}" in one.versions
        assert math.isnan(one.floor)
        assert math.isnan(one.predicted)
    lines = [line for line in out.splitlines() if line.startswith(("retnet", "rwkv6", "softmax"))]
    assert len(lines) == len(rows)
    assert "retnet 1,64,2,16,16 fwd" in err  # as they come


def test_stored_rows_are_drawn_again(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "rows.csv"
    for number, spec in enumerate(("gla", "retnet")):
        for what in ("fwd", "fwd+bwd"):
            for shape in ("t1k", "t4k", "wide8k"):
                B, T, H, K, V = SHAPES[shape]
                sizes = {"shape": shape, "B": B, "T": T, "H": H, "K": K, "V": V}
                ours = dataclasses.replace(ROW, spec=spec, what=what, value=T / 1000 + number, floor=T / 4000, **sizes)
                bench_report.append(file, ours)
                bench_report.append(file, dataclasses.replace(ours, library="fla", op="chunk", value=2 * ours.value))
    status, out, err = run(capsys, "--plot", str(file), "--out", str(tmp_path))
    assert status == 0, err
    assert "gla: 2.00 times as fast as fla, fwd+bwd, geometric mean over t1k, t4k, wide8k" in out
    for name in ("share.png", "time.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / name).stat().st_size > 10_000
        assert f"written: {tmp_path / name}" in err


def test_starts_are_those_of_new_processes():
    made, rows = runner(("cold", "warm"))
    made.run([specs.get("retnet")], {"tiny": Shape.dense(1, 32, 1, 16, 16)})
    assert not made.missing
    cold, warm = rows
    assert (cold.what, warm.what, cold.unit) == ("cold", "warm", "s")
    parts = [float(part.split()[1]) for part in cold.note.split(", ")]
    assert cold.value == pytest.approx(sum(parts), abs=0.02)
    assert cold.note.startswith("forward")
    assert warm.value > 0


def test_a_process_that_fails_says_why(tmp_path):
    with pytest.raises(FlagenError, match=r"status 1: .*no such device|status 1: .*abacus"):
        bench_child.first_call(
            specs.get("retnet").to_json(), (1, 8, 1, 8, 8), "float32", "abacus", "auto", tmp_path, 100
        )
    with pytest.raises(FlagenError, match="longer than 0 s"):
        bench_child.first_call(specs.get("retnet").to_json(), (1, 8, 1, 8, 8), "float32", "cpu", "auto", tmp_path, 0.01)


# --- what is wrong is not timed, or said


class Wrong:
    """An op whose output is a little too large; or, from a token on, that of another."""

    def __init__(self, op, factor, begin=0):
        self.op, self.factor, self.begin = op, factor, begin
        self.spec, self.analysis, self.plan, self.backend = op.spec, op.analysis, op.plan, op.backend

    def __call__(self, *tensors, **options):
        o, final = self.op(*tensors, **options)
        weight = torch.ones(o.shape[1], 1, 1, dtype=o.dtype)
        weight[self.begin :] = self.factor
        return o * weight, final


def test_a_wrong_op_is_not_timed(monkeypatch):
    op = Wrong(flagen.compile("gla"), 1.01)
    monkeypatch.setattr(bench_run, "compile", lambda spec, backend: op)
    made, rows = runner(("fwd", "fwd+bwd"))
    made.run([op.spec], {"a": TINY, "b": TINY._replace(T=90)})
    assert [(one.what, math.isnan(one.value)) for one in rows] == 2 * [("check", True)]
    assert all(one.note.startswith("WRONG: o: rms 1") for one in rows)
    assert len(made.wrong) == 2


def test_what_is_wrong_at_full_length_alone_is_said(monkeypatch):
    """The small check ends before the tokens that are wrong."""
    op = Wrong(flagen.compile("gla"), 2.0, begin=bench_check.TOKENS_ON_CPU)
    monkeypatch.setattr(bench_run, "compile", lambda spec, backend: op)
    made, rows = runner(("fwd",))
    made.run([op.spec], {"a": TINY})
    assert [one.what for one in rows] == ["fwd"]
    assert rows[0].note.startswith("WRONG: o: rms")
    assert "d v" in rows[0].note
    assert made.wrong


def test_the_command_says_that_something_is_wrong(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_check, "small", lambda *a: "o: rms 1")
    status, _, err = run(capsys, "gla", "--shapes", "1,16,1,8,8", "--what", "fwd", "--out", str(tmp_path))
    assert status == 1
    assert "WRONG: gla K=8 V=8: o: rms 1" in err


@pytest.mark.parametrize("name", ["retnet", "rwkv6", "gateloop", "based", "linear", "mamba2"])
def test_right_ops_pass_both_checks(name):
    op = flagen.compile(name)
    shape = bench.fitted(op.spec, TINY)
    assert bench_check.small(op, shape, torch.float32, "cpu") == ""
    case = bench.case_of(op, shape, torch.float32, "cpu")
    assert bench_check.sampled(op, case, shape, torch.float32) == ""
    assert bench_check.small(op, shape._replace(T=1), torch.float32, "cpu") == ""


def test_the_sample_holds_other_heads_than_the_first():
    op = flagen.compile("retnet")
    case = bench.case_of(op, TINY, torch.float32, "cpu")
    factor = torch.tensor([1.0, 1.0, 1.01]).view(3, 1)
    bad = bench.Case(case.inputs, lambda: case.run() * factor)
    assert "o: rms" in bench_check.sampled(op, bad, TINY, torch.float32)


class _Added(torch.autograd.Function):
    """The same tensor, with its gradient times a factor and more added to it."""

    @staticmethod
    def forward(ctx, x, factor, more):
        ctx.factor, ctx.more = factor, more
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor + ctx.more, None, None


def _with_rate(op, tokens, factor=1.0, more=0.0):
    """A case of mamba2 of one head, whose gradient of A_log, one number, is wrong; and its shape."""
    shape = Shape.dense(1, tokens, 1, 8, 8)
    case = bench.case_of(op, shape, torch.float32, "cpu")

    def run():
        *others, rate = case.inputs
        return op(*others, _Added.apply(rate, factor, more))[0]

    return bench.Case(case.inputs, run), shape


def _sum_and_size(op, tokens):
    """The gradient of A_log for the sample's gradient of the output, and the root of its terms' squares."""
    case, _ = _with_rate(op, tokens)
    each = [x.detach().double() for x in case.inputs]
    g = (-each[4].exp() * each[3]).requires_grad_()
    own = op.spec.replace("own", log_decay=Input("own", "b t h"))
    do = torch.randn(1, tokens, 1, 8, generator=torch.Generator().manual_seed(1)).double()
    (d,) = torch.autograd.grad(reference.run(own, (*each[:4], g))[0], g, do)
    terms = (d * g).detach()
    return float(terms.sum()), float(terms.square().sum().sqrt())


def test_a_sum_that_cancels_is_measured_as_check_measures_it():
    """Against its terms, which at some length have cancelled to a tenth."""
    op = flagen.compile("mamba2")
    found = ((tokens, *_sum_and_size(op, tokens)) for tokens in range(10, 300))
    tokens, total, size = next(one for one in found if abs(one[1]) < one[2] / 10)
    limit = bench_check.SLACK * TOLERANCES[torch.float32]["gate"]
    for share, said in ((0.9, ""), (1.1, "d A_log: rms")):
        case, shape = _with_rate(op, tokens, more=share * limit * size)
        assert share * limit * size > 5 * limit * abs(total)
        assert bench_check.sampled(op, case, shape, torch.float32).startswith(said)
        assert bool(bench_check.sampled(op, case, shape, torch.float32)) == bool(said)


def test_a_wrong_gradient_of_a_sum_is_seen():
    op = flagen.compile("mamba2")
    assert bench_check.sampled(op, *_with_rate(op, 100), torch.bfloat16) == ""
    assert "d A_log: rms" in bench_check.sampled(op, *_with_rate(op, 100, factor=1.2), torch.bfloat16)


# --- limits and failures


def test_a_limit_of_time_ends_it_cleanly():
    made, rows = runner(("fwd",), limit=0.0)
    made.run([specs.get("gla"), specs.get("retnet")], {"a": TINY, "b": TINY})
    assert rows == []
    assert [one.partition(":")[0] for one in made.missing] == ["gla a fwd", "gla b fwd", "retnet a fwd", "retnet b fwd"]
    assert "time limit" in made.missing[0]


def test_what_fails_is_a_row_without_a_figure(monkeypatch):
    def broken(run, device):
        raise torch.OutOfMemoryError("tried to allocate\nmuch")

    monkeypatch.setattr(bench_measure, "milliseconds", broken)
    made, rows = runner(("fwd",))
    made.run([specs.get("retnet")], {"a": TINY})
    (row,) = rows
    assert math.isnan(row.value)
    assert row.note == "OutOfMemoryError: tried to allocate"
    assert made.missing == ["retnet a flagen fwd: tried to allocate"]


def test_nothing_measured_is_status_1(capsys, tmp_path):
    # a shape of more than one token has nothing to decode, and the default one would have: only it is refused here
    status, _, _ = run(
        capsys, "gla", "--shapes", "1,16,1,8,8", "--what", "graph", "--device", "cpu", "--out", str(tmp_path)
    )
    assert status == 1


# --- shapes, inputs, floors


def test_shapes_by_name_group_and_size():
    assert SHAPES["wide8k"] == (1, 8192, 96, 128, 128)
    assert SHAPES["million"][1] == 1 << 20
    assert list(bench.shapes_of(["large"])) == ["wide8k", "long16k", "mid"]
    assert [shape.T for shape in bench.shapes_of(["lengths"]).values()] == [1024 << n for n in range(9)]
    assert bench.shapes_of(["1,2,3,4,5"]) == {"1,2,3,4,5": Shape.dense(1, 2, 3, 4, 5)}
    assert set(GROUPS["named"]) <= set(SHAPES)
    for text in ("1,2,3", "wide", "1,2,3,4,0"):
        with pytest.raises(FlagenError, match="five sizes B,T,H,K,V nor one of wide8k"):
            bench.shapes_of([text])


def test_head_sizes_that_a_spec_may_have():
    wide = Shape.dense(8, 2048, 32, 256, 256)
    found = {name: bench.fitted(specs.get(name), wide).K for name in ("gla", "based", "gateloop")}
    assert found == {"gla": 256, "based": 16, "gateloop": 128}


def test_long_inputs_repeat_what_was_drawn(monkeypatch):
    monkeypatch.setattr(bench, "DRAWN", 16)
    q, _, _, dt, A_log = bench.make_inputs(specs.get("mamba2"), Shape.dense(2, 40, 3, 4, 5), torch.bfloat16, "cpu", {})
    assert q.shape == (2, 40, 3, 4)
    assert (q.dtype, dt.dtype, A_log.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert torch.equal(q[:, 16:32], q[:, :16])
    assert torch.equal(q[0], q[1])
    assert all(x.is_leaf and x.requires_grad and x.is_contiguous() for x in (q, dt, A_log))
    assert A_log.shape == (3,)


def test_floors_are_each_tensor_once():
    op = flagen.compile("gla")
    case = bench.case_of(op, TINY, torch.bfloat16, "cpu")
    k, v = 2 * 70 * 3 * 16 * 2, 2 * 70 * 3 * 12 * 2
    inputs, output = 3 * k + v, v
    assert case.floors(case.forward()) == (inputs + output, 3 * inputs + 2 * output)
    assert not case.forward().requires_grad
    assert [x.shape for x in case.both(torch.ones(2, 70, 3, 12))] == [x.shape for x in case.inputs]


# --- rows


def test_rows_survive_a_file(tmp_path):
    odd = dataclasses.replace(ROW, value=math.nan, note='a "quoted", note\nof two lines', predicted=math.nan)
    for one in (ROW, odd):
        bench_report.append(tmp_path / "rows.csv", one)
    first, second = bench_report.read([tmp_path / "rows.csv"])
    assert first == ROW
    assert math.isnan(second.value)
    assert second.note == odd.note
    assert (tmp_path / "rows.csv").read_text().count("library") == 1
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(FlagenError, match="other columns"):
        bench_report.read([tmp_path / "other.csv"])
    text = (tmp_path / "rows.csv").read_text().replace("8192", "many", 1)
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(FlagenError, match="line 2"):
        bench_report.read([tmp_path / "rows.csv"])


def test_of_rows_for_the_same_the_last_counts():
    again = dataclasses.replace(ROW, value=1.0)
    other = dataclasses.replace(ROW, device="another")
    assert bench_report.latest([ROW, other, again]) == [again, other]


def test_predictions_that_are_off_are_flagged():
    assert not ROW.mispredicted
    assert ROW.share == 0.25
    low, high = (dataclasses.replace(ROW, predicted=ROW.value * factor) for factor in (0.6, 1.6))
    assert low.mispredicted
    assert high.mispredicted
    assert not dataclasses.replace(high, H=1).mispredicted  # small shapes are bound by launches
    assert not dataclasses.replace(high, predicted=math.nan).mispredicted
    assert not dataclasses.replace(high, unit="MB").mispredicted
    (line,) = bench_report.summary([ROW, high])
    assert line == "predictions off by more than 1.5 times on large shapes: gla wide8k fwd (1.60)"
    assert "OFF" in bench_report.table([high])[-1]
    assert "OFF" not in bench_report.table([ROW])[-1]


def test_speed_against_a_peer_is_that_of_its_best():
    def row(spec, shape, library, op, value):
        return dataclasses.replace(ROW, spec=spec, shape=shape, library=library, op=op, value=value, what="fwd+bwd")

    rows = [row("x", "a", "flagen", "", 1.0), row("x", "a", "fla", "quick", 2.0), row("x", "a", "fla", "slow", 9.0),
            row("x", "b", "flagen", "", 1.0), row("x", "b", "fla", "slow", 8.0), row("x", "c", "fla", "slow", 1.0),
            row("x", "d", "flagen", "", math.nan), row("x", "d", "fla", "slow", 5.0)]  # fmt: skip
    assert bench_report.speedups(rows) == [("x", "fla", pytest.approx(4.0), ("a", "b"))]


def test_a_table_for_the_readme(capsys, tmp_path):
    rows = [dataclasses.replace(ROW, what="fwd+bwd", value=4.0, floor=1.0), ROW,
            dataclasses.replace(ROW, library="fla", op="chunk", what="fwd+bwd", value=10.0),
            dataclasses.replace(ROW, shape="mid", value=math.nan), dataclasses.replace(ROW, shape="lone", spec="kda"),
            dataclasses.replace(ROW, library="sdpa", spec=bench_report.SOFTMAX)]  # fmt: skip
    for one in rows:
        bench_report.append(tmp_path / "rows.csv", one)
    assert main(["bench", "--markdown", str(tmp_path / "rows.csv")]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "| spec | wide8k | long16k | mid | against fla |",
        "| --- | --- | --- | --- | --- |",
        "| `gla` | 2 (25%) / 4 (25%) | - / - | - / - | 2.5x |",
    ]


# --- options and peers


def test_options():
    given = parser().parse_args(
        ["bench", "gla", "--what", "cold,warm", "--shapes", "wide8k", "1,2,3,4,5", "--jobs", "4"]
    )
    assert given.what == ("cold", "warm")
    assert given.shapes == ["wide8k", "1,2,3,4,5"]
    assert parser().parse_args(["bench"]).what == DEFAULT_WHAT
    assert set(DEFAULT_WHAT) <= set(WHATS)
    with pytest.raises(argparse.ArgumentTypeError, match="'fast' is not among fwd"):
        cli_bench_options._some(WHATS)("fwd,fast")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gla", "--device", "cuda"), "finds no CUDA device"),
        (("gla", "--device", "abacus"), "cpu or cuda"),
        (("gal",), "did you mean 'gla'"),
        (("gla", "--shapes", "wide"), "nor one of wide8k"),
        (("gla", "--against", "fla"), "install fla-core"),
    ],
)
def test_wrong_calls_are_one_message(capsys, tmp_path, arguments, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "fla", None)
    monkeypatch.delitem(sys.modules, "flagen.peers.fla", raising=False)
    status, out, err = run(capsys, *arguments, "--out", str(tmp_path))
    assert (status, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_peers_are_called_with_what_they_take(monkeypatch):
    """A library of stand-ins that check what they are given: each shipped spec with a peer, forward and backward."""
    called = []

    def stand_in(name, pair):
        def function(*tensors, **options):
            called.append((name, len(tensors), options))
            assert all(x.dtype in (torch.float32, torch.bfloat16) for x in tensors)
            *_, v = [x for x in tensors if x.dim() == 4 and x.shape[-1] == 12] or tensors
            o = v * sum((x.float().mean() for x in tensors), start=torch.zeros(())).to(v.dtype)
            return (o, None) if pair else o

        return function

    ops = types.ModuleType("fla.ops")
    for name in ("chunk_retention", "chunk_lightning_attn", "chunk_linear_attn", "chunk_simple_gla", "chunk_gla",
                 "chunk_rwkv6", "chunk_delta_rule", "chunk_gated_delta_rule", "chunk_kda", "chunk_rwkv7",
                 "chunk_comba"):  # fmt: skip
        setattr(ops, name, stand_in(name, True))
    for name in ("parallel_based", "fused_chunk_based"):
        setattr(ops, name, stand_in(name, False))
    fla = types.ModuleType("fla")
    fla.ops = ops
    monkeypatch.setitem(sys.modules, "fla", fla)
    monkeypatch.setitem(sys.modules, "fla.ops", ops)
    monkeypatch.delitem(sys.modules, "flagen.peers.fla", raising=False)
    for spec in specs.names():
        for name, make in peers.calls("fla", spec).items():
            inputs, call = make(TINY, torch.bfloat16, "cpu")
            case = bench.Case(inputs, call)
            o = case.forward()
            assert o.shape == (2, 70, 3, 12), name
            assert all(x.is_leaf and x.requires_grad for x in inputs)
            assert len(case.both(torch.ones_like(o))) == len(inputs)
    assert {name for name, _, _ in called} == set(vars(ops)) & {name for name, _, _ in called}
    assert len({name for name, _, _ in called}) == 13
    assert {name for name, _, options in called if options == {"use_qk_l2norm_in_kernel": True}} == {
        "chunk_delta_rule", "chunk_gated_delta_rule", "chunk_kda", "chunk_comba",
    }  # fmt: skip
    counts = {name: count for name, count, _ in called}
    assert (counts["chunk_gla"], counts["chunk_rwkv6"], counts["chunk_simple_gla"]) == (4, 5, 4)
    monkeypatch.delitem(sys.modules, "flagen.peers.fla")
    with pytest.raises(NotImplementedError, match="over all pairs"):
        peers.calls("fla", "based")["parallel_based"](TINY._replace(T=1 << 20), torch.bfloat16, "cpu")
    monkeypatch.delitem(sys.modules, "flagen.peers.fla")


def test_every_spec_with_a_peer_is_shipped():
    tree = ast.parse((Path(peers.__file__).parent / "fla.py").read_text(encoding="utf-8"))
    (table,) = [node.value for node in tree.body if isinstance(node, ast.AnnAssign) and node.target.id == "_TABLE"]
    named = [key.value for key in table.keys]
    assert set(named) <= set(specs.names())
    assert len(named) == 14


# --- what only a GPU has, with stand-ins for it


@pytest.fixture
def pretended(monkeypatch):
    """A GPU of 3 TB/s, on which a run takes a millisecond and holds a megabyte; tensors stay on the CPU."""
    monkeypatch.setattr(bench_run.Settings, "on_gpu", property(lambda self: True))
    monkeypatch.setattr(bench_run, "provenance", lambda device: {"device": "NVIDIA H100 80GB HBM3"})
    monkeypatch.setattr(bench_measure, "copy_bandwidth", lambda device: 3e12)
    monkeypatch.setattr(bench_measure, "milliseconds", lambda run, device: float(run() is None) or 1.0)
    monkeypatch.setattr(bench_measure, "graphed", lambda run: lambda: run())
    monkeypatch.setattr(bench_measure, "peak", lambda run, device: 1 << 20)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


def test_floors_predictions_memory_and_graphs(pretended):
    made, rows = runner(("fwd", "fwd+bwd", "memory", "graph", "decode"))
    shape = Shape.dense(2, 70, 3, 16, 16)
    made.run([specs.get("gla")], {"a": shape, "one": shape._replace(T=1)})
    assert (made.wrong, made.missing) == ([], [])
    found = {one.what: one for one in rows}
    assert set(found) == {"fwd", "fwd+bwd", "memory", "graph fwd", "graph fwd+bwd", "decode"}
    tensor = 2 * 70 * 3 * 16 * 4
    predicted = cost.estimate(specs.get("gla"), shape, torch.float32, cost.machine_of("h100", 3e12))
    assert found["fwd"].floor == pytest.approx(1e3 * 5 * tensor / 3e12)
    assert found["fwd+bwd"].floor == found["graph fwd+bwd"].floor == pytest.approx(1e3 * 14 * tensor / 3e12)
    assert found["fwd"].predicted == pytest.approx(1e3 * predicted.forward.seconds)
    assert found["fwd+bwd"].predicted == pytest.approx(1e3 * predicted.both.seconds)
    assert found["decode"].predicted == pytest.approx(1e3 * predicted.step.seconds, rel=0.5)
    state = 4 * 2 * 3 * 16 * 16
    assert found["decode"].floor == pytest.approx(1e3 * (2 * state + 5 * tensor / 70) / 3e12)
    assert found["memory"].unit == "MB"
    assert found["memory"].value == pytest.approx(1 - 5 * tensor / (1 << 20))
    assert found["memory"].note == f"{((1 << 20) - 5 * tensor) / (4 * tensor):.0%} of the inputs"
    assert all(one.copy == 3e12 for one in rows)


def test_garbage_that_is_freed_meanwhile_does_not_lower_a_peak(monkeypatch):
    held = {"now": 0, "most": 0}

    class Buffer:
        def __init__(self, size):
            self.size = size
            held["now"] += size
            held["most"] = max(held["most"], held["now"])

        def __del__(self):
            held["now"] -= self.size

    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: held.update(most=held["now"]))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: held["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: held["most"])

    def run():
        gc.collect()  # as the collector does when it likes
        kept = [Buffer(70)]
        kept.append(kept)

    gc.disable()
    try:
        assert bench_measure.peak(run, "cuda") == 70
    finally:
        gc.enable()


def test_a_peak_below_the_results_is_no_figure(pretended, monkeypatch):
    results = 5 * TINY.T * TINY.H * TINY.N * 4 * 16
    for peak, value in ((results // 2, math.nan), (results, 0.0)):
        monkeypatch.setattr(bench_measure, "peak", lambda run, device, peak=peak: peak)
        made, rows = runner(("memory",))
        shape = TINY._replace(K=16, V=16)
        made.run([specs.get("gla")], {"a": shape})
        (found,) = rows
        assert (found.value == value) if value == 0 else math.isnan(found.value)
        assert ("less than the" in found.note) == math.isnan(value)
        assert math.isnan(found.share)
        assert "nan" not in "".join(bench_report.table(rows))


def test_a_device_that_fails_ends_the_run(pretended, monkeypatch):
    def illegal(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(bench_measure, "milliseconds", illegal)
    monkeypatch.setattr(torch.cuda, "synchronize", illegal)
    made, rows = runner(("fwd",))
    made.run([specs.get("gla"), specs.get("retnet")], {"a": TINY})
    assert [(one.spec, one.note) for one in rows] == [
        ("gla", "RuntimeError: CUDA error: an illegal memory access was encountered")
    ]
    assert [one for one in made.missing if one.startswith(("gla a: ", "retnet a: "))] == [
        f"{spec} a: the device failed: CUDA error: an illegal memory access was encountered"
        for spec in ("gla", "retnet")
    ]


def test_kernels_are_compiled_before_in_processes(pretended, monkeypatch):
    asked = []

    def pool(work, units, jobs):
        asked.extend([jobs, *units])
        return iter([(units[0], "no driver"), (units[1], None)])

    monkeypatch.setattr(bench_run.cli_pool, "run", pool)
    made, _ = runner((), jobs=3)
    said = []
    made.say = said.append
    made.run([specs.get("gla"), specs.get("based")], {"d256": Shape.dense(8, 2048, 32, 256, 256)})
    assert asked[0] == 3
    assert sorted((unit.sizes, unit.dtype) for unit in asked[1:]) == [
        ((8, 2048, 32, 16, 256), "float32"), ((8, 2048, 32, 256, 256), "float32"),
    ]  # fmt: skip
    assert any("no driver" in one for one in said)
    assert any("the process died" in one for one in said)


def test_peers_are_called_before_in_processes(pretended, monkeypatch):
    """Once for each number of heads and channels, on a short sequence, forward and backward."""
    triton = pytest.importorskip("triton")
    timing = triton.testing.do_bench
    asked, tokens, ran = [], [], []

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, v):
            tokens.append(v.shape[1])
            assert triton.testing.do_bench(lambda: ran.append(1), quantiles=(0.5, 0.2)) == [1.0, 1.0]
            return v * 2

        @staticmethod
        def backward(ctx, do):
            tokens.append(do.shape[1])
            return do * 2

    def make(shape, dtype, device):
        v = torch.zeros(*shape[:3], shape.V, dtype=dtype, requires_grad=True)
        return (v,), lambda: Product.apply(v)

    monkeypatch.setattr(peers, "calls", lambda library, spec: {"chunk": make} if spec == "gla" else {})
    monkeypatch.setattr(bench_run.cli_pool, "run", lambda work, units, jobs: iter([(x, work(x)[0]) for x in units]))
    monkeypatch.setattr(bench_compile, "compile_unit", lambda unit: (1, True))
    made, _ = runner((), jobs=3, against=("fla", "sdpa"))
    made.say = asked.append
    sizes = ((1, 9000, 3, 16, 16), (2, 100, 3, 16, 16), (1, 70, 5, 16, 16), (9, 1, 3, 16, 16))
    made.run([specs.get("gla"), specs.get("based")], {str(x): Shape.dense(*x) for x in sizes})
    assert tokens == [100, 100, 70, 70]
    assert len(ran) == 2
    assert triton.testing.do_bench is timing
    assert not [one for one in asked if one.startswith("compiling (")]
    unit = bench_compile.PeerUnit("fla", "gla", "chunk", sizes[0], "float32", "cpu")
    assert bench_compile.warm(unit) == (1, True)
    assert tokens[-1] == bench_compile.SHORT
    monkeypatch.setattr(peers, "calls", lambda library, spec: {})
    assert bench_compile.warm(unit) == ("KeyError: 'chunk'", True)


# --- on a GPU


@pytest.mark.gpu
def test_on_a_gpu_everything_has_a_figure(tmp_path, capsys):
    what = "fwd,fwd+bwd,memory,graph,decode,cold,warm"
    shapes = ("--shapes", "2,4096,16,64,64", "8,1,16,64,64")
    status, _, err = run(capsys, "retnet", "gla", *shapes, "--what", what, "--jobs", "4", "--out", str(tmp_path))
    assert status == 0, err
    rows = bench_report.read([tmp_path / "rows.csv"])
    found = {(one.spec, one.what): one for one in rows}
    for spec in ("retnet", "gla"):
        for name in ("fwd", "fwd+bwd", "graph fwd", "graph fwd+bwd", "decode"):
            one = found[spec, name]
            assert 0 < one.floor < one.value, one
            assert one.copy > 1e11
        assert found[spec, "memory"].value >= 0
        assert found[spec, "warm"].value < found[spec, "cold"].value
        assert found[spec, "graph fwd"].value <= 1.2 * found[spec, "fwd"].value

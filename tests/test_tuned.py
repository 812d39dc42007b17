"""Tuned choices: the tables that remember them, and the search that makes them. The search runs here on the torch
backend under invented times; on a GPU it runs on kernels.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import warnings

import pytest
import torch

import flagen
from flagen import bench_check, bench_measure, cli_tune, specs, triton_backend, tuned_search, tuned_tables
from flagen.__main__ import main
from flagen.analysis import analyse
from flagen.bench import make_inputs
from flagen.errors import ConfigError
from flagen.plan import make_plan
from flagen.schedule import Shape, schedule
from flagen.torch_backend import TorchBackend
from flagen.tuned_search import Bench, BusyError, candidates, in_turn, search, winner
from flagen.tuned_tables import Entry, TableError, TunedWarning, applied, bucket, chosen, file_name, place_of, remember

GPU = "NVIDIA H100 80GB HBM3"
SHAPE = Shape.dense(1, 8192, 96, 128, 128)
PLACE = dataclasses.replace(place_of("_flagen_gla_0123", SHAPE, torch.bfloat16), triton="3.6.0")


def decided(name="retnet", shape=SHAPE, dtype=torch.bfloat16):
    return schedule(make_plan(analyse(specs.get(name))), shape, dtype)


@pytest.fixture(autouse=True)
def folders(monkeypatch, tmp_path):
    """An empty folder for the user's tables, and one for shipped ones."""
    for name in ("shipped", "user"):
        (tmp_path / name).mkdir(mode=0o700)
    monkeypatch.setenv("FLAGEN_CACHE_DIR", str(tmp_path / "user"))
    monkeypatch.delenv("FLAGEN_CACHE", raising=False)
    monkeypatch.setattr(tuned_tables, "_triton", lambda: "3.6.0")
    monkeypatch.setattr(tuned_tables, "_warned", set())
    real = tuned_tables.SHIPPED
    monkeypatch.setattr(tuned_tables, "SHIPPED", tmp_path / "shipped")
    tuned_tables._choices.cache_clear()
    yield real
    tuned_tables._choices.cache_clear()


def entry(choice, place=PLACE):
    return Entry(place, choice, 2.0, 1.0, "flagen 0")


def shipped_file():
    return tuned_tables.SHIPPED / file_name(GPU)


# --- tables


def test_nothing_is_remembered_at_first():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuned_tables.lookup(PLACE, GPU) is None
        assert chosen(decided(), "_flagen_gla_0123", SHAPE, torch.bfloat16, GPU) == decided()


def test_what_is_remembered_is_found_for_its_place_alone():
    choice = {"fwd": {"num_warps": 8}}
    path = remember([entry(choice)], GPU)
    assert path.parent.name == "tuned"
    assert path.stat().st_mode & 0o777 == 0o600
    assert tuned_tables.lookup(PLACE, GPU) == choice
    assert chosen(decided(), "_flagen_gla_0123", SHAPE, torch.bfloat16, GPU).fwd.num_warps == 8
    near = SHAPE._replace(T=9000, H=100)
    assert chosen(decided(), "_flagen_gla_0123", near, torch.bfloat16, GPU).fwd.num_warps == 8
    for module, shape, dtype, device in [
        ("_flagen_gla_4567", SHAPE, torch.bfloat16, GPU),  # another text of the kernels
        ("_flagen_gla_0123", SHAPE._replace(T=1 << 14), torch.bfloat16, GPU),
        ("_flagen_gla_0123", SHAPE._replace(N=4), torch.bfloat16, GPU),
        ("_flagen_gla_0123", SHAPE._replace(V=64), torch.bfloat16, GPU),
        ("_flagen_gla_0123", SHAPE, torch.float16, GPU),
        ("_flagen_gla_0123", SHAPE, torch.bfloat16, "NVIDIA A100"),
    ]:
        assert chosen(decided(), module, shape, dtype, device) == decided(), (module, shape, dtype, device)


def test_another_version_of_triton_has_its_own_choices(monkeypatch):
    remember([entry({"fwd": {"num_warps": 8}})], GPU)
    monkeypatch.setattr(tuned_tables, "_triton", lambda: "3.7.1")
    assert chosen(decided(), "_flagen_gla_0123", SHAPE, torch.bfloat16, GPU) == decided()


def test_the_users_table_goes_before_the_shipped_one():
    other = dataclasses.replace(PLACE, K=64)
    remember([entry({"fwd_L": 512}), entry({"fwd_L": 1024}, other)], GPU, tuned_tables.SHIPPED)
    assert tuned_tables.lookup(PLACE, GPU) == {"fwd_L": 512}
    remember([entry({"fwd_L": 2048})], GPU)
    assert tuned_tables.lookup(PLACE, GPU) == {"fwd_L": 2048}
    assert tuned_tables.lookup(other, GPU) == {"fwd_L": 1024}


def test_a_newer_choice_replaces_an_older_and_an_empty_one_removes_it():
    other = dataclasses.replace(PLACE, tokens=4096)
    remember([entry({"fwd_L": 512}), entry({"fwd_L": 256}, other)], GPU)
    remember([entry({"fwd_L": 1024})], GPU)
    assert tuned_tables.lookup(PLACE, GPU) == {"fwd_L": 1024}
    assert tuned_tables.lookup(other, GPU) == {"fwd_L": 256}
    path = remember([entry({})], GPU)
    assert tuned_tables.lookup(PLACE, GPU) is None
    assert tuned_tables.lookup(other, GPU) == {"fwd_L": 256}
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_the_cache_mode_holds_for_tables(monkeypatch):
    remember([entry({"fwd_L": 512})], GPU)
    for mode, found in (("readonly", {"fwd_L": 512}), ("off", None)):
        monkeypatch.setenv("FLAGEN_CACHE", mode)
        assert tuned_tables.lookup(PLACE, GPU) == found
        with pytest.raises(ConfigError, match=f"FLAGEN_CACHE={mode}"):
            remember([entry({"fwd_L": 256})], GPU)


def test_while_others_are_timed_nothing_is_remembered():
    remember([entry({"fwd_L": 512})], GPU)
    with tuned_tables.ignored():
        assert tuned_tables.lookup(PLACE, GPU) is None
    assert tuned_tables.lookup(PLACE, GPU) == {"fwd_L": 512}


def test_a_broken_table_of_the_user_is_replaced():
    path = remember([entry({"fwd_L": 512})], GPU)
    path.write_text("{")
    with pytest.warns(TunedWarning, match="no JSON"):
        remember([entry({"fwd_L": 1024})], GPU)
    assert tuned_tables.lookup(PLACE, GPU) == {"fwd_L": 1024}


def table(**changes):
    place = dataclasses.asdict(PLACE)
    one = {"place": place, "choice": {"fwd_L": 512}, "default_ms": 1.0, "ms": 0.5, "versions": ""}
    return {"format": 1, "device": GPU, "entries": [one]} | changes


BROKEN = {
    "no JSON": "{",
    "no object": [],
    "field too few": {"format": 1, "device": GPU},
    "field too many": table(more=1),
    "format": table(format=2),
    "foreign": table(device="NVIDIA A100"),
    "entries": table(entries={}),
    "entry": table(entries=[1]),
    "place": table(entries=[table()["entries"][0] | {"place": {}}]),
    "number": table(entries=[table()["entries"][0] | {"ms": "fast"}]),
    "type": table(entries=[table()["entries"][0] | {"place": dataclasses.asdict(PLACE) | {"K": "128"}}]),
    "choice": table(entries=[table()["entries"][0] | {"choice": [1]}]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_table_is_left_aside_with_one_warning(name):
    remember([entry({"fwd_L": 1024})], GPU)
    content = BROKEN[name] if isinstance(BROKEN[name], str) else json.dumps(BROKEN[name])
    shipped_file().write_text(content)
    tuned_tables._choices.cache_clear()
    with pytest.warns(TunedWarning, match="left aside") as seen:
        assert tuned_tables.lookup(PLACE, GPU) == {"fwd_L": 1024}  # of the other table
        tuned_tables._choices.cache_clear()
        assert tuned_tables.lookup(PLACE, GPU) == {"fwd_L": 1024}
    assert len(seen) == 1
    shipped_file().write_text(json.dumps(table()))
    assert [one.choice for one in tuned_tables.read(shipped_file(), GPU, shipped=True)] == [{"fwd_L": 512}]


@pytest.mark.skipif(os.name != "posix", reason="permissions are those of POSIX")
def test_a_table_that_others_can_write_is_not_read():
    path = remember([entry({"fwd_L": 512})], GPU)
    path.chmod(0o666)
    tuned_tables._choices.cache_clear()
    with pytest.warns(TunedWarning, match="can be written by others"):
        assert tuned_tables.lookup(PLACE, GPU) is None
    # the package's own lies where its modules lie
    shipped_file().write_text(json.dumps(table()))
    shipped_file().chmod(0o666)
    tuned_tables._choices.cache_clear()
    assert tuned_tables.lookup(PLACE, GPU) == {"fwd_L": 512}


def test_a_choice_that_does_not_fit_is_left_aside_with_one_warning():
    remember([entry({"fwd_L": 100})], GPU)
    with pytest.warns(TunedWarning, match="fwd_L=100 is no multiple of the 256 tokens") as seen:
        for _ in range(2):
            assert chosen(decided(), "_flagen_gla_0123", SHAPE, torch.bfloat16, GPU) == decided()
    assert len(seen) == 1


def test_shipped_tables_are_tables(folders):
    files = sorted(folders.glob("*.json"))
    assert files
    for path in files:
        device = json.loads(path.read_text())["device"]
        assert path.name == file_name(device)
        for one in tuned_tables.read(path, device, shipped=True):
            assert one.place.text.rpartition("_")[0] in specs.names()
            assert one.ms < one.default_ms


# --- choices


def test_a_choice_changes_what_it_names():
    before = decided("gla")
    after = applied(before, {"fwd": {"BT": 64, "num_stages": 2}, "intra": {"BT": 64}, "bwd_L": 1024})
    assert (after.fwd.BT, after.fwd.num_stages, after.fwd.BV) == (64, 2, before.fwd.BV)
    assert (after.intra.BT, after.bwd_L, after.bwd) == (64, 1024, before.bwd)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"LC": 64}, "'LC' is nothing that may be chosen"),
        ({"DOT": "fp16"}, "'DOT' is nothing"),
        ({"step": {"BV": 32}}, "'step' is nothing"),
        ({"fwd": 3}, "fwd must be an object"),
        ({"fwd": {}}, "fwd must be an object"),
        ({"fwd": {"BK": 32}}, "fwd: BK=32 is not allowed"),
        ({"fwd": {"BV": 48}}, "fwd: BV=48 is not allowed; use one of 16, 32"),
        ({"fwd": {"num_warps": True}}, "num_warps=True"),
        ({"fwd": {"num_warps": "8"}}, "num_warps='8'"),
        ({"fwd": {"BT": 32}}, "fwd and intra must have the same BT"),
        ({"bwd": {"BT": 32}}, "bwd and bwd_intra must have the same BT"),
        ({"fwd_L": -256}, "fwd_L must be a number of tokens"),
        ({"fwd_L": 300}, "no multiple of the 256"),
        ({"bwd_L": 2.0}, "bwd_L must be a number"),
    ],
)
def test_choices_that_are_none(choice, message):
    with pytest.raises(TableError, match=message):
        applied(decided(), choice)


def test_chunks_must_divide_the_tokens_between_checkpoints():
    plan = make_plan(analyse(specs.get("retnet")))
    short = schedule(plan, SHAPE, torch.bfloat16, checkpoint=64)
    with pytest.raises(TableError, match="does not divide the 64 tokens"):
        applied(short, {"fwd": {"BT": 128}, "intra": {"BT": 128}})


def test_buckets_are_the_nearest_powers_of_two():
    assert [bucket(n) for n in (0, 1, 3, 96, 128, 180, 190, 8192)] == [1, 1, 4, 128, 128, 128, 256, 8192]


# --- the search


@pytest.mark.parametrize("name", ["retnet", "gla", "based", "mamba2"])
@pytest.mark.parametrize("part", tuned_search.PARTS)
def test_candidates_are_a_handful_of_steps(name, part):
    for shape in (SHAPE, Shape.dense(1, 65536, 4, 128, 128), Shape.dense(8, 512, 32, 256, 256)):
        shape = shape._replace(K=16) if name == "based" else shape
        before = decided(name, shape)
        found = candidates(before, shape, part)
        assert 2 <= len(found) <= tuned_search.MOST
        made = [applied(before, one) for one in found]
        assert before not in made
        assert len(set(made)) == len(made)
        for one in made:
            assert max(16, 2 * shape.V - 1) >= getattr(one, part).BV
            other = "bwd" if part == "fwd" else "fwd"
            assert getattr(one, other) == getattr(before, other)


def test_a_winner_wins_every_round_by_the_margin():
    default = [1.0, 1.02, 1.0]
    assert winner({"default": default, "a": [0.9, 0.9, 0.9]}, "default") == "a"
    assert winner({"default": default, "a": [0.5, 0.5, 1.0]}, "default") == "default"  # once it did not
    assert winner({"default": default, "a": [0.98, 0.98, 0.98]}, "default") == "default"  # not by the margin
    assert winner({"default": default, "a": [0.9, 0.9, 0.9], "b": [0.8, 0.85, 0.8]}, "default") == "b"
    assert winner({"default": default, "a": [0.9, math.nan, 0.9]}, "default") == "default"
    assert winner({"default": default}, "default") == "default"


def test_a_busy_gpu_decides_nothing():
    with pytest.raises(BusyError, match=r"took 1\.0000 to 1\.2000 ms: the GPU is busy"):
        winner({"default": [1.0, 1.2, 1.0], "a": [0.1, 0.1, 0.1]}, "default")


def test_runs_take_turns():
    order = []
    runs = {name: (lambda name=name: order.append(name)) for name in "abc"}
    times = in_turn(runs, lambda run: run() or 1.0, rounds=3)
    assert "".join(order) == "abccbaabc"
    assert times == {name: [1.0, 1.0, 1.0] for name in "abc"}


class Pretended:
    """The torch backend as if it had schedules: some make it wrong, fail, or give other results each time."""

    calls = 0

    def __init__(self, plan, module=None):
        self.plan, self.own = plan, TorchBackend(plan.analysis)

    def schedule(self, inputs, sizes):
        return schedule(self.plan, sizes, torch.float32)

    def forward(self, inputs, *rest):
        now = self.now = self.schedule(inputs, SMALL)
        out = self.own.forward(inputs, *rest)
        if now.fwd.num_warps != FIRST.fwd.num_warps and now.fwd.BV == FIRST.fwd.BV:
            return out._replace(o=out.o * 1.01)
        if now.fwd.BT != FIRST.fwd.BT:
            raise RuntimeError("out of resource: shared memory\nRequired: much")
        return out

    def backward(self, do, ends, o, saved, inputs, *rest):
        now = self.schedule(inputs, SMALL)
        gradients, initial = self.own.backward(do, ends, o, saved, inputs, *rest)
        if now.bwd.num_stages != FIRST.bwd.num_stages:
            Pretended.calls += 1
            gradients = tuple(x * (1 + 1e-7 * Pretended.calls) for x in gradients)
        if now.bwd.BV != FIRST.bwd.BV and now.fwd.BV != FIRST.fwd.BV:
            gradients = tuple(x + 1 for x in gradients)  # wrong together
        return gradients, initial


SMALL = Shape.dense(1, 40, 2, 32, 64)
FIRST = decided("retnet", SMALL, torch.float32)


def timer_of(fwd, bwd):
    """Times by the schedule that a run has: of the forward, of the backward."""

    def timer(run):
        names = dict(zip(run.__code__.co_freevars, (cell.cell_contents for cell in run.__closure__), strict=True))
        now = names["backend"].schedule(names["bench"].inputs, SMALL)
        return bwd(now.bwd, now) if "out" in names else fwd(now.fwd, now)

    return timer


@pytest.fixture
def small_bench():
    op = flagen.compile("retnet")
    inputs = make_inputs(op.spec, SMALL, torch.float32, "cpu", {})
    return Bench(op, inputs, lambda: Pretended(op.plan))


def test_the_quickest_that_is_right_is_chosen(small_bench):
    said = []
    quick = timer_of(
        lambda tile, now: 0.5 if tile.BV != FIRST.fwd.BV else 1.0,
        lambda tile, now: 1.0 if now.bwd_L == FIRST.bwd_L else 0.9,
    )
    forward, backward = search(small_bench, SMALL, torch.float32, quick, said.append, rounds=3)
    assert forward.choice["fwd"]["BV"] == FIRST.fwd.BV // 2
    assert (forward.default_ms, forward.ms) == (1.0, 0.5)
    assert sorted(fault.partition(":")[0] for fault in forward.refused.values()) == [
        "RuntimeError", "o differs from the default's"
    ]  # fmt: skip
    assert list(backward.refused.values()) == ["two runs gave different results"]
    assert any("out of resource: shared memory" in one for one in said)
    assert any("<- chosen" in one for one in said)


def test_no_candidate_that_is_not_better_is_chosen(small_bench):
    even = timer_of(lambda tile, now: 1.0, lambda tile, now: 1.0)
    for one in search(small_bench, SMALL, torch.float32, even, lambda text: None, rounds=2):
        assert one.choice == {}
        assert one.ms == one.default_ms


def test_choices_that_are_wrong_together_are_not_kept(small_bench):
    quick = timer_of(lambda tile, now: 1.0 if tile.BV == FIRST.fwd.BV else 0.5,
                     lambda tile, now: 1.0 if tile.BV == FIRST.bwd.BV else 0.5)  # fmt: skip
    said = []
    found = search(small_bench, SMALL, torch.float32, quick, said.append, rounds=2)
    assert [one.choice for one in found] == [{}, {}]
    assert "wrong together" in said[-1]


def test_what_is_tuned_is_what_a_call_finds(monkeypatch, capsys):
    """The whole command but for the GPU: what it writes is what the schedule of the same call is changed by."""
    quick = timer_of(lambda tile, now: 1.0 if tile.BV == FIRST.fwd.BV else 0.5, lambda tile, now: 1.0)
    monkeypatch.setattr(triton_backend, "TritonBackend", Pretended)
    monkeypatch.setattr(bench_check, "sampled", lambda *a: "")
    monkeypatch.setattr(bench_check, "small", lambda *a: "")
    monkeypatch.setattr(bench_measure, "milliseconds", lambda run, device: quick(run))
    monkeypatch.setattr(cli_tune, "provenance", lambda device: {"versions": "flagen 0"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: GPU)
    real = cli_tune.tuned
    monkeypatch.setattr(
        cli_tune, "tuned", lambda spec, shape, dtype, device, *rest: real(spec, shape, dtype, "cpu", *rest)
    )
    arguments = ["tune", "retnet", "--shapes", "1,40,2,32,64", "--dtype", "fp32", "--rounds", "2"]
    assert main(arguments) == 0
    out, _ = capsys.readouterr()
    assert "retnet 1,40,2,32,64: fwd.BV=" in out
    from flagen.compiler import prepare
    from flagen.load import load

    module = load(prepare(specs.get("retnet"))[1])
    found = chosen(FIRST, module.__name__, SMALL, torch.float32, GPU)
    assert found.fwd.BV == FIRST.fwd.BV // 2
    assert found.bwd == FIRST.bwd
    monkeypatch.setattr(bench_check, "small", lambda *a: "o: rms 1")
    assert main(arguments) == 1
    assert "the default is wrong" in capsys.readouterr().err


def test_tune_needs_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune", "gla"]) == 2
    assert "finds no CUDA device" in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu(capsys, monkeypatch):
    monkeypatch.undo()  # of Triton's version; the folder is the session's
    status = main(["tune", "retnet", "--shapes", "1,4096,96,64,64", "--rounds", "2"])
    out, err = capsys.readouterr()
    assert status == 0 or "busy" in err
    assert "retnet" in out + err

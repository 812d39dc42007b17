"""The cost model: what it finds launched, its bytes and FLOPs against counts by hand, and that it never guesses in
silence. tests/test_interp_cost.py holds its counts against kernels that run.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import math
import sys
from math import prod
from pathlib import Path

import cases
import pytest
import torch

from flagen import compiler, cost, cost_launch, cost_trace, specs
from flagen.__main__ import main
from flagen.bench import Row
from flagen.cost_registers import registers
from flagen.cost_work import Block, CostError, Work, kernels_of
from flagen.load import load
from flagen.schedule import HOPPER, Shape

H100 = cost.MACHINES["h100"]
MB = 1 << 20
NAMES = ("value_u", "key_u_norm", "norm_max", "taylor_2_row", "phase_key_u", "shared", "fixed_key", "gated_value")
WITH_KERNELS = [spec for spec in cases.SHIPPED if compiler.prepare(spec)[0] is not None]
CHOSEN = [*WITH_KERNELS, *(spec for spec in cases.ALL if spec.name in NAMES)]


def sizes_of(spec, B=1, T=1024, H=2, K=32, V=32):
    return Shape.dense(B, T, H, 16 if spec.taylor else K, V)


def estimated(name, B, T, H, K, V, machine=H100, **options):
    return cost.estimate(specs.get(name), Shape.dense(B, T, H, K, V), torch.bfloat16, machine, **options)


def named(stage):
    """The kernels of a stage by their short names, in order."""
    return [(one.name.partition("_")[2].removesuffix("_kernel"), one) for one in stage.kernels]


# --- what is launched


@pytest.mark.parametrize("spec", CHOSEN, ids=lambda spec: spec.name)
def test_every_kernel_of_every_spec_is_known_and_launched(spec):
    """A kernel that no call launches, or that holds something unknown, would be missing from tables without a word."""
    _, entry = compiler.prepare(spec)
    seen = set()
    for pieces in (0, 256):
        found = cost.estimate(
            spec,
            sizes_of(spec),
            change=lambda s, pieces=pieces: dataclasses.replace(s, fwd_L=pieces, bwd_L=pieces),
        )
        for stage in (found.forward, found.training, found.backward, found.step):
            seen |= {one.name for one in stage.kernels if not one.name.startswith("torch.")}
            assert stage.seconds > 0
            for one in stage.kernels:
                assert one.read + one.written > 0, one.name
    assert seen == set(kernels_of(entry.source))


def test_the_module_is_left_as_it_was():
    plan, entry = compiler.prepare(specs.get("gla"))
    module = load(entry)
    before = dict(vars(module))
    cost_launch.trace(plan, module, entry.source, cost.meta_inputs(specs.get("gla"), Shape.dense(1, 512, 2, 32, 32),
                                                                   torch.bfloat16), HOPPER)  # fmt: skip
    assert dict(vars(module)) == before


def test_tiles_warps_and_pieces_are_those_of_the_schedule():
    found = estimated("retnet", 1, 65536, 4, 128, 128)
    s = found.schedule
    forward = dict(named(found.forward))
    pieces = -(-65536 // s.fwd_L)
    assert pieces > 1
    assert forward["fwd"].grid == (pieces * 4 * -(-128 // s.fwd.BV), 1, 1)
    assert (forward["fwd"].num_warps, forward["fwd"].num_stages) == (s.fwd.num_warps, s.fwd.num_stages)
    assert f"BV={s.fwd.BV}" in forward["fwd"].tile
    assert [name for name, _ in named(found.forward)] == ["fwd", "scan", "fwd"]
    assert [name for name, _ in named(found.backward)] == ["bwd_state", "scan", "dk", "dv", "dq"]
    whole = estimated("retnet", 1, 8192, 96, 128, 128)
    assert [name for name, _ in named(whole.forward)] == ["fwd"]
    erase = estimated("delta_net", 1, 65536, 4, 128, 128)
    short = [name.removeprefix("net_") for name, _ in named(erase.forward) + named(erase.backward)]
    assert short == ["intra", "fwd", "carry", "fwd", "fwd", "bwd_state", "carry", "bwd_state", "bwd"]


def test_the_schedule_is_that_of_the_device_asked_for():
    grids = {name: named(estimated("retnet", 1, 65536, 4, 128, 128, cost.MACHINES[name]).forward)[0][1].grid
             for name in ("a100", "h100", "mi300x")}  # fmt: skip
    assert len(set(grids.values())) == 3


def test_a_longer_sequence_costs_in_proportion():
    short, long = (estimated("gla", 1, T, 96, 64, 64) for T in (4096, 16384))
    for one, other in ((short.forward, long.forward), (short.both, long.both)):
        assert other.moved == pytest.approx(4 * one.moved, rel=0.01)
        assert other.seconds == pytest.approx(4 * one.seconds, rel=0.04)  # whole rounds of programs


# --- bytes


def test_the_floor_is_each_input_and_output_once():
    found = estimated("gla", 1, 8192, 96, 128, 128)
    tensor = 8192 * 96 * 128 * 2
    assert found.inputs == 4 * tensor
    assert found.forward.floor == found.training.floor == 5 * tensor
    assert found.backward.floor == (4 + 1 + 4) * tensor
    assert found.both.floor == 14 * tensor
    state = 4 * 96 * 128 * 128
    assert found.step.floor == 2 * state + 5 * tensor // 8192


def test_step_sizes_count_as_fp32():
    found = estimated("mamba2", 2, 512, 4, 64, 32)
    tokens = 2 * 512 * 4
    assert found.inputs == tokens * (2 * 64 * 2 + 32 * 2 + 4) + 4 * 4


def test_one_pass_moves_the_floor_and_training_the_states():
    found = estimated("retnet", 1, 8192, 96, 128, 128)
    (_, forward), (_, training) = named(found.forward)[0], named(found.training)[0]
    head_rates = 4 * 96  # log_decay, one number a head
    assert forward.read + forward.written == found.forward.floor + head_rates
    states = 96 * (8192 // found.schedule.LC) * 128 * 128 * 2
    assert training.written - forward.written == states
    assert found.held == states
    assert found.extra == states


def test_a_sweep_reads_three_tensors_and_writes_one():
    found = estimated("retnet", 1, 8192, 96, 128, 128)
    tensor, head_rates = 8192 * 96 * 128 * 2, 4 * 96
    assert [name for name, _ in named(found.backward)] == ["dk", "dv", "dq"]
    for _, sweep in named(found.backward):
        assert sweep.written == tensor
    pieces = 96 * -(-8192 // found.schedule.dq_L)
    (_, key), (_, value), (_, query) = named(found.backward)
    # the query's sweep begins each piece from a checkpoint
    assert query.read == 3 * tensor + pieces * 128 * 128 * 2 + head_rates
    assert key.read == value.read == 3 * tensor + head_rates


def test_scratch_that_does_not_fit_the_cache_is_moved():
    """The states between checkpoints, in the sweep that makes all gradients."""
    small = dataclasses.replace(H100, cache=MB)
    spec = next(spec for spec in cases.ALL if spec.name == "phase_scalar_u")
    found = [cost.estimate(spec, Shape.dense(1, 8192, 96, 64, 64), torch.bfloat16, one) for one in (H100, small)]
    less, more = (next(x for x in one.backward.kernels if x.name.endswith("_bwd_kernel")) for one in found)
    chunk = found[0].schedule.bwd.BT
    assert more.read - less.read == 96 * (8192 // chunk) * 64 * 64 * 2 * 2  # a state a chunk
    assert more.asked == less.asked


@pytest.mark.parametrize(("name", "inputs", "halves"), [("gla", 3, 1), ("gateloop", 4, 2)])
def test_pairs_of_a_decay_per_key_channel_are_counted(name, inputs, halves):
    """halves: a complex decay has queries and keys for the real and for the imaginary part of a state, and an angle."""
    found = estimated(name, 1, 8192, 96, 128, 128)
    (_, prepare), (_, rare), (_, serial) = named(found.forward)
    tensor, pairs = 8192 * 96 * 128 * 2, 8192 * 96 * found.schedule.intra.BT * 2
    marks, totals = 8192 * 96, 96 * (8192 // found.schedule.intra.BT) * 128 * 4
    totals *= halves
    assert (prepare.read, prepare.written) == (inputs * tensor, 2 * halves * tensor + pairs + marks + totals)
    # rows whose decays are too strong to be divided by have a kernel that most often finds none
    assert (rare.read, rare.written, rare.flops) == (marks, 0, 0)
    assert (serial.read, serial.written) == ((2 * halves + 1) * tensor + pairs + totals, tensor)


def test_parts_of_gradients_are_summed_by_torch():
    """A state of 256 channels is taken in blocks of V, each of which gives a part of dq and dk, summed at once."""
    found = estimated("based", 1, 512, 4, 32, 256)
    parts = -(-256 // found.schedule.bwd.BV)
    assert parts > 1
    sums = [one for one in found.backward.kernels if one.name == "torch.sum"]
    assert [(one.read, one.written) for one in sums] == 2 * [(parts * 512 * 4 * 32 * 2, 512 * 4 * 32 * 2)]
    assert found.extra >= parts * 512 * 4 * 32 * 2


def test_memory_of_the_forward_is_the_output_and_what_it_keeps():
    found = estimated("gla", 1, 4096, 96, 64, 64)
    output, pairs = 4096 * 96 * 64 * 2, 4096 * 96 * found.schedule.intra.BT * 2
    prepared = 2 * output + pairs + 4096 * 96 + 96 * (4096 // found.schedule.intra.BT) * 64 * 4
    assert found.forward.peak == output + prepared
    assert found.training.peak == output + found.held  # what is prepared is kept
    states = 4096 // found.schedule.LC * 96 * 64 * 64 * 2
    assert found.held == states + prepared


# --- FLOPs


def test_flops_by_hand():
    """Per chunk: query key, weights value, query state, key value; the state pass has the last alone."""
    found = estimated("retnet", 1, 65536, 4, 128, 128)
    (_, first), _, (_, second) = named(found.forward)
    BT, BV = found.schedule.fwd.BT, found.schedule.fwd.BV
    chunks = 65536 // BT * 4 * (128 // BV)
    update = 2 * 128 * BT * BV
    assert first.flops == pytest.approx(chunks * update, rel=0.07)  # the last piece is shorter, and pieces are averaged
    assert second.flops / first.flops == (2 * BT * BT * 128 + 2 * BT * BT * BV + 2 * update) / update
    assert named(found.forward)[1][1].flops == 0
    one = estimated("retnet", 1, 8192, 96, 128, 128)
    kernel = named(one.forward)[0][1]
    assert kernel.flops == 128 * 96 * (128 // BV) * (2 * BT * BT * 128 + 2 * BT * BT * BV + 2 * update)
    assert kernel.work.products == 4 * 128


def test_products_of_fp32_are_told_apart():
    low = cost.estimate(specs.get("retnet"), Shape.dense(1, 512, 2, 64, 64), torch.bfloat16)
    high = cost.estimate(specs.get("retnet"), Shape.dense(1, 512, 2, 64, 64), torch.float32)
    assert set(low.forward.kernels[0].work.flops) == {"16"}
    assert set(high.forward.kernels[0].work.flops) == {"tf32x3"}
    assert set(H100.products) >= {"16", "tf32", "tf32x3", "ieee"}


# --- the evaluation of a kernel's text

SOURCE = """
FLOOR = tl.constexpr(-128.0)

@triton.jit
def double(b_x, BT: tl.constexpr):
    return b_x + tl.exp(b_x)

@triton.jit
def toy_kernel(x, y, n, T, BT: tl.constexpr):
    o_i = tl.arange(0, BT)
    b_s = tl.zeros([BT, BT], dtype=tl.float32)
    for i in range(tl.program_id(0), tl.cdiv(T, BT)):
        b_x = tl.load(x + o_i[:, None] * BT + o_i[None, :], mask=o_i[:, None] < n, other=0.0)
        if y is not None:
            if i % 4 == 0:
                tl.store(y + o_i[:, None] * BT + o_i[None, :], double(b_s, BT).to(y.dtype.element_ty))
        b_s = tl.dot(b_x, tl.trans(b_x), tl.maximum(b_s, FLOOR))
    BODY

def launch(x, y):
    toy_kernel[(2,)](x, y)
"""
X, Y = Block((), "bf16", "x"), Block((), "fp32", "y")


def toy(body="tl.debug_barrier()", program=0, **arguments):
    work, _ = cost_trace.count(SOURCE.replace("BODY", body), "toy_kernel",
                               {"x": X, "y": Y, "n": 5, "T": 4096, "BT": 16, **arguments}, (program, 0, 0))  # fmt: skip
    return work


def test_a_small_kernel_by_hand():
    work = toy()
    turns, tile = 256, 16 * 16
    assert work.products == turns
    assert work.flops == {"16": turns * 2 * 16 * tile}
    assert work.reads == {"x": turns * tile * 2}
    assert work.writes == {"y": turns / 4 * tile * 4}
    assert work.special == turns / 4 * tile
    assert work.barriers == 1
    assert kernels_of(SOURCE.replace("BODY", "pass")) == ("toy_kernel",)


def test_a_reduction_takes_a_step_for_each_halving():
    assert toy("tl.sum(b_s, 1)").reduced == toy("tl.max(b_s, 0)").reduced == 4
    assert toy("tl.sum(b_s)").reduced == 8
    assert toy("tl.cumsum(b_s, 0)").reduced == 4


def test_products_of_a_batch_are_each_counted():
    one = "tl.dot(tl.zeros([4, 16, 32], tl.float32), tl.zeros([4, 32, 8], tl.float32), input_precision='ieee')"
    assert toy(one).flops["ieee"] == 4 * 2 * 16 * 32 * 8
    assert toy(one).products == toy().products + 1
    with pytest.raises(CostError, match="a product of blocks"):
        toy(one.replace("[4, 32", "[2, 32"))


def test_programs_and_absent_tensors_decide():
    assert toy(program=56).products == 200
    assert toy(y=None).writes == {}
    assert toy(y=None).special == 0
    assert toy(T=32).products == 2


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("b_h = tl.histogram(o_i, BT)", "does not know what 'tl.histogram"),
        ("b_s = unheard_of(b_s)", "'unheard_of"),
        ("b_s = b_s @ b_s", "does not know"),
        ("while n > 0:\n        n = n - 1", "does not know"),
        ("for i in tl.load(x):\n        pass", "does not know"),
        ("for i in range(tl.load(x)):\n        pass", "bounds a loop"),
        ("b_s = b_s if tl.load(x) > 0 else b_s + 1", "whether tl.load"),
        ("b_s = b_s + tl.zeros([8, BT], dtype=tl.float32)", "do not fit"),
        ("b_s = b_t", "'b_t' has no value"),
        ("b_s = b_s[0]", "does not know"),
        ("b_s = tl.dot(b_s)", "stumbled: TypeError"),
        ("b_s = o_i.to()", "stumbled: IndexError"),
    ],
)
def test_what_is_not_known_is_an_error(body, message):
    with pytest.raises(CostError, match=message) as error:
        toy(body)
    assert "toy_kernel" in str(error.value)


def test_a_launch_with_an_argument_that_the_kernel_lacks():
    stand = cost_launch._Stand("toy_kernel", ["x"], lambda launch: None)
    with pytest.raises(CostError, match="toy_kernel is launched with y"):
        stand[(1,)](x=1, y=2)


def test_registers_are_those_of_the_blocks_alive_at_once():
    text = """
def helper(b_a):
    b_in = tl.exp(b_a)
    b_in2 = b_in + 1
    return b_in2 * b_in

def kernel(n):
    b_h = tl.zeros([64, 64])
    for i in range(n):
        b_x = tl.load(n)
        b_k = b_x
        b_y = b_x + 1
        b_h = b_h + b_k
        b_z = b_y * b_x
        tl.store(n, b_z)
    b_last = CALL
    tl.store(n, b_last)
"""
    tile, state = Block((64, 32), "fp32"), Block((64, 64), "fp32")
    names = {"b_x": tile, "b_k": tile, "b_y": Block((64, 32), "fp32"), "b_z": Block((64, 32), "bf16"), "b_h": state,
             "o_i": Block((64,), "int32"), "b_last": Block((64, 64), "fp32")}  # fmt: skip
    inner = {"b_in": Block((64, 64), "fp32"), "b_in2": Block((64, 64), "fp32")}

    def wanted(call, warps=4):
        tree = ast.parse(text.replace("CALL", call))
        functions = {one.name: one for one in tree.body}
        return registers(functions, "kernel", {"kernel": names, "helper": inner}, warps)

    # the state, x (under two names, one block) and y
    assert wanted("b_h + 1") == (64 * 64 + 2 * 64 * 32) / 128
    assert wanted("b_h + 1", warps=8) == wanted("b_h + 1") / 2
    # the state, which the function is given, its result, and both blocks of the function
    assert wanted("helper(b_h)") == 4 * 64 * 64 / 128
    names["b_k"] = Block((64, 32), "fp32")
    assert wanted("b_h + 1") == (64 * 64 + 3 * 64 * 32) / 128


# --- times


def test_the_largest_term_decides():
    work = Work(products=100)
    work.flops["16"] = 1e6
    slow = cost.times(work, 132, 1, 100, H100)
    assert slow["chain"] == pytest.approx(100 * cost.FITTED.PRODUCT / H100.clock + 1e6 * 132 / 700e12)
    assert slow["issue"] == pytest.approx(1e6 * 132 / 700e12)
    # a program too many is a round more; twice the programs: two rounds, or two at once whose slots add up
    assert cost.times(work, 133, 1, 100, H100)["chain"] == 2 * slow["chain"]
    assert cost.times(work, 264, 1, 100, H100)["chain"] == 2 * slow["chain"]
    assert cost.times(work, 264, 2, 100, H100)["chain"] == slow["chain"]
    assert cost.times(work, 264, 2, 100, H100)["issue"] == 2 * slow["issue"]


def test_exponentials_have_a_unit_of_their_own():
    plain, special = (cost.times(one, 132, 1, 100, H100)["issue"] for one in (Work(lanes=1e6), Work(special=1e6)))
    assert special == pytest.approx(1e6 / 16 / cost.FITTED.SPECIAL / H100.clock)
    assert plain == pytest.approx(1e6 / 128 / cost.FITTED.PLAIN / H100.clock)


def test_spills_make_slots_dearer():
    work = Work(lanes=1e6)
    limit = cost.FITTED.REGISTERS
    few, many = (cost.times(work, 132, 1, wanted, H100)["issue"] for wanted in (limit, limit + 64))
    assert many / few == pytest.approx(1 + 2 * cost.FITTED.SPILL)


def test_no_kernel_is_faster_than_its_bytes():
    for name in ("retnet", "gla"):
        for stage in (estimated(name, 1, 8192, 96, 128, 128).both, estimated(name, 8, 1024, 8, 64, 64).both):
            for one in stage.kernels:
                assert one.seconds >= max((one.read + one.written) / H100.bandwidth, H100.launch)
            assert stage.seconds * H100.bandwidth >= stage.floor


def test_machines_by_name():
    assert cost.machine_of("NVIDIA H100 80GB HBM3") is H100
    assert cost.machine_of("NVIDIA A100-SXM4-80GB").name == "a100"
    assert cost.machine_of("AMD Instinct MI300X").name == "mi300x"
    assert cost.machine_of("h100", 2e12).bandwidth == 2e12
    with pytest.raises(CostError, match="knows no device 'abacus'; it knows h100, h200"):
        cost.machine_of("abacus")
    for machine in cost.MACHINES.values():
        assert machine.measured == (machine is H100)
        assert prod(machine.products.values()) > 0


def test_calibration_finds_the_constants_that_made_the_times():
    path = Path(__file__).parent.parent / "benchmarks" / "calibrate.py"
    loader = importlib.util.spec_from_file_location("calibrate", path)
    calibrate = importlib.util.module_from_spec(loader)
    sys.modules["calibrate"] = calibrate
    loader.loader.exec_module(calibrate)
    truth = cost.Constants(700.0, 400.0, 0.6, 225.0, 1.2)
    rows = []
    for name in ("retnet", "gla", "linear", "mamba2"):
        found = cost.estimate(specs.get(name), Shape.dense(1, 8192, 96, 128, 128), constants=truth)
        for what, stage in (("fwd", found.forward), ("fwd+bwd", found.both)):
            rows.append(
                Row(name, "flagen", "", "wide8k", 1, 8192, 96, 128, 128, "bf16", what, 1e3 * stage.seconds, "ms")
            )
    ignored = [dataclasses.replace(rows[0], **change, value=1e6)
               for change in ({"library": "fla"}, {"what": "memory"}, {"H": 1}, {"spec": "unknown"})]  # fmt: skip
    points = calibrate.points(rows + ignored, H100)
    assert len(points) == 8
    assert max(abs(math.log(one.ratio(H100, cost.FITTED))) for one in points) > 0.15
    fitted = calibrate.fit(points, H100)
    assert max(abs(math.log(one.ratio(H100, fitted))) for one in points) < 0.05


@pytest.mark.parametrize("name", specs.names())
def test_shipped_specs_are_estimated_as_they_run(name):
    """At the head sizes and in the dtype that are timed, where kernels have other branches than in small tests."""
    channels = 16 if specs.get(name).taylor else 128
    found = cost.estimate(specs.get(name), Shape.dense(1, 8192, 96, channels, 128), torch.bfloat16)
    assert all(one.seconds > 0 for one in (found.forward, found.training, found.backward, found.step))
    assert found.both.seconds > 2 * found.forward.seconds


def test_show_prints_the_kernels_and_what_they_cost(capsys):
    shape = ("--shape", "1,65536,4,128,128")
    assert main(["show", "retnet", *shape, "--device", "h100", "--dtype", "bf16"]) == 0
    out = capsys.readouterr().out
    found = cost.estimate(specs.get("retnet"), Shape.dense(1, 65536, 4, 128, 128))
    assert f"fwd_L={found.schedule.fwd_L} " in out
    assert f"training forward: {1e6 * found.training.seconds:.0f} us by estimate" in out
    for one in found.both.kernels:
        short = one.name.removeprefix("retnet_").removesuffix("_kernel")
        lines = [line.split() for line in out.splitlines() if line.strip().startswith(f"{short} ")]
        assert any("x".join(map(str, one.grid)).removesuffix("x1").removesuffix("x1") in line for line in lines), short
    assert f"{found.extra / found.inputs:.0%} of the inputs" in out
    assert main(["show", "retnet", *shape, "--device", "a100"]) == 0
    assert "from data sheets" in capsys.readouterr().out
    assert main(["show", "retnet", "--device", "abacus"]) == 2
    assert "knows no device" in capsys.readouterr().err


def test_show_says_what_the_cost_model_does_not_know(capsys, monkeypatch):
    def unknown(*_):
        raise CostError("gla_fwd_kernel, line 3: the cost model does not know what 'x' costs")

    monkeypatch.setattr(cost, "estimate", unknown)
    assert main(["show", "gla"]) == 0
    assert "not shown, gla_fwd_kernel, line 3" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "most"), [("retnet", 0.25), ("gla", 0.8), ("rwkv6", 0.8), ("hgrn2", 1.0)])
def test_a_step_needs_little_memory(name, most):
    """Beside inputs, output and gradients, in inputs. With a decay per key channel what was prepared is kept where
    there are four inputs of channels (gla, rwkv6), or three in whose gradients' places those of prepared rows fit
    (hgrn2); else it is made again, and lies where gradients are to be."""
    found = estimated(name, 1, 8192, 96, 128, 128)
    assert found.extra <= most * found.inputs

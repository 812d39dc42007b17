"""The plan: how it prints, and what of the spec reaches the kernels' text."""

from __future__ import annotations

import ast
import re

import pytest
import torch
import triton
from cases import ALL

from flagen import specs, validate
from flagen.analysis import analyse
from flagen.errors import SpecError
from flagen.expr import Input, k, logsigmoid, sigmoid, taylor
from flagen.plan import make_plan
from flagen.render import render
from flagen.schedule import HOPPER, Shape, schedule
from flagen.spec import Spec

EVERY = pytest.mark.parametrize("spec", ALL, ids=lambda spec: spec.name)


def plan_of(spec):
    return make_plan(analyse(spec))


def functions(text):
    return {node.name: ast.unparse(node) for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}


@EVERY
def test_prints_its_kernels_with_what_they_read_and_write(spec):
    plan = plan_of(spec)
    text = str(plan)
    assert f"decay: {plan.decay}" in text and plan == plan_of(spec)
    for one in spec.inputs:
        assert re.search(rf"reads .*\b{one.name}\b", text) and re.search(rf"writes .*\bd{one.name}\b", text)
    kernels = {kernel.name for kernel in plan.kernels}
    assert kernels <= set(functions(render(plan)))


def test_no_decay_is_loaded_where_there_is_none():
    kernels = functions(render(plan_of(specs.get("linear"))))
    for name, text in kernels.items():
        assert "b_ld" not in text and "b_en" not in text and "gt" not in re.findall(r"\w+", text), name


def test_a_constant_decay_is_one_number_a_head():
    plan = plan_of(specs.get("retnet"))
    assert plan.decay == "constant" and [x.name for x in plan.tensors if x.is_constant] == ["c0"]
    text = functions(render(plan))["retnet_fwd_kernel"]
    assert "c0" in text and "sum_steps" not in text


def test_the_states_update_loads_no_query():
    plan = plan_of(specs.get("mamba2"))
    assert [x.name for x in plan.state_tensors] == ["k", "v", "dt", "A_log"]
    assert [x.name for x in plan.adjoint_tensors] == ["q", "dt", "A_log"]
    assert "k + " not in functions(render(plan))["mamba2_bwd_state_kernel"]


def test_serial_kernels_of_a_decay_per_key_channel_load_what_is_prepared():
    plan = plan_of(specs.get("gla"))
    assert [x.name for x in plan.value_tensors] == ["v"]
    found = functions(render(plan))
    for name in ("fwd", "dq", "dk", "dv"):
        text = found[f"gla_{name}_kernel"]
        assert not {"q", "k", "g", "scale"} & set(re.findall(r"\w+", text)), name
    assert all(f"tl.store({name} + " in found["gla_prepare_kernel"] for name in ("qd", "kd", "gn", "A"))


def test_gradients_are_texts_of_the_roles_gradients():
    plan = plan_of(specs.get("mamba2"))
    found = {gradient.name: gradient for gradient in plan.gradients}
    assert set(found) == {"q", "k", "v", "dt", "A_log"}
    assert [term[0] for term in found["dt"].terms] == ["factor", "log_decay"]
    assert "b_dfactor" in str(found["dt"].terms) and "DECAY_FLOOR" in str(found["dt"].terms)
    assert found["v"].terms[0].text == "b_dvalue * b_vf[:, None]"
    assert [gradient.name for gradient in plan.fixed_gradients] == ["A_log"]


@EVERY
def test_a_name_of_generated_text_is_no_inputs_name(spec):
    """Whatever text binds, an input may not be called: it would hide it, or be hidden."""
    plan = plan_of(spec)
    own = {x.name for x in plan.tensors}
    # two inputs of which one is named so are refused together
    made = {f"{letter}{name}" for name in own for letter in "de"} | {f"d{name}_sp" for name in own}
    bound = set()
    for node in ast.parse(render(plan)).body:
        if not isinstance(node, ast.FunctionDef):
            continue
        bound.add(node.name)
        if node.name.endswith("_kernel") or node.name in ("fwd", "bwd", "step"):
            bound |= {arg.arg for arg in node.args.args}
            inner = {n for n in ast.walk(node) if isinstance(n, ast.FunctionDef) and n is not node}
            hidden = {id(n) for function in inner for n in ast.walk(function)}
            bound |= {
                n.id
                for n in ast.walk(node)
                if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store) and id(n) not in hidden
            }
    for name in sorted(bound - own - made):
        with pytest.raises(SpecError):
            validate.check_argument_name("s", name)


@pytest.mark.parametrize("name", ["x", "n", "theta", "first", "query", "sum_q", "ct", "angle"])
def test_an_input_named_like_a_block_gets_another_block(name):
    gate = Input(name, "b t h k")
    plan = plan_of(Spec("named", key=k * sigmoid(gate), log_decay=logsigmoid(gate)))
    (tensor,) = (x for x in plan.inputs if x.name == name)
    assert tensor.block == (f"b_{name}" if name == "theta" else f"b_{name}_")
    compile(render(plan), "<rendered>", "exec")


@pytest.mark.parametrize(
    "spec", [spec for spec in ALL if spec.taylor != 2 and not spec.erase], ids=lambda spec: spec.name
)
@pytest.mark.parametrize(("K", "V"), [(60, 24), (24, 60), (5, 6), (128, 40)])
def test_no_block_of_16_bit_operands_is_narrower_than_those_that_are_believed(spec, K, V):
    plan = make_plan(analyse(spec))
    for chunk_size in (None, 64):
        found = schedule(plan, Shape.dense(1, 714, 6, K, V), torch.bfloat16, chunk_size=chunk_size)
        assert min(found.BK, found.BV, found.BF, found.fwd.BV, found.bwd.BV, found.rows.BV) >= 64
    exact = schedule(plan, Shape.dense(1, 714, 6, K, V), torch.float32)
    assert triton.next_power_of_2(max(V, 16)) == exact.BV


TAYLOR = Spec("features", feature_map=taylor(2), log_decay=logsigmoid(Input("g", "b t h")))


@pytest.mark.parametrize(
    ("spec", "K", "dtype", "given", "tokens"),
    [
        # 325 features of a decayed map of order 2 fill 512 rows, of which a chunk of 32 in fp32 takes 64 KiB
        (TAYLOR, 24, torch.float32, None, 16),
        (TAYLOR, 24, torch.float32, 32, 16),
        (TAYLOR, 24, torch.bfloat16, 64, 32),
        (TAYLOR, 5, torch.float32, 64, 32),
        (specs.get("gateloop"), 60, torch.float32, 64, 32),
        (specs.get("gateloop"), 60, torch.bfloat16, 128, 32),
        # a gradient that is a sum over all tokens of sums that begin anew with each chunk
        (Spec("fixed", log_decay=Input("w", "h k", low=-2, high=0)), 64, torch.bfloat16, None, 32),
    ],
)
def test_chunks_are_as_long_as_tiles_allow(spec, K, dtype, given, tokens):
    found = schedule(make_plan(analyse(spec)), Shape.dense(2, 714, 6, K, 64), dtype, chunk_size=given)
    assert tokens == found.fwd.BT and found.LC % tokens == 0
    if spec.name == "fixed":
        assert tokens == found.LC


@pytest.mark.parametrize("name", ["delta_net", "gated_delta_net", "comba", "kda", "rwkv7"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_few_sequences_with_an_erase_are_cut(name, dtype):
    """Where multiprocessors are left for twice the work and more; at checkpoints, both ways alike."""
    plan = make_plan(analyse(specs.get(name)))
    cuts = {}
    for T, H in ((65536, 4), (16384, 16), (512, 4), (8192, 96), (16384, 64)):
        s = schedule(plan, Shape.dense(1, T, H, 128, 128), dtype)
        assert s.fwd_L == s.bwd_L and s.fwd_L % s.LC == 0
        cuts[T, H] = -(-T // s.fwd_L) if s.fwd_L else 1
    assert cuts[512, 4] == cuts[8192, 96] == cuts[16384, 64] == 1
    assert 4 <= cuts[16384, 16] <= 132 // 16 and 8 <= cuts[65536, 4] <= 132 // 4


@pytest.mark.parametrize("name", ["delta_net", "gated_delta_net", "comba", "kda", "rwkv7"])
def test_few_sequences_have_half_a_state_in_a_program(name):
    """As long as each half has a multiprocessor of its own; what starts at every checkpoint has all of a state."""
    plan = make_plan(analyse(specs.get(name)))
    few, many = (schedule(plan, Shape.dense(1, 8192, H, 128, 128), torch.bfloat16) for H in (66, 67))
    assert (few.fwd.BV, many.fwd.BV, many.bwd.BV) == (64, 128, 128)
    assert (few.bwd.BV == 64) == bool(plan.erase_factors)
    assert few.rows == many.rows and few.intra == many.intra and few.bwd_intra == many.bwd_intra
    wider = [schedule(plan, Shape.dense(1, 8192, H, 256, 128), torch.bfloat16) for H in (66, 67)]
    assert (wider[0].fwd, wider[0].bwd) == (wider[1].fwd, wider[1].bwd)


@pytest.mark.parametrize("name", ["delta_net", "gated_delta_net", "comba", "kda", "rwkv7"])
def test_large_states_of_an_erase_are_halved_where_two_chunks_fit(name):
    """256 rows in bf16: 128 columns a program and the next chunk loaded early; with one stage 8 warps go wrong."""
    plan, shape = make_plan(analyse(specs.get(name))), Shape.dense(8, 2048, 32, 256, 256)
    s = schedule(plan, shape, torch.bfloat16)
    assert s.fwd == s.bwd == s.rows and (s.fwd.BV, s.fwd.num_warps, s.fwd.num_stages) == (128, 8, 2)
    for dtype, shared in ((torch.float32, HOPPER.shared), (torch.bfloat16, 64 << 10)):
        small = schedule(plan, shape, dtype, device=HOPPER._replace(shared=shared))
        assert (small.fwd.BV, small.fwd.num_stages, small.rows.num_stages) == (64, 1, 1)

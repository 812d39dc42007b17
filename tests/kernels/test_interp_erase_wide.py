"""Erase with more than 128 key channels in bf16: states in two halves of key channels."""

from __future__ import annotations

import bf16_interpreter
import pytest
import torch
from cases import ALL, make
from harness import compare, pieces

from flagen import specs

WHOLE, PACKED = (256, 64, None), (200, 136, [0, 5, 5, 70])
CASES = [(name, WHOLE) for name in ("delta_net", "gated_delta_net", "comba", "kda", "rwkv7", "low_rank_scalar")]
CASES += [("delta_net", PACKED), ("kda", PACKED)]


@pytest.mark.parametrize(("name", "sizes"), CASES, ids=str)
def test_states_in_two_halves(name, sizes, monkeypatch):
    """Also where the second half is not full, with blocks of V, kept states and states at the start and the end."""
    bf16_interpreter.repair(monkeypatch)
    key, value, cu = sizes
    spec = next(one for one in ALL if one.name == name)
    compare(spec, 1, 70, 1, key, value, cu=cu, dtype=torch.bfloat16, chunk=32, checkpoint=32)


@pytest.mark.parametrize("name", ["delta_net", "kda"])
def test_pieces_of_states_in_two_halves(name, monkeypatch):
    """Gates are weak, so that pieces do not forget what came before."""
    bf16_interpreter.repair(monkeypatch)
    spec, sizes = specs.get(name), (1, 80, 1, 256, 64)
    inputs = [x / 8 if one.name == "g" else x for one, x in zip(spec.inputs, make(spec, *sizes), strict=True)]
    compare(spec, *sizes, inputs=tuple(inputs), dtype=torch.bfloat16, chunk=32, checkpoint=32, patch=pieces(32))

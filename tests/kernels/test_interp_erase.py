"""What is erased, by the kernels under the interpreter: resets of every kind inside a chunk, and keys of any length."""

from __future__ import annotations

import bf16_interpreter
import pytest
import torch
from cases import ALL, extreme, make
from harness import compare, pieces

from flagen import specs

SPANS = [0, 37, 37, 50]


@pytest.mark.parametrize("name", ["gated_delta_net", "comba", "kda", "rwkv7"])
@pytest.mark.parametrize("cu", [None, SPANS], ids=["dense", "packed"])
def test_resets_inside_a_chunk(name, cu):
    """Decays of exp(-30), exp(-100) and 0 among others, per token or per channel: exact, and no gradient is NaN."""
    spec = specs.get(name)
    generator = torch.Generator().manual_seed(5)
    inputs = make(spec, 1, 53, 2, 8, 5, sequences=None if cu is None else 3)
    inputs = tuple(
        extreme(x.shape, generator) if one.name in ("g", "w") else x for one, x in zip(spec.inputs, inputs, strict=True)
    )
    compare(spec, 1, 53, 2, 8, 5, inputs=inputs, cu=cu, chunk=32)


@pytest.mark.parametrize("size", [0.2, 3.0])
def test_keys_of_any_length(size):
    """Where nothing is normalised: a small and a large a, beside b of length 1."""
    spec = next(one for one in ALL if one.name == "low_rank_scalar")
    inputs = make(spec, 1, 40, 1, 8, 5)
    inputs = tuple(x * size if one.name == "a" else x for one, x in zip(spec.inputs, inputs, strict=True))
    compare(spec, 1, 40, 1, 8, 5, inputs=inputs, chunk=32)


@pytest.mark.parametrize("name", ["delta_net", "gated_delta_net", "comba"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tokens_that_take_nothing_away(name, dtype, monkeypatch):
    """A beta of 0, whose gradient is that of any other, among ones up to 2; keys 40 times as long as others."""
    bf16_interpreter.repair(monkeypatch)
    spec = specs.get(name)
    generator = torch.Generator().manual_seed(3)
    inputs = list(make(spec, 1, 45, 2, 40, 20))
    names = [one.name for one in spec.inputs]
    beta, key = names.index("beta"), names.index("k")
    inputs[beta] = 2 * torch.rand(inputs[beta].shape, generator=generator, dtype=inputs[beta].dtype)
    inputs[beta][:, ::3] = 0.0
    inputs[key] = torch.where(torch.arange(45)[:, None, None] % 4 == 1, 40 * inputs[key], inputs[key])
    compare(spec, 1, 45, 2, 40, 20, inputs=tuple(inputs), chunk=32, dtype=dtype)


@pytest.mark.parametrize("name", ["delta_net", "gated_delta_net", "comba", "kda", "rwkv7"])
@pytest.mark.parametrize(
    ("dtype", "cu"), [(torch.bfloat16, None), (torch.float32, [0, 40, 40, 70])], ids=["bf16-dense", "fp32-packed"]
)
def test_what_passes_pieces(name, dtype, cu, monkeypatch):
    """More key channels than a piece has tokens, so that no piece erases all that came before; and several blocks of
    the products with what takes states through."""
    bf16_interpreter.repair(monkeypatch)
    sizes = (1 if cu else 2, 75, 3, 100, 20)
    inputs = make(specs.get(name), *sizes, sequences=len(cu) - 1 if cu else None)
    weak = [x / 8 if one.name in ("g", "w") else x for one, x in zip(specs.get(name).inputs, inputs, strict=True)]
    compare(specs.get(name), *sizes, inputs=tuple(weak), cu=cu, patch=pieces(32), dtype=dtype)

"""What is erased, with a decay per key channel and bf16 operands: pairs are taken by quotients of decays and, where
those are too strong, by the product tree. Up to 32 key channels operands are fp32, and the tree takes all.
"""

from __future__ import annotations

import math

import bf16_interpreter
import pytest
import torch
from cases import ALL, extreme, make
from harness import backend_of, compare, rounded_inputs

from flagen import specs

SPANS = [0, 37, 37, 50]
NAMES = ["kda", "rwkv7", "delta_key_previous", "delta_fixed_key", "reflected"]


@pytest.fixture(autouse=True)
def _repaired(monkeypatch):
    bf16_interpreter.repair(monkeypatch)


def _spec(name):
    return next(one for one in ALL if one.name == name)


def _inputs(spec, tokens, heads, key, value, decays, sequences=None):
    """decays: makes those that are given as log decays, from a shape and a generator."""
    generator = torch.Generator().manual_seed(5)
    inputs = make(spec, 1, tokens, heads, key, value, sequences=sequences)
    pairs = zip(spec.inputs, inputs, strict=True)
    return tuple(decays(x.shape, generator) if one.name in ("g", "w") else x for one, x in pairs)


def _few_resets(shape, generator):
    """Weak decays, and a reset of one channel at one token of the first chunk."""
    values = -0.2 * torch.rand(shape, generator=generator, dtype=torch.float64)
    values[:, 11, :, 3] = -math.inf
    return values


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cu", [None, SPANS], ids=["dense", "packed"])
def test_channels_in_blocks(name, cu):
    """Two blocks of key channels, the second in part; the norms are those of all channels."""
    compare(_spec(name), 1, 53, 2, 72, 20, cu=cu, chunk=32, dtype=torch.bfloat16, gates=torch.float32)


@pytest.mark.parametrize("name", ["kda", "rwkv7"])
@pytest.mark.parametrize("decays", [extreme, _few_resets], ids=["all", "few"])
@pytest.mark.parametrize("gates", [torch.float32, torch.bfloat16], ids=str)
def test_resets_inside_a_chunk(name, decays, gates):
    spec = specs.get(name)
    inputs = _inputs(spec, 53, 2, 40, 20, decays, sequences=3)
    compare(spec, 1, 53, 2, 40, 20, inputs=inputs, cu=SPANS, chunk=32, dtype=torch.bfloat16, gates=gates)


@pytest.mark.parametrize("name", ["kda", "rwkv7"])
def test_a_reset_changes_no_bit_before_it(name):
    """A token whose decay no quotient holds: outputs before it, and gradients where no loss looks at it, keep every
    bit, but for the decay's.
    """
    spec = specs.get(name)
    weak = rounded_inputs(spec, _inputs(spec, 32, 1, 40, 20, _weak), torch.bfloat16, torch.float32)
    at = 19
    strong = tuple(x.clone() for x in weak)
    place = [one.name in ("g", "w") for one in spec.inputs].index(True)
    strong[place][:, at, :, 1:5] = -math.inf
    backend = backend_of(spec, chunk=32)
    found = []
    for inputs in (weak, strong):
        out = backend.forward(inputs, (), 0.2, (), None, True, True)
        do = torch.randn(out.o.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
        do[:, at:] = 0
        none = (None,) * len(out.final)
        got, _ = backend.backward(do, none, out.o, out.saved, inputs, (), 0.2, (), None, (True,) * len(inputs), False)
        found.append((out.o, *got))
    for i, (x, y) in enumerate(zip(*found, strict=True)):
        assert x[:, :at].any()
        if i != place + 1:
            assert torch.equal(x[:, :at], y[:, :at]), i
    assert not torch.equal(found[0][0][:, at:], found[1][0][:, at:])


def _weak(shape, generator):
    return -0.2 * torch.rand(shape, generator=generator, dtype=torch.float64)

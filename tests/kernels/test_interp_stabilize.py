"""Exponential gates under the interpreter: what would overflow, several pieces of a sequence, and nothing at all."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

import flagen
from flagen import reference, specs
from flagen.samples import make_inputs
from flagen.spec import SpecWarning

MLSTM = specs.get("mlstm")


def plain():
    """The same recurrence, held as it is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SpecWarning)
        return MLSTM.replace("mlstm_plain", stabilize=None)


def hostile(T, H=4):
    """Gates up to e^80 and down to nothing, resets, a masked start, a head of small gates and one of none."""
    found = make_inputs(MLSTM, B=1, T=T, H=H, K=4, V=5)
    gate, forget = found["ig"], found["fg"]
    gate[:, 7:9], gate[:, 20] = 80.0, -math.inf
    gate[:, :3, 1] = -math.inf
    gate[:, :, 2] -= 100.0
    gate[:, :, 3] = -math.inf
    forget[:, 30], forget[:, 35] = -math.inf, -100.0
    return found


@pytest.mark.parametrize("cu_seqlens", [None, [0, 11, 11, 37]], ids=["dense", "packed"])
def test_no_gate_overflows(cu_seqlens):
    limits = None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32)
    narrow = [x.requires_grad_() for x in hostile(40).values()]
    wide = [x.detach().double().requires_grad_() for x in narrow]
    op = flagen.compile(MLSTM, backend="triton")
    o, (S, z, m) = op(*narrow, output_final_state=True, cu_seqlens=limits)
    want, (last, _) = reference.run(plain(), wide, output_final_state=True, cu_seqlens=cu_seqlens)
    assert all(x.isfinite().all() for x in (o, S, z, m))
    torch.testing.assert_close(o, want.float(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(S * m.double().exp()[..., None, None], last, rtol=1e-3, atol=1e-8)
    assert not o[:, :, 3].any()
    do = torch.randn(o.shape, generator=torch.Generator().manual_seed(3))
    found = torch.autograd.grad(o, narrow, do), torch.autograd.grad(want, wide, do.double())
    for one, x, y in zip(MLSTM.inputs, *found, strict=True):
        assert x.isfinite().all(), one.name
        assert (x - y).norm() <= 1e-3 * y.norm(), one.name


@pytest.mark.parametrize("cu_seqlens", [None, [0, 3, 3, 1500, 2300]], ids=["dense", "packed"])
def test_pieces_of_the_gates_are_the_whole(cu_seqlens):
    """m is found in pieces of 1024 tokens: across their bounds it is what it is token by token."""
    from flagen.analysis import analyse
    from flagen.compiler import prepare
    from flagen.load import load
    from flagen.torch_roles import Sizes
    from flagen.torch_stabilize import gauges

    x = tuple(make_inputs(MLSTM, B=1, T=2304, H=2, K=4, V=4).values())
    x[3][:, 1030:1040, 0] += 50  # a gate that the second piece hands on to the third
    limits = None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32)
    rows = 1 if cu_seqlens is None else len(cu_seqlens) - 1
    before = torch.randn(rows, 2, generator=torch.Generator().manual_seed(5)) * 30
    got = load(prepare(MLSTM)[1]).peaks(*x, before, limits)
    analysis = analyse(MLSTM)
    want = gauges(analysis, x, (), Sizes.of(analysis.inputs, x), before, limits)
    end = 2304 if cu_seqlens is None else 2300
    for mine, theirs in zip(got[:2], want[:2], strict=True):
        torch.testing.assert_close(mine[:, :end], theirs[:, :end], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(got[2], want[2], rtol=1e-5, atol=1e-4)

"""Offsets past 2^31 elements with the Triton kernels under the interpreter: inputs of huge strides in memory that is
mapped and never touched, where a product taken in 32 bits would read zeros instead.
"""

from __future__ import annotations

import mmap

import pytest
import torch
from hostile import INTERPRETER, NAMED, Run, inputs_of
from triton.runtime import interpreter

NORESERVE = 0x4000  # Linux: pages are counted when they are touched
ELEMENTS = 3 << 31  # of fp32
BASE = 1 << 31  # where tensors begin: a wrapped offset is as far before it at most


@pytest.fixture(scope="module")
def plain():
    """ELEMENTS zeros, none of which is there before it is written."""
    try:
        room = mmap.mmap(-1, ELEMENTS * 4, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    except OSError as error:
        pytest.skip(f"no address space for {ELEMENTS * 4 >> 30} GiB: {error}")
    return torch.frombuffer(room, dtype=torch.float32)


@pytest.fixture(autouse=True)
def _no_copies(monkeypatch):
    """The interpreter copies storages back to where they came from, whole, which on a CPU is where they are."""
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *arguments: None)


def _spread(plain, x, axes, far, at):
    """x with a stride of `far` elements in each of the axes "b t h" that `far` has, from BASE + at on."""
    strides = [far.get(axis, stride) for axis, stride in zip(axes, x.contiguous().stride(), strict=True)]
    found = plain.as_strided(x.shape, strides, BASE + at)
    assert BASE + at + sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True)) < ELEMENTS
    return found.copy_(x)


TIME = (1, 18, 1, {"t": (1 << 27) + 4096})
BATCH, HEADS = (3, 2, 1, {"b": (1 << 30) + 4096}), (1, 2, 3, {"h": (1 << 30) + 4096})


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *((name, TIME) for name in ("scalar", "rwkv6", "phase_key_u", "key_u_norm")),
        *(("rwkv6", form) for form in (BATCH, HEADS)),
        *(("scalar", form) for form in (BATCH, HEADS)),
    ],
    ids=lambda x: x if isinstance(x, str) else "".join(x[-1]),
)
def test_strides(plain, name, form):
    """An offset is a product of an index and a stride, which is below 2^31 itself."""
    spec, (batch, time, heads, far) = NAMED[name], form
    inputs = inputs_of(INTERPRETER, spec, batch, time, heads=heads)
    run = Run(INTERPRETER, spec, inputs)
    moved = [
        _spread(plain, x, one.axes, far if "t" in one.axes else {}, 1024 * i)
        for i, (x, one) in enumerate(zip(inputs, spec.inputs, strict=True))
    ]
    assert any(x.stride() != y.stride() for x, y in zip(inputs, moved, strict=True))
    assert sum((n - 1) * s for n, s in zip(moved[0].shape, moved[0].stride(), strict=True)) >= 1 << 31
    other = Run(INTERPRETER, spec, tuple(moved))
    other.do = _spread(plain, run.do, "bthv", far, 1024 * len(moved))
    want, got = run.everything(), other.everything()
    assert all(torch.equal(x, got[name]) for name, x in want.items())
    for x in (*moved, other.do):
        x.zero_()

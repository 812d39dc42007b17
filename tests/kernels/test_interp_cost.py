"""The counts of the cost model against kernels that run: products and bytes that Triton's interpreter is asked for."""

from __future__ import annotations

from collections import Counter

import cases
import harness
import numpy as np
import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder

from flagen import compiler, cost, cost_trace
from flagen.cost_launch import Argument, Launch, trace
from flagen.cost_work import Block
from flagen.schedule import HOPPER, Shape

B, T, H, K, V = 1, 64, 2, 16, 32  # no size needs padding: masks, which the model does not evaluate, hide nothing
NAMES = ("retnet", "gla", "mamba2", "gateloop", "value_u", "key_u_norm", "taylor_1", "shared")
CHOSEN = [spec for spec in cases.ALL if spec.name in NAMES]


@pytest.fixture
def counted(monkeypatch):
    """What all programs of all launches ask for: flops, and bytes that are loaded and stored."""
    found = Counter()

    def watched(name, note):
        real = getattr(InterpreterBuilder, name)

        def stand_in(self, *args, **kwargs):
            note(*args)
            return real(self, *args, **kwargs)

        monkeypatch.setattr(InterpreterBuilder, name, stand_in)

    def dot(a, b, *_):
        found["flops"] += 2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1]

    def size(pointers):
        return pointers.dtype.scalar.element_ty.primitive_bitwidth // 8 * np.size(pointers.data)

    def loaded(pointers, *_):
        found["read"] += size(pointers)

    def stored(pointers, *_):
        found["written"] += size(pointers)

    watched("create_dot", dot)
    watched("create_masked_load", loaded)
    watched("create_masked_store", stored)
    return found


def traced(spec, backend, change=None):
    inputs = cost.meta_inputs(spec, Shape.dense(B, T, H, K, V), torch.float32)
    _, entry = compiler.prepare(spec)
    found = trace(backend.plan, backend.module, entry.source, inputs, HOPPER, change, chunk_size=16, checkpoint=32)
    return found, entry.source


def counts(calls, source):
    """The sums over all programs of the launches, each program counted."""
    found = Counter()
    for launch in calls.launches:
        if not isinstance(launch, Launch):
            continue
        arguments = {name: Block((), one.dtype, name) if isinstance(one, Argument) else one
                     for name, one in launch.arguments.items()}  # fmt: skip
        for x in range(launch.grid[0]):
            for y in range(launch.grid[1]):
                for z in range(launch.grid[2]):
                    work, _ = cost_trace.count(source, launch.kernel, arguments, (x, y, z))
                    found["flops"] += sum(work.flops.values())
                    found["read"] += sum(work.reads.values())
                    found["written"] += sum(work.writes.values())
    return found


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "pieces"])
@pytest.mark.parametrize("spec", CHOSEN, ids=lambda spec: spec.name)
def test_counts_are_what_kernels_ask_for(spec, cut, counted):
    patch = harness.pieces(32) if cut else harness.pieces(0)
    backend = harness.backend_of(spec, patch=patch)
    calls, source = traced(spec, backend, patch)
    inputs = tuple(x.float() for x in cases.make(spec, B, T, H, K, V))
    constants = tuple(x.float() for x in cases.constants_of(backend.plan.analysis, H))
    plan = backend.plan
    out = backend.forward(inputs, constants, 0.5, (), None, False, True)
    forward = Counter(counted)
    assert forward == counts(calls.training, source)
    counted.clear()
    ends = (None,) * (1 + plan.normalized)
    backend.backward(torch.ones_like(out.o), ends, out.o, out.saved, inputs, constants, 0.5, (), None,
                     (True,) * len(inputs), False)  # fmt: skip
    assert Counter(counted) == counts(calls.backward, source)
    counted.clear()
    states = harness.narrow_states(cases.make_states(spec, B, H, K, V))
    now = tuple(x.narrow(1, 0, 1) if "t" in one.axes else x for x, one in zip(inputs, spec.inputs, strict=True))
    backend.step(now, constants, 0.5, states)
    assert Counter(counted) == counts(calls.step, source)

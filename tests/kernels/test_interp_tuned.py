"""Candidates of the search for better schedules on kernels that run: each must be right, however quick it is."""

from __future__ import annotations

import harness
import pytest
import torch

import flagen
from flagen import specs
from flagen.bench import make_inputs
from flagen.compiler import prepare
from flagen.schedule import Shape
from flagen.triton_backend import TritonBackend
from flagen.tuned_search import PARTS, Bench, candidates, search


@pytest.mark.parametrize(("name", "shape"), [("retnet", (1, 70, 1, 16, 32)), ("gla", (1, 40, 1, 16, 16))])
def test_candidates_are_right(name, shape):
    shape = Shape.dense(*shape)
    spec = specs.get(name)
    plan, _ = prepare(spec)
    _, module = harness.generated(spec)
    op = flagen.compile(spec, backend="triton")
    inputs = make_inputs(spec, shape, torch.float32, "cpu", {})
    bench = Bench(op, inputs, lambda: TritonBackend(plan, module))
    said = []
    seen = set()

    def timer(run):
        seen.add(run)
        return 1.0 + 1e-3 * len(seen)

    found = search(bench, shape, torch.float32, timer, said.append, rounds=1)
    for part, one in zip(PARTS, found, strict=True):
        assert one.refused == {}, said
        assert one.choice == {}
        assert len(one.times) == 1 + len(candidates(bench.backend({}).schedule(bench.inputs, shape), shape, part)) >= 3

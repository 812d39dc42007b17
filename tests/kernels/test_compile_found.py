"""Chunks that runs on a GPU have found too long, compiled for sm_90: the launchers take as many tokens as fit."""

from __future__ import annotations

import aot
import pytest
import torch
from compile_cases import DEVICES
from random_specs import found_trials

from flagen import compiler, triton_backend
from flagen.load import load
from flagen.samples import gates
from flagen.triton_backend import TritonBackend

NAMES = (
    "chunks too long for fp32", "chunks too long for features", "an erase in chunks too long",
    "l2norm of an input as it is", "features too wide for fp32",
)  # fmt: skip
FOUND = found_trials()


def kernels_of(trial):
    """What a training step of the trial launches."""
    plan, entry = compiler.prepare(trial.spec)
    backend, heads = TritonBackend(plan, load(entry), trial.chunk_size), dict(trial.heads)
    inputs = []
    for one in trial.spec.inputs:
        sizes = {"b": trial.B, "t": trial.T, "h": heads.get(one.name, trial.H), "k": trial.K, "v": trial.V}
        kind = trial.gate_dtype if trial.gate_dtype and one in gates(trial.spec) else trial.dtype
        inputs.append(torch.empty([sizes[axis] for axis in one.axes], dtype=getattr(torch, kind), device="meta"))
    constants = tuple(torch.empty(trial.H, device="meta") for _ in plan.analysis.constants)
    needs = (True,) * len(inputs)
    with aot.compiling("sm_90") as found:
        out = backend.forward(tuple(inputs), constants, 1.0, (), None, True, True)
        backend.backward(
            out.o, out.final, out.o, out.saved, tuple(inputs), constants, 1.0, out.final, None, needs, True
        )
    return found


@pytest.mark.filterwarnings("ignore::flagen.spec.SpecWarning")
@pytest.mark.parametrize("name", NAMES)
def test_what_was_found_fits(name, monkeypatch):
    monkeypatch.setattr(triton_backend, "device_of", lambda device: DEVICES["sm_90"])
    found = kernels_of(FOUND[name])
    assert len(found) >= 2
    assert {one.metadata.name: one.metadata.shared for one in found if one.metadata.shared > aot.SHARED["sm_90"]} == {}

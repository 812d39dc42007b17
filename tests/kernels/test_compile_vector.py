"""The kernels of vector states, compiled for every target."""

from __future__ import annotations

import dataclasses
from collections import defaultdict

import aot
import pytest
import torch
from cases import SHIPPED_VECTORS
from compile_cases import DEVICES, too_large

from flagen import compiler, specs, triton_vector
from flagen.load import load
from flagen.triton_vector import VectorTritonBackend

SHAPES = {"bf16": (2048, torch.bfloat16), "fp32": (2048, torch.float32), "odd": (100, torch.bfloat16)}
CASES = [(target, "bf16") for target in DEVICES] + [("sm_90", "odd"), ("sm_90", "fp32"), ("gfx942", "fp32")]


def compiled(spec, target, shape, monkeypatch):
    """The kernels by name: of a training step in pieces, for sm_90 also in one piece, and of decode."""
    monkeypatch.setattr(triton_vector, "device_of", lambda device: DEVICES[target])
    plan, entry = compiler.prepare(spec)
    backend = VectorTritonBackend(plan, load(entry))
    D, dtype = SHAPES[shape]
    sizes = {"b": 2, "t": 4096, "d": D}
    inputs, now = (
        tuple(torch.empty([own[axis] for axis in one.axes], dtype=dtype, device="meta") for one in spec.inputs)
        for own in (sizes, sizes | {"t": 1})
    )
    decided = backend.schedule
    with aot.compiling(target) as found:
        for tokens in (1024, 0) if target == "sm_90" else (1024,):
            backend.schedule = lambda x, s, tokens=tokens: dataclasses.replace(decided(x, s), L=tokens)
            out = backend.forward(inputs, (), 1.0, (), None, True, True)
            backend.backward(
                out.o, out.final, out.o, out.saved, inputs, (), 1.0, out.final, None, (True,) * len(inputs), True
            )
        backend.step(now, (), 1.0, tuple(torch.empty_like(x) for x in out.final))
    kernels = defaultdict(list)
    for kernel in found:
        kernels[kernel.metadata.name.removeprefix(f"{spec.name}_")].append(kernel)
    return plan, kernels


@pytest.mark.parametrize(("target", "shape"), CASES)
@pytest.mark.parametrize("name", [spec.name for spec in SHIPPED_VECTORS])
def test_every_kernel_compiles_and_fits(name, target, shape, monkeypatch):
    plan, kernels = compiled(specs.get(name), target, shape, monkeypatch)
    needed = {kernel.name.removeprefix(f"{name}_") for kernel in plan.kernels}
    assert needed <= set(kernels), f"not launched: {needed - set(kernels)}"
    assert not too_large(kernels, target)
    if target == "sm_90":
        stacks = {key: max(aot.resources(kernel)["stack"] for kernel in found) for key, found in kernels.items()}
        assert max(stacks.values()) <= 64, f"bytes of stack a thread: {stacks}"
    if (target, shape) == ("sm_90", "bf16") and not plan.complex:
        # two channels of 16 bits a thread are read at once; a thread has one complex channel
        forward = kernels["fwd_kernel"][-1].asm["ptx"]
        assert "ld.global.b32" in forward and "ld.global.b16" not in forward

"""The kernels of the specs without a decay per channel, compiled for every target."""

from __future__ import annotations

import pytest
import torch
from compile_cases import CASES, check, compiled, too_large

from flagen import specs


@pytest.mark.parametrize(("target", "shape"), CASES)
@pytest.mark.parametrize("name", ["retnet", "transnormer", "mamba2", "linear", "mlstm"])
def test_every_kernel_compiles_and_fits(name, target, shape, monkeypatch):
    check(specs.get(name), target, shape, monkeypatch)


@pytest.mark.parametrize(("name", "target"), [("retnet", "sm_90"), ("mamba2", "sm_90"), ("linear", "sm_100")])
def test_three_chunks_of_256_channels_fit(name, target, monkeypatch):
    kernels = compiled(specs.get(name), target, monkeypatch, B=1, T=8192, H=96, K=256, V=256, dtype=torch.bfloat16)
    ahead = {kernel for kernel, found in kernels.items() if found[0].metadata.num_stages == 3}
    assert {"dq_kernel", "dk_kernel"} <= ahead
    assert not too_large(kernels, target)

"""The kernels of the specs without a decay per channel, compiled for every target."""

from __future__ import annotations

import pytest
from compile_cases import CASES, check

from flagen import specs


@pytest.mark.parametrize(("target", "shape"), CASES)
@pytest.mark.parametrize("name", ["retnet", "transnormer", "mamba2", "linear"])
def test_every_kernel_compiles_and_fits(name, target, shape, monkeypatch, request):
    if (name, target, shape) == ("mamba2", "sm_100", "bf16"):
        # Triton 3.7.1 fails in its own pass TritonNvidiaGPUOptimizeTMemLayouts; strict, so that a cure is noticed
        request.applymarker(pytest.mark.xfail(strict=True, raises=Exception, reason="Triton 3.7.1, sm_100"))
    check(specs.get(name), target, shape, monkeypatch)

"""The kernels of the specs that erase, compiled for every target."""

from __future__ import annotations

import pytest
import triton
from compile_cases import CASES, check

from flagen import specs

NAMES = ("delta_net", "gated_delta_net", "kda", "comba", "rwkv7")
# a minute each at the usual size
SMALLER = {(name, "gfx942", "bf16"): "half" for name in ("kda", "rwkv7")}


@pytest.mark.parametrize(
    ("name", "target", "shape"),
    [(name, target, SMALLER.get((name, target, shape), shape)) for name in NAMES for target, shape in CASES],
)
def test_every_kernel_compiles_and_fits(name, target, shape, monkeypatch, request):
    before_3_8 = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8)
    if (name, target, shape) == ("comba", "sm_100", "bf16") and before_3_8:
        # the same pass of Triton's own fails as for mamba2, see test_compile_rows
        request.applymarker(pytest.mark.xfail(strict=True, raises=Exception, reason="Triton before 3.8, sm_100"))
    check(specs.get(name), target, shape, monkeypatch)

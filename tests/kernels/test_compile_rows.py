"""The kernels of the specs without a decay per channel, compiled for every target."""

from __future__ import annotations

import pytest
from compile_cases import CASES, check

from flagen import specs


@pytest.mark.parametrize(("target", "shape"), CASES)
@pytest.mark.parametrize("name", ["retnet", "transnormer", "mamba2", "linear", "mlstm"])
def test_every_kernel_compiles_and_fits(name, target, shape, monkeypatch):
    check(specs.get(name), target, shape, monkeypatch)

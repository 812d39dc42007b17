"""The kernels of gateloop, whose states are complex, compiled for every target."""

from __future__ import annotations

import pytest
from compile_cases import SLOW_CASES, check

from flagen import specs


@pytest.mark.parametrize(("target", "shape"), SLOW_CASES)
@pytest.mark.parametrize("name", ["gateloop"])
def test_every_kernel_compiles_and_fits(name, target, shape, monkeypatch):
    check(specs.get(name), target, shape, monkeypatch)

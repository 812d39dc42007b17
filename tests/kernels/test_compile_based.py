"""The kernels of based, whose states are of Taylor features, compiled for every target."""

from __future__ import annotations

import pytest
from compile_cases import SLOW_CASES, check

from flagen import specs


@pytest.mark.parametrize(("target", "shape"), SLOW_CASES)
@pytest.mark.parametrize("name", ["based"])
def test_every_kernel_compiles_and_fits(name, target, shape, monkeypatch):
    check(specs.get(name), target, shape, monkeypatch)

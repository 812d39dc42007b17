"""The kernels of hgrn2, compiled for every target; the files beside this one hold the other specs."""

from __future__ import annotations

from pathlib import Path

import pytest
from cases import SHIPPED
from compile_cases import CASES, check

from flagen import specs


@pytest.mark.parametrize(("target", "shape"), CASES)
@pytest.mark.parametrize("name", ["hgrn2"])
def test_every_kernel_compiles_and_fits(name, target, shape, monkeypatch):
    check(specs.get(name), target, shape, monkeypatch)


def test_no_spec_is_left_out():
    texts = [path.read_text() for path in Path(__file__).parent.glob("test_compile_*.py")]
    assert all(any(f'"{spec.name}"' in text for text in texts) for spec in SHIPPED)

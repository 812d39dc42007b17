"""Heads in groups under the interpreter: q and k with fewer heads than v, and the reverse, with states and decode."""

from __future__ import annotations

import pytest
import torch

from flagen import specs
from flagen.testing import check

FEW = {
    "mamba2": ({"q": 1, "k": 2}, {"v": 1, "dt": 2}),
    "gla": ({"q": 2, "k": 2, "g": 1}, {"v": 2}),
    "mlstm": ({"q": 2, "k": 1}, {"v": 1, "ig": 2}),
}


@pytest.mark.parametrize("few", [0, 1], ids=["keys", "values"])
@pytest.mark.parametrize("name", FEW)
def test_against_the_reference(name, few):
    sizes = {"B": 1, "T": 35, "H": 4, "K": 8, "V": 12, "decode": 1}
    check(specs.get(name), backend="triton", device="cpu", heads=FEW[name][few], dtype=torch.float32, **sizes)

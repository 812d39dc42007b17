"""Under Triton's interpreter, loads and stores that lie outside all tensors of their launch are errors.

The interpreter itself reads and writes wherever that happens to be mapped; a GPU may stop with an illegal address.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder


def watch(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Until the test's end such accesses raise; returns how many there were of each load and store."""
    counts: list[int] = []
    spans = np.zeros((0, 2), np.int64)  # first address and the one past the last, of each storage, in order
    start, load, store = (
        GridExecutor._init_args_hst,
        InterpreterBuilder.create_masked_load,
        InterpreterBuilder.create_masked_store,
    )

    def starting(self: Any, args: Any, kwargs: Any) -> Any:
        nonlocal spans
        found = start(self, args, kwargs)
        storages = [x.untyped_storage() for x in (*found[0], *found[1].values()) if isinstance(x, torch.Tensor)]
        ends = {one.data_ptr(): one.data_ptr() + one.nbytes() for one in storages}
        spans = np.array(sorted(ends.items()), np.int64).reshape(-1, 2)
        return found

    def inside(pointers: np.ndarray, mask: np.ndarray, size: int, what: str) -> None:
        first = pointers[np.broadcast_to(mask, pointers.shape).astype(bool)].astype(np.int64)
        at = np.searchsorted(spans[:, 0], first, side="right") - 1
        wrong = (at < 0) | (first + size > spans[np.maximum(at, 0), 1])
        assert not wrong.any(), f"{what} of {int(wrong.sum())} elements outside the launch's tensors"
        counts.append(first.size)

    def loading(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        inside(pointers.data, mask.data, max(1, pointers.get_element_ty().primitive_bitwidth // 8), "load")
        return load(self, pointers, mask, *rest)

    def storing(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        inside(pointers.data, mask.data, value.data.dtype.itemsize, "store")
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(GridExecutor, "_init_args_hst", starting)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", loading)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", storing)
    return counts

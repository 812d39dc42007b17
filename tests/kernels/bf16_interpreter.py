"""Repairs bf16 in Triton's interpreter (3.7.1), which keeps it as uint16: arithmetic and products take its bits,
casts from fp32 truncate, and casts from integers keep the integer's bits. fp16 and fp32 are right without it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle


def widen(bits: np.ndarray) -> np.ndarray:
    """bf16 in uint16 -> fp32, exactly."""
    return (np.asarray(bits, dtype=np.uint16).astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """Numbers -> bf16 in uint16, to nearest, ties to even; NaN stays NaN."""
    values = np.asarray(values).astype(np.float32)
    bits = np.ascontiguousarray(values).view(np.uint32).reshape(values.shape)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _is_bf16(handle: Any) -> bool:
    return not isinstance(handle.dtype, tl.pointer_type) and handle.dtype.scalar == tl.bfloat16


def _wide(handle: Any) -> np.ndarray:
    return widen(handle.data) if _is_bf16(handle) else handle.data


def repair(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the test's end the interpreter computes with bf16 as a GPU does: in fp32, rounded after each operation."""
    cast, binary, ternary, unary, fma, dot = (
        getattr(InterpreterBuilder, name)
        for name in ("cast_impl", "binary_op", "ternary_op", "unary_op", "create_fma", "create_dot")
    )  # fmt: skip
    total = ReduceOps.sum

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if tl.bfloat16 not in (src.dtype.scalar, dst_type.scalar):
            return cast(self, src, dst_type)
        values = _wide(src)
        if dst_type.scalar == tl.bfloat16:
            return TensorHandle(src.data if _is_bf16(src) else narrow(values), tl.bfloat16)
        return TensorHandle(values.astype(interpreter._get_np_dtype(dst_type)), dst_type.scalar)

    def rounded(operation: Any, *handles: Any) -> Any:
        """`operation` in fp32 if any handle is bf16; what is no number, as that of a comparison, is left as it is."""
        found = operation(*(TensorHandle(_wide(x), tl.float32) if _is_bf16(x) else x for x in handles))
        if not any(map(_is_bf16, handles)) or found.data.dtype == np.bool_:
            return found
        return TensorHandle(narrow(found.data), tl.bfloat16)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        a, b = (TensorHandle(_wide(x), tl.float32) if _is_bf16(x) else x for x in (a, b))
        return rounded(lambda d: dot(self, a, b, d, *rest), d)

    def reduced_sum(self: Any, given: Any) -> Any:
        if given.dtype.scalar != tl.bfloat16:
            return total(self, given)
        return self.to_tensor(narrow(np.sum(widen(given.handle.data), self.axis, keepdims=self.keep_dims)), tl.bfloat16)

    def patch(name: str, function: Any) -> None:
        monkeypatch.setattr(InterpreterBuilder, name, function, raising=False)

    patch("cast_impl", cast_impl)
    patch("binary_op", lambda self, lhs, rhs, op: rounded(lambda x, y: binary(self, x, y, op), lhs, rhs))
    patch("ternary_op", lambda self, x, y, z, op: rounded(lambda x, y, z: ternary(self, x, y, z, op), x, y, z))
    patch("unary_op", lambda self, x, op: rounded(lambda x: unary(self, x, op), x))
    patch("create_fma", lambda self, x, y, z: rounded(lambda x, y, z: fma(self, x, y, z), x, y, z))
    patch("create_dot", create_dot)
    patch("get_bf16", lambda self, value: TensorHandle(narrow(np.array([value])), tl.bfloat16))
    monkeypatch.setattr(ReduceOps, "sum", reduced_sum)

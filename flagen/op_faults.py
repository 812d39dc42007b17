"""What is wrong with the inputs of a call: the slow half of checks, which only a wrong call comes to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .expr import Input

FLOATS = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
SIZES = {"b": "B", "n": "N", "t": "T", "h": "H", "k": "K", "v": "V", "d": "D"}


def is_dense(x: Any) -> bool:
    """Whether x is a tensor whose elements have an address and strides."""
    return isinstance(x, Tensor) and x.layout is torch.strided and not x.is_nested


def not_dense(x: Tensor) -> str:
    """What is wrong with a tensor that is not."""
    kind = "nested" if x.is_nested else str(x.layout).removeprefix("torch.").removeprefix("_")
    remedy = (
        "pack its sequences into one row, with their bounds as cu_seqlens" if x.is_nested else "convert it: .to_dense()"
    )
    return f"must be a dense tensor, got a {kind} one; {remedy}"


def refuse(
    name: str, declared: Sequence[Input], axes_of: Sequence[str], tensors: Sequence[Any], cu_seqlens: Any
) -> NoReturn:
    """Says which tensor is at fault. One size per axis is right: the one that most tensors have."""
    named = list(zip(declared, axes_of, tensors, strict=True))
    for one, _, x in named:
        _check_kind(name, declared, one, x)
    lead, device = declared[0].name, tensors[0].device
    for one, _, x in named:
        if x.device != device:
            raise ValueError(
                f"{name}: {one.name} is on {x.device} and {lead} on {device}; all tensors must be on one "
                f"device: {one.name}.to({lead}.device)"
            )
    found: dict[str, Counter[int]] = {}
    for _, axes, x in named:
        for axis, n in zip(axes, x.shape, strict=False) if x.dim() == len(axes) else ():
            found.setdefault(axis, Counter())[n] += 1
    size = {axis: counts.most_common(1)[0][0] for axis, counts in found.items()}
    packed = isinstance(cu_seqlens, Tensor) and cu_seqlens.dim() == 1
    size["n"] = cu_seqlens.shape[0] - 1 if packed else size.get("b", 1)
    # heads are counted where they are surely heads: a tensor may have heads first
    sure = [(axes, x.shape) for _, axes, x in named if x.dim() == len(axes) and "h" in axes]
    sure = [one for one in sure if "t" not in one[0] or one[1][one[0].index("t")] == size["t"]] or sure
    if sure:
        size["h"] = max(shape[axes.index("h")] for axes, shape in sure)
    for one, axes, x in named:
        _check_shape(name, one, axes, tuple(x.shape), size)
    for one, axes, x in named:
        if "h" in axes:
            _check_heads(name, one, axes, x, size["h"], named)
    raise ValueError(f"{name}: {[tuple(x.shape) for x in tensors]} are no shapes of one call")


def _check_kind(name: str, declared: Sequence[Input], one: Input, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{name}: {one.name} must be a tensor of shape {symbols(one.axes)}, got {type(x).__name__}; the "
            f"tensors are {', '.join(one.name for one in declared)}, in this order"
        )
    if not is_dense(x):
        raise ValueError(f"{name}: {one.name} {not_dense(x)}")
    if x.dtype not in FLOATS:
        remedy = f"convert it: {one.name}.float()"
        if x.is_complex():
            remedy = "only the state can be complex: give the angle of a decay as the phase of a spec"
        raise ValueError(
            f"{name}: {one.name} must be float16, bfloat16, float32 or float64, got "
            f"{str(x.dtype).removeprefix('torch.')}; {remedy}"
        )


def _check_shape(name: str, one: Input, axes: str, shape: tuple[int, ...], size: dict[str, int]) -> None:
    known = all(axis in size for axis in axes)
    want = tuple(size.get(axis, 1) for axis in axes)
    if len(shape) == len(axes):
        pairs = zip(axes, shape, want, strict=True)
        # any divisor of H will do; other counts have a message of their own
        want = tuple(n if axis == "h" and not (n and n > m) else m for axis, n, m in pairs)
    if shape == want:
        return
    form = symbols(axes) + (f" = {want}" if known else "")
    raise ValueError(f"{name}: {one.name} must have shape {form}, got {shape}.\n    {_remedy(one, axes, shape, want)}")


def _check_heads(
    name: str, one: Input, axes: str, x: Tensor, most: int, named: Sequence[tuple[Input, str, Tensor]]
) -> None:
    heads = x.shape[axes.index("h")]
    if heads and most % heads == 0:
        return
    lead = next(other.name for other, its, y in named if "h" in its and y.shape[its.index("h")] == most)
    divisors = ", ".join(str(n) for n in range(1, most + 1) if most % n == 0)
    raise ValueError(
        f"{name}: {one.name} has {heads} heads, which do not divide the {most} of {lead}, got shape "
        f"{tuple(x.shape)}; it may have {divisors}"
    )


def symbols(axes: str) -> str:
    """Axes as a shape: "bthk" as [B, T, H, K]."""
    return f"[{', '.join(SIZES[axis] for axis in axes)}]"


def _remedy(one: Input, axes: str, shape: tuple[int, ...], want: tuple[int, ...]) -> str:
    declared = f"It is declared as Input({one.name!r}, {' '.join(one.axes)!r})"
    if len(shape) == len(axes):
        if axes.startswith("bth") and shape == (want[0], shape[1], shape[2], *want[3:]) and shape[2] == want[1]:
            return f"The sequence comes before the heads: {one.name}.transpose(1, 2)."
        wrong = [SIZES[axis] for axis, n, m in zip(axes, shape, want, strict=True) if n != m]
        hint = " N is B, or the number of sequences of cu_seqlens." if wrong == ["N"] else ""
        return f"{declared}; its {' and '.join(wrong)} differ{'s' * (len(wrong) == 1)} from the others'.{hint}"
    if len(shape) == len(axes) - 1 and axes[-1] in "kv":
        return (
            f"{declared}, a value per {'key' if axes[-1] == 'k' else 'value'} channel; for one per head write a spec "
            f"in which it has no axis {axes[-1]}, or repeat it: {one.name}.unsqueeze(-1).expand(...)."
        )
    return f"{declared}: {len(axes)} axes, not {len(shape)}."

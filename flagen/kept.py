"""What the training forward keeps beside its states."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .schedule import Shape, products

if TYPE_CHECKING:
    import torch

    from .plan import Plan


def kept(
    plan: Plan, shape: Shape, dtype: torch.dtype, chunk_size: int | None, packed: bool
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of what the training forward keeps beside its states: of an erase, and of what chunks need no
    state for where a plan keeps it and its pairs take no more than a row, or half of one."""
    import torch

    low, BT, _ = products(plan, shape, dtype, chunk_size)
    rows = shape.B, shape.T, shape.H
    chunks = shape.T // BT + shape.N if packed else shape.N * -(-shape.T // BT)
    common = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    if plan.keeps and plan.keeps * BT <= shape.K:
        wide = (*rows, shape.K), common
        return [wide, wide, ((chunks, shape.H, shape.K), torch.float32), ((*rows, BT), common), (rows, torch.int8)]
    kinds = dict.fromkeys("MABC", ((*rows, BT), torch.bfloat16 if low else torch.float32)) | {
        "fs": ((shape.B, shape.H, shape.T, 4), torch.float32),
        "fn": ((len(plan.row_numbers), shape.B, shape.H, shape.T), torch.float32),
        "en": ((chunks, shape.H, *((shape.K,) if plan.decay == "key" else ())), torch.float32),
        "far": (rows, torch.int8),
    }
    return [kinds[x] for x in plan.erase_kept]

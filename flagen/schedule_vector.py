"""The schedule of a vector state: how a scan over tokens is cut, by arithmetic.

Memory bounds it, so that a program must have many bytes under way and a multiprocessor many warps. A program owns BD
channels and goes through segments of BP rows of S tokens; all of a segment is read at once and stays in registers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from .plan import Plan
    from .schedule import Device, Shape

# tokens of a row: as many as registers let three programs of four warps have a multiprocessor; and where there is next
# to nothing to do for a token
ROWS = (12, 8, 6, 4)
PLAIN = 16
REGISTERS, OTHERS = 168, 45  # of a thread, and those that are not by tokens


@dataclass(frozen=True, slots=True)
class VectorTile:
    """How one kernel is cut: rows of a segment, tokens of a row, channels, warps."""

    BP: int
    S: int
    BD: int
    num_warps: int


@dataclass(frozen=True, slots=True)
class VectorSchedule:
    """Launch-time constants. L: tokens per piece of a sequence, a multiple of the segments of both ways, or 0 where it
    is not cut; LC: tokens per checkpoint: those of a row of the backward, and a multiple of those of a row of the
    forward or the other way round."""

    fwd: VectorTile
    bwd: VectorTile
    step: VectorTile
    LC: int
    L: int


def row_tokens(plan: Plan) -> int:
    """Tokens of a row of the backward, and so between the states that the training forward keeps."""
    read = 1 + sum("t" in one.axes and one.channel == "d" for one in plan.inputs)
    if plan.kept <= 1 and read <= 3 and not plan.complex:
        return PLAIN
    # two channels of 16 bits to a register or one complex channel; what is read is there for two segments
    held = 2 * (read + 1) + (1 if plan.complex else 2) * plan.kept
    return next((tokens for tokens in ROWS if OTHERS + tokens * held <= REGISTERS), ROWS[-1])


def forward_tokens(plan: Plan, LC: int) -> int:
    """Tokens of a row of the forward: twice those of the backward if registers allow it."""
    read = sum("t" in one.axes and one.channel == "d" for one in plan.inputs)
    held = 2 * read + plan.kept_forward + (2 if plan.complex else 0)
    return 2 * LC if OTHERS + 2 * LC * held <= REGISTERS else LC


def vector_schedule(
    plan: Plan, shape: Shape, dtype: torch.dtype, *, device: Device, checkpoint: int | None = None
) -> VectorSchedule:
    """The schedule of a call. shape: of one head with D value channels; dtype: that of the output; checkpoint: instead
    of row_tokens."""
    import triton

    channels, LC = int(triton.next_power_of_2(shape.V)), checkpoint or row_tokens(plan)
    S = forward_tokens(plan, LC) if dtype.itemsize == 2 else max(1, LC // 2)
    BD = min(32, channels)
    programs = shape.N * -(-shape.V // BD)
    warps = 4 if programs >= 2 * device.multiprocessors else 8
    if warps == 8 and LC < PLAIN and 3 * programs > device.multiprocessors:
        # more programs instead of more warps, which would wait for one another; the rows are half as wide in memory
        BD, programs, warps = min(16, channels), shape.N * -(-shape.V // 16), 4
    fwd, bwd = (vector_tile(plan, shape, tokens, BD, warps) for tokens in (S, LC))
    segment = max(fwd.BP * fwd.S, bwd.BP * bwd.S)
    return VectorSchedule(
        fwd=fwd,
        bwd=bwd,
        step=VectorTile(1, 1, min(512, channels), 4),
        LC=LC,
        L=vector_piece(shape, programs, device, segment),
    )


def vector_piece(shape: Shape, programs: int, device: Device, segment: int) -> int:
    """Tokens per piece, so that there are about as many programs as multiprocessors, or 0: a cut sequence is read
    twice, which pays where most of the multiprocessors would have nothing to do."""
    wanted = min(device.multiprocessors // programs, shape.T // (4 * segment))
    return -(-shape.T // wanted // segment) * segment if wanted >= 3 else 0


def vector_tile(plan: Plan, shape: Shape, S: int, BD: int, warps: int) -> VectorTile:
    """Rows of S tokens of BD channels, as many as the warps have with two channels a thread, a complex one with one, or
    as there are tokens."""
    lanes = 32 if plan.complex else 64  # channels of a warp
    BP = 1
    while lanes * warps > BP * BD and shape.T > BP * S:
        BP *= 2
    return VectorTile(BP, S, BD, max(1, min(warps, BP * BD // lanes)))

"""Plan, shapes, dtypes and device -> Schedule: the launch-time constants of a call, decided by arithmetic.

A program holds a block of the state in registers, so the state's size decides tiles and warps; programs against
multiprocessors decide whether sequences are cut into pieces; nothing is timed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from .schedule_pieces import STATE_ELEMENTS, carried, cut, even, leaves_idle, piece

if TYPE_CHECKING:
    import torch

    from .plan import Plan

CHECKPOINT = 256  # tokens between the states that the training forward keeps
FEATURES = 64  # rows of a tile of a state over Taylor features of order 2; with 16 gradients were wrong on Hopper
STAGED = 200 << 10  # bytes of shared memory that three stages of chunks and a state of 128 x 128 take at the most
AHEAD = 227 << 10  # the same of three stages of chunks of 256 channels and a state of 256 x 64, where those are inputs
# channels, of keys and of values, of the narrowest block of 16-bit operands: with 16 or 32 beside chunks of 64 outputs
# and gradients were wrong with Triton 3.6 on Hopper, or an address was bad, whatever the kernel
NARROWEST = 64
PRECISIONS = ("tf32", "tf32x3", "ieee", "bf16x3", "bf16x6")


class Shape(NamedTuple):
    """The sizes of a call: batch, tokens, heads, key and value channels, sequences (the batch, or those of
    cu_seqlens)."""

    B: int
    T: int
    H: int
    K: int
    V: int
    N: int

    @classmethod
    def dense(cls, B: int, T: int, H: int, K: int, V: int) -> Shape:
        return cls(B, T, H, K, V, B)

    def of_vector(self) -> Shape:
        """As kernels of a vector state count: all heads' value channels are those of one head, whose state is a row."""
        return self._replace(H=1, K=1, V=self.H * self.V)


@dataclass(frozen=True, slots=True)
class Tile:
    """How one kernel is cut: tokens per chunk, value channels per program, warps, and depth of the pipeline."""

    BT: int
    BV: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class Schedule:
    """Launch-time constants. fwd_L, bwd_L, dq_L: tokens per piece of a sequence, a multiple of LC, or 0 where it is not
    cut. rows: the tile of the sweeps for query and key, whose programs have a block of K, its BV, and all of V; of an
    erase that of the kernels for what becomes of pieces and, where rows have factors, for all states.

    DOT, PRECISION: dtype of the products' operands and how fp32 ones are multiplied; SUM_PRECISION: the same for sums
    of log decays; PARTS: how many bf16 parts of a log decay are summed. beside: sweeps that do not depend on each other
    are given to streams of their own.
    """

    fwd: Tile
    bwd: Tile
    intra: Tile
    bwd_intra: Tile
    step: Tile
    rows: Tile
    BK: int
    BV: int
    BF: int
    LC: int
    fwd_L: int
    bwd_L: int
    dq_L: int
    PARTS: int
    DOT: Any
    PRECISION: str
    SUM_PRECISION: str
    checkpoint: Any
    beside: bool = False


class Device(NamedTuple):
    """What a schedule needs to know of a device. `shared`: bytes of shared memory that one program may have;
    `precision`: how products of fp32 operands are taken with the accuracy of fp32."""

    multiprocessors: int
    shared: int
    precision: str = "tf32x3"


HOPPER = Device(132, 227 * 1024)


@functools.cache
def device_of(device: torch.device) -> Device:
    """The facts of a CUDA device; those of an H100 for any other, such as the interpreter's."""
    import torch

    if device.type != "cuda":
        return HOPPER
    found = torch.cuda.get_device_properties(device)
    shared = getattr(found, "shared_memory_per_block_optin", HOPPER.shared)
    # Triton has no tf32x3 for AMD
    return Device(found.multi_processor_count, shared, "ieee" if torch.version.hip else HOPPER.precision)


def rows_of_state(plan: Plan, K: int) -> int:
    """Rows F of the state: key channels, or the features of a Taylor map."""
    return K if not plan.taylor else 1 + K + (K * (K + 1) // 2 if plan.taylor == 2 else 0)


def checkpoint_of(plan: Plan) -> int:
    """Tokens between the states that the training forward keeps.

    From each of them the gradient of a decay is summed up anew, by token. Errors of such a sum add up in one
    direction; half as many tokens leave half of them to a gradient that is in turn the sum over all tokens, and with a
    decay per channel, of which each has fewer terms, it takes an eighth. Taylor features in tiles have no decay, and a
    state is as large as hundreds of tokens' inputs.
    """
    if plan.tiled:
        return CHECKPOINT * 4
    if often(plan):
        return CHECKPOINT // 8
    # beside all that is prepared for chunks, states of every 256 tokens would be more than three inputs
    many = CHECKPOINT * 3 // 2 if plan.keeps == 2 else CHECKPOINT
    return CHECKPOINT // 2 if plan.summed and plan.sweeps else many


def often(plan: Plan) -> bool:
    """Whether the gradient of a decay or angle per channel is summed over all tokens, for which chunks are short."""
    return plan.summed and not plan.sweeps and not plan.erase


def schedule(
    plan: Plan,
    shape: Shape,
    dtype: torch.dtype,
    *,
    exact_decay: bool = False,
    device: Device = HOPPER,
    chunk_size: int | None = None,
    input_precision: str | None = None,
    checkpoint: int | None = None,
) -> Schedule:
    """The schedule of a call. dtype: that of the output; exact_decay: log decays are bf16 as given.

    chunk_size: tokens per chunk, 16, 32, 64 or 128, instead of the plan's own, or as many of them as there is shared
    memory for; input_precision: how products of fp32 inputs are taken. checkpoint: instead of checkpoint_of.
    """
    import torch
    import triton
    import triton.language as tl

    low, BT, BF = products(plan, shape, dtype, chunk_size)
    # there is a channel of ones beside the key's where features are tiled
    BK = max(32, block(shape.K + 1, triton)) if plan.tiled else block(shape.K, triton, least(low))
    whole = block(shape.V, triton, least(low))
    square = low and BF == whole == 128 and device.shared >= STAGED
    parts = 2 if plan.complex else 1
    BV = value_block(whole, BF * parts, STATE_ELEMENTS)
    programs = shape.N * shape.H
    LC = max(checkpoint or checkpoint_of(plan), BT) // BT * BT
    bwd = tile(BT, BV, BF * BV * parts, 1)
    fwd = bwd
    if plan.tiled:
        fwd = bwd = Tile(BT, min(whole, 128 if low else 64), 4, 1)
    # blocks of more than 128 rows and 32 columns gave wrong outputs and bad addresses with Triton 3.6 on Hopper
    elif not plan.serial_tree and BF <= 128:
        # half a state, and two programs at once on a multiprocessor
        half = max(value_block(BV, BF * parts, STATE_ELEMENTS // 2), least(low))
        stages = 2 if low and BF * half * parts <= STATE_ELEMENTS // 2 else 1
        if plan.turned:
            half, stages = max(half, min(BV, 64)), 1
        fwd = tile(BT, half, BF * half * parts, stages)
        bwd = fwd if plan.sweeps or plan.intra else bwd
    # narrower blocks, also of fewer key channels, gave wrong gradients and bad addresses with Triton 3.6 on Hopper
    intra, bwd_intra = Tile(BT, 64, 4, 1), Tile(BT, 64, 4, 1)
    if plan.turned:
        # four warps hold the rows of a chunk of 32 twice
        intra = Tile(BT, 32, 2, 1)
        if square and not chunk_size and not plan.normalized:
            # the forward's own chunks: what a backward does inside chunks of 64 has too few registers
            fwd, intra = tile(64, half, BF * half * parts, 2), Tile(64, 16, 2, 1)
            bwd = tile(BT, half, BF * half * parts, 3)
            bwd_intra = Tile(BT, 64, 4, 2)
    if plan.erase:
        # the registers that a state of 256 rows leaves hold no more of it than half, and blocks of chunks are large
        large = low and BF == 256 and erase_bytes(plan, BT, BF, min(whole, 128), 2) + (16 << 10) <= device.shared
        serial = fwd = bwd = erase_tile(plan, BT, BF, BV, device, low and BF == whole == 128)
        if large:
            serial = fwd = bwd = Tile(BT, min(whole, 128), 8 if whole > 64 else 4, 2)
        staged, factors = serial.num_stages == 3, bool(plan.erase_factors)
        erase_L, halves = carried(shape, serial.BV, BT, LC, staged, factors, device)
        if halves:
            # half a state takes little more than half the time, and each half has a multiprocessor of its own
            fwd = Tile(BT, BV // 2, 4, 3)
            bwd = fwd if factors else bwd
        # with a decay per key channel the key channels come in blocks
        warps = 4 if BK <= 128 or plan.decay == "key" or large else 8
        # loads ahead pay where the rows of products have to be made and are loaded too
        stages = 2 if square and plan.delta and plan.made_rows and plan.decay != "key" else 1
        intra, bwd_intra = Tile(BT, 64, warps, 1), Tile(BT, min(64, 8192 // BK), 8, stages)
        if large and plan.decay != "key":
            bwd_intra = Tile(BT, 64, 8, 2)
        elif large and not plan.delta:
            # with 8 warps ptxas keeps next to nothing in registers
            bwd_intra = Tile(BT, 64, 16, 1)
        if plan.decay == "key" and low:
            # four warps hold the rows of a chunk of 32 twice
            intra = Tile(BT, 32, 2, 1)
    rows = turned_tile(BT, BK, whole, bwd.num_stages) if plan.turned else sweep_tile(BT, BK, whole, low)
    if plan.erase:
        rows = serial if serial.num_stages == 3 or large else Tile(BT, serial.BV, serial.num_warps, 1)
    # a program has a tile of features, and three fit a multiprocessor
    states = -(-programs * -(-rows_of_state(plan, shape.K) // BF) // 3) if plan.tiled else programs
    fwd_L = erase_L if plan.erase else piece(shape, states * -(-shape.V // fwd.BV), device, LC)
    bwd_L = erase_L if plan.erase else piece(shape, states * -(-shape.V // bwd.BV), device, LC)
    beside = False
    # with smaller states three stages gave wrong normalisers with Triton 3.6 on Hopper, and they moved
    three, by_key = square and BT == 64, plan.intra and not plan.turned and not plan.normalized
    if three and (plan.swept or by_key):
        counts = (1,) if by_key and 2 * programs > device.multiprocessors else (1, 2)
        parts, fwd_L = cut(shape, BT, LC, BF, BV, device, 1, counts)
        if plan.swept or parts == 1:
            fwd = serial_tile(BT, BF, BV // parts)
        parts, bwd_L = cut(shape, BT, LC, BF, BV, device, 2, counts)
        if plan.swept or parts == 1:
            rows = serial_tile(BT, whole, BK // parts)
        if plan.swept:  # with a decay per key channel dv takes no less than with halves
            bwd = serial_tile(BT, BF, BV // parts)
            beside = not bwd_L and leaves_idle(shape, programs * -(-shape.V // bwd.BV), BT, device)
    if low and BT == 64 and device.shared >= AHEAD and plan.plain_sweeps:
        # with a normaliser both spill, for which three stages leave no cache, and on Blackwell dv would not fit
        if shape.K == 256 and not plan.normalized:
            fwd = bwd = serial_tile(BT, BF, 64)
        if shape.V == 256 and (plan.prepared or not plan.telescopes):
            rows = serial_tile(BT, whole, 64)
    # these pieces begin at checkpoints and cost next to nothing: enough of them to fill the device evenly
    blocks, alone = programs * -(-shape.K // rows.BV), rows.num_stages == 3  # a program a multiprocessor
    dq_L = even(shape, blocks, rows.BT, LC, device) if alone else piece(shape, -(-blocks // 8), device, LC)
    return Schedule(
        fwd=fwd,
        bwd=bwd,
        intra=intra,
        bwd_intra=bwd_intra,
        step=Tile(1, max(16, min(BV, 8192 // (block(rows_of_state(plan, shape.K), triton) * parts))), 4, 1),
        rows=rows,
        BK=BK,
        BV=whole,
        BF=BF,
        LC=LC,
        fwd_L=fwd_L,
        bwd_L=bwd_L,
        dq_L=dq_L,
        PARTS=1 if exact_decay and low else 2,
        DOT=tl.bfloat16 if low else tl.float32,
        # for fp16 inputs too: tf32 cuts operands off, which sums of positive terms do not average out
        PRECISION=input_precision or device.precision,
        SUM_PRECISION=device.precision,
        checkpoint=torch.bfloat16 if dtype == torch.bfloat16 else torch.float32,
        beside=beside,
    )


def products(plan: Plan, shape: Shape, dtype: torch.dtype, chunk_size: int | None) -> tuple[bool, int, int]:
    """Whether operands of products are bf16, tokens per chunk, and the block of the rows of the state."""
    import torch
    import triton

    # a state of few rows is rewritten over and over, and roundings of what is erased add up: bf16 would be too coarse
    low = dtype == torch.bfloat16 and not (plan.erase and shape.K <= 32)
    BF = FEATURES if plan.tiled else block(rows_of_state(plan, shape.K), triton, least(low))
    widest = max(2 * BF if plan.complex else BF, shape.V)
    BT = min(chunk_size or chunk(plan, BF, low), longest(plan, widest, low))
    return low, BT, BF


def block(size: int, triton: Any, narrowest: int = 16) -> int:
    """The block of an axis: a power of two that products take."""
    return max(narrowest, int(triton.next_power_of_2(size)))


def least(low: bool) -> int:
    """Channels of the narrowest block. low: operands of products have 16 bits."""
    return NARROWEST if low else 16


def chunk(plan: Plan, BF: int, low: bool) -> int:
    """Tokens per chunk: as many as the tiles [BT, BF] leave registers for."""
    widest = 64 if low and not plan.serial_tree and not often(plan) else 32
    return max(16, min(widest, STATE_ELEMENTS // BF))


def longest(plan: Plan, widest: int, low: bool) -> int:
    """The most tokens per chunk whose tiles fit shared memory, beside a state of up to `widest` rows or columns."""
    if plan.turned:  # longer ones take thousands of bytes of stack a thread, and gave wrong gradients on Hopper
        return 32
    half = plan.serial_tree or plan.taylor or plan.erase or widest > 128
    quarter = plan.taylor and widest > 256
    return (128 if low else 64) // (4 if quarter else 2 if half else 1)


def value_block(widest: int, rows: int, elements: int) -> int:
    """Value channels per program, so that its block of the state has no more than `elements`."""
    return max(16, min(widest, elements // rows))


def tile(BT: int, BV: int, elements: int, stages: int) -> Tile:
    """Warps by the size of the state's block: 64 fp32 registers a thread at the most.

    Serial kernels of a decay per channel and all backward ones are not pipelined (stages 1): with 8 warps and chunks of
    32 tokens Triton 3.6 gave wrong states for Hopper when they were, unless their rows were prepared.
    """
    return Tile(BT, BV, 8 if elements > STATE_ELEMENTS // 2 else 4, stages)


def sweep_tile(BT: int, widest: int, others: int, low: bool) -> Tile:
    """The tile of a sweep that has blocks of up to `widest` channels of one side of the state and `others`, all of the
    other side: half a state and two programs at once on a multiprocessor where that leaves blocks of 64."""
    elements = STATE_ELEMENTS // 2 if others <= 128 else STATE_ELEMENTS
    size = value_block(widest, others, elements)
    return tile(BT, size, size * others, 2 if low and others <= 128 else 1)


def turned_tile(BT: int, widest: int, others: int, stages: int) -> Tile:
    """The same for complex states, of which a program has half in blocks of 64 or a quarter."""
    size = max(value_block(widest, 2 * others, STATE_ELEMENTS // 2), min(widest, 64, STATE_ELEMENTS // (2 * others)))
    return tile(BT, size, 2 * size * others, stages)


def serial_tile(BT: int, rows: int, columns: int) -> Tile:
    """The tile of a serial kernel whose next chunks are loaded while it works on one: a program a multiprocessor."""
    return Tile(BT, columns, 8 if rows * columns > STATE_ELEMENTS // 2 else 4, 3)


def erase_tile(plan: Plan, BT: int, BF: int, BV: int, device: Device, whole: bool) -> Tile:
    """The tile of the serial kernels of an erase. whole: the state is 128 x 128, with bf16 operands: chunks are loaded
    early, with all of the state in a program or, where that does not fit, half of it and two programs a multiprocessor.
    Else they are not; blocks of 32 value channels are not believed."""
    chunk_bytes = 2 * BT * (len(plan.erase_rows) * BF + (2 if plan.delta else 4) * BT)
    held = 2 * BT * BV + (16 << 10)  # the value is no operand as it lies, and the state's roundings need a place
    if whole and plan.erase_factors and erase_bytes(plan, BT, BF, BV, 3) <= device.shared:
        return Tile(BT, BV, 8, 3)
    if whole and plan.erase_factors and 2 * (2 * chunk_bytes + held // 2) <= device.shared:
        return Tile(BT, 64, 4, 2)
    if whole and not plan.erase_factors and 3 * chunk_bytes + 2 * held <= device.shared:
        return Tile(BT, BV, 8, 3)
    size = max(64, BV if BF > 128 else value_block(BV, BF, STATE_ELEMENTS // 2))
    return tile(BT, size, BF * size, 1)


def erase_bytes(plan: Plan, BT: int, BF: int, BV: int, stages: int) -> int:
    """Bytes of shared memory of a serial kernel of an erase whose chunks are loaded early: rows, pairs, the value and
    four numbers a row of each stage, a matrix of ones, and where blocks are turned."""
    chunk_bytes = 2 * BT * (len(plan.erase_rows) * BF + (2 if plan.delta else 4) * BT)
    return stages * (chunk_bytes + 2 * BT * (BV + 8)) + 2 * BT * BT + (4 << 10)

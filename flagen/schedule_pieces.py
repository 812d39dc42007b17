"""How sequences are cut into pieces, by arithmetic: programs against multiprocessors.

A piece begins with a state that nobody has yet: it takes one more pass, in which pieces begin from zero, and a kernel
that goes from piece to piece.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .schedule import Device, Shape

STATE_ELEMENTS = 1 << 14  # of a program's block of the state: 64 KiB of registers in fp32


def cut(
    shape: Shape, BT: int, LC: int, rows: int, widest: int, device: Device, passes: int, counts: tuple[int, ...]
) -> tuple[int, int]:
    """Into how many blocks, of `counts`, the columns of a state are cut, and tokens per piece of a sequence or 0: what
    takes the least time on all multiprocessors. passes: kernels after the one for the states that pieces begin with."""
    best, found = float("inf"), (1, 0)
    for parts in counts:
        # a turn takes 0.6 us and 2.4 us for a state of 128 x 128 on an H200
        turn = 1 + 4 * rows * (widest // parts) / STATE_ELEMENTS
        programs = shape.N * shape.H * parts * -(-shape.V // widest)
        for pieces in range(1, max(2, device.multiprocessors // programs + 1)):
            tokens = -(-shape.T // pieces // LC) * LC if pieces > 1 else shape.T
            pieces = -(-shape.T // tokens)
            rounds = -(-programs * pieces // device.multiprocessors)
            time = rounds * -(-tokens // BT) * turn * (passes + 0.7 * (pieces > 1))
            time += 25 * (pieces > 1)  # the launches that pieces need
            if time < best * 0.95:
                best, found = time, (parts, tokens if pieces > 1 else 0)
    return found


def even(shape: Shape, programs: int, BT: int, LC: int, device: Device) -> int:
    """Tokens per piece where pieces cost no more than the start of a program, about four turns; 0 for one piece."""
    best, found = float("inf"), 0
    for blocks in range(1, -(-shape.T // LC) + 1):
        pieces = -(-shape.T // (blocks * LC))
        rounds = -(-programs * pieces // device.multiprocessors)
        time = rounds * (blocks * LC // BT + 4)
        if time < best:
            best, found = time, blocks * LC if pieces > 1 else 0
    return found


def leaves_idle(shape: Shape, programs: int, BT: int, device: Device) -> bool:
    """Whether programs, one a multiprocessor, leave so much of the device idle for so long that kernels in several
    streams pay, which cost the host some 20 us."""
    rounds = -(-programs // device.multiprocessors)
    return programs < 0.85 * rounds * device.multiprocessors and rounds * -(-shape.T // BT) >= 64


def piece(shape: Shape, programs: int, device: Device, LC: int) -> int:
    """Tokens per piece, so that there are about as many programs as multiprocessors; 0 where there are enough
    already."""
    wanted = device.multiprocessors // max(1, programs)
    if wanted < 2 or shape.T <= 2 * LC:
        return 0
    return -(-shape.T // wanted // LC) * LC


def carried(
    shape: Shape, columns: int, BT: int, LC: int, halved: bool, factors: bool, device: Device
) -> tuple[int, bool]:
    """Of an erase: tokens per piece, 0 where sequences are not cut, and whether a program has half of its columns, if
    it may. What takes a state through a piece is a matrix [K, K]: columns of their own in the pass before. factors:
    whether its rows have factors."""
    heads, whole, best, found = shape.N * shape.H, float("inf"), float("inf"), (0, False)
    # of the turn of a whole state, 3.4 us on an H100 or 2.7 with rows that were made: a half's, the pass before's
    half_turn, first_turn = (0.65, 0.7) if factors else (0.87, 0.55)
    for pieces in range(1, max(2, device.multiprocessors // heads + 1)):
        tokens = -(-shape.T // pieces // LC) * LC if pieces > 1 else shape.T
        pieces = -(-shape.T // tokens)
        for half in (False, True)[: 1 + halved]:
            programs = heads * pieces * -(-shape.V // columns)
            turn = float(-(-programs // device.multiprocessors))
            if half:
                turn = -(-2 * programs // device.multiprocessors) * half_turn
            if pieces > 1:
                before = heads * pieces * -(-(shape.V + shape.K) // columns)
                turn += -(-before // device.multiprocessors) * first_turn
            # from piece to piece, and two launches: of the host's time too, which small calls wait for
            time = -(-tokens // BT) * turn + (pieces + 25 if pieces > 1 else 0)
            if pieces == 1:
                whole = min(whole, time)
            if time < best * 0.97 and (pieces == 1 or time < 0.9 * whole):
                best, found = time, (tokens if pieces > 1 else 0, half)
    return found

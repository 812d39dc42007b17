"""The repair of bf16 in Triton's interpreter does what torch does, and is still needed."""

from __future__ import annotations

import bf16_interpreter
import numpy as np
import pytest
import torch
import triton
import triton.language as tl

SIZE = 32


@triton.jit
def arithmetic_kernel(x, y, o, SIZE: tl.constexpr):
    o_i = tl.arange(0, SIZE)
    b_x = tl.load(x + o_i)
    b_y = tl.load(y + o_i)
    tl.store(o + o_i, b_x + b_y)
    tl.store(o + SIZE + o_i, b_x * b_y)
    tl.store(o + 2 * SIZE + o_i, b_x - 0.3)
    tl.store(o + 3 * SIZE + o_i, -b_x)
    tl.store(o + 4 * SIZE + o_i, tl.where(b_x > b_y, b_x, b_y))
    tl.store(o + 5 * SIZE + o_i, tl.abs(b_x))
    tl.store(o + 6 * SIZE + o_i, o_i.to(tl.bfloat16))
    tl.store(o + 7 * SIZE + o_i, (b_x > b_y).to(tl.bfloat16))
    tl.store(o + 8 * SIZE + o_i, tl.load(x + o_i, mask=o_i < 5, other=1.5))


@triton.jit
def cast_kernel(x, o, SIZE: tl.constexpr):
    o_i = tl.arange(0, SIZE)
    tl.store(o + o_i, tl.load(x + o_i).to(o.dtype.element_ty))


@triton.jit
def dot_kernel(x, y, o, total, SIZE: tl.constexpr):
    o_i = tl.arange(0, SIZE)
    p_x = o_i[:, None] * SIZE + o_i[None, :]
    b_x = tl.load(x + p_x)
    tl.store(o + p_x, tl.dot(b_x, tl.trans(tl.load(y + p_x))))
    tl.store(total + o_i, tl.sum(b_x.to(tl.float32), 1))


@pytest.fixture
def _repaired(monkeypatch: pytest.MonkeyPatch) -> None:
    bf16_interpreter.repair(monkeypatch)


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.usefixtures("_repaired")
def test_arithmetic_is_that_of_torch():
    x, y, o = _random(SIZE), _random(SIZE, seed=1), torch.empty(9, SIZE, dtype=torch.bfloat16)
    arithmetic_kernel[(1,)](x, y, o, SIZE=SIZE)
    number = torch.arange(SIZE)
    wanted = [x + y, x * y, x - torch.tensor(0.3).bfloat16(), -x, torch.maximum(x, y), x.abs(), number.bfloat16()]
    wanted += [(x > y).bfloat16(), torch.where(number < 5, x, 1.5)]
    for i, one in enumerate(wanted):
        assert torch.equal(o[i], one), i


@pytest.mark.usefixtures("_repaired")
def test_casts_round_to_nearest_even():
    special = torch.tensor([0.0, -0.0, 1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1 - 2**-8, 3.4e38])
    special = torch.cat((special, torch.tensor([torch.inf, -torch.inf, torch.nan, 1e-40, -1e-45, 65280.0, 7e-3, 0.1])))
    x = torch.cat((special, torch.randn(SIZE - len(special), generator=torch.Generator().manual_seed(2))))
    o = torch.empty(SIZE, dtype=torch.bfloat16)
    cast_kernel[(1,)](x, o, SIZE=SIZE)
    assert torch.equal(o.nan_to_num(nan=7.0), x.bfloat16().nan_to_num(nan=7.0)) and int(o.isnan().sum()) == 1
    back = torch.empty(SIZE)
    cast_kernel[(1,)](o, back, SIZE=SIZE)
    assert torch.equal(back.nan_to_num(nan=7.0), o.float().nan_to_num(nan=7.0))


@pytest.mark.usefixtures("_repaired")
def test_dot_takes_numbers_not_bits():
    x, y = _random(SIZE, SIZE), _random(SIZE, SIZE, seed=1)
    o, total = torch.empty(SIZE, SIZE), torch.empty(SIZE)
    dot_kernel[(1,)](x, y, o, total, SIZE=SIZE)
    torch.testing.assert_close(o, x.float() @ y.float().T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total, x.float().sum(1), rtol=1e-5, atol=1e-5)


def test_every_bf16_there_and_back():
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = bf16_interpreter.widen(bits)
    same = bf16_interpreter.narrow(values) == bits
    assert (same | np.isnan(values)).all() and np.isnan(
        bf16_interpreter.widen(bf16_interpreter.narrow(values[~same]))
    ).all()
    torch.testing.assert_close(
        torch.from_numpy(values), torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float(), equal_nan=True
    )


def test_the_interpreter_alone_is_wrong():
    """When this fails, Triton has been mended and the repair can go."""
    x = torch.full((SIZE,), 1 + 2**-8 + 2**-9)
    o = torch.empty(SIZE, dtype=torch.bfloat16)
    cast_kernel[(1,)](x, o, SIZE=SIZE)
    assert not torch.equal(o, x.bfloat16())

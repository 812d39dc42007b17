"""What is timed must be right: a check at a small shape with the same tiles, a sample of the shape that is timed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import testing
from .analysis import analyse
from .bench import Case, make_inputs
from .compare import Row, kind_of, limit_of, row
from .functions import evaluate_host
from .samples import make_scalars
from .testing import check
from .torch_backend import TorchBackend
from .torch_vector import VectorBackend

if TYPE_CHECKING:
    from .op import Op
    from .schedule import Shape

# enough for two pieces of a sequence, where a small call is cut as the large one is; else fewer
TOKENS, TOKENS_UNCUT, TOKENS_ON_CPU = 600, 500, 60
SEGMENT = 64  # tokens whose states the reference holds at once for its gradient: they are fp64
SMALL_HEADS = 16  # kernels are compiled anew for a number of heads that is no multiple of 16
LONG = 100_000  # tokens from which on one head is compared, not two
# times the limits of a check: more tokens have more roundings, and what a sample must show (wrong states at the ends of
# pieces, rows that two programs wrote) is far beyond
SLACK = 3.0


def small(op: Op, shape: Shape, dtype: torch.dtype, device: str) -> str:
    """Forward and backward (for a shape of one token: decode) against the reference, token by token, with the head
    sizes of `shape` and so its tiles. Returns what differs, or nothing."""
    scalars = make_scalars(op.spec)
    heads = SMALL_HEADS if shape.H % SMALL_HEADS == 0 else min(shape.H, 4)
    least = shape._replace(B=1, N=1, T=8 if shape.T == 1 else min(shape.T, _tokens(shape, device)), H=heads)
    inputs = make_inputs(op.spec, least, dtype, device, scalars)
    named = dict(zip((one.name for one in op.spec.inputs), inputs, strict=True))
    # with states there would be other kernels than those that are timed, and to wait for
    states = shape.T == 1
    report = check(op, inputs=named, scalars=scalars, device=device, raises=False, initial_state=states,
                   final_state=states, decode=3 if states else 0, segment=SEGMENT)  # fmt: skip
    return _said(report.failures)


def _tokens(shape: Shape, device: str) -> int:
    if not device.startswith("cuda"):
        return TOKENS_ON_CPU
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return TOKENS if multiprocessors // 2 >= shape.B * shape.H else TOKENS_UNCUT


def sampled(op: Op, case: Case, shape: Shape, dtype: torch.dtype) -> str:
    """Output and gradients of some heads of a call at its full length, against the recurrence in chunks of PyTorch in
    fp64, measured as testing.check measures. Returns what differs, or nothing."""
    spec = op.spec
    if spec.vector:
        return _sampled_channels(op, case, shape, dtype)
    heads = torch.tensor([0] if shape.H == 1 or shape.T > LONG else [0, shape.H - 1])
    o = case.run()
    generator = torch.Generator().manual_seed(1)
    # the same token's gradient all along, so that a long one need not be drawn
    do = torch.randn(1, min(shape.T, 512), shape.H, shape.V, generator=generator)
    do = do.to(o.device, o.dtype).repeat(shape.B, -(-shape.T // do.shape[1]), 1, 1)[:, : shape.T]
    found = torch.autograd.grad(o, case.inputs, do, allow_unused=True)
    inputs = tuple(_heads(x, one.axes, heads).double() for x, one in zip(case.inputs, spec.inputs, strict=True))
    scalars, part = make_scalars(spec), do[:, :, heads.to(do.device)].double()
    right = testing.Case(op, spec, inputs, (), scalars, {"scale": None, "cu_seqlens": None}, False, 1, dtype, "")

    def by_chunks(one: testing.Case) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        analysis = op.analysis if one.spec is spec else analyse(one.spec)
        constants = tuple(
            torch.tensor(evaluate_host(expr, scalars, shape.H), dtype=torch.float64)[heads].to(o.device)
            for _, expr in analysis.constants
        )
        backend, scale = TorchBackend(analysis), spec.scale if spec.scale is not None else shape.K**-0.5
        want = backend.forward(one.inputs, constants, scale, (), None, False, True)
        ends, needs = (None,) * (1 + backend.normalized), (True,) * len(one.inputs)
        call = want.o, want.saved, one.inputs, constants, scale, (), None
        return want.o, backend.backward(part, ends, *call, needs, False)[0]

    want, gradients = by_chunks(right)
    rows = [row("o", o.detach()[:, :, heads.to(o.device)], want, SLACK * limit_of(dtype, "o"))]
    rate = testing.rate_of(want, part)
    for one, got, mine in zip(spec.inputs, found, gradients, strict=True):
        if got is not None and mine is not None and "h" in one.axes:
            limit, part_of = SLACK * limit_of(dtype, kind_of(spec, one)), _heads(got, one.axes, heads)
            rows.append(testing.gradient_row(right, one, part_of, mine, rate, limit, lambda wide: by_chunks(wide)[1]))
    return _said(tuple(one for one in rows if not one.ok))


def _sampled_channels(op: Op, case: Case, shape: Shape, dtype: torch.dtype) -> str:
    """The same for some channels of a vector state, over the last tokens and what came before them."""
    spec, scalars, D = op.spec, make_scalars(op.spec), shape.H * shape.V
    channels = torch.tensor(sorted({0, D // 2, D - 1}))
    o = case.run()
    generator = torch.Generator().manual_seed(1)
    do = torch.randn(1, 1, D, generator=generator).to(o.device, o.dtype).expand_as(o)
    found = torch.autograd.grad(o, case.inputs, do, allow_unused=True)
    inputs = tuple(_channels(x, one.axes, channels).double() for x, one in zip(case.inputs, spec.inputs, strict=True))
    constants = tuple(
        torch.tensor(evaluate_host(expr, scalars, 1), dtype=torch.float64).to(o.device)
        for _, expr in op.analysis.constants
    )
    backend, scale = VectorBackend(op.analysis), 1.0 if spec.scale is None else spec.scale
    want = backend.forward(inputs, constants, scale, (), None, False, True)
    part, needs = _channels(do, "btd", channels).double(), (True,) * len(inputs)
    gradients, _ = backend.backward(part, (None,), want.o, want.saved, inputs, constants, scale, (), None, needs, False)
    rows = [row("o", _channels(o, "btd", channels), want.o, SLACK * limit_of(dtype, "o"))]
    for one, got, mine in zip(spec.inputs, found, gradients, strict=True):
        if got is not None and mine is not None and "d" in one.axes:
            limit = SLACK * limit_of(dtype, kind_of(spec, one))
            rows.append(row(f"d {one.name}", _channels(got, one.axes, channels), mine, limit))
    return _said(tuple(one for one in rows if not one.ok))


def _channels(x: Tensor, axes: str, channels: Tensor) -> Tensor:
    x = x.detach()
    return x.index_select(-1, channels.to(x.device)) if "d" in axes else x


def _heads(x: Tensor, axes: str, heads: Tensor) -> Tensor:
    x = x.detach()
    return x.index_select(axes.index("h"), heads.to(x.device)) if "h" in axes else x


def _said(failures: tuple[Row, ...]) -> str:
    return "; ".join(f"{one.tensor}: {one.fault or f'rms {one.rms:.1e}, limit {one.limit:.0e}'}" for one in failures)

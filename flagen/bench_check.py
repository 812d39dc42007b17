"""What is timed must be right: a check at a small shape with the same tiles, a sample of the shape that is timed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .bench import Case, make_inputs
from .compare import Row, kind_of, limit_of, row
from .functions import evaluate_host
from .samples import make_scalars
from .testing import check
from .torch_backend import TorchBackend

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
    fp64. Returns what differs, or nothing."""
    spec = op.spec
    heads = torch.tensor([0] if shape.H == 1 or shape.T > LONG else [0, shape.H - 1])
    o = case.run()
    generator = torch.Generator().manual_seed(1)
    # the same token's gradient all along, so that a long one need not be drawn
    do = torch.randn(1, min(shape.T, 512), shape.H, shape.V, generator=generator)
    do = do.to(o.device, o.dtype).repeat(shape.B, -(-shape.T // do.shape[1]), 1, 1)[:, : shape.T]
    found = torch.autograd.grad(o, case.inputs, do, allow_unused=True)
    inputs = tuple(_heads(x, one.axes, heads).double() for x, one in zip(case.inputs, spec.inputs, strict=True))
    scalars = make_scalars(spec)
    constants = tuple(
        torch.tensor(evaluate_host(expr, scalars, shape.H), dtype=torch.float64)[heads].to(o.device)
        for _, expr in op.analysis.constants
    )
    backend, scale = TorchBackend(op.analysis), spec.scale if spec.scale is not None else shape.K**-0.5
    want = backend.forward(inputs, constants, scale, (), None, False, True)
    ends, needs = (None,) * (1 + backend.normalized), (True,) * len(inputs)
    part = do[:, :, heads.to(do.device)].double()
    gradients, _ = backend.backward(part, ends, want.o, want.saved, inputs, constants, scale, (), None, needs, False)
    rows = [row("o", o.detach()[:, :, heads.to(o.device)], want.o, SLACK * limit_of(dtype, "o"))]
    size = float((want.o * part).sum(-1).square().mean().sqrt())  # of what gradients are differences of
    for one, got, mine, x in zip(spec.inputs, found, gradients, inputs, strict=True):
        if got is not None and mine is not None and "h" in one.axes:
            channels = one.axes[-1] in "kv"
            norms = x.square().sum(-1) if channels else x.square()
            floor = size / max(float(norms.mean().sqrt()), 1e-30) if backend.normalized else 0.0
            limit = SLACK * limit_of(dtype, kind_of(spec, one))
            rows.append(row(f"d {one.name}", _heads(got, one.axes, heads), mine, limit, channels=channels, floor=floor))
    return _said(tuple(one for one in rows if not one.ok))


def _heads(x: Tensor, axes: str, heads: Tensor) -> Tensor:
    x = x.detach()
    return x.index_select(axes.index("h"), heads.to(x.device)) if "h" in axes else x


def _said(failures: tuple[Row, ...]) -> str:
    return "; ".join(f"{one.tensor}: {one.fault or f'rms {one.rms:.1e}, limit {one.limit:.0e}'}" for one in failures)

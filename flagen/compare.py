"""How far two tensors are apart, and how far they may be: the table of tolerances and what is measured against it.

Errors are relative: of the RMS over a tensor, and of its worst single row. A tensor passes if both are within their
limits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .expr import Input
from .samples import gates

if TYPE_CHECKING:
    from .spec import Spec

# The limit of the relative RMS error, by the dtype of the inputs and the kind of the tensor: "o", outputs and final
# states; "gradient", of inputs and initial states; "gate", gradients of the inputs of log_decay and phase, and of what
# lacks an axis, over which its gradient is summed: inputs such as a bonus per head, the normaliser's initial sums.
TOLERANCES: dict[torch.dtype, dict[str, float]] = {
    torch.bfloat16: {"o": 4e-3, "gradient": 6e-3, "gate": 2e-2},
    torch.float16: {"o": 1e-3, "gradient": 2e-3, "gate": 1e-2},
    torch.float32: {"o": 2e-5, "gradient": 2e-5, "gate": 2e-5},
    torch.float64: {"o": 1e-10, "gradient": 1e-10, "gate": 1e-10},
}
WORST_ROW = 10.0  # the limit of the worst row's error, in units of that of the RMS
HEADER = f"{'tensor':<24} {'rms':>9} {'limit':>9} {'worst row':>9} {'limit':>9}"
COMPLEX = {torch.complex64: torch.float32, torch.complex128: torch.float64}
ROLE_AXES = {"query": "bthk", "key": "bthk", "value": "bthv", "bonus": "bthk", "erase_a": "bthk", "erase_b": "bthk"}


@dataclass(frozen=True, slots=True)
class Error:
    """rms: RMS of the difference over the RMS of what is wanted. worst: the largest norm of a row of the difference,
    over the larger of the wanted row's own norm and the RMS of the rows' norms; index: that row.
    """

    rms: float
    worst: float
    index: tuple[int, ...]

    def within(self, limit: float) -> bool:
        return self.rms <= limit and self.worst <= WORST_ROW * limit  # False for NaN


def measure(got: Tensor, want: Tensor, *, channels: bool = True, floor: float = 0.0) -> Error:
    """The error of `got`, of the shape of `want`, computed in fp64. Rows are along the last axis if that is one of
    `channels`, else single numbers. floor: the RMS of rows' norms to compare with where all of `want` is smaller.
    """
    wide = torch.complex128 if want.is_complex() else torch.float64
    got, want = got.detach().to(want.device, wide), want.detach().to(wide)
    if not want.numel():
        return Error(0.0, 0.0, ())
    if not channels or not want.dim():
        got, want = got.unsqueeze(-1), want.unsqueeze(-1)
    norms, wrong = want.abs().square().sum(-1).sqrt(), (got - want).abs().square().sum(-1).sqrt()
    typical = max(float(norms.square().mean().sqrt()), floor)
    if not typical and not wrong.any():
        return Error(0.0, 0.0, (0,) * wrong.dim())
    rows = wrong / norms.clamp(min=typical) if typical else wrong * math.inf  # where nothing is wanted, all is too much
    place = int(rows.nan_to_num(nan=math.inf if typical else 0.0).argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(place), rows.shape))
    rms = float(wrong.square().mean().sqrt())
    return Error(rms / typical if typical else math.inf, float(rows.flatten()[place]), index)


def assert_close(
    name: str,
    got: Tensor,
    want: Tensor,
    *,
    dtype: torch.dtype | None = None,
    kind: str = "gradient",
    channels: bool = True,
) -> None:
    """Raises AssertionError, with both errors and their limits, unless `got` is as close to `want` as TOLERANCES
    demands.

    dtype: of the inputs of the computation; None for that of `got`. kind: "o", "gradient" or "gate", as in TOLERANCES.
    channels: whether the last axis is one of channels, whose rows are compared as wholes.
    """
    limit = limit_of(dtype or got.dtype, kind)
    if got.shape != want.shape:
        raise AssertionError(f"{name}: the shape is {tuple(got.shape)}, it should be {tuple(want.shape)}")
    error = measure(got, want, channels=channels)
    if not error.within(limit):
        raise AssertionError(
            f"{name}: relative RMS error {error.rms:.2e} (limit {limit:.0e}), worst row {error.worst:.2e} at "
            f"{error.index} (limit {WORST_ROW * limit:.0e})"
        )


def kind_of(spec: Spec, one: Input) -> str:
    """The kind in TOLERANCES of the gradient of an input."""
    axes = set(one.axes)
    summed = any(
        one in expr.inputs and set("btd" if spec.vector else ROLE_AXES[role]) - axes
        for role, expr in spec.roles
        if role in ROLE_AXES
    )
    return "gate" if summed or one in gates(spec) else "gradient"


def limit_of(dtype: torch.dtype, kind: str) -> float:
    """The limit of the relative RMS error. Raises ValueError where TOLERANCES has none."""
    dtype = COMPLEX.get(dtype, dtype)
    if dtype not in TOLERANCES or kind not in TOLERANCES[dtype]:
        raise ValueError(
            f"no tolerance for {dtype} {kind!r}; there are {', '.join(str(x) for x in TOLERANCES)} and the kinds "
            f"{', '.join(TOLERANCES[torch.float32])}"
        )
    return TOLERANCES[dtype][kind]


def limit_for(*dtypes: torch.dtype, kind: str) -> float:
    """The limit of what is computed in the coarsest of these dtypes."""
    return max(limit_of(one, kind) for one in dtypes)


@dataclass(frozen=True, slots=True)
class Row:
    """One tensor of a check: its errors, and the limit of the RMS error. fault: what was wrong with its form, or ''."""

    tensor: str
    rms: float
    worst: float
    limit: float
    fault: str = ""

    @property
    def ok(self) -> bool:
        return not self.fault and Error(self.rms, self.worst, ()).within(self.limit)

    def __str__(self) -> str:
        verdict = "ok" if self.ok else self.fault or "DIFFERS"
        limits = f"{self.limit:>9.0e} {self.worst:>9.1e} {WORST_ROW * self.limit:>9.0e}"
        return f"{self.tensor:<24} {self.rms:>9.1e} {limits}  {verdict}"


@dataclass(frozen=True, slots=True)
class Report:
    """What `check` found; prints as a table."""

    title: str
    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows)

    @property
    def failures(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if not row.ok)

    def __str__(self) -> str:
        return "\n".join([self.title, HEADER, *(str(row) for row in self.rows)])


def row(name: str, got: Tensor, want: Tensor, limit: float, *, dtype: torch.dtype | None = None, **how: Any) -> Row:
    """`got` compared with `want`; a wrong shape, or a dtype other than `dtype`, is a fault. how: as for measure."""
    if got.shape != want.shape:
        return Row(name, math.nan, math.nan, limit, f"shape {tuple(got.shape)}, not {tuple(want.shape)}")
    error = measure(got, want, **how)
    fault = "" if dtype in (None, got.dtype) else f"{got.dtype}, not {dtype}"
    return Row(name, error.rms, error.worst, limit, fault)

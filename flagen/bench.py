"""What a benchmark measures: shapes, inputs, the floor, and the rows that are kept.

The floor is the time to move each input and output once at the copy bandwidth measured in the same run; a backward
reads the inputs and the output's gradient and writes a gradient of each input.
"""

from __future__ import annotations

import dataclasses
import math
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import samples
from .bench_shapes import GROUPS, SHAPES
from .cost import dtype_of
from .errors import FlagenError
from .schedule import Shape

if TYPE_CHECKING:
    from .op import Op
    from .spec import Spec

# head sizes that a spec may have, by the order of its Taylor map; and with a phase
MOST_K, MOST_K_PHASE = {0: 256, 1: 255, 2: 16}, 128
DRAWN = 2048  # tokens that are drawn at random; longer sequences repeat them
LARGE = 1 << 18  # token-heads from which on a prediction must hold


@dataclass(frozen=True, slots=True)
class Row:
    """One figure. value: in `unit`, NaN where there is none (note says why); floor, predicted: in the same unit, or
    NaN; library: "flagen" or a peer's; op: what of it was called; copy: bytes a second, measured in the same run."""

    spec: str
    library: str
    op: str
    shape: str
    B: int
    T: int
    H: int
    K: int
    V: int
    dtype: str
    what: str
    value: float
    unit: str
    floor: float = math.nan
    predicted: float = math.nan
    note: str = ""
    device: str = ""
    copy: float = math.nan
    versions: str = ""
    commit: str = ""

    @property
    def share(self) -> float:
        """The floor's share of the time; NaN where nothing was measured."""
        return self.floor / self.value if self.value else math.nan

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.B, self.T, self.H, self.K, self.V

    @property
    def is_large(self) -> bool:
        return self.B * self.T * self.H >= LARGE

    @property
    def mispredicted(self) -> bool:
        """Whether the prediction for a large shape is off by more than 1.5 times."""
        off = self.predicted / self.value if self.unit == "ms" else math.nan
        return self.is_large and not math.isnan(off) and not 1 / 1.5 <= off <= 1.5


def shapes_of(names: list[str]) -> dict[str, Shape]:
    """Shapes by name: of SHAPES, of groups of them, or as B,T,H,K,V."""
    found: dict[str, Shape] = {}
    for name in names:
        for one in GROUPS.get(name, (name,)):
            sizes = SHAPES.get(one) or _sizes(one)
            found[one] = Shape.dense(*sizes)
    return found


def _sizes(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if len(parts) != 5 or not all(part.strip().isdigit() and int(part) for part in parts):
        raise FlagenError(
            f"--shapes {text}: is neither five sizes B,T,H,K,V nor one of {', '.join(SHAPES)} nor of the groups "
            f"{', '.join(GROUPS)}"
        )
    return tuple(map(int, parts))


def fitted(spec: Spec, shape: Shape) -> Shape:
    """The shape with as many key channels as the spec allows at the most, 16 with a Taylor map of order 2."""
    most = min(MOST_K[spec.taylor], MOST_K_PHASE if spec.phase is not None else 256)
    return shape._replace(K=min(shape.K, most))


def make_inputs(
    spec: Spec, shape: Shape, dtype: torch.dtype, device: str, scalars: dict[str, float]
) -> tuple[Tensor, ...]:
    """Inputs as samples.make_inputs draws them; sequences longer than DRAWN tokens repeat those, and so do batches.
    Step sizes and scalar gates are fp32, what has channels is of `dtype`."""
    drawn = samples.make_inputs(spec, B=1, T=min(shape.T, DRAWN), H=shape.H, K=shape.K, V=shape.V, scalars=scalars)
    found = []
    for one in spec.inputs:
        x = drawn[one.name].to(device, dtype_of(one.axes, dtype))
        times = [shape.B if axis == "b" else -(-shape.T // DRAWN) if axis == "t" else 1 for axis in one.axes]
        x = x.repeat(times)
        if "t" in one.axes:
            x = x.narrow(one.axes.index("t"), 0, shape.T)
        found.append(x.contiguous().requires_grad_())
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Case:
    """Something to time: inputs, and a function of none that gives the output from them."""

    inputs: tuple[Tensor, ...]
    run: Callable[[], Tensor]

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.run()

    def both(self, do: Tensor) -> tuple[Tensor | None, ...]:
        """Forward, and backward by autograd, eager."""
        found: tuple[Tensor | None, ...] = torch.autograd.grad(self.run(), self.inputs, do, allow_unused=True)
        return found

    def floors(self, output: Tensor) -> tuple[int, int]:
        """Bytes of the forward, and of forward and backward."""
        read, written = sum(map(nbytes, self.inputs)), nbytes(output)
        return read + written, 3 * read + 2 * written


def case_of(op: Op, shape: Shape, dtype: torch.dtype, device: str) -> Case:
    """A call of an op with inputs of the shape."""
    scalars: dict[str, Any] = samples.make_scalars(op.spec)
    inputs = make_inputs(op.spec, shape, dtype, device, scalars)
    return Case(inputs, lambda: op(*inputs, **scalars)[0])


def nbytes(x: Tensor) -> int:
    return int(x.numel() * x.element_size())


def provenance(device: str) -> dict[str, Any]:
    """Device, versions and commit, for every row of a run."""
    from importlib import metadata

    from . import __version__

    found = {"flagen": __version__, "torch": torch.__version__}
    for package in ("triton", "fla-core", "flash-linear-attention"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    name = torch.cuda.get_device_name() if device.startswith("cuda") else "cpu"
    return {"device": name, "versions": " ".join(f"{key} {value}" for key, value in found.items()), "commit": _commit()}


def _commit() -> str:
    """Of the checkout that flagen is run from, with + where it differs; nothing where there is none."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return ""
    try:
        commit = _git(root, "rev-parse", "--short=12", "HEAD")
        changed = _git(root, "status", "--porcelain", "--", "flagen")
    except (OSError, subprocess.SubprocessError):
        return ""
    return commit + ("+" if changed else "")


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=20, check=True)
    return done.stdout.strip()


FIELDS = tuple(one.name for one in dataclasses.fields(Row))

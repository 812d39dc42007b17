"""Tensors to try a spec on: values that its expressions can take, chosen by the roles in which they stand.

An input is drawn from a standard normal distribution wherever that makes sense. The inputs of log_decay are drawn so
that it is never positive and mostly weak enough for a state to live some tokens; those of erase so that what is taken
away is about what is there: vectors of the norm 1 or 1/2, numbers per token between 0 and 1. Those of the other roles
are drawn so that the roles are finite.
"""

from __future__ import annotations

import functools
import itertools
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from . import reference
from .expr import AXES, ROW_FUNCTIONS, VECTOR, Call, Expr, Input, substitute
from .functions import evaluate
from .intervals import interval
from .rank_one import erase_kind

if TYPE_CHECKING:
    from .spec import Spec

INF = math.inf
WEAK = (1e-4, 1.5)  # between these should lie the median of -log_decay
MOST_TRIALS = 4096
STATE_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Draw:
    """Values in (low, high), made of standard normal ones."""

    low: float
    high: float
    make: Callable[[Tensor], Tensor]


DRAWS = (
    Draw(-INF, INF, lambda z: z),
    Draw(0, 1, lambda z: torch.sigmoid(z - 2)),  # a step size
    Draw(0, 1, lambda z: torch.sigmoid(z + 2)),  # a decay
    Draw(-INF, 0, lambda z: logsigmoid(2 * z + 3)),  # the log of a decay, from -0.001 to -5
    Draw(-1, 0, lambda z: -torch.sigmoid(z - 2)),
)


STRENGTH = Draw(0, 1, torch.sigmoid)  # of an erase


def make_inputs(
    spec: Spec,
    *,
    B: int = 2,
    T: int = 128,
    H: int = 4,
    K: int = 64,
    V: int = 64,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    gate_dtype: torch.dtype | None = None,
    heads: Mapping[str, int] | None = None,
    N: int | None = None,
    scalars: Mapping[str, float] | None = None,
) -> dict[str, Tensor]:
    """A tensor for each input of `spec`, by name and in its order; inputs and seed decide the values, not device or
    dtype. A vector state has H * V channels.

    gate_dtype: of the inputs of log_decay and phase; None for `dtype`. heads: the head count of inputs that have fewer
        than H.
    N: the number of sequences, if cu_seqlens will be used: the rows of the inputs that have the axis b and lack t.
    scalars: the values for which log_decay must not be positive; None for those of make_scalars.
    Raises ValueError if no values are found for which log_decay is never positive.
    """
    draws, _ = _chosen(spec, _frozen(scalars))
    erasing = _erasing(spec)
    # of two vectors that are not one, what is taken away is not what was read, and the state may grow
    norm = 0.5 if erase_kind(dict(spec.roles)) == "general" else 1.0
    found = {}
    for one in spec.inputs:
        rows = B if N is None or "t" in one.axes else N
        sizes = {"b": rows, "t": T, "h": (heads or {}).get(one.name, H), "k": K, "v": V, "d": H * V}
        values = draws[one].make(_normal(one, [sizes[axis] for axis in one.axes], seed))
        if one in erasing and "k" in one.axes and math.isinf(draws[one].low) and math.isinf(draws[one].high):
            values = values * (norm * K**-0.5)
        own = gate_dtype if gate_dtype is not None and one in gates(spec) else dtype
        found[one.name] = values.to(own).to(device)
    return found


def make_state(spec: Spec, *, N: int = 2, H: int = 4, K: int = 64, V: int = 64, seed: int = 0,
               dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
               scalars: Mapping[str, float] | None = None) -> reference.State:  # fmt: skip
    """An initial state, as the op takes it: the one after a few tokens of other random inputs. dtype: of its real
    numbers.
    """
    scalars = make_scalars(spec) if scalars is None else scalars
    inputs = make_inputs(spec, B=N, T=STATE_TOKENS, H=H, K=K, V=V, seed=seed + 1_000_003, scalars=scalars)
    with torch.no_grad():
        _, state = reference.run(spec, tuple(inputs.values()), scalars=scalars, output_final_state=True)
    if isinstance(state, Tensor):
        return state.to(device, dtype.to_complex() if state.is_complex() else dtype)
    return tuple(x.to(device, dtype).contiguous() for x in state)


def _swapped(x: Tensor, axes: str) -> Tensor:
    i, j = axes.find("t"), axes.find("h")
    return x if min(i, j) < 0 else x.transpose(i, j).contiguous().transpose(i, j)


def _sliced(x: Tensor, axes: str) -> Tensor:
    return torch.cat((x.new_full(x.shape, math.nan), x, x.new_full(x.shape, math.nan)), -1).tensor_split(3, -1)[1]


def _turned(x: Tensor, axes: str) -> Tensor:
    backwards = tuple(reversed(range(x.dim())))
    return x.permute(backwards).contiguous().permute(backwards)


def _spread(x: Tensor, axes: str) -> Tensor:
    return torch.stack((x, x.new_full(x.shape, math.nan)), -1)[..., 0]


# the same values with other strides
LAYOUTS: dict[str, Callable[[Tensor, str], Tensor]] = {
    "contiguous": lambda x, axes: x,
    "heads_first": _swapped,  # [B, H, T, K] in memory
    "sliced": _sliced,  # out of a wider tensor, as of a fused projection
    "reversed": _turned,  # the last axis has the largest stride
    "spread": _spread,  # every other element
}


def arranged(x: Tensor, axes: str, layout: str) -> Tensor:
    """The values of `x`, whose axes are `axes`, laid out as one of LAYOUTS says. Memory between them is NaN."""
    return LAYOUTS[layout](x, axes)


def check_choices(spec: Spec, requires_grad: Sequence[str] | None, layout: str) -> None:
    """Raises ValueError on an input that the spec does not have, and on a layout that is none."""
    names = [one.name for one in spec.inputs] + ["initial_state"]
    if unknown := [name for name in requires_grad or () if name not in names]:
        raise ValueError(f"{spec.name}: requires_grad names {unknown[0]!r}; there are {', '.join(names)}")
    if layout not in LAYOUTS:
        raise ValueError(f"{spec.name}: layout={layout!r} is not allowed; use one of {', '.join(LAYOUTS)}")


def make_scalars(spec: Spec) -> dict[str, float]:
    """A value for each Scalar of `spec`, for which log_decay need not be positive."""
    return dict(_chosen(spec, None)[1])


def gates(spec: Spec) -> set[Input]:
    """The inputs of log_decay and phase."""
    return {one for role, expr in spec.roles if role in ("log_decay", "phase") for one in expr.inputs}


def _erasing(spec: Spec) -> set[Input]:
    """The inputs of erase, but for those whose size an l2norm takes away."""
    found, pending = set(), list(spec.erase or ())
    while pending:
        node = pending.pop()
        found |= {node} if isinstance(node, Input) else set()
        pending += () if isinstance(node, Call) and node.function in ROW_FUNCTIONS else node.children
    return found


def _frozen(scalars: Mapping[str, float] | None) -> tuple[tuple[str, float], ...] | None:
    return None if scalars is None else tuple(sorted((name, float(value)) for name, value in scalars.items()))


def _normal(one: Input, shape: list[int], seed: int) -> Tensor:
    """Standard normal, by seed and name, on the CPU. Inputs without a time axis are parameters, and moderate."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {one.name}".encode()))
    return torch.randn(shape, generator=generator) * (1.0 if "t" in one.axes else 0.5)


# --- the choice


@functools.lru_cache(maxsize=256)
def _chosen(spec: Spec, given: tuple | None) -> tuple[dict[Input, Draw], tuple[tuple[str, float], ...]]:
    """How to draw each input, and the scalars' values."""
    # log_decay first, it asks the most; then what shares inputs with it
    decay = set() if spec.log_decay is None else set(spec.log_decay.inputs)
    roles = sorted(spec.roles, key=lambda item: (item[0] != "log_decay", not decay & set(item[1].inputs)))
    strengths = {
        one: STRENGTH
        for one in _erasing(spec)
        if "k" not in one.axes and one not in decay and one.low is None and one.high is None
    }
    for first in (strengths, {}) if strengths else ({},):
        for scalars in _scalar_values(spec) if given is None else (given,):
            chosen = _filled(roles, dict(first), dict(scalars))
            if chosen is not None:
                return chosen, scalars
    wanted = "" if spec.log_decay is None else f" and log_decay = {spec.log_decay} <= 0"
    raise ValueError(
        f"{spec.name}: no inputs were found for which all expressions are finite{wanted}; declare bounds that make it "
        "so, as Input(..., low=, high=), or give inputs and scalars of your own"
    )


def _filled(roles: list[tuple[str, Expr]], chosen: dict[Input, Draw], scalars: dict[str, float]) -> dict | None:
    """`chosen` with draws for the other inputs of `roles` that suit them all, or None."""
    if not roles:
        return chosen
    (role, expr), *others = roles
    for suiting in _suiting(expr, role == "log_decay", chosen, scalars):
        found = _filled(others, suiting, scalars)
        if found is not None:
            return found
    return None


def _suiting(expr: Expr, is_decay: bool, chosen: dict[Input, Draw], scalars: dict[str, float]) -> Iterator[dict]:
    """`chosen` with draws that suit the role, best first: for a decay proven and weak, then proven, then sampled to be
    <= 0.
    """
    free = [one for one in expr.inputs if one not in chosen]
    trials = itertools.islice(itertools.product(*(_draws(one) for one in free)), MOST_TRIALS)
    trials = [chosen | dict(zip(free, trial, strict=True)) for trial in trials]
    for proven, weak in ((True, True), (True, False), (False, False)) if is_decay else ((False, False),):
        for trial in trials:
            if proven and not _is_proven(expr, trial):
                continue
            value = _sampled(expr, trial, scalars)
            if not bool(value.isfinite().all()) or (is_decay and bool((value > 0).any())):
                continue
            if not weak or WEAK[0] < float(-value.median()) < WEAK[1]:
                yield trial


def _draws(one: Input) -> Iterable[Draw]:
    """The ways to draw an input: by its declared bounds if it has any, else those of DRAWS."""
    low, high = one.low, one.high
    if low is not None and high is not None:
        return (Draw(low, high, lambda z: low + (high - low) * torch.sigmoid(z)),)
    if low is not None:
        return (Draw(low, INF, lambda z: low + softplus(z)),)
    if high is not None:
        return Draw(-INF, high, lambda z: high - softplus(-2 * z - 3)), Draw(-INF, high, lambda z: high - softplus(z))
    return DRAWS


def _is_proven(expr: Expr, draws: Mapping[Input, Draw]) -> bool:
    """Whether interval arithmetic shows that the expression is never positive. It knows nothing of scalars and
    heads.
    """
    if not expr.inputs:
        return True  # a number per head: sampled is proven
    bounded = {}
    for one, draw in draws.items():
        ends = {"low": None if draw.low == -INF else draw.low, "high": None if draw.high == INF else draw.high}
        bounded[one] = Input(one.name, one.axes, **ends)
    return interval(substitute(expr, bounded)).high <= 0


def _sampled(expr: Expr, draws: Mapping[Input, Draw], scalars: Mapping[str, float]) -> Tensor:
    """The expression's values for some small inputs, five axes each."""
    sizes = {"b": 2, "t": 32, "h": 4, "k": 4, "v": 4, "d": 4}
    values: dict[str, Tensor | float] = {"head": torch.arange(4.0, dtype=torch.float64).view(4, 1, 1), **scalars}
    for one in expr.inputs:
        drawn = draws[one].make(_normal(one, [sizes[axis] for axis in one.axes], seed=17)).double()
        axes = one.axes.replace(VECTOR, "h")  # a channel of a vector state is as a head
        values[one.name] = drawn.view([sizes[axis] if axis in axes else 1 for axis in AXES])
    value = evaluate(expr, values, 4, channel=AXES.index("k") - len(AXES))
    return value if isinstance(value, Tensor) else torch.tensor(float(value))


def _scalar_values(spec: Spec) -> Iterable[tuple[tuple[str, float], ...]]:
    """Values to try for the scalars: rising, falling, and all the same."""
    names = [scalar.name for scalar in spec.scalars]
    rising = [float(i + 1) for i in range(len(names))]
    lists = (rising, rising[::-1], [0.5] * len(names), [-0.5] * len(names)) if names else ([],)
    return [tuple(zip(names, values, strict=True)) for values in lists]

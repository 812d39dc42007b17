"""Whole specs at random with arguments to match, by Hypothesis: anything that the language allows.

    from flagen.fuzz_specs import PROFILES, trials
    @hypothesis.given(trials(PROFILES["cpu"]))      # a few trials of one spec
    def test(found): ...

Specs are never refused: the rules of validate.py are obeyed as they are drawn. A failure shrinks to the smallest spec
first, since that is drawn first, then to plain arguments.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from . import fuzz_exprs as exprs
from .expr import Expr, elu, exp, k, maximum, q, relu, sigmoid, silu, softplus, sqrt, tanh, taylor, v
from .expr import abs as absolute
from .fuzz import Trial
from .fuzz_exprs import Draw, one_of
from .samples import LAYOUTS
from .spec import Spec, SpecWarning, default_inputs

NAME = "drawn"
DECAY_AXES = (
    None, "h", "bth", "bthk", "bthv", "", "hk", "hv", "bh", "bthk", "bth", "bthv", "th", "bhk", "btk", "bhv", "bt", "t",
    "k", "thv",
)  # fmt: skip
POSITIVE_MAPS: tuple[exprs.Form, ...] = (
    lambda x: elu(x) + 1,
    softplus,
    lambda x: sigmoid(x) + 0.05,
    lambda x: x * x / 4 + 0.1,
    lambda x: exp(x / 4),
    lambda x: relu(x) + 0.2,
)
SIGNED_MAPS: tuple[exprs.Form, ...] = (*POSITIVE_MAPS, relu, silu, tanh, lambda x: x / (1 + absolute(x)))
# of n, which is positive
DIVISORS: tuple[Any, ...] = (True, lambda n: n + 0.5, lambda n: sqrt(n * n + 1), lambda n: maximum(n, 0.01))
# of n, which may have any sign. Where n is about 1 in size, maximum(abs(n), 1) is a matter of rounding: see fuzz_judge
SIGNED_DIVISORS: tuple[Any, ...] = (
    lambda n: 1 + absolute(n),
    lambda n: sqrt(n * n + 1),
    lambda n: maximum(absolute(n), 1),
    lambda n: 1 + n * n / 4,
)


@dataclass(frozen=True)
class Profile:
    """What arguments are drawn from, the simplest first. lengths: tokens, of a chunk of C tokens, as functions of C.

    builds: how often dtypes and channels are drawn for one spec, which is what compiles kernels anew; runs: how often
    lengths and the like are drawn for each of these.
    """

    device: str
    backend: str
    dtypes: tuple[str, ...]
    keys: tuple[int, ...]
    taylor_keys: tuple[int, ...]
    values: tuple[int, ...]
    heads: tuple[int, ...]
    chunks: tuple[int | None, ...]
    lengths: tuple[Callable[[int], int], ...]
    builds: int
    runs: int


LENGTHS = (
    lambda C: 1, lambda C: C, lambda C: C + 1, lambda C: C - 1, lambda C: 2 * C + 5, lambda C: 3 * C, lambda C: 3,
)  # fmt: skip
PROFILES = {
    "cpu": Profile(
        device="cpu", backend="torch", dtypes=("float32", "float64", "bfloat16", "float16"), keys=(5, 1, 3, 8, 16, 33),
        taylor_keys=(5, 1, 3, 8), values=(3, 1, 4, 7, 20, 40), heads=(1, 2, 3, 4, 6), chunks=(16, 32, None, 64),
        lengths=(*LENGTHS, lambda C: 5 * C + 3), builds=2, runs=2,
    ),
    "interpreter": Profile(
        device="cpu", backend="triton", dtypes=("float32", "float16", "bfloat16"), keys=(5, 3, 8, 17, 1),
        taylor_keys=(3, 5, 1), values=(3, 4, 7, 20, 1), heads=(1, 2, 4), chunks=(16, 32, None), lengths=LENGTHS[:5],
        builds=1, runs=2,
    ),
    "cuda": Profile(
        device="cuda", backend="auto", dtypes=("float32", "bfloat16", "float16"),
        keys=(16, 5, 20, 33, 60, 64, 100, 128), taylor_keys=(5, 8, 16, 24, 3), values=(16, 3, 24, 40, 64, 100, 128),
        heads=(1, 2, 4, 6), chunks=(None, None, 16, 32, 64),
        lengths=(*LENGTHS, lambda C: 8 * C + 1, lambda C: 257, lambda C: 700), builds=2, runs=3,
    ),
}  # fmt: skip


def trials(profile: Profile) -> st.SearchStrategy[tuple[Trial, ...]]:
    """A few trials of one spec."""

    @st.composite
    def drawn(draw: Draw) -> tuple[Trial, ...]:
        spec = drawn_spec(draw)
        found: list[Trial] = []
        for _ in range(one_of(draw, range(1, profile.builds + 1))):
            build = _build(draw, spec, profile)
            found += [Trial(spec, **build, **_run(draw, spec, profile, build)) for _ in _times(draw, profile.runs)]
        return tuple(dict.fromkeys(found))

    return drawn()


def specs() -> st.SearchStrategy[Spec]:
    """A spec of the language."""
    return st.composite(drawn_spec)()


def _times(draw: Draw, most: int) -> range:
    return range(one_of(draw, range(1, most + 1)))


# --- the spec


def drawn_spec(draw: Draw) -> Spec:
    """The rules of the language decide what may follow: a phase or a bonus excludes taylor, and so on."""
    rarely = st.sampled_from((False, False, False, True))
    axes = one_of(draw, DECAY_AXES)
    per_key, per_value = "k" in (axes or ""), "v" in (axes or "")
    arguments: dict[str, Any] = {}
    if axes is not None:
        arguments["log_decay"] = exprs.log_decay(draw, axes, (q, k, v))
    kind = one_of(draw, ("plain", "plain", "plain", "map", "taylor", "map"))
    if kind == "taylor" and per_key:
        kind = "map"
    if kind != "taylor" and not per_value and draw(rarely):
        arguments["phase"] = _phase(draw)
    positive = "phase" not in arguments and not per_value and draw(st.booleans())  # a sum to divide by
    arguments |= _features(draw, kind, positive)
    if positive:
        positive_sum = "feature_map" in arguments and arguments["feature_map"] != taylor(1)
        arguments["normalize"] = one_of(draw, DIVISORS if positive_sum else SIGNED_DIVISORS)
        if arguments["normalize"] is True and draw(rarely):
            arguments["eps"] = 1e-3
    if kind != "taylor" and draw(rarely):
        axes = one_of(draw, exprs.subsets("bthk"))
        arguments["bonus"] = exprs.positive(draw, axes) if positive or draw(st.booleans()) else exprs.signed(draw, axes)
    arguments["key"] = exprs.role(draw, k, (q, k))
    arguments["query"] = exprs.role(draw, q, (q, k))
    arguments["value"] = exprs.role(draw, v, (v,))
    arguments["scale"] = one_of(draw, (None, None, 1, 0.3))
    return _declared(draw, arguments)


def _features(draw: Draw, kind: str, positive: bool) -> dict[str, Any]:
    if kind == "taylor":
        return {"feature_map": taylor(one_of(draw, (2, 1)))}
    if kind == "map":
        return {"feature_map": one_of(draw, POSITIVE_MAPS if positive else SIGNED_MAPS)}
    return {}


def _phase(draw: Draw) -> Expr:
    axes = one_of(draw, ("bthk", "bth", "hk", "h", *exprs.subsets("bthk")))
    return exprs.signed(draw, axes) * one_of(draw, (1, 0.3)) if draw(st.booleans()) else exprs.leaf(draw, axes)


def _declared(draw: Draw, arguments: dict[str, Any]) -> Spec:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SpecWarning)  # a divisor of a sum of any sign is meant
        spec = Spec(NAME, **arguments)
        if one_of(draw, (False,) * 7 + (True,)):
            order = draw(st.permutations(default_inputs(spec)))
            spec = Spec(NAME, **arguments, inputs=order)
    return spec


# --- arguments


def _build(draw: Draw, spec: Spec, profile: Profile) -> dict[str, Any]:
    """What decides which kernels are compiled."""
    dtype = one_of(draw, profile.dtypes)
    gates = (None, "float32", "bfloat16") if dtype != "float64" else (None, "float32")
    names = [one.name for one in spec.inputs]
    some = st.lists(st.sampled_from([*names, "initial_state"]), unique=True)
    asked = one_of(draw, ("all", "all", "some"))
    return {
        "dtype": dtype,
        "K": one_of(draw, profile.taylor_keys if spec.taylor else profile.keys),
        "V": one_of(draw, profile.values),
        "chunk_size": one_of(draw, profile.chunks),
        "gate_dtype": one_of(draw, gates),
        "initial_state": one_of(draw, (False, True, True)),
        "final_state": one_of(draw, (False, True, True)),
        "requires_grad": None if asked == "all" else tuple(draw(some)),
        "layout": one_of(draw, ("contiguous", "contiguous", *LAYOUTS)),
        "device": profile.device,
        "backend": profile.backend,
    }


def _run(draw: Draw, spec: Spec, profile: Profile, build: dict[str, Any]) -> dict[str, Any]:
    """Lengths, batch, heads: what compiled kernels take as they come."""
    C = build["chunk_size"] or 32
    heads = one_of(draw, profile.heads)
    found: dict[str, Any] = {"H": heads, "heads": _groups(draw, spec, heads), "seed": draw(st.integers(0, 999))}
    found["scale"] = one_of(draw, (None, None, 1.0, 0.25))
    if one_of(draw, (False, False, True)):
        lengths = [
            one(C) for one in draw(st.lists(st.sampled_from((lambda C: 0, *profile.lengths)), min_size=1, max_size=4))
        ]
        bounds = tuple(sum(lengths[:i]) for i in range(len(lengths) + 1))
        found |= {"cu_seqlens": bounds, "T": max(1, bounds[-1] + one_of(draw, (0, 3)))}
    else:
        found |= {"B": one_of(draw, (1, 2, 3)), "T": one_of(draw, profile.lengths)(C)}
        found["decode"] = one_of(draw, (0, 1, 3))
    return found


def _groups(draw: Draw, spec: Spec, heads: int) -> tuple[tuple[str, int], ...]:
    """Inputs that have fewer heads than the most; one input has all."""
    names = [one.name for one in spec.inputs if "h" in one.axes]
    divisors = [n for n in range(1, heads) if heads % n == 0]
    if not divisors or len(names) < 2 or not one_of(draw, (False, False, True)):
        return ()
    whole = one_of(draw, names)
    counts = {name: one_of(draw, (heads, *divisors)) for name in names if name != whole}
    return tuple((name, count) for name, count in counts.items() if count < heads)

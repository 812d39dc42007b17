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
from .expr import (
    ROW_FUNCTIONS,
    Expr,
    Input,
    Taylor,
    elu,
    exp,
    k,
    l2norm,
    maximum,
    q,
    relu,
    sigmoid,
    silu,
    softplus,
    sqrt,
    tanh,
    taylor,
    v,
)
from .expr import abs as absolute
from .fuzz import Trial
from .fuzz_exprs import Draw, one_of
from .samples import LAYOUTS
from .spec import Spec, SpecWarning, default_inputs

NAME = "drawn"
RARELY = (False, False, False, True)
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


# those that can be scaled
HOMOGENEOUS = (SIGNED_DIVISORS[0], SIGNED_DIVISORS[2])


@dataclass(frozen=True)
class Profile:
    """What arguments are drawn from, the simplest first. lengths: tokens, of a chunk of C tokens, as functions of C.

    norms: whether with l2norm where nothing is erased.
    builds: how often dtypes and channels are drawn for one spec, which is what compiles kernels anew; runs: how often
    lengths and the like are drawn for each of these.
    """

    device: str
    backend: str
    dtypes: tuple[str, ...]
    gate_dtypes: tuple[str | None, ...]
    keys: tuple[int, ...]
    taylor_keys: tuple[int, ...]
    values: tuple[int, ...]
    heads: tuple[int, ...]
    chunks: tuple[int | None, ...]
    lengths: tuple[Callable[[int], int], ...]
    builds: tuple[int, ...]
    runs: tuple[int, ...]
    norms: bool


LENGTHS = (
    lambda C: 1, lambda C: C, lambda C: C + 1, lambda C: C - 1, lambda C: 2 * C + 5, lambda C: 3 * C, lambda C: 3,
)  # fmt: skip
PROFILES = {
    "cpu": Profile(
        device="cpu",
        backend="torch",
        dtypes=("float32", "float64", "bfloat16", "float16"),
        gate_dtypes=(None, "float32", "bfloat16"),
        keys=(5, 1, 3, 8, 16, 33),
        taylor_keys=(5, 1, 3, 8),
        values=(3, 1, 4, 7, 20, 40),
        heads=(1, 2, 3, 4, 6),
        chunks=(16, 32, None, 64),
        lengths=(*LENGTHS, lambda C: 5 * C + 3),
        builds=(1, 2),
        runs=(1, 2),
        norms=True,
    ),
    "interpreter": Profile(
        # Triton's interpreter has no bf16
        device="cpu",
        backend="triton",
        dtypes=("float32", "float16"),
        gate_dtypes=(None, "float32", "float16"),
        keys=(5, 3, 8, 17, 1),
        taylor_keys=(3, 5, 1),
        values=(3, 4, 7, 20, 1),
        heads=(1, 2, 4),
        chunks=(16, 32, None),
        lengths=LENGTHS[:5],
        builds=(1,),
        runs=(1, 2),
        norms=False,
    ),
    "cuda": Profile(
        device="cuda",
        backend="auto",
        dtypes=("float32", "bfloat16", "float16"),
        gate_dtypes=(None, "float32", "bfloat16"),
        keys=(16, 5, 20, 33, 60, 64, 100, 128),
        taylor_keys=(5, 8, 16, 24, 3),
        values=(16, 3, 24, 40, 64, 100, 128),
        heads=(1, 2, 4, 6),
        chunks=(None, None, 16, 32, 64),
        lengths=(*LENGTHS, lambda C: 8 * C + 1, lambda C: 257, lambda C: 700),
        builds=(1, 1, 1, 2),
        runs=(1, 2),
        norms=False,
    ),
}


def trials(profile: Profile) -> st.SearchStrategy[tuple[Trial, ...]]:
    """A few trials of one spec."""

    @st.composite
    def drawn(draw: Draw) -> tuple[Trial, ...]:
        spec = draw(specs(profile.norms))
        found: list[Trial] = []
        for _ in range(one_of(draw, profile.builds)):
            build = _build(draw, spec, profile)
            found += [
                Trial(spec, **build, **_run(draw, spec, profile, build)) for _ in range(one_of(draw, profile.runs))
            ]
        return tuple(dict.fromkeys(found))

    return drawn()


def specs(norms: bool = True) -> st.SearchStrategy[Spec]:
    """A spec of the language. norms: whether with l2norm where nothing is erased."""
    return st.composite(drawn_spec)(norms)


# --- the spec


@st.composite
def _part(draw: Draw, make: Callable[..., Any], *arguments: Any) -> Any:
    """What `make` draws as one part, which a failure that does not need it can shrink away at once."""
    draw(st.just(None))
    return make(draw, *arguments)


def drawn_spec(draw: Draw, norms: bool = True) -> Spec:
    """The rules of the language decide what may follow: a phase excludes taylor, and so on."""
    axes, decay = draw(_part(_decay))
    per_key, per_value = "k" in axes, "v" in axes
    found: dict[str, Any] = {} if decay is None else {"log_decay": decay}
    if not per_value:
        found |= draw(_part(_phase))
    if not per_value and not found.keys() & {"phase"}:
        found |= draw(_part(_erase))
    alone = bool(found.keys() & {"phase", "erase"})  # without taylor and a sum to divide by
    found |= draw(_part(_features, not per_key and not alone, not per_value and not alone))
    if not isinstance(found.get("feature_map"), Taylor) and "erase" not in found:
        found |= draw(_part(_bonus, "normalize" in found))
    found["scale"] = one_of(draw, (None, None, 1, 0.3))
    for name, own, others in (("key", k, (q, k)), ("query", q, (q, k)), ("value", v, (v,))):
        found[name] = draw(_part(exprs.role, own, others, norms or "erase" in found))
    if found.get("normalize") in HOMOGENEOUS and not per_key and not found.keys() & {"bonus", "feature_map"}:
        found |= draw(_part(_gate, found["key"]))
    return _declared(draw, found)


def _decay(draw: Draw) -> tuple[str, Expr | None]:
    axes = one_of(draw, DECAY_AXES)
    return axes or "", None if axes is None else exprs.log_decay(draw, axes, (q, k, v))


def _phase(draw: Draw) -> dict[str, Any]:
    if not one_of(draw, RARELY):
        return {}
    axes = one_of(draw, ("bthk", "bth", "hk", "h", *exprs.subsets("bthk")))
    is_made = draw(st.booleans())
    return {"phase": exprs.signed(draw, axes) * one_of(draw, (1, 0.3)) if is_made else exprs.leaf(draw, axes)}


def _erase(draw: Draw) -> dict[str, Any]:
    """Corrections by a vector of norm 1 at the most, or half of that where two vectors have nothing in common."""
    if not one_of(draw, RARELY):
        return {}
    kind = one_of(draw, ("own", "strength", "strength", "given", "general"))
    unit = l2norm(exprs.leaf(draw, "bthk", (k,)))
    strength = exprs.strength(draw, one_of(draw, exprs.subsets("bthk")))
    pair = {
        "own": (unit, unit),
        "strength": (unit, strength * unit),
        "given": (Input("r_bthk", "bthk"), Input("s_bthk", "bthk")),
        "general": (unit, strength * l2norm(exprs.leaf(draw, "bthk")) / 2),
    }
    return {"erase": pair[kind], "erase_reads": one_of(draw, ("decayed", "previous"))}


def _features(draw: Draw, may_expand: bool, may_divide: bool) -> dict[str, Any]:
    kind = one_of(draw, ("plain", "plain", "map", "taylor", "taylor", "map"))
    divides = draw(st.booleans()) and may_divide
    found: dict[str, Any] = {}
    if kind == "taylor" and may_expand:
        found["feature_map"] = taylor(one_of(draw, (2, 1)))
    elif kind != "plain":
        found["feature_map"] = one_of(draw, POSITIVE_MAPS if divides else SIGNED_MAPS)
    if divides:
        is_positive = "feature_map" in found and found["feature_map"] != taylor(1)
        found["normalize"] = one_of(draw, DIVISORS if is_positive else SIGNED_DIVISORS)
        if found["normalize"] is True and one_of(draw, RARELY):
            found["eps"] = 1e-3
    return found


def _bonus(draw: Draw, divides: bool) -> dict[str, Any]:
    if not one_of(draw, RARELY):
        return {}
    axes = one_of(draw, exprs.subsets("bthk"))
    is_positive = draw(st.booleans()) or divides
    return {"bonus": exprs.positive(draw, axes) if is_positive else exprs.signed(draw, axes)}


def _gate(draw: Draw, key: Expr) -> dict[str, Any]:
    """An exponential gate, which the state is held divided by."""
    if not draw(st.booleans()):
        return {}
    axes = one_of(draw, exprs.subsets("bth"))
    return {"key": key * exp(one_of(draw, (1, 3)) * exprs.signed(draw, axes)), "stabilize": "max"}


def _declared(draw: Draw, arguments: dict[str, Any]) -> Spec:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SpecWarning)  # a divisor of a sum of any sign is meant
        spec = Spec(NAME, **arguments)
        if one_of(draw, RARELY):
            order = draw(st.permutations(default_inputs(spec)))
            spec = Spec(NAME, **arguments, inputs=order)
    return spec


# --- arguments


def _build(draw: Draw, spec: Spec, profile: Profile) -> dict[str, Any]:
    """What decides which kernels are compiled."""
    dtype = one_of(draw, profile.dtypes)
    names = [one.name for one in spec.inputs]
    has_rows = any(getattr(node, "function", "") in ROW_FUNCTIONS for _, expr in spec.roles for node in expr.walk())
    # the derivative of an l2norm of one channel is zero, a difference of rounded terms
    keys = [key for key in (profile.taylor_keys if spec.taylor else profile.keys) if key > 1 or not has_rows]
    some = st.lists(st.sampled_from([*names, "initial_state"]), unique=True)
    asked = one_of(draw, ("all", "all", "some"))
    return {
        "dtype": dtype,
        "K": one_of(draw, keys),
        "V": one_of(draw, profile.values),
        "chunk_size": one_of(draw, profile.chunks),
        "gate_dtype": one_of(draw, profile.gate_dtypes),
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

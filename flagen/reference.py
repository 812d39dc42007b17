"""The reference: the recurrence of a spec, token by token, in plain PyTorch.

    S_t = exp(log_decay_t + i phase_t) * S_{t-1} + key_t value_t^T,    o_t = Re(query_t^T S_t)
    with erase=(a, b):    S_t = X_t - b_t (a_t^T X_t) + key_t value_t^T,    X_t = exp(log_decay_t) * S_{t-1}

    with stabilize:       S_t is held times exp(-m_t), m_t = max(log_decay_t + m_{t-1}, gate_t), a constant in gradients

A vector state is the same with a head of one key and one value channel for each of its channels, the axis d.

It is made from the spec alone and shares nothing with the kernels but the evaluation of expressions, so that it can
judge them. Gradients are autograd's. Every option is one of a few rewrites of the same recurrence: the scale multiplies
query, a normaliser is one more column of ones in value, a Taylor map makes longer queries and keys, a phase makes the
decay complex.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .expr import AXES, exp
from .functions import evaluate
from .stabilize import LOWEST, PEAK, RISE, gated, scaled_normalizer

if TYPE_CHECKING:
    from .expr import Expr
    from .spec import Spec

State = Tensor | tuple[Tensor, ...]
WHOLE_ELEMENTS = 1 << 23  # of all states of a sequence: below, autograd keeps every one


class Roles(NamedTuple):
    """A sequence of n tokens, time first. query, key [n, B, H, F] over the expanded features, query scaled; value [n,
    B, H, V], with a last column of ones if there is a normaliser; decay broadcasts to [n, B, H, F, V], complex with a
    phase, or is None; own [n, B, H, 1] with a bonus: the weight of the token's own value, and the output reads the
    state before the token; or None. erase_a, erase_b: as query, with erase; previous: erase_a reads the state before
    the decay.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    decay: Tensor | None
    own: Tensor | None
    erase_a: Tensor | None = None
    erase_b: Tensor | None = None
    previous: bool = False

    def split(self, lengths: Sequence[int]) -> list[Roles]:
        count = len(lengths)
        parts = [x.split(list(lengths)) if isinstance(x, Tensor) else [x] * count for x in self]
        return [Roles(*part) for part in zip(*parts, strict=True)]


def run(
    spec: Spec,
    inputs: Sequence[Tensor],
    *,
    scalars: Mapping[str, float] | None = None,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    segment: int | None = None,
) -> tuple[Tensor, State | None]:
    """The output [B, T, H, V] (a vector state: [B, T, D]) in the dtype of value's first input, and the state after the
    last token or None.

    inputs: tensors in the order of spec.inputs, on one device, of any float dtype; computed in fp64 if any is fp64,
        else in fp32. An input's heads may be any divisor of the largest number of heads.
    scalars: the numbers that the spec's Scalars stand for, by name. scale: None for the spec's, or K ** -0.5.
    initial_state: [N, H, K, V], complex with a phase, over the expanded features with taylor; with normalize the pair
        of that and of [N, H, K], and m [N, H] with stabilize; a vector state is [N, D]. None is zero. The final state
        has the same form, in fp32 (complex64), or fp64 if an input is.
    cu_seqlens: [N + 1] bounds of sequences in one row (B = 1), from 0 to at most T; tokens past the last give zero.
        Inputs with the axis b and without t then have a row per sequence.
    segment: tokens between the states that autograd keeps; those between are computed again in the backward, so that
        memory grows with T / segment + segment. None decides by size. It changes no number.

    Where exp(log_decay) is 0 the state is forgotten, and log_decay has no gradient there whatever its expression's
    derivative.
    Raises ValueError on a positive log_decay and on shapes, scalars or bounds that do not fit the spec.
    """
    device = inputs[0].device
    with torch.autocast(device.type, enabled=False):
        limits = None if cu_seqlens is None else _limits(spec, cu_seqlens)
        sizes = _sizes(spec, inputs, limits)
        wide = any(x.dtype == torch.float64 for x in inputs)
        dtype = torch.float64 if wide else torch.float32
        values = _values(spec, inputs, scalars or {}, sizes, limits, dtype)
        tokens = sizes["t"] if limits is None else limits[-1]
        scales = () if spec.stabilize is None else _held(spec, values, initial_state, sizes, tokens, limits, dtype)
        roles = _roles(spec, values, sizes, tokens, scale, dtype)
        states = _states(spec, initial_state, roles, sizes, limits)
        if limits is None:
            o, state = _sequence(roles, states, segment)
        else:
            parts = roles.split([end - begin for begin, end in pairwise(limits)])
            runs = [_sequence(part, states[i : i + 1], segment) for i, part in enumerate(parts)]
            past = roles.value.new_zeros(sizes["t"] - limits[-1], 1, sizes["h"], roles.value.shape[-1])
            o, state = torch.cat([*(o for o, _ in runs), past]), torch.cat([state for _, state in runs])
        o = _normalized(spec, o, values, sizes["h"], None if limits is None else limits[-1])
        o = o.squeeze(-1) if spec.vector else o
        o = o.transpose(0, 1).to(inputs[spec.inputs.index(spec.value.inputs[0])].dtype)
    if not output_final_state:
        return o, None
    if spec.vector:
        return o, state.flatten(1)
    return o, state if spec.normalizer is None else (state[..., :-1], state[..., -1], *scales)


# --- the recurrence


def _sequence(roles: Roles, state: Tensor, segment: int | None) -> tuple[Tensor, Tensor]:
    """The outputs [n, B, H, V] and the state after the last token, from the state [B, H, F, V] before the first."""
    tokens = roles.query.shape[0]
    if segment is None:
        segment = tokens if tokens * state.numel() <= WHOLE_ELEMENTS else max(32, math.isqrt(tokens))
    segment = max(1, segment)
    lengths = [min(segment, tokens - begin) for begin in range(0, tokens, segment)] or [0]
    if len(lengths) == 1:
        return _tokens(state, *roles)
    outputs = []
    for part in roles.split(lengths):
        o, state = checkpoint(_tokens, state, *part, use_reentrant=False, preserve_rng_state=False)
        outputs.append(o)
    return torch.cat(outputs), state


def _tokens(
    state: Tensor, query: Tensor, key: Tensor, value: Tensor, decay: Tensor | None, own: Tensor | None,
    erase_a: Tensor | None, erase_b: Tensor | None, previous: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One step of Python per token; what tokens do not share is computed for all of them at once."""
    updates = key.unsqueeze(-1) * value.unsqueeze(-2)
    decays = None if decay is None else decay.unbind(0)
    before, after = [], []
    for t, update in enumerate(updates.unbind(0)):
        before.append(state)
        decayed = state if decays is None else decays[t] * state
        if erase_a is not None:
            read = (erase_a[t].unsqueeze(-1) * (state if previous else decayed)).sum(-2, keepdim=True)
            decayed = decayed - erase_b[t].unsqueeze(-1) * read
        state = decayed + update
        after.append(state)
    reads = torch.stack(after if own is None else before) if before else updates
    o = (query.unsqueeze(-1) * (reads.real if reads.is_complex() else reads)).sum(-2)
    return o if own is None else o + own * value, state


def _normalized(spec: Spec, o: Tensor, values: Mapping[str, Tensor | float], heads: int, end: int | None) -> Tensor:
    """Divides by f of the last column. Tokens from `end` on belong to no sequence and stay zero."""
    if spec.normalizer is None:
        return o
    inside, past = (o, o[:0]) if end is None else o.split([end, o.shape[0] - end])
    known: dict[str, Tensor | float] = {"n": inside[..., -1:]}
    normalizer = spec.normalizer
    if spec.stabilize is not None:
        normalizer = scaled_normalizer(normalizer)
        known[PEAK.name] = values[PEAK.name].transpose(0, 1)
    divisor = evaluate(normalizer, known, heads)
    return torch.cat([inside[..., :-1] / divisor, past[..., :-1]])


@torch.no_grad()
def _held(
    spec: Spec, values: dict[str, Tensor | float], given: State | None, sizes: Mapping[str, int], tokens: int,
    limits: list[int] | None, dtype: torch.dtype,
) -> tuple[Tensor]:  # fmt: skip
    """What the state is held divided by, in logarithms: adds m and its rise at each token to `values`. Returns m after
    the last, [N, H]."""
    like = torch.empty(0, dtype=dtype, device=values[spec.value.inputs[0].name].device)
    shape = sizes["b"], tokens, sizes["h"], 1
    gate = _evaluated(gated(spec.key).gate, values, sizes["h"], like).expand(shape)
    decay = like.new_zeros(shape)
    if spec.log_decay is not None:
        decay = _evaluated(spec.log_decay, values, sizes["h"], like).expand(shape)
    bounds = [0, tokens] if limits is None else limits
    m = like.new_full((sizes["b"] if limits is None else len(limits) - 1, sizes["h"]), LOWEST)
    if given is not None:
        m = given[2].detach().to(dtype).clamp(min=LOWEST)
    peaks, rises, last = [], [], []
    for row, (begin, end) in enumerate(pairwise(bounds)):
        now = m if limits is None else m[row : row + 1]
        for t in range(begin, end):
            before, now = now, torch.maximum(now + decay[:, t, :, 0], gate[:, t, :, 0]).clamp(min=LOWEST)
            peaks.append(now)
            rises.append(now - before)
        last.append(now)
    for name, found in ((PEAK.name, peaks), (RISE.name, rises)):
        values[name] = torch.stack(found, 1).unsqueeze(-1) if found else like.new_zeros(shape)
    return (torch.cat(last),)


# --- the roles


def _roles(spec: Spec, values: Mapping[str, Tensor | float], sizes: Mapping[str, int], tokens: int,
           scale: float | None, dtype: torch.dtype) -> Roles:  # fmt: skip
    batch, heads = sizes["b"], sizes["h"]
    like = torch.empty(0, dtype=dtype, device=values[spec.value.inputs[0].name].device)

    exprs = dict(spec.roles)
    if spec.stabilize is not None:
        gate, rest = gated(spec.key)
        exprs["key"] = rest * exp(gate - PEAK)

    def role(name: str, channels: int) -> Tensor:
        value = _evaluated(exprs[name], values, heads, like)
        return value.expand(batch, tokens, heads, channels).transpose(0, 1)

    query, key, value = role("query", sizes["k"]), role("key", sizes["k"]), role("value", sizes["v"])
    query = query * (scale if scale is not None else spec.scale if spec.scale is not None else sizes["k"] ** -0.5)
    own = None if spec.bonus is None else (query * role("bonus", sizes["k"]) * key).sum(-1, keepdim=True)
    decay = _decay(spec, values, heads, like)
    if spec.taylor:
        query, key = _features(query, spec.taylor, query=True), _features(key, spec.taylor, query=False)
    if spec.normalizer is not None:
        value = torch.cat([value, torch.ones_like(value[..., :1])], -1)
    decay = None if decay is None else decay.expand(tokens, *decay.shape[1:])
    if spec.erase is None:
        return Roles(query, key, value, decay, own)
    erased = role("erase_a", sizes["k"]), role("erase_b", sizes["k"])
    return Roles(query, key, value, decay, own, *erased, previous=spec.erase_reads == "previous")


def _evaluated(expr: Expr, values: Mapping[str, Tensor | float], heads: int, like: Tensor) -> Tensor:
    """An expression as [B, T, H, D], each axis its size or 1, in the working dtype."""
    value = evaluate(expr, values, heads)
    return value.to(like.dtype) if isinstance(value, Tensor) else like.new_full((1, 1, 1, 1), value)


def _decay(spec: Spec, values: Mapping[str, Tensor | float], heads: int, like: Tensor) -> Tensor | None:
    """exp(log_decay + i phase), time first, with an axis each for key and value channels."""
    decay = None
    if spec.stabilize is not None:
        decay = (
            -values[RISE.name] if spec.log_decay is None else _log_decay(spec, values, heads, like) - values[RISE.name]
        )
        decay = decay.exp()
    elif spec.log_decay is not None:
        decay = _log_decay(spec, values, heads, like).exp()
    if spec.phase is not None:
        phase = _evaluated(spec.phase, values, heads, like)
        decay = torch.ones_like(phase) if decay is None else decay
        decay = torch.complex(decay * phase.cos(), decay * phase.sin())
    if decay is None:
        return None
    per_value = spec.log_decay is not None and "v" in spec.log_decay.axes
    return decay.transpose(0, 1).unsqueeze(-2 if per_value else -1)


def _log_decay(spec: Spec, values: Mapping[str, Tensor | float], heads: int, like: Tensor) -> Tensor:
    """Where the decay is zero the inputs are selected away: autograd would give 0 times the expression's derivative,
    which is NaN where that is infinite.
    """
    with torch.no_grad():
        value = _evaluated(spec.log_decay, values, heads, like)
        if (value > 0).any():
            raise ValueError(
                f"{spec.name}: log_decay = {spec.log_decay} is positive in {int((value > 0).sum())} of {value.numel()} "
                f"places, up to {float(value[value > 0].max()):.3g}; it is the natural log of the decay and must be "
                "<= 0: is it the decay itself, or is a logsigmoid missing?"
            )
        reset = value.exp() == 0
    if reset.any():
        names = [one.name for one in spec.log_decay.inputs]
        selected = {name: torch.where(reset, values[name].detach(), values[name]) for name in names}
        values = {**values, **selected}
    return _evaluated(spec.log_decay, values, heads, like)


def _features(x: Tensor, order: int, *, query: bool) -> Tensor:
    """[..., K] to [1; x_i; x_i x_j for i <= j]. With the query's multiplicities the product of two is 1 + s (+ s^2 /
    2).
    """
    parts = [torch.ones_like(x[..., :1]), x]
    if order == 2:
        i, j = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device)
        pairs = x[..., i] * x[..., j]
        parts.append(torch.where(i == j, 0.5, 1.0).to(x.dtype) * pairs if query else pairs)
    return torch.cat(parts, -1)


# --- sizes and layouts


def _values(spec: Spec, inputs: Sequence[Tensor], scalars: Mapping[str, float], sizes: Mapping[str, int],
            limits: list[int] | None, dtype: torch.dtype) -> dict[str, Tensor | float]:  # fmt: skip
    """What expressions are evaluated with: each input as [B, T, H, D] with 1 for the axes that it lacks."""
    device = inputs[0].device
    # the functions of head are computed in fp64: fp32 has no 1 - 2^-25
    exact = torch.float32 if device.type == "mps" else torch.float64
    found: dict[str, Tensor | float] = {"head": torch.arange(sizes["h"], dtype=exact, device=device).view(1, 1, -1, 1)}
    for scalar in spec.scalars:
        if scalar.name not in scalars:
            raise ValueError(f"{spec.name}: the scalar {scalar.name!r} is missing; give it as a number")
        found[scalar.name] = float(scalars[scalar.name])
    for declared, x in zip(spec.inputs, inputs, strict=True):
        x = x.to(dtype)
        for i, axes in enumerate(("b", "t", "hd", "kv")):
            if not set(axes) & set(declared.axes):
                x = x.unsqueeze(i)
        if limits is not None and "t" in declared.axes:
            x = x[:, : limits[-1]]
        elif limits is not None and "b" in declared.axes:
            lengths = torch.tensor(limits, device=device).diff()
            x = x.repeat_interleave(lengths, 0).transpose(0, 1)  # a row per sequence: one per token
        if "h" in declared.axes:
            x = x.repeat_interleave(sizes["h"] // x.shape[2], 2)
        found[declared.name] = x
    return found


def _states(
    spec: Spec, given: State | None, roles: Roles, sizes: Mapping[str, int], limits: list[int] | None
) -> Tensor:
    """The initial states [N, H, F, V], the normaliser's sums as a last column."""
    count = sizes["b"] if limits is None else len(limits) - 1
    shape = (count, sizes["h"], roles.key.shape[-1], roles.value.shape[-1])
    dtype = roles.value.dtype if spec.phase is None else roles.value.dtype.to_complex()
    if given is None:
        return torch.zeros(shape, dtype=dtype, device=roles.value.device)
    parts = (given,) if isinstance(given, Tensor) else tuple(given)
    if spec.vector:
        shape = shape[:2]
    wanted = [shape] if spec.normalizer is None else [(*shape[:-1], shape[-1] - 1), shape[:-1]]
    wanted += [shape[:2]] if spec.stabilize is not None else []
    if [tuple(x.shape) for x in parts] != wanted:
        form = ("one tensor", "a pair of tensors (S, z)", "three tensors (S, z, m)")[spec.state_parts - 1]
        raise ValueError(
            f"{spec.name}: initial_state must be {form} of shape {' and '.join(map(str, wanted))}, "
            f"got {' and '.join(str(tuple(x.shape)) for x in parts)}"
        )
    if spec.vector:
        return parts[0].to(dtype)[..., None, None]
    columns = [x if x.dim() == 4 else x.unsqueeze(-1) for x in parts[:2]]
    return torch.cat([x.to(dtype) for x in columns], -1)


def _sizes(spec: Spec, inputs: Sequence[Tensor], limits: list[int] | None) -> dict[str, int]:
    """The size of each axis, h the largest number of heads. Raises ValueError where inputs disagree."""
    if len(inputs) != len(spec.inputs):
        names = ", ".join(one.name for one in spec.inputs)
        raise ValueError(f"{spec.name}: takes {len(spec.inputs)} inputs ({names}), got {len(inputs)}")
    for declared, x in zip(spec.inputs, inputs, strict=True):
        if x.dim() != len(declared.axes):
            raise ValueError(
                f"{spec.name}: {declared.name} must have the axes {' '.join(declared.axes)}, got shape {tuple(x.shape)}"
            )
    heads = (
        max(x.shape[one.axes.index("h")] for one, x in zip(spec.inputs, inputs, strict=True) if "h" in one.axes)
        if not spec.vector
        else 1
    )
    found: dict[str, tuple[int, str]] = {"h": (heads, "")}
    for declared, x in zip(spec.inputs, inputs, strict=True):
        for axis, size in zip(declared.axes, x.shape, strict=True):
            if axis == "h":
                if not size or heads % size:
                    raise ValueError(f"{spec.name}: {declared.name} has {size} heads, which do not divide {heads}")
                continue
            if axis == "b" and limits is not None:
                wanted, other = (1, "cu_seqlens") if "t" in declared.axes else (len(limits) - 1, "cu_seqlens")
            else:
                wanted, other = found.setdefault(axis, (size, declared.name))
            if size != wanted:
                raise ValueError(
                    f"{spec.name}: {declared.name} has the size {size} in its axis {axis}, by {other} it must be "
                    f"{wanted}"
                )
    if spec.vector:
        found |= {"h": found["d"], "k": (1, ""), "v": (1, "")}
    sizes = {axis: size for axis, (size, _) in found.items()} | ({"b": 1} if limits is not None else {})
    if limits is not None and limits[-1] > sizes["t"]:
        raise ValueError(f"{spec.name}: cu_seqlens ends at {limits[-1]}, beyond the {sizes['t']} tokens; shorten it")
    return {axis: sizes[axis] for axis in AXES}


def _limits(spec: Spec, cu_seqlens: Tensor | Sequence[int]) -> list[int]:
    limits = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else [int(x) for x in cu_seqlens]
    if len(limits) < 2 or limits[0] != 0 or any(end < begin for begin, end in pairwise(limits)):
        raise ValueError(
            f"{spec.name}: cu_seqlens must rise from 0 and hold two bounds or more, got {str(limits)[:80]}"
        )
    return limits

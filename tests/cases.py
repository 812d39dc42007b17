"""Specs that together use every combination of the language, inputs for them, and what the reference makes of those."""

from __future__ import annotations

import math
import warnings

import torch

from flagen import reference, specs
from flagen.analysis import analyse
from flagen.expr import (
    Input,
    Scalar,
    elu,
    exp,
    head,
    heads,
    k,
    l2norm,
    log,
    logsigmoid,
    maximum,
    q,
    sigmoid,
    silu,
    softplus,
    sqrt,
    tanh,
    v,
)
from flagen.expr import abs as absolute
from flagen.functions import evaluate_host
from flagen.spec import Spec, SpecWarning, taylor
from flagen.torch_taylor import count

SCALARS = {"layer": 1.0, "layers": 4.0}
SPANS = [0, 70, 70, 103, 140]  # an empty sequence, and tokens past the last

gs, dt, gb = Input("gs", "b t h"), Input("dt", "b t h"), Input("gb", "b h")
gk, gv, gbk = Input("gk", "b t h k"), Input("gv", "b t h v"), Input("gbk", "b h k")
wk, wv, u, ut = Input("wk", "h k"), Input("wv", "h v"), Input("u", "h k"), Input("ut", "b t h k")
a, b, beta = Input("a", "b t h k"), Input("b", "b t h k"), Input("beta", "b t h")
th, ths, layer = Input("th", "b t h k"), Input("ths", "b t h"), Scalar("layer")


def _combinations() -> list[Spec]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SpecWarning)
        return [
            Spec("plain"),
            Spec("number", log_decay=-0.05),
            Spec("scalar", log_decay=-(head + 1) / heads * 0.1 * layer * sigmoid(gs)),
            Spec("scalar_u", log_decay=logsigmoid(gs), bonus=ut),
            Spec("row", log_decay=logsigmoid(gb)),
            Spec("row_key", log_decay=logsigmoid(gbk)),
            Spec("fixed_key", log_decay=-exp(wk)),
            Spec("fixed_value", log_decay=-exp(wv)),
            Spec("value_decay", log_decay=logsigmoid(gv) / 4),
            Spec("value_u", log_decay=logsigmoid(gv), bonus=u, key=softplus(k)),
            Spec(
                "key_u_norm",
                log_decay=logsigmoid(gk) / 4,
                bonus=exp(u),
                normalize=True,
                feature_map=lambda x: elu(x) + 1,
            ),
            Spec("norm_max", log_decay=logsigmoid(gs), normalize=lambda n: maximum(absolute(n), 1)),
            Spec(
                "held",
                key=(elu(k) + 1) * exp(gs * (1 + head) / heads) / 2,
                query=elu(q) + 1,
                normalize=True,
                stabilize="max",
            ),
            Spec(
                "held_fixed",
                key=k / exp(-dt),
                log_decay=log(1 - 2 ** (-5 - head)) * layer,
                normalize=lambda n: maximum(absolute(n) / 2, 1),
                stabilize="max",
            ),
            Spec("taylor_1", log_decay=logsigmoid(gs), feature_map=taylor(1)),
            Spec("taylor_2", log_decay=logsigmoid(gs), feature_map=taylor(2)),
            Spec("taylor_2_row", log_decay=logsigmoid(gb), feature_map=taylor(2), normalize=True),
            Spec("taylor_2_value", log_decay=logsigmoid(gv), feature_map=taylor(2)),
            Spec("phase_only", phase=ths),
            Spec("phase_scalar_u", log_decay=logsigmoid(gs), phase=th, bonus=u),
            Spec("phase_fixed", log_decay=log(1 - 2 ** (-5 - head)), phase=wk * 2),
            Spec("phase_key_u", log_decay=logsigmoid(gk), phase=tanh(th) * 3, bonus=ut),
            Spec(
                "shared",
                query=q * sigmoid(gs),
                key=k * exp(-softplus(gs)),
                value=v * gs,
                log_decay=logsigmoid(gs) * (1 + head) / heads,
            ),
            Spec("gated_value", value=v * silu(gv), log_decay=logsigmoid(gk)),
        ]


def _erasing() -> list[Spec]:
    delta = Spec("delta", query=l2norm(q), key=beta * l2norm(k), erase=(l2norm(k), beta * l2norm(k)))
    low_rank = Spec("low_rank", erase=(a, b))
    return [
        delta.replace("delta_key_previous", log_decay=logsigmoid(gk), erase_reads="previous"),
        delta.replace("delta_fixed", log_decay=log(1 - 2 ** (-5 - head)) * layer, erase_reads="previous"),
        delta.replace("delta_fixed_key", log_decay=-exp(wk), key=l2norm(silu(k)), erase=(l2norm(silu(k)),) * 2),
        low_rank,
        low_rank.replace("low_rank_key", query=q - tanh(u) * k, log_decay=logsigmoid(gk)),
        low_rank.replace("low_rank_scalar", log_decay=logsigmoid(gs), erase=(a, sigmoid(gs) * b)),
        low_rank.replace("low_rank_row_previous", log_decay=logsigmoid(gb), erase_reads="previous"),
        Spec("reflected", log_decay=logsigmoid(gbk), erase=(l2norm(a + b), 2 * sigmoid(ths) * l2norm(a + b))),
        Spec("normed", query=l2norm(q * sigmoid(gs)), key=l2norm(softplus(k)) * gs, log_decay=logsigmoid(gk), bonus=u),
        Spec("normed_taylor", feature_map=taylor(2), query=l2norm(q), key=l2norm(k * u)),
    ]


def _vectors() -> list[Spec]:
    x, g, gate, theta = (Input(name, "b t d") for name in ("x", "g", "gate", "theta"))
    qd, kd, vd = (Input(name, "b t d") for name in "qkv")
    lam, per, pace = Input("lam", "d"), Input("per", "b d"), Input("pace", "b t")
    decay = -softplus(lam) * sigmoid(gate)
    return [
        Spec("sums", value=x),
        Spec("turned", value=x * per, phase=theta * 2),
        Spec("real_gated", query=qd * lam, value=x * sqrt(1 - exp(2 * decay)), log_decay=decay),
        Spec("fixed", value=x, log_decay=-exp(lam) * Scalar("layer")),
        Spec("shared_vector", query=sigmoid(g), key=kd, value=vd * g, log_decay=logsigmoid(g + pace), phase=per),
    ]


EVERY_SHIPPED = [specs.get(name) for name in specs.names()]
# those with kernels, of matrix states and of vector states
SHIPPED = [spec for spec in EVERY_SHIPPED if not analyse(spec).without_kernels and not spec.vector]
SHIPPED_VECTORS = [spec for spec in EVERY_SHIPPED if spec.vector]
ALL = SHIPPED + _combinations() + [spec for spec in _erasing() if not analyse(spec).without_kernels]
VECTORS = SHIPPED_VECTORS + _vectors()
# what the torch backend alone runs
WITHOUT_KERNELS = [spec for spec in EVERY_SHIPPED + _erasing() if analyse(spec).without_kernels and not spec.vector]


def make(spec, batch, time, heads_, key, value, *, sequences=None, groups=None, dtype=torch.float64, seed=0):
    """Inputs by the names that the specs of this file and the shipped ones use: those of decays are made <= 0."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for one in spec.inputs:
        sizes = {"b": batch, "t": time, "h": (groups or {}).get(one.name, heads_), "k": key, "v": value}
        sizes["d"] = heads_ * value
        if "t" not in one.axes and sequences is not None:
            sizes["b"] = sequences
        x = torch.randn([sizes[axis] for axis in one.axes], generator=generator, dtype=torch.float64)
        if one.name in ("g", "w"):
            x = -x.abs()
        if one.name == "dt":
            x = x.abs() * 0.3
        if one.name == "beta":
            x = 2 * torch.sigmoid(x)
        if one.name in ("a", "b") and "k" in one.axes:
            x = x * key**-0.5
        found.append(x.to(dtype))
    return tuple(found)


def make_states(spec, rows, heads_, key, value, seed=1):
    generator = torch.Generator().manual_seed(seed)
    features = count(key, spec.taylor) if spec.taylor else key
    kind = torch.complex128 if spec.phase is not None else torch.float64
    if spec.vector:
        return (torch.randn(rows, heads_ * value, generator=generator, dtype=kind),)
    state = torch.randn(rows, heads_, features, value, generator=generator, dtype=kind)
    sums = torch.rand(rows, heads_, features, generator=generator, dtype=torch.float64)
    return (state, sums, torch.randn(rows, heads_, generator=generator, dtype=torch.float64))[: spec.state_parts]


def constants_of(analysis, heads_):
    return tuple(
        torch.tensor(evaluate_host(expr, SCALARS, heads_), dtype=torch.float64) for _, expr in analysis.constants
    )


def expected(spec, inputs, scale, initial, cu_seqlens, do_seed=2, grad_dtype=None, with_final=True):
    """The reference's output, states, random gradients of them and the gradients that autograd finds.

    grad_dtype: what the output's gradient is rounded to; with_final: whether the final states have a gradient.
    """
    inputs = tuple(x.double().clone().requires_grad_() for x in inputs)
    initial = tuple(x.clone().requires_grad_() for x in initial)
    state = (initial if spec.normalizer is not None else initial[0]) if initial else None
    options = {"scale": scale, "initial_state": state, "output_final_state": True, "cu_seqlens": cu_seqlens}
    o, final = reference.run(spec, inputs, scalars=SCALARS, **options)
    final = final if spec.normalizer is not None else (final,)
    generator = torch.Generator().manual_seed(do_seed)
    do = torch.randn(o.shape, generator=generator, dtype=o.dtype).to(grad_dtype or o.dtype).to(o.dtype)
    # what a state is held divided by has no gradient
    dfinal = tuple(torch.randn(x.shape, generator=generator, dtype=x.dtype) * with_final for x in final[:2])
    loss = (o * do).sum() + sum((x * dx.conj()).real.sum() for x, dx in zip(final, dfinal, strict=False))
    gradients = torch.autograd.grad(loss, (*inputs, *initial), allow_unused=True, materialize_grads=True)
    return o.detach(), tuple(x.detach() for x in final), do, dfinal, gradients


def error(got, want):
    """Relative RMS."""
    return float(
        (got.to(want.dtype) - want).abs().square().mean().sqrt() / (want.abs().square().mean().sqrt() + 1e-300)
    )


def extreme(shape, generator):
    """Log decays from 0 to -3, with 0, -30, -100 and -inf among them."""
    values = -(torch.rand(shape, generator=generator, dtype=torch.float64) ** 2) * 3
    kind = torch.rand(shape, generator=generator)
    for value, low, high in ((-100.0, 0, 0.1), (-math.inf, 0.1, 0.2), (0.0, 0.2, 0.4), (-30.0, 0.4, 0.45)):
        values[(kind >= low) & (kind < high)] = value
    return values

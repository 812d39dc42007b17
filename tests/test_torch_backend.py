"""The torch backend against the reference: fp64 to rounding, fp32 and 16 bit to the table, states, gradients,
decode.
"""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from flagen import reference, specs
from flagen import torch_backend as module
from flagen.analysis import analyse
from flagen.expr import (
    Input,
    Scalar,
    elu,
    exp,
    head,
    heads,
    k,
    log,
    logsigmoid,
    maximum,
    q,
    sigmoid,
    silu,
    softplus,
    tanh,
    v,
)
from flagen.expr import abs as absolute
from flagen.functions import evaluate_host
from flagen.spec import Spec, SpecWarning, taylor
from flagen.torch_backend import TorchBackend
from flagen.torch_taylor import count

SCALARS = {"layer": 1.0, "layers": 4.0}
SPANS = [0, 70, 70, 103, 140]  # an empty sequence, and tokens past the last

gs, dt, gb = Input("gs", "b t h"), Input("dt", "b t h"), Input("gb", "b h")
gk, gv, gbk = Input("gk", "b t h k"), Input("gv", "b t h v"), Input("gbk", "b h k")
wk, wv, u, ut = Input("wk", "h k"), Input("wv", "h v"), Input("u", "h k"), Input("ut", "b t h k")
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
            Spec("key_u_norm", log_decay=logsigmoid(gk) / 4, bonus=u, normalize=True, feature_map=lambda x: elu(x) + 1),
            Spec("norm_max", log_decay=logsigmoid(gs), normalize=lambda n: maximum(absolute(n), 1)),
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


SHIPPED = [specs.get(name) for name in specs.names()]
ALL = SHIPPED + _combinations()
EVERY = pytest.mark.parametrize("spec", ALL, ids=lambda spec: spec.name)


@pytest.fixture(autouse=True)
def _small_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans of a few chunks only, so that short sequences have several."""
    monkeypatch.setattr(module, "SPAN_ELEMENTS", 1 << 14)


def make(spec, batch, time, heads_, key, value, *, sequences=None, groups=None, dtype=torch.float64, seed=0):
    """Inputs by the names that the specs of this file and the shipped ones use: those of decays are made <= 0."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for one in spec.inputs:
        sizes = {"b": batch, "t": time, "h": (groups or {}).get(one.name, heads_), "k": key, "v": value}
        if "t" not in one.axes and sequences is not None:
            sizes["b"] = sequences
        x = torch.randn([sizes[axis] for axis in one.axes], generator=generator, dtype=torch.float64)
        if one.name in ("g", "w"):
            x = -x.abs()
        if one.name == "dt":
            x = x.abs() * 0.3
        found.append(x.to(dtype))
    return tuple(found)


def make_states(spec, rows, heads_, key, value, seed=1):
    generator = torch.Generator().manual_seed(seed)
    features = count(key, spec.taylor) if spec.taylor else key
    kind = torch.complex128 if spec.phase is not None else torch.float64
    state = torch.randn(rows, heads_, features, value, generator=generator, dtype=kind)
    if spec.normalizer is None:
        return (state,)
    return state, torch.rand(rows, heads_, features, generator=generator, dtype=torch.float64)


def constants_of(analysis, heads_):
    return tuple(
        torch.tensor(evaluate_host(expr, SCALARS, heads_), dtype=torch.float64) for _, expr in analysis.constants
    )


def expected(spec, inputs, scale, initial, cu_seqlens, do_seed=2):
    """The reference's output, states, random gradients of them and the gradients that autograd finds."""
    inputs = tuple(x.double().clone().requires_grad_() for x in inputs)
    initial = tuple(x.clone().requires_grad_() for x in initial)
    state = (initial if spec.normalizer is not None else initial[0]) if initial else None
    options = {"scale": scale, "initial_state": state, "output_final_state": True, "cu_seqlens": cu_seqlens}
    o, final = reference.run(spec, inputs, scalars=SCALARS, **options)
    final = final if spec.normalizer is not None else (final,)
    generator = torch.Generator().manual_seed(do_seed)
    do = torch.randn(o.shape, generator=generator, dtype=o.dtype)
    dfinal = tuple(torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in final)
    loss = (o * do).sum() + sum((x * dx.conj()).real.sum() for x, dx in zip(final, dfinal, strict=True))
    gradients = torch.autograd.grad(loss, (*inputs, *initial))
    return o.detach(), tuple(x.detach() for x in final), do, dfinal, gradients


def error(got, want):
    """Relative RMS."""
    return float(
        (got.to(want.dtype) - want).abs().square().mean().sqrt() / (want.abs().square().mean().sqrt() + 1e-300)
    )


def check(
    spec,
    batch,
    time,
    heads_,
    key,
    value,
    *,
    cu=None,
    start=True,
    groups=None,
    chunk=None,
    limit=1e-10,
    inputs=None,
    dtype=None,
):
    """Forward, final state and all gradients of the backend against the reference on the same rounded inputs."""
    analysis = analyse(spec)
    backend = TorchBackend(analysis, chunk)
    cu_seqlens = None if cu is None else torch.tensor(cu, dtype=torch.int32)
    sequences = None if cu is None else len(cu) - 1
    if inputs is None:
        inputs = make(spec, batch, time, heads_, key, value, sequences=sequences, groups=groups)
    inputs = tuple(x.to(dtype or x.dtype) for x in inputs)
    initial = make_states(spec, sequences or batch, heads_, key, value) if start else ()
    scale, constants = key**-0.5, constants_of(analysis, heads_)
    o, final, do, dfinal, gradients = expected(spec, inputs, scale, initial, cu_seqlens)
    out = backend.forward(inputs, constants, scale, initial, cu_seqlens, True, True)
    needs = (True,) * len(inputs)
    got, got_initial = backend.backward(
        do, dfinal, out.o, out.saved, inputs, constants, scale, initial, cu_seqlens, needs, start
    )
    assert [x.shape for x in out.saved] == [x.shape for x in backend.saved_like(inputs, cu_seqlens)]
    assert all(x.shape == y.shape and x.dtype == y.dtype for x, y in zip(got, inputs, strict=True))
    names = ["o", *(f"final {i}" for i in range(len(final))), *(f"d {one.name}" for one in spec.inputs)]
    names += [f"d initial {i}" for i in range(len(got_initial))]
    errors = {
        name: error(x, y)
        for name, x, y in zip(names, (out.o, *out.final, *got, *got_initial), (o, *final, *gradients), strict=True)
    }
    assert all(x <= limit for x in errors.values()), {name: f"{x:.1e}" for name, x in errors.items()}
    return out, got


@EVERY
@pytest.mark.parametrize("time", [1, 5, 65])
def test_lengths_below_and_beyond_a_chunk(spec, time):
    check(spec, 2, time, 2, 6, 5)


@pytest.mark.parametrize("time", [63, 64, 130])
@pytest.mark.parametrize("name", ["retnet", "mamba2", "gla", "rwkv6", "gateloop", "based", "value_u"])
def test_lengths_around_a_chunk(name, time):
    spec = next(spec for spec in ALL if spec.name == name)
    check(spec, 1, time, 2, 8 if spec.taylor else 60, 12, start=time != 64)


@EVERY
def test_sequences_of_several_lengths_with_an_empty_one(spec):
    out, gradients = check(spec, 1, 150, 2, 6, 5, cu=SPANS, chunk=16)
    assert not out.o[:, SPANS[-1] :].any()
    for one, gradient in zip(spec.inputs, gradients, strict=True):
        if "t" in one.axes:
            assert not gradient[:, SPANS[-1] :].any()


@EVERY
def test_heads_that_share_an_input(spec):
    groups = {"q": 6, "r": 6, "k": 2, "v": 3, "gs": 1, "gk": 2, "gv": 2, "g": 2, "gb": 3, "u": 3, "th": 1, "dt": 2}
    groups |= {} if any(one.name in ("q", "r") for one in spec.inputs) else {"k": 6}
    check(spec, 2, 40, 6, 4, 5, chunk=8, groups=groups)


def _extreme(shape, generator):
    """Log decays from 0 to -3, with 0, -30, -100 and -inf among them."""
    values = -(torch.rand(shape, generator=generator, dtype=torch.float64) ** 2) * 3
    kind = torch.rand(shape, generator=generator)
    for value, low, high in ((-100.0, 0, 0.1), (-math.inf, 0.1, 0.2), (0.0, 0.2, 0.4), (-30.0, 0.4, 0.45)):
        values[(kind >= low) & (kind < high)] = value
    return values


@pytest.mark.parametrize("dtype,limit", [(torch.float64, 1e-10), (torch.float32, 5e-6), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("chunk", [None, 16])
@pytest.mark.parametrize("decay", ["gs", "gk", "gv", "gs u", "gk u", "gv u", "gs u phase", "gk phase"])
def test_decays_from_zero_to_minus_infinity(decay, chunk, dtype, limit):
    gate, *others = decay.split()
    gate = {"gs": gs, "gk": gk, "gv": gv}[gate]
    spec = Spec("extreme", log_decay=gate, bonus=u if "u" in others else None, phase=th if "phase" in others else None)
    generator = torch.Generator().manual_seed(3)
    inputs = list(make(spec, 1, 100, 2, 16, 12))
    where = spec.inputs.index(gate)
    inputs[where] = _extreme(inputs[where].shape, generator)
    _, gradients = check(spec, 1, 100, 2, 16, 12, chunk=chunk, inputs=inputs, limit=limit, dtype=dtype, start=False)
    assert all(x.isfinite().all() for x in gradients)
    assert not gradients[where][inputs[where] == -math.inf].any()


@pytest.mark.parametrize("gate", [gs, gk, gv], ids=lambda gate: gate.name)
def test_gates_whose_derivative_is_infinite_at_a_reset(gate):
    spec = Spec("gate", log_decay=log(maximum(gate, 0)))
    inputs = list(make(spec, 1, 70, 2, 4, 5))
    where = spec.inputs.index(gate)
    inputs[where] = torch.rand(inputs[where].shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    inputs[where][:, 10:20] = 0
    out, gradients = check(spec, 1, 70, 2, 4, 5, inputs=inputs, start=False)
    assert all(x.isfinite().all() for x in (out.o, *gradients))
    assert not gradients[where][:, 10:20].any() and gradients[where][:, 20:].any()


@EVERY
def test_fp32(spec):
    check(spec, 1, 200, 2, 8 if spec.taylor else 32, 32, dtype=torch.float32, limit=5e-6, start=False)


@EVERY
def test_step_by_step_equals_forward(spec):
    analysis = analyse(spec)
    backend = TorchBackend(analysis)
    inputs, state = make(spec, 2, 9, 2, 6, 5), make_states(spec, 2, 2, 6, 5)
    constants = constants_of(analysis, 2)
    whole = backend.forward(inputs, constants, 0.4, state, None, True, False)
    kept = tuple(x.clone() for x in state)
    for t in range(9):
        now = tuple(
            x.narrow(one.axes.index("t"), t, 1) if "t" in one.axes else x
            for one, x in zip(spec.inputs, inputs, strict=True)
        )
        o = backend.step(now, constants, 0.4, kept)
        assert o.shape == (2, 1, 2, 5) and error(o, whole.o[:, t : t + 1]) < 1e-10
    assert all(error(x, y) < 1e-10 for x, y in zip(kept, whole.final, strict=True))


@pytest.mark.parametrize("name", ["mamba2", "gla", "value_u", "gateloop", "based", "key_u_norm", "phase_key_u"])
def test_only_what_is_asked_for(name):
    spec = next(spec for spec in ALL if spec.name == name)
    analysis = analyse(spec)
    backend = TorchBackend(analysis, 16)
    inputs, state = make(spec, 2, 40, 2, 6, 5), make_states(spec, 2, 2, 6, 5)
    out = backend.forward(inputs, (), 0.4, state, None, True, True)
    do = torch.randn(out.o.shape, dtype=torch.float64)
    dfinal = tuple(torch.randn_like(x) for x in out.final)
    common = (out.o, out.saved, inputs, (), 0.4, state, None)
    every, _ = backend.backward(do, dfinal, *common, (True,) * len(inputs), True)
    for i in range(len(inputs)):
        needs = tuple(i == j for j in range(len(inputs)))
        one, none = backend.backward(do, dfinal, *common, needs, False)
        assert none == () and [x is not None for x in one] == list(needs)
        assert error(one[i], every[i]) < 1e-12
    # the gradient is linear in do and dfinal, either of which may be missing
    missing = tuple(None for _ in dfinal)
    by_output, _ = backend.backward(do, missing, *common, (True,) * len(inputs), False)
    by_state, _ = backend.backward(None, dfinal, *common, (True,) * len(inputs), False)
    for x, y, z in zip(by_output, by_state, every, strict=True):
        assert error(x + y, z) < 1e-11


@pytest.mark.parametrize("name", ["mamba2", "gla", "value_u", "gateloop", "based"])
def test_strided_inputs(name):
    spec = next(spec for spec in ALL if spec.name == name)
    inputs = make(spec, 2, 50, 2, 6, 5)
    strided = tuple(torch.stack((x, x + 1), -1).flip(0)[..., 0].flip(0) for x in inputs)
    strided = tuple(x.transpose(0, -1).contiguous().transpose(0, -1) for x in strided)
    backend = TorchBackend(analyse(spec))
    for x, y in zip(inputs, strided, strict=True):
        assert torch.equal(x, y)
    out, other = (backend.forward(x, (), 0.4, (), None, False, True) for x in (inputs, strided))
    assert torch.equal(out.o, other.o)
    do = torch.randn(2, 2, 50, 5, dtype=torch.float64).transpose(1, 2)
    needs = (True,) * len(inputs)
    got, again = (
        backend.backward(do, (None,), out.o, out.saved, x, (), 0.4, (), None, needs, False)[0]
        for x in (inputs, strided)
    )
    assert all(torch.equal(x, y) for x, y in zip(got, again, strict=True))


@pytest.mark.parametrize("name", ["mamba2", "gla", "value_u"])
def test_a_later_token_changes_no_bit_of_an_earlier_output(name):
    spec = next(spec for spec in ALL if spec.name == name)
    inputs = make(spec, 1, 100, 2, 16, 16, dtype=torch.float32)
    changed = tuple(x.clone() for x in inputs)
    for one, x in zip(spec.inputs, changed, strict=True):
        if "t" in one.axes:
            x[:, 37:] *= 50
    backend = TorchBackend(analyse(spec))
    out, other = (backend.forward(x, (), 0.4, (), None, False, False).o for x in (inputs, changed))
    assert torch.equal(out[:, :37], other[:, :37]) and not torch.equal(out, other)


def test_no_tokens():
    spec = specs.get("gla")
    inputs, state = make(spec, 2, 0, 2, 4, 5), make_states(spec, 2, 2, 4, 5)
    backend = TorchBackend(analyse(spec))
    out = backend.forward(inputs, (), 1.0, state, None, True, True)
    assert out.o.shape == (2, 0, 2, 5) and torch.equal(out.final[0], state[0])
    gradients, (d_initial,) = backend.backward(
        None, out.final, out.o, out.saved, inputs, (), 1.0, state, None, (True,) * 4, True
    )
    assert torch.equal(d_initial, out.final[0]) and all(
        x.shape == y.shape for x, y in zip(gradients, inputs, strict=True)
    )


def test_dtypes():
    spec = specs.get("mamba2")
    inputs = [x.bfloat16() for x in make(spec, 1, 20, 2, 4, 5)]
    inputs[spec.inputs.index(Input("A_log", "h"))] = torch.zeros(2)
    backend = TorchBackend(analyse(spec))
    out = backend.forward(tuple(inputs), (), 1.0, (), None, True, True)
    assert out.o.dtype == torch.bfloat16 and out.final[0].dtype == torch.float32
    gradients, _ = backend.backward(
        out.o, (None,), out.o, out.saved, tuple(inputs), (), 1.0, (), None, (True,) * len(inputs), False
    )
    assert [x.dtype for x in gradients] == [x.dtype for x in inputs]

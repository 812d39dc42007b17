"""The torch backend against the reference: fp64 to rounding, fp32 and 16 bit to the table, states, gradients,
decode.
"""

from __future__ import annotations

import math

import pytest
import torch
from cases import (
    ALL,
    SPANS,
    WITHOUT_KERNELS,
    constants_of,
    error,
    expected,
    extreme,
    gk,
    gs,
    gv,
    make,
    make_states,
    th,
    u,
)

from flagen import specs
from flagen import torch_backend as module
from flagen.analysis import analyse
from flagen.expr import Input, log, maximum
from flagen.spec import Spec
from flagen.torch_backend import TorchBackend

EVERY = pytest.mark.parametrize("spec", ALL + WITHOUT_KERNELS, ids=lambda spec: spec.name)


@pytest.fixture(autouse=True)
def _small_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans of a few chunks only, so that short sequences have several."""
    monkeypatch.setattr(module, "SPAN_ELEMENTS", 1 << 14)


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
    inputs[where] = extreme(inputs[where].shape, generator)
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

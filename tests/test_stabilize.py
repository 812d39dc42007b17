"""stabilize: its rules, its recurrence against the one that it stands for, and gates that would overflow."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from cases import ALL, gk, make_states, u

import flagen
from flagen import reference, specs
from flagen.analysis import analyse
from flagen.errors import SpecError
from flagen.expr import NORM, Input, elu, exp, k, l2norm, logsigmoid, maximum, relu, sqrt
from flagen.expr import abs as absolute
from flagen.spec import Spec, SpecWarning, taylor
from flagen.stabilize import FLOOR, LOWEST, gated, scaled_normalizer
from flagen.testing import check
from flagen.torch_backend import TorchBackend

i, f = Input("ig", "b t h"), Input("fg", "b t h")
ONE = {"normalize": lambda n: maximum(absolute(n), 1), "stabilize": "max"}
HELD = [spec for spec in ALL if spec.stabilize is not None]
EVERY = pytest.mark.parametrize("spec", HELD, ids=lambda spec: spec.name)


def plain(spec):
    """The same recurrence, held as it is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SpecWarning)
        return spec.replace(f"{spec.name}_plain", stabilize=None)


def inputs_of(spec, T=40, *, B=2, H=3, K=5, V=4, wide=1.0, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    sizes = {"b": B, "t": T, "h": H, "k": K, "v": V}
    drawn = [torch.randn([sizes[x] for x in one.axes], generator=generator, dtype=torch.float64) for one in spec.inputs]
    found = [x * (1 if set(one.axes) & set("kv") else wide) for x, one in zip(drawn, spec.inputs, strict=True)]
    return [x.abs() if one.name == "dt" else x for x, one in zip(found, spec.inputs, strict=True)]


def true(state):
    """S and z of a state (S, z, m) as they are without stabilize."""
    S, z, m = state
    return S * m.exp()[..., None, None], z * m.exp()[..., None]


# --- the rules


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"key": exp(i) * k, "stabilize": "max"}, "needs normalize"),
        ({**ONE}, "no exponential gate in key = k"),
        ({**ONE, "key": exp(k) * exp(Input("x", "b t h k"))}, "no exponential gate"),
        ({**ONE, "key": exp(i) * k, "feature_map": lambda x: elu(x) + 1}, "no exponential gate"),
        ({**ONE, "key": exp(i) * k, "feature_map": taylor(1)}, "stabilize with taylor"),
        ({**ONE, "key": exp(i) * k, "bonus": u}, "stabilize with a bonus"),
        ({**ONE, "key": exp(i) * k, "log_decay": logsigmoid(gk)}, "stabilize with a decay per key channel"),
        ({**ONE, "key": exp(i) * k, "normalize": lambda n: sqrt(n * n + 1)}, "stabilize with normalize = sqrt"),
        ({**ONE, "key": exp(i) * k, "normalize": False, "erase": (k, l2norm(k))}, "stabilize with erase"),
        ({**ONE, "key": exp(i) * k, "stabilize": "min"}, "stabilize must be 'max'"),
        ({**ONE, "key": exp(i) * k, "stabilize": True}, "stabilize must be 'max'"),
        ({"value": Input("x", "b t d"), "stabilize": "max"}, "stabilize with a vector state"),
    ],
)
def test_what_has_no_meaning_is_refused(arguments, words):
    with warnings.catch_warnings(), pytest.raises(SpecError, match=words):
        warnings.simplefilter("ignore", SpecWarning)
        Spec("wrong", **arguments)


@pytest.mark.parametrize(
    ("key", "gate", "rest"),
    [
        (exp(i) * k, i, k),
        (-k * exp(i) / 2, i, -k / 2),
        (k / exp(f), -f, k),
        (exp(i) * k / exp(f), i - f, k),
        (exp(i) * (exp(f) * k), i + f, k),
        (k * exp(Input("p", "h")), Input("p", "h"), k),
        (exp(2) * k, None, exp(2) * k),
        (exp(i) + k, None, exp(i) + k),
        (exp(k), None, exp(k)),
    ],
)
def test_the_gate_of_a_key(key, gate, rest):
    assert gated(key) == (gate, rest)


@pytest.mark.parametrize(
    ("divisor", "scaled"),
    [
        (maximum(absolute(NORM), 1), maximum(absolute(NORM), FLOOR)),
        (NORM + 1e-6, NORM + 1e-6 * FLOOR),
        (absolute(2 * NORM / 3) - 0, absolute(2 * NORM / 3) - 0),
        (relu(-NORM) + 1, relu(-NORM) + FLOOR),
        (NORM * NORM, None),
        (1 / NORM, None),
        (exp(NORM), None),
        (NORM + exp(NORM), None),
    ],
)
def test_a_normaliser_times_the_scale(divisor, scaled):
    assert scaled_normalizer(divisor) == scaled


@EVERY
def test_json_and_text(spec):
    assert Spec.from_json(spec.to_json()) == spec
    assert plain(spec).to_json() != spec.to_json()
    assert 'stabilize="max"' in repr(spec).replace("'", '"')
    assert "held times exp(-m), m_t = max(" in str(spec)
    assert r"m_t &= \max" in spec.latex()
    assert "m [N, H]" in flagen.compile(spec).__doc__


def test_mlstm_as_it_is_planned():
    mlstm = analyse(specs.get("mlstm"))
    assert [str(expr) for expr in (*map(mlstm.role, ("key", "gate", "log_decay")), mlstm.normalizer)] == [
        "k",
        "ig - peak",
        "logsigmoid(fg) - rise",
        "maximum(abs(n), exp(minimum(-peak, 80)))",
    ]
    assert (mlstm.decay, mlstm.decay_varies) == ("scalar", True)


# --- the recurrence is the one without stabilize


@EVERY
@pytest.mark.parametrize("start", [False, True])
def test_it_is_the_same_recurrence_with_the_same_gradients(spec, start):
    """Autograd goes through everything in the plain recurrence, and takes m for a constant in the held one."""
    scalars = {one.name: 1.0 for one in spec.scalars}
    x = [one.requires_grad_() for one in inputs_of(spec, wide=3.0)]
    S, z, m = make_states(spec, 2, 3, 5, 4)
    S, z = S.requires_grad_(), z.requires_grad_()
    given, theirs = ((S, z, m), true((S, z, m))) if start else (None, None)
    options = {"scalars": scalars, "output_final_state": True}
    o, state = reference.run(spec, x, initial_state=given, **options)
    want, last = reference.run(plain(spec), x, initial_state=theirs, **options)
    weights = [torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape) for y in (want, *last)]
    found = []
    for outputs in ((o, *true(state)), (want, *last)):
        loss = sum((y * w / w.norm() / last_size).sum() for y, w, last_size in zip(
            outputs, weights, [y.detach().norm() for y in (want, *last)], strict=True))  # fmt: skip
        found.append((*outputs, *torch.autograd.grad(loss, (*x, *((S, z) if start else ())))))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9 * float(expected.detach().abs().max()))


@EVERY
def test_the_output_does_not_depend_on_the_scale_of_the_first_state(spec):
    op, scalars = flagen.compile(spec, backend="torch"), {one.name: 1.0 for one in spec.scalars}
    x = inputs_of(spec)
    S, z, m = make_states(spec, 2, 3, 5, 4)
    o, state = op(*x, **scalars, initial_state=(S, z, m), output_final_state=True)
    factor = math.exp(2.5)
    other, last = op(*x, **scalars, initial_state=(S * factor, z * factor, m - 2.5), output_final_state=True)
    torch.testing.assert_close(other, o)
    for got, want in zip(true(last), true(state), strict=True):
        torch.testing.assert_close(got, want)


def test_m_has_no_gradient():
    op = flagen.compile("mlstm", backend="torch")
    x = [one.requires_grad_() for one in inputs_of(op.spec)]
    state = tuple(one.requires_grad_() for one in make_states(op.spec, 2, 3, 5, 4))
    o, final = op(*x, initial_state=state, output_final_state=True)
    assert [one.requires_grad for one in final] == [True, True, False]
    (o.sum() + final[0].sum()).backward()
    assert state[0].grad.any()
    assert not state[2].grad.any()


# --- gates that would overflow


def hostile(T=60, H=4):
    """q, k, v, and gates up to e^80 and down to nothing, with resets, a masked start, and one head of small gates."""
    q_, k_, v_, gate, forget = inputs_of(specs.get("mlstm"), T=T, H=H, wide=20.0)
    gate[:, 7:9] = 80.0
    gate[:, 20] = -math.inf
    gate[:, :3, 1] = -math.inf
    gate[:, :, 2] = -100.0 + gate[:, :, 2]
    gate[:, :, 3] = -math.inf
    forget[:, 30] = -math.inf
    forget[:, 40:42] = -100.0
    return [q_, k_, v_, gate, forget]


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_no_gate_overflows(backend):
    spec = specs.get("mlstm")
    op = flagen.compile(spec, backend="torch")
    wide = [x.clone().requires_grad_() for x in hostile()]
    narrow = [x.detach().float().requires_grad_() for x in wide]
    want, last = reference.run(plain(spec), wide, output_final_state=True)
    o, state = (op if backend == "torch" else op.reference)(*narrow, output_final_state=True)
    assert all(x.isfinite().all() for x in (o, *state))
    torch.testing.assert_close(o, want.float(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(state[0] * state[2].double().exp()[..., None, None], last[0], rtol=1e-4, atol=1e-8)
    do = torch.randn(o.shape, generator=torch.Generator().manual_seed(3))
    got, wanted = torch.autograd.grad(o, narrow, do), torch.autograd.grad(want, wide, do.double())
    for one, x, y in zip(spec.inputs, got, wanted, strict=True):
        assert x.isfinite().all(), one.name
        assert (x - y).norm() <= 1e-3 * y.norm(), one.name


def test_a_reset_forgets_and_nothing_before_the_first_gate_counts():
    op = flagen.compile("mlstm", backend="torch")
    x = [one.float() for one in hostile()]
    x[4][:, 30] = -math.inf
    o, _ = op(*x)
    after, _ = op(*(one[:, 30:] for one in x))
    torch.testing.assert_close(o[:, 30:], after, rtol=1e-4, atol=1e-6)
    assert not o[:, :, 3].any()


def test_a_later_gate_changes_no_earlier_output():
    op = flagen.compile("mlstm", backend="torch")
    x = [one.float() for one in inputs_of(op.spec, T=100)]
    o, _ = op(*x)
    x[3][:, 90] = 80.0
    assert torch.equal(op(*x)[0][:, :64], o[:, :64])
    torch.testing.assert_close(op(*x)[0][:, :90], o[:, :90])


# --- states


@EVERY
@pytest.mark.parametrize("T", [0, 1, 5])
def test_few_tokens(spec, T):
    op, scalars = flagen.compile(spec, backend="torch"), {one.name: 1.0 for one in spec.scalars}
    x = inputs_of(spec, T=T)
    _, state = op(*x, **scalars, output_final_state=True)
    _, want = op.reference(*x, **scalars, output_final_state=True)
    for got, expected in zip(state, want, strict=True):
        torch.testing.assert_close(got, expected)
    assert T or (state[2] == LOWEST).all()


def test_decoding_from_a_state_of_zeros():
    op = flagen.compile("mlstm", backend="torch")
    x = inputs_of(op.spec, T=12)
    want, last = op(*x, output_final_state=True)
    state = tuple(torch.zeros_like(one) for one in last)
    o = torch.cat([op.step(*(one[:, t : t + 1] for one in x), state=state) for t in range(12)], 1)
    torch.testing.assert_close(o, want)
    for got, expected in zip(true(state), true(last), strict=True):
        torch.testing.assert_close(got, expected)


def test_a_state_of_the_wrong_form_is_refused():
    op = flagen.compile("mlstm", backend="torch")
    x = inputs_of(op.spec)
    S, z, m = make_states(op.spec, 2, 3, 5, 4)
    with pytest.raises(TypeError, match=r"must be a triple \(S, z, m\)"):
        op(*x, initial_state=(S, z))
    with pytest.raises(ValueError, match=r"\[2\], the scale m, must have shape \[N, H\] = \(2, 3\)"):
        op(*x, initial_state=(S, z, m[:1]))


def test_saved_tensors_are_those_that_compilation_expects():
    spec = specs.get("mlstm")
    backend, x = TorchBackend(analyse(spec)), tuple(inputs_of(spec))
    saved = backend.forward(x, (), 1.0, (), None, True, True).saved
    assert [(y.shape, y.dtype) for y in saved] == [(y.shape, y.dtype) for y in backend.saved_like(x, None)]


@EVERY
@pytest.mark.parametrize("packed", [False, True])
def test_against_the_reference(spec, packed):
    sizes = {"T": 150, "K": 20, "V": 12, "cu_seqlens": [0, 70, 70, 103, 140] if packed else None}
    check(spec, backend="torch", dtype=torch.float32, heads={"q": 2, "k": 1, "gs": 2}, **sizes)

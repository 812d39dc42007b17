"""The function that a spec compiles to, on the torch backend: results, states, gradients, decode, and what it says of
itself.
"""

from __future__ import annotations

import copy
import inspect
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import flagen
from flagen import reference, specs
from flagen.analysis import analyse
from flagen.expr import Input, Scalar, logsigmoid, q, sigmoid, v
from flagen.op import Op, _triton_devices
from flagen.spec import Spec
from flagen.stabilize import LOWEST
from flagen.testing import assert_close, check, make_inputs, make_scalars, make_state
from flagen.torch_backend import Forward, TorchBackend

SIZES = {"B": 2, "T": 37, "H": 2, "K": 6, "V": 5}
gs, gb = Input("gs", "b t h"), Input("gb", "b h")
EVERY = pytest.mark.parametrize("name", specs.names())


def op_of(name: str | Spec) -> Op:
    return flagen.compile(name, chunk_size=16, backend="torch")


def inputs_of(op: Op, *, grad: bool = False, **changes: Any) -> list[Tensor]:
    made = make_inputs(op.spec, **{**SIZES, **changes}).values()
    return [x.requires_grad_(grad) for x in made]


def parts(state: Any) -> tuple[Tensor, ...]:
    return (state,) if isinstance(state, Tensor) else tuple(state)


def by_hand(spec: Spec, make: Callable[[], Any] | None = None, backend: str = "torch") -> Op:
    analysis = analyse(spec)

    def unused() -> Any:
        raise AssertionError("not for this device")

    return Op(
        spec=spec,
        analysis=analysis,
        plan=None,
        backend=backend,
        torch_backend=make or (lambda: TorchBackend(analysis, 16)),
        triton_backend=unused,
        source="",
        path=None,
    )


class Spy:
    """A backend that keeps the arguments it was called with."""

    def __init__(self, analysis: Any) -> None:
        self.inner = TorchBackend(analysis, 16)
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.autocast: list[bool] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            self.calls.append((name, arguments))
            self.autocast.append(torch.is_autocast_enabled("cpu"))
            return getattr(self.inner, name)(*arguments)

        return call


def spied(name: str) -> tuple[Op, Spy]:
    spec = specs.get(name)
    spy = Spy(analyse(spec))
    return by_hand(spec, lambda: spy), spy


# --- results


@EVERY
def test_against_the_reference(name):
    op = op_of(name)
    assert check(op, **SIZES).ok
    assert check(op, **(SIZES | {"B": 1}), cu_seqlens=[0, 20, 20, 30], initial_state=True).ok


@EVERY
def test_the_result_is_a_pair(name):
    op = op_of(name)
    x, scalars = inputs_of(op), make_scalars(op.spec)
    o, state = op(*x, **scalars)
    assert (o.shape, state) == ((2, 37, 10) if op.spec.vector else (2, 37, 2, 5), None)
    o, state = op(*x, **scalars, output_final_state=True)
    assert isinstance(state, tuple) == (op.spec.normalizer is not None)
    rows = 1 + 6 + 21 if op.spec.taylor else 6
    wanted = [(2, 2, rows, 5), (2, 2, rows), (2, 2)] if not op.spec.vector else [(2, 10)]
    assert [x.shape for x in parts(state)] == wanted[: len(parts(state))]
    assert parts(state)[0].dtype == (torch.complex64 if op.spec.phase is not None else torch.float32)


@EVERY
def test_pieces_are_the_whole(name):
    op = op_of(name)
    x, scalars = inputs_of(op), make_scalars(op.spec)
    whole = op(*x, **scalars, output_final_state=True)
    outputs, state = [], None
    for begin, end in ((0, 13), (13, 37)):
        cut = [y[:, begin:end] if "t" in one.axes else y for y, one in zip(x, op.spec.inputs, strict=True)]
        o, state = op(*cut, **scalars, initial_state=state, output_final_state=True)
        outputs.append(o)
    torch.testing.assert_close(torch.cat(outputs, 1), whole[0], atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(state, whole[1], atol=2e-5, rtol=2e-5)


@EVERY
def test_the_reference_has_the_same_signature(name):
    op = op_of(name)
    x, scalars = inputs_of(op, T=9), make_scalars(op.spec)
    state = make_state(op.spec, N=2, H=2, K=6, V=5)
    got = op(*x, **scalars, scale=0.3, initial_state=state, output_final_state=True)
    want = op.reference(*x, **scalars, scale=0.3, initial_state=state, output_final_state=True)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
    assert inspect.signature(op.reference) == inspect.signature(op)


def test_tensors_by_name():
    op = op_of("gla")
    x = inputs_of(op)
    want, _ = op(*x)
    assert torch.equal(op(**dict(zip("qkvg", x, strict=True)))[0], want)
    assert torch.equal(op(*x[:2], g=x[3], v=x[2])[0], want)


def test_the_scale():
    for name, default in (("gla", 6**-0.5), ("mamba2", 1.0)):
        op = op_of(name)
        x = inputs_of(op)
        torch.testing.assert_close(op(*x)[0], op(*x, scale=default)[0])
        torch.testing.assert_close(op(*x, scale=2)[0], op(*x, scale=1.0)[0] * 2)


def test_heads_in_groups():
    op = op_of("gla")
    x = list(make_inputs(op.spec, **(SIZES | {"H": 4}), heads={"k": 2, "v": 1}).values())
    full = [y.repeat_interleave(4 // y.shape[2], 2) for y in x]
    torch.testing.assert_close(op(*x)[0], op(*full)[0])


def test_any_strides():
    op = op_of("rwkv6")
    x = inputs_of(op)
    odd = [torch.stack((y, y), -1)[..., 0] for y in x]
    turned = [y.transpose(0, 1).contiguous().transpose(0, 1) for y in x]
    repeated = [y[:1].expand(y.shape) for y in x]
    assert not odd[0].is_contiguous()
    for given, plain in ((odd, x), (turned, x), (repeated, [y.contiguous() for y in repeated])):
        assert torch.equal(op(*given)[0], op(*plain)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes(dtype):
    op = op_of("gla")
    x = [y.to(dtype) for y in inputs_of(op)]
    o, state = op(*x, output_final_state=True)
    assert (o.dtype, state.dtype) == (dtype, torch.float64 if dtype is torch.float64 else torch.float32)
    x[3] = x[3].float()  # the gate in fp32, the output as value
    assert op(*x)[0].dtype == dtype


def test_no_tokens():
    for name in ("gla", "linear", "gateloop"):
        op = op_of(name)
        x = inputs_of(op, T=0, grad=True)
        state = make_state(op.spec, N=2, H=2, K=6, V=5)
        for y in parts(state):
            y.requires_grad_()
        o, final = op(*x, initial_state=state, output_final_state=True)
        assert o.shape == (2, 0, 2, 5)
        torch.testing.assert_close(final, state)
        grads = torch.autograd.grad([y.abs().sum() for y in parts(final)], [*x, *parts(state)])
        assert [y.shape for y in grads] == [y.shape for y in (*x, *parts(state))]
        torch.testing.assert_close(grads[-1].abs(), torch.ones_like(grads[-1].abs()))
        o, final = op(*x, output_final_state=True)
        assert all(not y.any() for y in parts(final))


# --- sequences


def test_sequences():
    op = op_of("gla")
    x = inputs_of(op, B=1)
    bounds = torch.tensor([0, 10, 10, 30])
    state = torch.randn(3, 2, 6, 5)
    o, final = op(*x, cu_seqlens=bounds, initial_state=state, output_final_state=True)
    assert torch.equal(o, op(*x, cu_seqlens=bounds.int(), initial_state=state)[0])
    assert torch.equal(o, op(*x, cu_seqlens=bounds.int().repeat_interleave(2)[::2], initial_state=state)[0])
    assert not o[:, 30:].any()
    assert torch.equal(final[1], state[1])
    first, end = op(*(y[:, :10] for y in x), initial_state=state[:1], output_final_state=True)
    torch.testing.assert_close(o[:, :10], first)
    torch.testing.assert_close(final[:1], end)


def test_an_input_without_time_has_a_row_per_sequence():
    op = op_of(Spec("rows", log_decay=logsigmoid(gb)))
    x = list(make_inputs(op.spec, **(SIZES | {"B": 1}), N=2).values())
    o, _ = op(*x, cu_seqlens=torch.tensor([0, 7, 37]))
    alone, _ = op(*(y[:, 7:] for y in x[:3]), x[3][1:])
    torch.testing.assert_close(o[:, 7:], alone)


# --- gradients


def test_gradients_are_those_of_fp64():
    op = op_of("linear")
    x = [y.double().detach().requires_grad_() for y in inputs_of(op, T=7, B=1, K=3, V=2)]
    state = [y.requires_grad_() for y in make_state(op.spec, N=1, H=2, K=3, V=2, dtype=torch.float64)]

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        o, final = op(*tensors[:-2], initial_state=tensors[-2:], output_final_state=True)
        return o, *final

    assert torch.autograd.gradcheck(run, [*x, *state])


def test_nothing_is_saved_without_a_gradient():
    op, spy = spied("gla")
    x = inputs_of(op)
    op(*x)
    with torch.no_grad():
        op(*(y.requires_grad_() for y in x))
    op(*x)
    assert [arguments[-1] for _, arguments in spy.calls] == [False, False, True]


def test_only_the_gradients_that_are_needed():
    op, spy = spied("gla")
    x = inputs_of(op)
    x[1].requires_grad_()
    op(*x)[0].sum().backward()
    assert (spy.calls[-1][0], spy.calls[-1][1][-2:]) == ("backward", ((False, True, False, False), False))
    assert x[1].grad is not None
    state = torch.zeros(2, 2, 6, 5, requires_grad=True)
    op(*inputs_of(op), initial_state=state)[0].sum().backward()
    assert spy.calls[-1][1][-2:] == ((False,) * 4, True)
    assert state.grad.any()


def test_gradients_of_one_result_alone():
    op, spy = spied("linear")
    x = inputs_of(op, grad=True)
    _, (_, sums) = op(*x, output_final_state=True)
    found = torch.autograd.grad(sums.sum(), x, allow_unused=True)
    assert spy.calls[-1][1][0] is None
    assert spy.calls[-1][1][1][0] is None
    assert found[1].any()
    assert not any(y.any() for y in (found[0], found[2]))
    want = reference.run(op.spec, x, output_final_state=True)[1][1]
    torch.testing.assert_close(found[1], torch.autograd.grad(want.sum(), x[1])[0], atol=2e-5, rtol=2e-5)


def test_a_part_of_the_state_may_want_a_gradient():
    op = op_of("linear")
    state, sums = make_state(op.spec, N=2, H=2, K=6, V=5)
    sums.requires_grad_()
    o, _ = op(*inputs_of(op), initial_state=(state, sums))
    assert torch.autograd.grad(o.sum(), sums)[0].any()


def test_a_changed_input_is_noticed():
    op = op_of("gla")
    x = inputs_of(op, grad=True)
    y = [one * 1 for one in x]
    o, _ = op(*y)
    y[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()


def test_second_derivatives_are_refused_where_they_would_be_wrong():
    op = op_of("gla")
    x = inputs_of(op, grad=True)
    for loss in (op(*x)[0].sum(), op(*x)[0].square().sum()):
        grad, *_ = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(NotImplementedError, match=r"gla: has no second derivative.*gla\.reference has all"):
            grad.sum().backward()
    grad, *_ = torch.autograd.grad(op.reference(*x)[0].square().sum(), x, create_graph=True)
    grad.sum().backward()


def test_transforms():
    op = op_of("gla")
    x = inputs_of(op)

    def loss(query: Tensor) -> Tensor:
        return op(query, *x[1:])[0].square().sum()

    leaf = x[0].clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(leaf), leaf)
    assert torch.equal(torch.func.grad(loss)(x[0]), want)
    value, back = torch.func.vjp(loss, x[0])
    assert torch.equal(back(torch.ones_like(value))[0], want)
    with pytest.raises(NotImplementedError, match="gla: has no second derivative"):
        torch.func.grad(lambda y: torch.func.grad(loss)(y).square().sum())(x[0])
    for mapped in (torch.vmap(loss), torch.vmap(torch.func.grad(loss))):
        with pytest.raises(NotImplementedError, match=r"gla: torch\.vmap.*fold the mapped axis into B"):
            mapped(x[0][None])
    with pytest.raises(NotImplementedError, match=r"gla: torch\.vmap"):
        torch.func.jacrev(loss)(x[0])
    with pytest.raises(NotImplementedError, match=r"gla: forward-mode derivatives.*are not supported"):
        torch.func.jvp(loss, (x[0],), (x[0],))


# --- decode


@EVERY
def test_step(name):
    op = op_of(name)
    scalars = make_scalars(op.spec)
    x = inputs_of(op, T=6)
    want = op(*x, **scalars, output_final_state=True)
    state = tuple(torch.zeros_like(y) for y in parts(want[1]))
    if op.spec.stabilize is not None:
        state[2].fill_(LOWEST)
    given = state if op.spec.normalizer is not None else state[0]
    outputs = []
    for t in range(6):
        now = [y[:, t : t + 1] if "t" in one.axes else y for y, one in zip(x, op.spec.inputs, strict=True)]
        outputs.append(op.step(*now, **scalars, state=given))
    torch.testing.assert_close(torch.cat(outputs, 1), want[0], atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(given, want[1], atol=2e-5, rtol=2e-5)


def test_step_changes_the_state_that_it_is_given():
    op = op_of("gla")
    x = inputs_of(op, T=1)
    state = torch.randn(2, 2, 6, 5)
    turned = state.transpose(2, 3).contiguous().transpose(2, 3)
    o = op.step(*x, state=state)
    assert torch.equal(op.step(*x, state=turned), o)
    assert torch.equal(turned, state)


def test_step_has_no_gradient():
    op = op_of("gla")
    x = inputs_of(op, T=1, grad=True)
    state = torch.zeros(2, 2, 6, 5)
    assert not op.step(*x, state=state).requires_grad
    assert not state.requires_grad


def test_autograd_sees_that_step_wrote_to_the_state():
    op = op_of("gla")
    state = torch.randn(2, 2, 6, 5)
    other = torch.ones((), requires_grad=True)
    product = (state * other).sum()
    op.step(*inputs_of(op, T=1), state=state)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_inference_mode():
    op = op_of("transnormer")
    scalars = {"layer": 3.0, "layers": 7.0}
    x = inputs_of(op)
    with torch.inference_mode():
        o, state = op(*x, **scalars, output_final_state=True)
        before = state.clone()
        op.step(*(y[:, :1] for y in x), **scalars, state=state)
        assert not torch.equal(before, state)
    leaves = [y.requires_grad_() for y in x]
    op(*leaves, **scalars)[0].sum().backward()  # constants first made under inference mode
    assert torch.equal(op(*leaves, **scalars)[0], o)


# --- autocast


def test_autocast():
    op, spy = spied("mamba2")
    x = inputs_of(op, grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        o, state = op(*x, output_final_state=True)
    kinds = {one.name: y.dtype for one, y in zip(op.spec.inputs, spy.calls[0][1][0], strict=True)}
    wide, narrow = torch.float32, torch.bfloat16
    assert kinds == {"q": narrow, "k": narrow, "v": narrow, "dt": wide, "A_log": wide}
    assert (o.dtype, state.dtype) == (narrow, wide)
    grads = torch.autograd.grad(o.float().sum() + state.sum(), x)
    assert {y.dtype for y in grads} == {wide}
    want = op(*(y.bfloat16() if i < 3 else y for i, y in enumerate(x)))[0]
    assert torch.equal(o, want)
    assert not any(spy.autocast)


def test_autocast_leaves_fp64_alone():
    op = op_of("gla")
    x = [y.double() for y in inputs_of(op)]
    want, _ = op(*x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(op(*x)[0], want)


def test_an_input_of_the_query_alone_is_cast():
    op = by_hand(Spec("gated", query=q * sigmoid(gs), log_decay=logsigmoid(Input("gd", "b t h"))))
    assert [one.name for one, cast in zip(op.spec.inputs, op._casts, strict=True) if cast] == ["q", "gs", "k", "v"]


# --- constants and scalars


def test_constants_are_evaluated_once():
    op, spy = spied("transnormer")
    x = inputs_of(op)
    seen = []
    for layer in (1, 2, 1, 2.0):
        op(*x, layer=layer, layers=4)
        seen.append(spy.calls[-1][1][1])
    assert seen[0] is seen[2]
    assert seen[1] is seen[3]
    assert not torch.equal(seen[0][0], seen[1][0])
    assert seen[0][0].dtype == torch.float64
    assert seen[0][0].tolist() == [0.0, -(8 / 2) * (1 - 1 / 4) * 1]


def test_constants_are_bounded(monkeypatch):
    monkeypatch.setattr("flagen.op_library.MAX_CONSTANTS", 2)
    op, _ = spied("transnormer")
    x = inputs_of(op)
    for layer in range(4):
        op(*x, layer=layer, layers=4)
        assert 1 <= len(op._operators._constants) <= 2


# --- what a call costs


def test_forms_of_calls_are_remembered_and_bounded(monkeypatch):
    monkeypatch.setattr("flagen.op.MAX_PASSED", 3)
    op = by_hand(specs.get("gla"))
    looked = []
    tensors = op._checks.tensors
    monkeypatch.setattr(op._checks, "tensors", lambda *given: looked.append(given) or tensors(*given))
    for T in (3, 4, 3, 4, 3):
        op(*inputs_of(op, T=T))
    assert len(looked) == 2
    for T in range(5, 12):
        op(*inputs_of(op, T=T))
        assert 1 <= len(op._passed) <= 3


def test_a_form_that_passed_is_not_another():
    op = by_hand(specs.get("gla"))
    x = inputs_of(op, B=1, T=1)
    state, bounds = torch.zeros(1, 2, 6, 5), torch.tensor([0, 1], dtype=torch.int32)
    for _ in range(2):
        op(*x)
        op(*x, cu_seqlens=bounds)
        op.step(*x, state=state)
        for wrong, message in (
            ((*x[:3], x[3].long()), "g must be float16"),
            ((*x[:3], x[3][..., :3]), "g must have shape"),
            ((*x[:3], x[3].to("meta")), "g is on meta"),
            ((*x[:3], x[3].numpy()), "g must be a tensor"),
            ((*x[:3], None), "g must be a tensor"),
        ):
            with pytest.raises((TypeError, ValueError), match=f"^gla: {message}"):
                op(*wrong)
        for wrong, message in ((bounds.float(), "got dtype float32"), (bounds[:1], r"got shape \(1,\)")):
            with pytest.raises(ValueError, match=f"cu_seqlens must be .* {message}"):
                op(*x, cu_seqlens=wrong)
        longer = inputs_of(op, B=1, T=2)
        op(*longer)
        with pytest.raises(ValueError, match="takes one token"):
            op.step(*longer, state=state)
        two = inputs_of(op, B=2, T=1)
        op(*two)
        with pytest.raises(ValueError, match="B = 1, got B = 2"):
            op(*two, cu_seqlens=bounds)


def test_a_call_costs_little_beside_its_backend():
    """Of a call forward and backward, with a backend that does nothing: some 100 microseconds, of which PyTorch's own
    are 40."""
    spec = specs.get("gla")
    x = [y.requires_grad_() for y in make_inputs(spec, B=1, T=4, H=1, K=2, V=2).values()]
    given = torch.zeros(1, 4, 1, 2)

    class Nothing:
        def forward(self, inputs: Any, *_: Any) -> Forward:
            return Forward(torch.empty_like(given), (), (given,))

        def backward(self, *_: Any) -> Any:
            return tuple(torch.empty_like(y) for y in x), ()

    op = by_hand(spec, Nothing)
    torch.autograd.grad(op(*x)[0], x, given)
    best = float("inf")
    for _ in range(5):
        began = time.process_time()
        for _ in range(200):
            torch.autograd.grad(op(*x)[0], x, given)
        best = min(best, (time.process_time() - began) / 200)
    assert best < 1e-3, f"{best * 1e6:.0f} microseconds"


# --- backends


def test_a_backend_is_made_when_it_is_first_needed_and_once():
    made = []

    def make() -> TorchBackend:
        made.append(1)
        return TorchBackend(analyse(specs.get("gla")), 16)

    op = by_hand(specs.get("gla"), make, backend="auto")
    assert not made
    x = inputs_of(op)
    op(*x)
    op.step(*(y[:, :1] for y in x), state=torch.zeros(2, 2, 6, 5))
    assert made == [1]


def test_where_triton_runs(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert _triton_devices("torch") == frozenset()
    assert _triton_devices("auto") == _triton_devices("triton") == {"cuda"}
    import triton.language  # noqa: F401

    monkeypatch.setenv("TRITON_INTERPRET", "1")  # too late: Triton was imported without it
    assert _triton_devices("auto") == {"cuda"}
    code = "import flagen.op; print(sorted(flagen.op._triton_devices('auto')), flagen.op._triton_devices('torch'))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "['cpu', 'cuda'] frozenset()"


def test_meta_tensors_have_shapes_alone():
    op = op_of("based")
    x = [y.to("meta") for y in inputs_of(op)]
    o, (state, sums) = op(*x, output_final_state=True)
    assert (o.shape, state.shape, sums.shape) == ((2, 37, 2, 5), (2, 2, 28, 5), (2, 2, 28))
    assert o.is_meta


def test_debug_looks_at_values(monkeypatch):
    op = by_hand(Spec("bounded", log_decay=Input("g", "b t h", high=0)))
    x = inputs_of(op)
    x[3][1, 4, 1] = 0.5
    op(*x)
    monkeypatch.setenv("FLAGEN_DEBUG", "1")
    with pytest.raises(ValueError, match=r"bounded: g is declared <= 0, got 0.5 at \(1, 4, 1\)"):
        op(*x)


# --- what it says of itself


def test_signature_and_names():
    op = op_of("transnormer")
    signature = inspect.signature(op)
    assert list(signature.parameters) == [
        "q", "k", "v", "layer", "layers", "scale", "initial_state", "output_final_state", "cu_seqlens",
    ]  # fmt: skip
    assert signature.parameters["layer"].kind is inspect.Parameter.KEYWORD_ONLY
    assert signature.parameters["layer"].default is inspect.Parameter.empty
    assert signature.parameters["output_final_state"].default is False
    assert op.__name__ == "transnormer"
    assert list(inspect.signature(op.step).parameters) == ["q", "k", "v", "layer", "layers", "state", "scale"]
    assert (op.step.__name__, op.reference.__name__) == ("step", "reference")
    assert (op.spec, op.analysis.spec, op.plan.spec) == (specs.get("transnormer"),) * 3
    assert "def fwd" in op.source


def test_the_documentation_is_of_the_spec():
    doc = op_of("gateloop").__doc__
    for line in (
        "gateloop(q, k, v, g, theta, *, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None)",
        "    S_t = diag(exp(g_t + i theta_t)) S_{t-1} + k_t v_t^T",
        "K is at most 128, V 256.",
        "g: [B, T, H, K], natural log of the decay per step, <= 0.",
        "theta: [B, T, H, K], angle of the decay per step, in radians.",
        "initial_state: [N, H, K, V] complex64 (complex128 if a tensor is float64). None: zero.",
        "None: 1.",
    ):
        assert line in doc
    doc = op_of("mamba2").__doc__
    assert "dt: [B, T, H], in value = v * dt; in log_decay = -exp(A_log) * dt." in doc
    assert "the pair (S [N, H, F, V], z [N, H, F]) float32" in op_of("based").__doc__
    assert "F = 1 + K + K (K + 1) / 2 features" in op_of("based").step.__doc__
    assert "layer: a number, required." in op_of("transnormer").__doc__
    assert max(map(len, doc.splitlines())) <= 120


def test_print():
    op = op_of("gla")
    assert str(op).startswith("gla(q, k, v, g, *, scale=None,")
    assert "S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T" in str(op)
    assert repr(op).startswith("<flagen op gla(q, k, v, g, *, ")
    assert "\n" not in repr(op)


def test_pickle_and_copy_give_the_same_op():
    op = op_of(Spec("mine", value=v * 2, log_decay=logsigmoid(gs) * Scalar("rate")))
    model = torch.nn.Linear(2, 2)
    model.attend = op
    assert pickle.loads(pickle.dumps(op)) is op
    assert copy.copy(op) is copy.deepcopy(op) is op
    assert copy.deepcopy(model).attend is op
    with pytest.raises(TypeError, match="only an op made by flagen"):
        pickle.dumps(by_hand(specs.get("gla")))


def test_operators_have_names_of_their_own():
    first, second = by_hand(specs.get("retnet")), by_hand(specs.get("retnet"))
    names = {str(op._operators.forward) for op in (first, second, op_of("retnet"))}
    assert len(names) == 3
    assert all(name.startswith("flagen.retnet_") for name in names)


def test_a_small_error_is_an_error():
    """assert_close, by which check judges, does judge."""
    op = op_of("gla")
    x = inputs_of(op)
    o, _ = op(*x)
    with pytest.raises(AssertionError):
        assert_close("o", o * 1.001, op.reference(*x)[0], dtype=torch.float32)

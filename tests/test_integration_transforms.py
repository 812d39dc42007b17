"""torch.func, autograd's odd corners and their surroundings: each is right, or refused by a message of flagen's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import flagen
from flagen import specs
from flagen.op import Op
from flagen.testing import make_inputs, make_state

EVERY = pytest.mark.parametrize("name", specs.names())
SIZES = {"B": 1, "H": 2, "K": 4, "V": 3}
FORWARD_MODE = r"^{}: forward-mode derivatives .* are not supported; use backward, torch\.func\.vjp or {}\.reference$"
MAPPED = r"^{}: torch\.vmap over this op or its gradient is not supported .*: fold the mapped axis into B$"
SECOND = r"^{}: has no second derivative, .*; for small sizes {}\.reference has all derivatives$"


def op_of(name: str) -> Op:
    return flagen.compile(name, chunk_size=16, backend="torch")


def inputs_of(op: Op, T: int = 20) -> list[Tensor]:
    return list(make_inputs(op.spec, T=T, **SIZES).values())


def state_of(op: Op) -> Any:
    return make_state(op.spec, N=1, H=2, K=4, V=3)


def scalars_of(op: Op) -> dict[str, float]:
    """Such that constants that follow from them have no short form in binary."""
    return {one.name: {"layer": 3.0, "layers": 7.0}[one.name] for one in op.spec.scalars}


def parts(state: Any) -> tuple[Tensor, ...]:
    return (state,) if isinstance(state, Tensor) else tuple(state)


def loss_of(op: Op) -> Callable[..., Tensor]:
    """Of the inputs and the parts of the initial state: a number from the output and the final state."""
    count, scalars = len(op.spec.inputs), scalars_of(op)

    def loss(*tensors: Tensor) -> Tensor:
        state = tensors[count:] if op.spec.normalizer is not None else tensors[count]
        o, final = op(*tensors[:count], **scalars, initial_state=state, output_final_state=True)
        return o.square().sum() + sum(y.abs().square().sum() for y in parts(final))

    return loss


# --- torch.func


@EVERY
def test_func_grad_is_the_gradient(name):
    op = op_of(name)
    x, state = inputs_of(op), parts(state_of(op))
    loss = loss_of(op)
    leaves = [y.clone().requires_grad_() for y in (*x, *state)]
    want = torch.autograd.grad(loss(*leaves), leaves)
    every = tuple(range(len(leaves)))
    got, value = torch.func.grad_and_value(loss, argnums=every)(*x, *state)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert torch.equal(value, loss(*x, *state))
    _, back = torch.func.vjp(loss, *x, *state)
    torch.testing.assert_close(back(torch.tensor(1.0)), want, rtol=0, atol=0)


def test_func_grad_of_a_module():
    op = op_of("rwkv6")

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project, self.bonus = torch.nn.Linear(8, 32), torch.nn.Parameter(torch.randn(2, 4))

        def forward(self, x: Tensor) -> Tensor:
            r, k, v, w = self.project(x).unflatten(-1, (4, 2, 4)).unbind(-3)
            return op(r, k, v, torch.nn.functional.logsigmoid(w), self.bonus)[0]

    torch.manual_seed(0)
    model, x = Layer(), torch.randn(2, 9, 8)
    parameters = dict(model.named_parameters())
    got = torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).square().sum())(parameters)
    model(x).square().sum().backward()
    for one, parameter in parameters.items():
        torch.testing.assert_close(got[one], parameter.grad)
        assert parameter.grad.any()


def mapped(op: Op) -> list[Callable[[], Any]]:
    x, state, one = inputs_of(op), state_of(op), inputs_of(op, T=1)
    leaf = x[0].clone().requires_grad_()
    o, _ = op(leaf, *x[1:])
    several = torch.ones(3, *o.shape)
    bounds = torch.tensor([[0, 9], [0, 20]], dtype=torch.int32)

    def alone(query: Tensor) -> Tensor:
        return op(query, *x[1:])[0]

    return [
        lambda: torch.vmap(alone)(x[0][None]),
        lambda: torch.vmap(alone, randomness="different", chunk_size=1)(x[0][None].expand(2, *x[0].shape)),
        lambda: torch.vmap(lambda s: op(*x, initial_state=s)[0])(state[None]),
        lambda: torch.vmap(lambda c: op(*x, cu_seqlens=c)[0])(bounds),
        lambda: torch.vmap(lambda y: op.step(y, *one[1:], state=state.clone()))(one[0][None]),
        lambda: torch.vmap(torch.func.grad(lambda y: alone(y).sum()))(x[0][None]),
        lambda: torch.func.grad(lambda y: torch.vmap(alone)(y).sum())(x[0][None]),
        lambda: torch.func.jacrev(alone)(x[0]),
        lambda: torch.autograd.grad(o, leaf, several, is_grads_batched=True),
        lambda: torch.autograd.functional.jacobian(alone, x[0], vectorize=True),
    ]


@pytest.mark.parametrize("which", range(10))
def test_vmap_is_refused(which):
    op = op_of("gla")
    with pytest.raises(NotImplementedError, match=MAPPED.format("gla")):
        mapped(op)[which]()


def test_every_way_of_mapping_is_tried():
    assert len(mapped(op_of("gla"))) == 10


def forward_mode(op: Op) -> list[Callable[[], Any]]:
    x, state, one = inputs_of(op), state_of(op), inputs_of(op, T=1)

    def alone(query: Tensor) -> Tensor:
        return op(query, *x[1:])[0]

    def dual(tensors: list[Tensor], state: Tensor | None = None, step: bool = False) -> None:
        with forward_ad.dual_level():
            if state is None:
                op(forward_ad.make_dual(tensors[0], tensors[0]), *tensors[1:])
            elif step:
                op.step(*tensors, state=forward_ad.make_dual(state.clone(), state))
            else:
                op(*tensors, initial_state=forward_ad.make_dual(state, state))

    return [
        lambda: torch.func.jvp(alone, (x[0],), (x[0],)),
        lambda: torch.func.jvp(lambda s: op(*x, initial_state=s)[0], (state,), (state,)),
        lambda: torch.func.jvp(lambda s: op.step(*one, state=s), (state.clone(),), (state,)),
        lambda: torch.func.jacfwd(alone)(x[0]),
        lambda: torch.func.linearize(alone, x[0]),
        lambda: torch.func.jvp(torch.func.grad(lambda y: alone(y).sum()), (x[0],), (x[0],)),
        lambda: torch.func.hessian(lambda y: alone(y).sum())(x[0]),
        lambda: torch.autograd.functional.jacobian(alone, x[0], vectorize=True, strategy="forward-mode"),
        lambda: dual(x),
        lambda: dual([y.clone().requires_grad_() for y in x], state),
        lambda: dual(x, state),
        lambda: dual(one, state, step=True),
    ]


@pytest.mark.parametrize("which", range(12))
def test_forward_mode_is_refused(which):
    op = op_of("gla")
    with pytest.raises(NotImplementedError, match=FORWARD_MODE.format("gla", "gla")):
        forward_mode(op)[which]()


def test_every_way_of_forward_mode_is_tried():
    assert len(forward_mode(op_of("gla"))) == 12


# --- second derivatives


@EVERY
def test_a_second_derivative_is_refused(name):
    op = op_of(name)
    leaves = [y.clone().requires_grad_() for y in (*inputs_of(op), *parts(state_of(op)))]
    loss = loss_of(op)
    first = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    for one, grad in enumerate(first):
        with pytest.raises(NotImplementedError, match=SECOND.format(name, name)):
            torch.autograd.grad(grad.abs().sum(), leaves[one], retain_graph=True, allow_unused=True)


def test_a_gradient_penalty_is_refused():
    op = op_of("gla")
    q, *rest = inputs_of(op)
    leaf = q.clone().requires_grad_()
    (grad,) = torch.autograd.grad(op(leaf, *rest)[0].sum(), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match=SECOND.format("gla", "gla")):
        grad.square().sum().backward()
    with pytest.raises(NotImplementedError, match=SECOND.format("gla", "gla")):
        torch.autograd.functional.hessian(lambda y: op(y, *rest)[0].square().sum(), q)
    with pytest.raises(NotImplementedError, match=SECOND.format("gla", "gla")):
        torch.func.grad(lambda y: torch.func.grad(lambda z: op(z, *rest)[0].square().sum())(y).sum())(q)
    # the same, of what the message recommends
    (grad,) = torch.autograd.grad(op.reference(leaf, *rest)[0].square().sum(), leaf, create_graph=True)
    assert torch.autograd.grad(grad.square().sum(), leaf)[0].any()


def test_a_graph_that_is_kept_gives_the_same_gradients_again():
    op = op_of("linear")
    leaves = [y.clone().requires_grad_() for y in (*inputs_of(op), *parts(state_of(op)))]
    value = loss_of(op)(*leaves)
    first = torch.autograd.grad(value, leaves, retain_graph=True)
    kept = torch.autograd.grad(value, leaves, create_graph=True)
    torch.testing.assert_close(kept, first, rtol=0, atol=0)
    torch.testing.assert_close(torch.autograd.grad(value, leaves), first, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(value, leaves)


# --- tensors without values


@EVERY
def test_fake_and_meta_tensors_go_forward_and_backward(name):
    op = op_of(name)
    scalars = scalars_of(op)

    def run(x: list[Tensor]) -> tuple[Any, ...]:
        x = [y.detach().requires_grad_() for y in x]
        o, final = op(*x, **scalars, output_final_state=True)
        grads = torch.autograd.grad(o.sum() + sum(y.abs().sum() for y in parts(final)), x)
        now = [y.detach()[:, :1] if "t" in one.axes else y.detach() for y, one in zip(x, op.spec.inputs, strict=True)]
        state = tuple(y.detach() for y in parts(final))
        return o, *state, *grads, op.step(*now, **scalars, state=state if op.spec.normalizer is not None else state[0])

    x = inputs_of(op)
    want = [(y.shape, y.stride(), y.dtype) for y in run(x)]
    on_meta = run([y.to("meta") for y in x])
    assert [(y.shape, y.stride(), y.dtype) for y in on_meta] == want
    assert all(y.is_meta for y in on_meta)
    with FakeTensorMode() as mode:
        fake = run([mode.from_tensor(y) for y in x])
    assert [(y.shape, y.stride(), y.dtype) for y in fake] == want
    assert all(isinstance(y, FakeTensor) for y in fake)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_sees_two_operators(mode):
    op = op_of("linear")
    x = inputs_of(op)

    def grads(*x: Tensor) -> tuple[Tensor, ...]:
        leaves = [y.detach().requires_grad_() for y in x]
        return torch.autograd.grad(op(*leaves)[0].square().sum(), leaves)

    graph = make_fx(grads, tracing_mode=mode)(*x)
    called = [str(node.target) for node in graph.graph.nodes if "flagen" in str(node.target)]
    assert [one.split("_")[-1] for one in called] == ["fwd.default", "bwd.default"]
    torch.testing.assert_close(graph(*x), grads(*x))
    if mode == "symbolic":
        longer = inputs_of(op, T=33)
        torch.testing.assert_close(graph(*longer), grads(*longer))


# --- what stands around a call


@pytest.fixture
def restored():
    dtype, deterministic = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_default_dtype(dtype)
    torch.set_default_device(None)
    torch.use_deterministic_algorithms(deterministic)


def surroundings() -> list[Callable[[], Any]]:
    return [
        lambda: torch.set_default_dtype(torch.float64),
        lambda: torch.set_default_dtype(torch.bfloat16),
        lambda: torch.set_default_device("meta"),
        lambda: torch.use_deterministic_algorithms(True),
    ]


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("name", ["gla", "linear", "gateloop", "transnormer"])
def test_defaults_of_the_process_change_nothing(name, which, restored):
    op = op_of(name)
    x, state = inputs_of(op), parts(state_of(op))
    one, scalars = inputs_of(op, T=1), scalars_of(op)

    def run() -> list[Tensor]:
        leaves = [y.clone().requires_grad_() for y in (*x, *state)]
        value = loss_of(op)(*leaves)
        written = tuple(y.clone() for y in state)
        step = op.step(*one, **scalars, state=written if op.spec.normalizer is not None else written[0])
        return [value, *torch.autograd.grad(value, leaves), step, *written]

    want = run()
    op._operators._constants.clear()
    surroundings()[which]()
    got = run()
    op._operators._constants.clear()
    assert [(y.dtype, y.device) for y in got] == [(y.dtype, y.device) for y in want]
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_anomaly_mode_and_hooks():
    op = op_of("gla")
    leaves = [y.clone().requires_grad_() for y in (*inputs_of(op), state_of(op))]
    want = torch.autograd.grad(loss_of(op)(*leaves), leaves)
    seen = []
    leaves[0].register_hook(lambda grad: seen.append(grad) or grad * 2)
    with torch.autograd.set_detect_anomaly(True):
        loss_of(op)(*leaves).backward()
    assert torch.equal(seen[0], want[0])
    torch.testing.assert_close(leaves[0].grad, want[0] * 2)
    torch.testing.assert_close([y.grad for y in leaves[1:]], list(want[1:]))


@EVERY
def test_what_backward_reads_can_be_moved_away(name):
    """Hooks of saved tensors, which offload activations, see all that is kept, and may put it elsewhere."""
    op = op_of(name)
    leaves = [y.clone().requires_grad_() for y in (*inputs_of(op), *parts(state_of(op)))]
    want = torch.autograd.grad(loss_of(op)(*leaves), leaves)
    packed = []

    def pack(y: Tensor) -> Tensor:
        packed.append(y.clone())
        return packed[-1]

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda y: y.clone()):
        value = loss_of(op)(*leaves)
    assert len(packed) > len(op.spec.inputs)
    torch.testing.assert_close(torch.autograd.grad(value, leaves), want, rtol=0, atol=0)


def test_a_subclass_of_tensor_passes_through():
    class Mine(torch.Tensor):
        pass

    op = op_of("gla")
    x = inputs_of(op)
    want = op(*x)[0]
    o, _ = op(*(y.as_subclass(Mine) for y in x))
    assert isinstance(o, Mine)
    assert torch.equal(o.as_subclass(Tensor), want)


def test_conjugated_and_negated_views():
    """Tensors whose sign of the imaginary part, or sign, PyTorch has put off."""
    op = op_of("gateloop")
    x, state = inputs_of(op), state_of(op)
    late = torch.complex(x[0], -x[0]).conj().imag
    assert late.is_neg()
    assert torch.equal(op(late, *x[1:])[0], op(*x)[0])
    assert state.conj().is_conj()
    want = op(*x, initial_state=state.conj().resolve_conj(), output_final_state=True)
    torch.testing.assert_close(op(*x, initial_state=state.conj(), output_final_state=True), want, rtol=0, atol=0)

"""The op under torch.compile: whole graphs, forward, backward and decode, lengths that change, a fresh process; and the
operators by themselves.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import flagen
from flagen import (
    Input,
    Scalar,
    Spec,
    compiler,
    exp,
    heads,
    k,
    logsigmoid,
    maximum,
    sigmoid,
    softplus,
    specs,
    tanh,
    taylor,
    v,
)
from flagen.load import load
from flagen.op import Op
from flagen.schedule import rows_of_state
from flagen.testing import make_inputs, make_scalars, make_state
from flagen.torch_backend import Forward
from flagen.triton_backend import TritonBackend

EVERY = pytest.mark.parametrize("name", specs.names())
TESTS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def op_of(name: str) -> Op:
    return flagen.compile(name, chunk_size=16, backend="torch")


def inputs_of(op: Op, *, grad: bool = True, **changes: Any) -> list[Tensor]:
    sizes = {"B": 1, "T": 20, "H": 2, "K": 4, "V": 3, **changes}
    return [x.requires_grad_(grad) for x in make_inputs(op.spec, **sizes).values()]


def state_of(op: Op, N: int = 1, *, grad: bool = True) -> Any:
    state = make_state(op.spec, N=N, H=2, K=4, V=3)
    for x in parts(state):
        x.requires_grad_(grad)
    return state


def parts(state: Any) -> tuple[Tensor, ...]:
    return (state,) if isinstance(state, Tensor) else tuple(state)


def no_recompile(refused: bool) -> Any:
    return torch._dynamo.config.patch(error_on_recompile=True) if refused else contextlib.nullcontext()


def results(run: Any, x: list[Tensor], state: Any) -> list[Tensor]:
    """Outputs, and gradients of everything from everything."""
    o, final = run(x, state)
    loss = o.square().sum() + sum(y.abs().square().sum() for y in parts(final))
    return [o, *parts(final), *torch.autograd.grad(loss, [*x, *parts(state)])]


@EVERY
def test_forward_and_backward_in_one_graph_at_every_length(name):
    op = op_of(name)
    scalars = make_scalars(op.spec)

    def run(x: list[Tensor], state: Any) -> Any:
        return op(*x, **scalars, initial_state=state, output_final_state=True)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for i, T in enumerate((17, 40, 64, 100)):
        x, state = inputs_of(op, T=T), state_of(op)
        with no_recompile(i > 1):
            got = results(compiled, x, state)
        torch.testing.assert_close(got, results(run, x, state))


class WithoutKernels(TritonBackend):
    """The Triton backend with launches left out: shapes and dtypes, also of what is saved, are its own."""

    def forward(self, inputs, constants, scale, initial, cu_seqlens, want_final, save):
        sizes, F = self._sizes(inputs, cu_seqlens), rows_of_state(self.plan, inputs[0].shape[-1])
        o = torch.zeros(sizes.B, sizes.T, sizes.H, sizes.V)
        kind = torch.complex64 if self.plan.complex else torch.float32
        final = torch.zeros(sizes.N, sizes.H, F, sizes.V, dtype=kind), torch.zeros(sizes.N, sizes.H, F)
        saved = self.saved_like(inputs, cu_seqlens) if save else ()
        return Forward(o, final[: 1 + self.normalized] if want_final else (), saved)

    def backward(self, do, dfinal, o, saved, inputs, constants, scale, initial, cu_seqlens, needs, need_initial):
        grads = tuple(torch.zeros_like(x) if need else None for x, need in zip(inputs, needs, strict=True))
        return grads, tuple(map(torch.zeros_like, initial)) if need_initial else ()


def without_kernels(name: str) -> Op:
    plan, entry = compiler.prepare(specs.get(name))
    op = Op(
        spec=plan.spec,
        analysis=plan.analysis,
        plan=plan,
        backend="auto",
        torch_backend=lambda: None,
        triton_backend=lambda: WithoutKernels(plan, load(entry)),
        source="",
        path=None,
    )
    op._checks.triton = frozenset({"cpu"})
    return op


def graphs_for(op: Op, lengths: tuple[int, ...], packed: bool) -> int:
    """How many graphs are made for calls and their gradients at lengths that are said to change, the first one too."""
    scalars, counter = make_scalars(op.spec), CompileCounterWithBackend("aot_eager")
    N = 2 if packed else 1

    def run(x: list[Tensor], state: Any, cu_seqlens: Tensor | None) -> Any:
        return op(*x, **scalars, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens)

    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for T in lengths:
        x, state = inputs_of(op, T=T, N=N), state_of(op, N)
        for y, one in zip(x, op.spec.inputs, strict=True):
            if "t" in one.axes:
                torch._dynamo.mark_dynamic(y, one.axes.index("t"))
        cu_seqlens = torch.tensor([0, 1, T], dtype=torch.int32) if packed else None
        o, final = compiled(x, state, cu_seqlens)
        (o.sum() + sum(y.abs().sum() for y in parts(final))).backward()
        assert o.shape[1] == T
        assert all(y.grad.shape == y.shape for y in x)
    return counter.frame_count


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("name", ["gla", "linear", "gateloop", "transnormer"])
def test_one_graph_for_every_length(name, packed):
    assert graphs_for(op_of(name), (2, 3, 16, 300), packed) == 1


@pytest.mark.parametrize("name", ["gla", "linear", "gateloop"])
def test_one_graph_for_every_length_with_the_triton_backend(name):
    assert graphs_for(without_kernels(name), (2, 3, 256, 257, 700), False) == 1


@pytest.mark.parametrize("name", ["gla", "linear", "gateloop"])
def test_one_graph_for_every_length_with_the_triton_backend_and_sequences(name):
    assert graphs_for(without_kernels(name), (2, 3, 256, 257, 700), True) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gla", "linear", "gateloop", "retnet"])
def test_forward_and_backward_in_one_graph_on_a_gpu(name):
    op = flagen.compile(name)
    scalars = make_scalars(op.spec)

    def run(x: list[Tensor], state: Any) -> Any:
        return op(*x, **scalars, initial_state=state, output_final_state=True)

    compiled = torch.compile(run, fullgraph=True)
    for T in (2, 65, 300, 700):
        x = [y.detach().cuda().requires_grad_() for y in inputs_of(op, T=T)]
        state = tuple(y.detach().cuda().requires_grad_() for y in parts(state_of(op)))
        state = state if op.spec.normalizer is not None else state[0]
        torch.testing.assert_close(results(compiled, x, state), results(run, x, state))


def test_inductor():
    op = op_of("linear")

    def run(x: list[Tensor], state: Any) -> Any:
        q, *rest = x
        o, final = op(q * 2, *rest, initial_state=state, output_final_state=True)
        return o.tanh(), final

    compiled = torch.compile(run, fullgraph=True)
    for i, T in enumerate((17, 40, 64)):
        x, state = inputs_of(op, T=T), state_of(op)
        with no_recompile(i > 1):
            got = results(compiled, x, state)
        torch.testing.assert_close(got, results(run, x, state))


def test_every_size_but_k_may_change_without_a_new_graph():
    op = op_of("gla")

    def run(*x: Tensor) -> Any:
        return op(*x, output_final_state=True)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    # spans of tokens are cut by all sizes: both cases, a chunk and many, are one graph
    for i, (B, T, H, V) in enumerate(((2, 30, 3, 5), (70, 31, 6, 7), (5, 90, 2, 130))):
        x = inputs_of(op, B=B, T=T, H=H, V=V)
        with no_recompile(i > 0):
            got = compiled(*x)
        torch.testing.assert_close(got, run(*x))


@pytest.mark.parametrize("grad", [True, False])
def test_sequences(grad):
    op = op_of("gla")

    def run(x: list[Tensor], bounds: Tensor) -> Any:
        return op(*x, cu_seqlens=bounds, output_final_state=True)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for i, bounds in enumerate(([0, 10, 30], [0, 3, 3, 40], [0, 1, 2, 3, 50])):
        x = inputs_of(op, T=bounds[-1] + i, grad=grad)
        with no_recompile(i > 1):
            got = compiled(x, torch.tensor(bounds))
        torch.testing.assert_close(got, run(x, torch.tensor(bounds)))
    with pytest.raises(
        ValueError, match=r"gla: cu_seqlens must rise from 0 to at most T = 52, got .*, which ends at 60"
    ):
        compiled(x, torch.tensor([0, 1, 2, 3, 60]))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", ["gla", "based", "gateloop"])
def test_step_changes_its_state(name, backend):
    op = op_of(name)
    x = [y.detach() for y in inputs_of(op, T=1)]

    def run(state: Any) -> Tensor:
        return torch.cat([op.step(*x, state=state), op.step(*x, state=state)])

    first, second = state_of(op, grad=False), state_of(op, grad=False)
    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend=backend)(first), run(second))
    torch.testing.assert_close(first, second)


def test_autocast():
    op = op_of("mamba2")

    def run(*x: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return op(*x, output_final_state=True)

    x = inputs_of(op)
    o, state = torch.compile(run, fullgraph=True, backend="aot_eager")(*x)
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(o, run(*x)[0])
    assert {y.dtype for y in torch.autograd.grad(o.float().sum(), x)} == {torch.float32}


def test_a_graph_without_gradients_saves_nothing():
    op = op_of("gla")
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    torch.compile(lambda x: op(*x)[0], fullgraph=True, backend=keep)([x.detach() for x in inputs_of(op)])
    (call,) = [node for node in graphs[0].graph.nodes if node.op == "call_function" and "flagen" in str(node.target)]
    assert call.args[-2:] == (False, False)


def test_a_module_of_several_ops():
    class Layer(torch.nn.Module):
        def __init__(self, name: str, scalars: dict[str, float]) -> None:
            super().__init__()
            self.attend, self.scalars = op_of(name), scalars
            self.project = torch.nn.Linear(12, 3 * 12)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.project(x).unflatten(-1, (3, 2, 6)).unbind(-3)
            return x + self.attend(q, k, v, **self.scalars)[0].flatten(-2)

    torch.manual_seed(0)
    model = torch.nn.Sequential(
        Layer("retnet", {}), Layer("transnormer", {"layer": 0, "layers": 2}), Layer("linear", {})
    )
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 33, 12)
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).square().sum().backward()
    assert all(parameter.grad.any() for parameter in model.parameters())


def test_a_wrong_call_says_what_is_wrong():
    op = op_of("gla")
    compiled = torch.compile(lambda *x: op(*x)[0], backend="aot_eager")
    x = inputs_of(op)
    with pytest.raises(
        ValueError, match=r"^gla: g must have shape \[B, T, H, K\] = \(1, 20, 2, 4\), got \(1, 3, 2, 4\)"
    ):
        compiled(*x[:3], x[3][:, :3])


def test_the_first_thing_in_a_process():
    code = """
        import torch
        import flagen

        op = flagen.compile("gla", backend="torch")
        x = [torch.randn(1, 20, 2, 4, requires_grad=True) for _ in range(3)]
        g = (-torch.rand(1, 20, 2, 4)).requires_grad_()
        run = torch.compile(lambda *x: op(*x, output_final_state=True), fullgraph=True, backend="aot_eager")
        o, state = run(*x, g)
        (o.sum() + state.sum()).backward()
        got = g.grad.clone()
        g.grad = None
        o, state = op(*x, g, output_final_state=True)
        (o.sum() + state.sum()).backward()
        torch.testing.assert_close(got, g.grad)
        print("right")
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert (run.returncode, run.stdout.strip()) == (0, "right"), run.stderr


# --- the operators by themselves


# every shipped spec, and what those have not: a state that is complex with a bonus, another normaliser, scalars within
# a gate, inputs without time, a decay per value channel, Taylor features with a row per sequence
gate, row, angle = Input("gate", "b t h"), Input("row", "b h"), Input("angle", "b t h k")
across, own = Input("across", "b t h v"), Input("own", "h k")
ODD = {
    spec.name: spec
    for spec in (
        Spec("turning", log_decay=logsigmoid(gate), phase=tanh(angle), bonus=own),
        Spec("bounded", log_decay=logsigmoid(gate), normalize=lambda n: maximum(abs(n), 1)),
        Spec("scaled", value=v * sigmoid(gate), log_decay=logsigmoid(gate) * Scalar("rate") / heads),
        Spec("by_row", key=softplus(k), log_decay=logsigmoid(row), bonus=own),
        Spec("by_value", log_decay=logsigmoid(across), bonus=exp(own)),
        Spec("features", log_decay=logsigmoid(row), feature_map=taylor(2), normalize=True),
    )
}


TRACED = ("gla", "linear", "gateloop", "scaled", "features")


def arguments_of(name: str, bounds: list[int] | None) -> tuple[Op, list[Tensor], list[Tensor], Any, list[Any]]:
    """An op, inputs, the parts of a state, cu_seqlens, and the scalars and the scale."""
    op = flagen.compile(ODD.get(name, name), chunk_size=16, backend="torch")
    N = 1 if bounds is None else len(bounds) - 1
    x = inputs_of(op, grad=False, N=N)
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    numbers = [[float(value) for value in make_scalars(op.spec).values()], 0.5]
    return op, x, list(parts(state_of(op, N=N, grad=False))), cu_seqlens, numbers


@pytest.mark.parametrize("bounds", [None, [0, 8, 8, 18]], ids=["dense", "packed"])
@pytest.mark.parametrize("name", [*specs.names(), *ODD])
def test_operators(name, bounds):
    op, x, state, cu_seqlens, numbers = arguments_of(name, bounds)
    operators = op._operators
    # the last test traces and compiles, which takes the most of the time: for one op of each kind
    most = TESTS if bounds is not None and name in TRACED else TESTS[:2]
    for initial, want_final in ((state, True), ([], False)):
        arguments = (x, initial, cu_seqlens, *numbers, want_final)
        torch.library.opcheck(operators.forward, (*arguments, False), test_utils=most if initial else TESTS[:2])
        # what is saved is not filled to the end, so its values are not compared
        torch.library.opcheck(operators.forward, (*arguments, True), test_utils=TESTS[:2])
    o, final, saved = operators.forward(x, state, cu_seqlens, *numbers, True, True)
    read = o if len(final) == 2 else None
    ends = [*final, None][:2]
    arguments = (o, *ends, read, saved, x, state, cu_seqlens, *numbers, [True] * len(x), True)
    torch.library.opcheck(operators.backward, arguments, test_utils=most)
    some = [False, True] + [False] * (len(x) - 2)
    arguments = (None, ends[0], None, read, saved, x, [], cu_seqlens, *numbers, some, False)
    torch.library.opcheck(operators.backward, arguments, test_utils=TESTS[:2])
    if bounds is None:
        one = inputs_of(op, T=1, grad=False)
        torch.library.opcheck(operators.step, (one, state, *numbers), test_utils=TESTS if name in TRACED else TESTS[:2])


@pytest.mark.parametrize("name", ["gla", "bounded", "turning"])
def test_the_forward_operator_has_a_gradient_of_its_own(name):
    op, x, state, cu_seqlens, numbers = arguments_of(name, [0, 8, 8, 18])
    leaves = [y.requires_grad_() for y in (*x, *state)]
    arguments = (leaves[: len(x)], leaves[len(x) :], cu_seqlens, *numbers, True, True)
    torch.library.opcheck(op._operators.forward, arguments, test_utils=("test_autograd_registration",))


def test_fake_results_have_the_shapes_and_strides_of_real_ones():
    for name in specs.names():
        op = op_of(name)
        x = [y.mT.contiguous().mT if y.dim() > 1 else y for y in inputs_of(op, grad=False, B=2)]
        numbers = [[float(value) for value in make_scalars(op.spec).values()], 0.5]
        state = list(parts(state_of(op, N=2, grad=False)))
        real = op._operators.forward(x, state, None, *numbers, True, True)
        with torch._subclasses.FakeTensorMode() as mode:
            fake = op._operators.forward(
                [mode.from_tensor(y) for y in x], [mode.from_tensor(y) for y in state], None, *numbers, True, True
            )
        for y, z in zip((real[0], *real[1], *real[2]), (fake[0], *fake[1], *fake[2]), strict=True):
            assert (y.shape, y.stride(), y.dtype) == (z.shape, z.stride(), z.dtype), name

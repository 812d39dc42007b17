"""torch.export of modules that call an op: strict and not, with a length that may change, packed, saved and loaded."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim, export

import flagen
from flagen import Input, Scalar, Spec, logsigmoid, maximum, q, sigmoid
from flagen.op import Op
from flagen.testing import make_inputs, make_scalars, make_state

STRICT = pytest.mark.parametrize("strict", [False, True], ids=["plain", "strict"])
gate, row = Input("gate", "b t h"), Input("row", "b h")
SPECS = {
    "gla": "gla",
    "transnormer": "transnormer",
    "gateloop": "gateloop",
    "based": "based",
    "rwkv6": "rwkv6",
    "mine": Spec(
        "mine",
        query=q * sigmoid(gate),
        log_decay=logsigmoid(row) * Scalar("rate"),
        normalize=lambda n: maximum(abs(n), 1),
    ),
}


class Layer(torch.nn.Module):
    """A call of an op with all that it may be given."""

    def __init__(self, op: Op) -> None:
        super().__init__()
        self.op, self.scalars = op, make_scalars(op.spec)

    def forward(self, x: tuple[Tensor, ...], state: Any = None, cu_seqlens: Tensor | None = None) -> Any:
        return self.op(
            *x, **self.scalars, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens, scale=0.4
        )


def op_of(name: str) -> Op:
    return flagen.compile(SPECS[name], chunk_size=16, backend="torch")


def inputs_of(op: Op, T: int, N: int = 1) -> tuple[Tensor, ...]:
    return tuple(make_inputs(op.spec, B=1, T=T, H=2, K=4, V=3, N=N).values())


def state_of(op: Op, N: int = 1) -> Any:
    return make_state(op.spec, N=N, H=2, K=4, V=3)


def dynamic(op: Op, time: Any, sequences: Any = None) -> tuple[Any, ...]:
    """Which sizes of the inputs may change: that of the time axis and, in packed batches, that of the sequences."""
    shapes = []
    for one in op.spec.inputs:
        found = {one.axes.index("t"): time} if "t" in one.axes else {}
        if sequences is not None and "b" in one.axes and "t" not in one.axes:
            found[0] = sequences
        shapes.append(found)
    return tuple(shapes)


def fixed(op: Op) -> Any:
    """That no size of a state may change; PyTorch 2.11 wants to be told of each tensor."""
    return (None, None) if op.spec.normalizer is not None else None


def operators(program: Any) -> list[str]:
    return [str(node.target).split("_")[-1] for node in program.graph.nodes if "flagen" in str(node.target)]


@STRICT
@pytest.mark.parametrize("name", SPECS)
def test_a_length_that_may_change(name, strict):
    op = op_of(name)
    layer = Layer(op)
    shapes = (dynamic(op, Dim("T", min=2, max=1 << 20)), fixed(op))
    program = export(layer, (inputs_of(op, 20), state_of(op)), dynamic_shapes=shapes, strict=strict)
    assert operators(program) == ["fwd.default"]
    run = program.module()
    for T in (2, 3, 16, 65):
        x, state = inputs_of(op, T), state_of(op)
        torch.testing.assert_close(run(x, state), layer(x, state))


@STRICT
@pytest.mark.parametrize("name", ["gla", "mine"])
def test_packed_sequences_of_which_there_may_be_any_number(name, strict):
    op = op_of(name)
    layer = Layer(op)
    sequences = Dim("sequences", min=2, max=1000)
    several = op.spec.normalizer is not None
    state_dims = ({0: sequences}, {0: sequences}) if several else {0: sequences}
    # bounds have one more entry than there are sequences, which export derives
    shapes = (dynamic(op, Dim("T", min=2), sequences), state_dims, {0: sequences + 1})
    bounds = torch.tensor([0, 3, 3, 20], dtype=torch.int32)
    program = export(layer, (inputs_of(op, 20, 3), state_of(op, 3), bounds), dynamic_shapes=shapes, strict=strict)
    run = program.module()
    for spans in ([0, 3, 3, 20], [0, 30, 40], [0, 1, 2, 3, 4, 50]):
        N = len(spans) - 1
        given = inputs_of(op, 50, N), state_of(op, N), torch.tensor(spans, dtype=torch.int32)
        torch.testing.assert_close(run(*given), layer(*given))


@pytest.mark.parametrize("name", SPECS)
def test_a_program_that_is_trained(name):
    """The exported operator has a gradient of its own, if what it was exported with needs one. Programs that are
    exported strictly are run without gradients by PyTorch.
    """
    op = op_of(name)
    layer = Layer(op)

    def given(T: int) -> tuple[Any, ...]:
        state = state_of(op)
        parts = (state,) if isinstance(state, Tensor) else state
        for y in parts:
            y.requires_grad_()
        return tuple(y.requires_grad_() for y in inputs_of(op, T)), state

    shapes = (dynamic(op, Dim("T", min=2)), fixed(op))
    program = export(layer, given(20), dynamic_shapes=shapes, strict=False)
    x, state = given(33)
    leaves = (*x, *((state,) if isinstance(state, Tensor) else state))

    def grads(run: Any, wanted: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        o, final = run(x, state)
        parts = (final,) if isinstance(final, Tensor) else final
        return torch.autograd.grad(o.square().sum() + sum(y.abs().square().sum() for y in parts), wanted)

    run = program.module()
    torch.testing.assert_close(grads(run, leaves), grads(layer, leaves))
    torch.testing.assert_close(grads(run, leaves[2:3]), grads(layer, leaves[2:3]))
    torch.testing.assert_close(grads(run, leaves[-1:]), grads(layer, leaves[-1:]))


@STRICT
def test_a_program_that_cannot_be_trained_says_so(strict):
    op = op_of("gla")
    run = export(Layer(op), (inputs_of(op, 20),), strict=strict).module()
    x = tuple(y.requires_grad_() for y in inputs_of(op, 20))
    with pytest.raises(NotImplementedError, match=r"gla: this program was exported .*; export it with tensors that do"):
        run(x)[0].sum().backward()


def test_a_program_after_decompositions_and_without_values():
    op = op_of("based")
    layer = Layer(op)
    x = inputs_of(op, 20)
    program = export(layer, (x,)).run_decompositions()
    assert operators(program) == ["fwd.default"]
    torch.testing.assert_close(program.module()(x), layer(x))


def test_a_step_in_a_program_changes_its_state():
    op = op_of("gla")

    class Decode(torch.nn.Module):
        def forward(self, x: tuple[Tensor, ...], state: Tensor) -> Tensor:
            return op.step(*x, state=state)

    x, first, second = inputs_of(op, 1), state_of(op), state_of(op)
    program = export(Decode(), (x, first.clone())).run_decompositions()
    assert program.graph_signature.user_inputs_to_mutate
    torch.testing.assert_close(program.module()(x, first), op.step(*x, state=second))
    torch.testing.assert_close(first, second)
    assert not torch.equal(first, state_of(op))


def test_a_program_is_loaded_in_another_process(tmp_path):
    op = op_of("gla")
    layer = Layer(op)
    program = export(layer, (inputs_of(op, 20),), dynamic_shapes=(dynamic(op, Dim("T", min=2)),))
    torch.export.save(program, tmp_path / "layer.pt2")
    x = inputs_of(op, 33)
    torch.save((x, layer(x)), tmp_path / "values.pt")
    code = f"""
        import torch
        import flagen

        flagen.compile("gla", chunk_size=16, backend="torch")  # which registers the operators
        run = torch.export.load({str(tmp_path / "layer.pt2")!r}).module()
        x, want = torch.load({str(tmp_path / "values.pt")!r})
        torch.testing.assert_close(run(x), want)
        print("right")
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout.strip()) == (0, "right"), run.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("name", SPECS)
def test_a_length_that_may_change_on_a_gpu(name):
    op = flagen.compile(SPECS[name])
    layer = Layer(op)

    def given(T: int) -> tuple[Any, ...]:
        state = state_of(op)
        state = state.cuda() if isinstance(state, Tensor) else tuple(y.cuda() for y in state)
        return tuple(y.cuda() for y in inputs_of(op, T)), state

    program = export(layer, given(20), dynamic_shapes=(dynamic(op, Dim("T", min=2, max=1 << 20)), fixed(op)))
    run = program.module()
    for T in (2, 65, 300, 700):
        torch.testing.assert_close(run(*given(T)), layer(*given(T)))

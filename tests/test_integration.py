"""An op inside a module, as users have it: checkpointed, under autocast, copied, pickled, moved, compiled, captured."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import flagen
from flagen import Input, Scalar, Spec, logsigmoid, sigmoid, specs, v
from flagen.analysis import analyse
from flagen.op import Op
from flagen.stabilize import gated
from flagen.testing import make_inputs, make_scalars, make_state
from flagen.torch_backend import TorchBackend
from flagen.torch_vector import VectorBackend

EVERY = pytest.mark.parametrize("name", specs.names())
GPU = pytest.mark.gpu
gate = Input("gate", "b t h")
mine = Spec("mine", value=v * sigmoid(gate), log_decay=logsigmoid(gate) * Scalar("rate"))


def op_of(spec: str | Spec, device: str = "cpu") -> Op:
    return flagen.compile(spec, chunk_size=16, backend="torch" if device == "cpu" else "auto")


class Spy:
    """A backend that keeps the names of the methods that were called, and the dtypes of inputs and states."""

    def __init__(self, analysis: Any) -> None:
        self.inner = VectorBackend(analysis) if analysis.vector else TorchBackend(analysis, 16)
        self.calls: list[str] = []
        self.inputs: list[tuple[torch.dtype, ...]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            self.calls.append(name)
            if name == "forward":
                self.inputs.append(tuple(x.dtype for x in (*arguments[0], *arguments[3])))
            return getattr(self.inner, name)(*arguments)

        return call


def spied(spec: Spec) -> tuple[Op, Spy]:
    analysis = analyse(spec)
    spy = Spy(analysis)
    op = Op(
        spec=spec,
        analysis=analysis,
        plan=None,
        backend="torch",
        torch_backend=lambda: spy,
        triton_backend=lambda: None,
        source="",
        path=None,
    )
    return op, spy


class Layer(torch.nn.Module):
    """Any op over 2 heads of 4 channels: its inputs with a time axis are projected, the others are parameters."""

    def __init__(self, op: Op) -> None:
        super().__init__()
        self.attend = op
        self.scalars = make_scalars(op.spec)
        made = make_inputs(op.spec, B=1, T=1, H=2, K=4, V=4)
        self.shapes = {one.name: made[one.name].shape[2:] for one in op.spec.inputs if "t" in one.axes}
        self.project = torch.nn.ModuleDict({name: torch.nn.Linear(8, s.numel()) for name, s in self.shapes.items()})
        fixed = {name: torch.nn.Parameter(x) for name, x in made.items() if name not in self.shapes}
        self.fixed = torch.nn.ParameterDict(fixed)

    def forward(self, x: Tensor) -> Tensor:
        def made(name: str) -> Tensor:
            if name in self.fixed:
                return self.fixed[name]
            y = self.project[name](x).unflatten(-1, self.shapes[name])
            return -torch.nn.functional.softplus(y) if name in ("g", "w") else y.sigmoid() if name == "dt" else y

        o, _ = self.attend(*(made(one.name) for one in self.attend.spec.inputs), **self.scalars)
        return x + o.flatten(-2)


def model_of(*ops: Op) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(*(Layer(op) for op in ops))


def gradients(run: Callable[[Tensor], Tensor], model: torch.nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad(set_to_none=True)
    run(x).float().square().mean().backward()
    return [parameter.grad for parameter in model.parameters()]


# --- activation checkpointing


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not"])
@pytest.mark.parametrize("name", ["gla", "rwkv6", "linear", "gateloop", "transnormer", "mine"])
def test_checkpointing(name, reentrant):
    op, spy = spied(mine if name == "mine" else specs.get(name))
    model = model_of(op, op)
    x = torch.randn(2, 37, 8, requires_grad=True)
    want = gradients(model, model, x)
    assert spy.calls.count("forward") == 2
    spy.calls.clear()
    got = gradients(lambda x: checkpoint(model, x, use_reentrant=reentrant), model, x)
    assert (spy.calls.count("forward"), spy.calls.count("backward")) == (4, 2)  # each forward twice
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    got = gradients(lambda x: checkpoint_sequential(model, 2, x, use_reentrant=reentrant), model, x)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_a_checkpoint_keeps_nothing_of_the_op():
    model = model_of(op_of("gla"))
    x = torch.randn(2, 37, 8, requires_grad=True)
    kept: list[Tensor] = []

    def keep(y: Tensor) -> Tensor:
        kept.append(y)
        return y

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda y: y):
        model(x)
        plain = sum(y.numel() for y in kept)
        kept.clear()
        checkpoint(model, x, use_reentrant=False)
        assert sum(y.numel() for y in kept) < plain / 4


def test_the_operator_may_be_what_a_checkpoint_saves():
    """Selective checkpointing, by the operators: the op's forward runs once, all around it twice."""
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    op, spy = spied(specs.get("gla"))
    model = model_of(op)
    x = torch.randn(2, 37, 8, requires_grad=True)
    want = gradients(model, model, x)
    spy.calls.clear()

    def policy(ctx: Any, func: Any, *_: Any, **__: Any) -> Any:
        return CheckpointPolicy.MUST_SAVE if func.namespace == "flagen" else CheckpointPolicy.PREFER_RECOMPUTE

    def run(x: Tensor) -> Tensor:
        contexts = lambda: create_selective_checkpoint_contexts(policy)  # noqa: E731
        return checkpoint(model, x, use_reentrant=False, context_fn=contexts)

    torch.testing.assert_close(gradients(run, model, x), want, rtol=0, atol=0)
    assert spy.calls == ["forward", "backward"]


# --- autocast


@EVERY
def test_autocast_casts_what_is_neither_gate_nor_state(name):
    spec = specs.get(name)
    op, spy = spied(spec)
    gates = {one for role, expr in spec.roles if role in ("log_decay", "phase", "bonus") for one in expr.inputs}
    # the numbers per token of an erase
    gates |= {one for role, expr in spec.roles if "erase" in role for one in expr.inputs if "k" not in one.axes}
    gates |= set() if spec.stabilize is None else set(gated(spec.key).gate.inputs)
    x = list(make_inputs(spec, B=1, T=20, H=2, K=4, V=4).values())
    state, scalars = make_state(spec, N=1, H=2, K=4, V=4), make_scalars(spec)
    parts = (state,) if isinstance(state, Tensor) else state
    with torch.autocast("cpu", torch.bfloat16):
        o, final = op(*x, **scalars, initial_state=state, output_final_state=True)
    want = [torch.float32 if one in gates else torch.bfloat16 for one in spec.inputs]
    assert spy.inputs == [(*want, *(y.dtype for y in parts))]
    assert o.dtype == want[spec.inputs.index(spec.value.inputs[0])]
    assert [y.dtype for y in ((final,) if isinstance(final, Tensor) else final)] == [y.dtype for y in parts]


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not"])
def test_autocast_with_a_checkpoint(reentrant):
    model = model_of(op_of("gla"), op_of(mine))
    x = torch.randn(2, 37, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        want = gradients(model, model, x)
        got = gradients(lambda x: checkpoint(model, x, use_reentrant=reentrant), model, x)
    assert {y.dtype for y in want} == {torch.float32}
    torch.testing.assert_close(got, want, rtol=0, atol=0)


# --- modules


def test_a_module_with_an_op_has_no_parameters_for_it():
    model = model_of(op_of("gla"), op_of(mine))
    assert not [name for name in model.state_dict() if "attend" in name]
    other = model_of(op_of("gla"), op_of(mine))
    assert not other.load_state_dict(model.state_dict()).missing_keys
    assert copy.deepcopy(model)[0].attend is model[0].attend


@pytest.mark.parametrize(
    "move",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.double(),
        lambda m: m.to("meta"),
        lambda m: m.to_empty(device="cpu"),
        lambda m: m.eval().requires_grad_(False),
        lambda m: m.share_memory(),
    ],
    ids=["bfloat16", "double", "meta", "empty", "frozen", "shared"],
)
def test_a_module_that_is_moved_keeps_its_op(move):
    model = model_of(op_of("gla"), op_of(mine))
    moved = move(copy.deepcopy(model))
    assert [layer.attend for layer in moved] == [layer.attend for layer in model]
    weight = moved[0].project["q"].weight
    x = torch.randn(2, 5, 8, dtype=weight.dtype).to(weight.device)
    o = moved(x)
    assert (o.shape, o.dtype, o.device) == (x.shape, x.dtype, x.device)


def test_modes():
    model, x = model_of(op_of("gla"), op_of(mine)), torch.randn(2, 37, 8)
    want = model(x)
    with torch.no_grad():
        o = model(x)
        assert torch.equal(o, want)
        assert not o.requires_grad
        with torch.enable_grad():
            assert model(x).requires_grad
    with torch.inference_mode():
        o = model(x)
        assert torch.equal(o, want)
        assert o.is_inference()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), want.detach())
    assert gradients(model, model, x)[0].any()  # nothing of the inference is left in the op


# --- pickle


FRESH = """
    import pickle, sys
    import torch
    import flagen
    from flagen import Input, Scalar, Spec, logsigmoid, sigmoid, v

    gla, mine = pickle.load(open(sys.argv[1], "rb"))
    gate = Input("gate", "b t h")
    spec = Spec("mine", value=v * sigmoid(gate), log_decay=logsigmoid(gate) * Scalar("rate"))
    assert gla is flagen.compile("gla", chunk_size=16, backend="torch")
    assert mine is flagen.compile(spec, chunk_size=16, backend="torch")
    assert mine.spec == spec
    assert gla is not flagen.compile("gla", backend="torch")
    x, want = torch.load(sys.argv[2])
    assert torch.equal(gla(*x)[0], want)
    print("right")
"""


def test_ops_are_unpickled_in_a_fresh_process(tmp_path):
    gla, own = op_of("gla"), op_of(mine)
    (tmp_path / "ops.pickle").write_bytes(pickle.dumps((gla, own)))
    x = list(make_inputs(gla.spec, B=1, T=20, H=2, K=4, V=3).values())
    torch.save((x, gla(*x)[0]), tmp_path / "values.pt")
    command = [sys.executable, "-c", textwrap.dedent(FRESH), str(tmp_path / "ops.pickle"), str(tmp_path / "values.pt")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout.strip()) == (0, "right"), run.stderr


def test_a_module_is_saved_and_loaded_whole():
    model, x = model_of(op_of("gla"), op_of(mine)), torch.randn(2, 5, 8)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert loaded[1].attend is model[1].attend
    assert torch.equal(loaded(x), model(x))


def test_pickles_hold_no_code():
    """A pickle of an op is the name of a function of flagen's and the spec as JSON."""
    import pickletools

    names = [
        argument
        for opcode, argument, _ in pickletools.genops(pickle.dumps(op_of(mine), protocol=0))
        if opcode.name == "GLOBAL"
    ]
    assert names == ["flagen.compiler _again"]


# --- torch.compile around modules


def test_two_specs_in_a_module_are_one_graph():
    model, x = model_of(op_of("gla"), op_of(mine), op_of("gla")), torch.randn(2, 37, 8)
    found = torch._dynamo.explain(model)(x)
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons
    called = {str(node.target) for node in found.graphs[0].graph.nodes if "flagen" in str(node.target)}
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled, model, x), gradients(model, model, x))
    torch._dynamo.reset()
    assert len(called) <= 2


def test_a_compiled_module_with_checkpoints():
    model, x = model_of(op_of("gla"), op_of(mine)), torch.randn(2, 37, 8, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        for layer in model:
            x = checkpoint(layer, x, use_reentrant=False)
        return x

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled, model, x), gradients(run, model, x))
    torch._dynamo.reset()


# --- CUDA graphs


@GPU
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("name", ["gla", "rwkv6", "linear", "gateloop", "transnormer", "based"])
def test_a_cuda_graph_of_a_training_step(name, packed):
    """Captured once, replayed on other values: also with other bounds of the sequences."""
    op = flagen.compile(name)
    scalars, N = make_scalars(op.spec), 3 if packed else 1
    sizes = {"B": 1, "T": 300, "H": 2, "K": 16, "V": 32, "N": N}

    def made(seed: int) -> list[Tensor]:
        return [x.cuda() for x in make_inputs(op.spec, seed=seed, **sizes).values()]

    x = [y.requires_grad_() for y in made(0)]
    bounds = torch.tensor([0, 100, 100, 300], dtype=torch.int32, device="cuda") if packed else None

    def run() -> list[Tensor]:
        o, final = op(*x, **scalars, output_final_state=True, cu_seqlens=bounds)
        parts = (final,) if isinstance(final, Tensor) else final
        loss = o.square().sum() + sum(y.abs().square().sum() for y in parts)
        return [o, *parts, *torch.autograd.grad(loss, x)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # kernels are compiled and constants made before the capture
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for seed, spans in ((1, [0, 1, 150, 299]), (2, [0, 0, 300, 300])):
        with torch.no_grad():
            for y, new in zip(x, made(seed), strict=True):
                y.copy_(new)
        if packed:
            bounds.copy_(torch.tensor(spans, dtype=torch.int32))
        graph.replay()
        torch.cuda.synchronize()
        torch.testing.assert_close(captured, run(), rtol=0, atol=0)


@GPU
@pytest.mark.parametrize("name", ["gla", "linear", "gateloop"])
def test_a_cuda_graph_of_decode(name):
    op = flagen.compile(name)
    x = [y.cuda() for y in make_inputs(op.spec, B=4, T=1, H=2, K=16, V=32).values()]
    state = make_state(op.spec, N=4, H=2, K=16, V=32)
    state = state.cuda() if isinstance(state, Tensor) else tuple(y.cuda() for y in state)
    parts = (state,) if isinstance(state, Tensor) else state
    start = [y.clone() for y in parts]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        op.step(*x, state=state)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = op.step(*x, state=state)
    for y, begun in zip(parts, start, strict=True):
        y.copy_(begun)
    for _ in range(5):
        graph.replay()
    got = [o.clone(), *(y.clone() for y in parts)]
    for y, begun in zip(parts, start, strict=True):
        y.copy_(begun)
    for _ in range(5):
        want = op.step(*x, state=state)
    torch.testing.assert_close(got, [want, *parts], rtol=0, atol=0)


def test_constants_are_made_where_no_graph_takes_their_memory(monkeypatch):
    """They outlive the graph that is being made at the first call, whose thread allocates from the graph's memory."""
    op = flagen.compile(specs.get("retnet").replace("own_constants"), backend="torch")
    made, tensor = [], torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda *a, **how: made.append(threading.get_ident()) or tensor(*a, **how))
    x = make_inputs(op.spec, B=1, T=4, H=2, K=4, V=4).values()
    with torch.inference_mode():
        op(*x)
    assert made and threading.get_ident() not in made
    count = len(made)
    op(*[y.requires_grad_() for y in x])[0].sum().backward()  # those of inference mode could not be saved
    assert len(made) == count


@GPU
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_module_on_a_gpu(mode):
    model, x = model_of(op_of("gla", "cuda"), op_of(mine, "cuda")).cuda(), torch.randn(2, 37, 8, device="cuda")
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        got = [y.clone() for y in gradients(compiled, model, x)]
    torch.testing.assert_close(got, gradients(model, model, x))


@GPU
def test_a_module_moves_from_the_cpu_to_a_gpu():
    """With backend="auto" one op runs PyTorch for CPU tensors and Triton for CUDA ones."""
    model = model_of(flagen.compile("gla"), flagen.compile(mine))
    x = torch.randn(2, 37, 8)
    want = [y.clone() for y in gradients(model, model, x)]  # those themselves move with the model
    op = model[0].attend
    model.cuda()
    assert model[0].attend is op
    got = gradients(model, model, x.cuda())
    torch.testing.assert_close([y.cpu() for y in got], want, rtol=1e-3, atol=1e-5)

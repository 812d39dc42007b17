"""One op used from several threads at once: compiled, first called, differentiated and stepped in a race."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import flagen
from flagen import Input, Scalar, Spec, compiler, logsigmoid, specs
from flagen.analysis import analyse
from flagen.op import Op
from flagen.testing import make_inputs, make_scalars, make_state
from flagen.torch_backend import TorchBackend

THREADS = 8
SIZES = {"B": 1, "T": 37, "H": 2, "K": 6, "V": 5}
gate = Input("gate", "b t h")


def at_once(run: Callable[[int], Any], threads: int = THREADS) -> list[Any]:
    """run(0), run(1), ..., each in a thread of its own, begun together; an exception in one is raised here."""
    start = threading.Barrier(threads, timeout=60)

    def begun(i: int) -> Any:
        start.wait()
        return run(i)

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(begun, range(threads), timeout=120))


def results(op: Op, x: list[Tensor], state: Any, scalars: dict[str, float]) -> list[Tensor]:
    """Of a call, of its gradients and of a step."""
    leaves = [y.clone().requires_grad_() for y in x]
    o, final = op(*leaves, **scalars, initial_state=state, output_final_state=True)
    parts = final if isinstance(final, tuple) else (final,)
    grads = torch.autograd.grad(o.square().sum() + sum(y.abs().square().sum() for y in parts), leaves)
    written = tuple(y.detach().clone() for y in parts)
    now = [y[:, :1] if "t" in one.axes else y for y, one in zip(x, op.spec.inputs, strict=True)]
    step = op.step(*now, **scalars, state=written if op.spec.normalizer is not None else written[0])
    return [o, *parts, *grads, step, *written]


def inputs(op: Op, seed: int = 0) -> list[Tensor]:
    return list(make_inputs(op.spec, **SIZES, seed=seed).values())


def state_of(op: Op) -> Any:
    return make_state(op.spec, N=1, H=2, K=6, V=5)


@pytest.mark.parametrize("name", ["gla", "linear", "gateloop", "transnormer"])
def test_a_race_of_first_calls(name, monkeypatch):
    spec = specs.get(name)
    monkeypatch.setattr(compiler, "_ops", {})
    made = at_once(lambda i: flagen.compile(name, chunk_size=16, backend="torch"))
    assert len({id(op) for op in made}) == 1
    op = made[0]
    x, state, scalars = inputs(op), state_of(op), make_scalars(spec)
    found = at_once(lambda i: results(op, x, state, scalars))
    want = results(op, x, state, scalars)
    for one in found:
        torch.testing.assert_close(one, want, rtol=0, atol=0)


def test_a_spec_compiled_by_several_threads_is_one_op():
    spec = Spec("raced", log_decay=logsigmoid(gate) * Scalar("rate"))
    made = at_once(lambda i: flagen.compile(Spec("raced", log_decay=logsigmoid(gate) * Scalar("rate"))))
    assert len({id(op) for op in made}) == 1
    assert flagen.compile(spec) is made[0]


def test_different_specs_compiled_at_once():
    made = at_once(
        lambda i: flagen.compile(Spec(f"at_once_{i}", log_decay=logsigmoid(gate) / (i + 1)), backend="torch")
    )
    assert [op.spec.name for op in made] == [f"at_once_{i}" for i in range(THREADS)]
    for i, op in enumerate(made):
        x = inputs(op)
        torch.testing.assert_close(op(*x)[0], op.reference(*x)[0], atol=2e-5, rtol=2e-5)
        assert flagen.compile(op.spec, backend="torch") is made[i]


def test_a_backend_is_made_once():
    analysis = analyse(specs.get("gla"))
    made = []

    def slowly() -> TorchBackend:
        made.append(threading.get_ident())
        time.sleep(0.2)  # all others come meanwhile
        return TorchBackend(analysis, 16)

    op = Op(
        spec=analysis.spec,
        analysis=analysis,
        plan=None,
        backend="torch",
        torch_backend=slowly,
        triton_backend=slowly,
        source="",
        path=None,
    )
    x = inputs(op)
    found = at_once(lambda i: op(*x)[0])
    assert len(made) == 1
    assert all(torch.equal(o, found[0]) for o in found)


def test_scalars_of_one_thread_are_not_anothers(monkeypatch):
    """With few constants kept, so that threads drop each other's while they are in use."""
    monkeypatch.setattr("flagen.op_library.MAX_CONSTANTS", 2)
    monkeypatch.setattr("flagen.op.MAX_PASSED", 2)
    op = flagen.compile("transnormer", chunk_size=16, backend="torch")
    x = [list(make_inputs(op.spec, **(SIZES | {"T": 3 + i})).values()) for i in range(THREADS)]
    want = [op(*x[i], layer=i, layers=THREADS + 1)[0] for i in range(THREADS)]
    for i, o in enumerate(want):
        torch.testing.assert_close(o, op.reference(*x[i], layer=i, layers=THREADS + 1)[0], atol=2e-5, rtol=2e-5)

    def run(i: int) -> bool:
        return all(torch.equal(op(*x[i], layer=i, layers=THREADS + 1)[0], want[i]) for _ in range(40))

    assert at_once(run) == [True] * THREADS


def test_modes_of_one_thread_are_not_anothers():
    op = flagen.compile("gla", chunk_size=16, backend="torch")
    x = [y.requires_grad_() for y in inputs(op)]
    want = op(*x)[0].detach()
    narrow = op(*(y.bfloat16() for y in x[:3]), x[3])[0].detach()

    def run(i: int) -> bool:
        for _ in range(10):
            if i % 4 == 0:
                with torch.no_grad():
                    o = op(*x)[0]
                right = torch.equal(o, want) and not o.requires_grad
            elif i % 4 == 1:
                with torch.autocast("cpu", torch.bfloat16):
                    o = op(*x)[0]
                right = torch.equal(o, narrow) and o.requires_grad
            elif i % 4 == 2:
                with torch.inference_mode():
                    o = op(*x)[0]
                right = torch.equal(o, want) and o.is_inference()
            else:
                o = op(*x)[0]
                right = torch.equal(o, want) and torch.autograd.grad(o.sum(), x)[0].any()
            if not right:
                return False
        return True

    assert at_once(run) == [True] * THREADS


def test_a_compiled_graph_is_called_by_several_threads():
    op = flagen.compile("gla", chunk_size=16, backend="torch")
    x = [inputs(op, seed) for seed in range(4)]
    want = [op(*y)[0] for y in x]
    run = torch.compile(lambda *y: op(*y)[0], fullgraph=True, backend="aot_eager")
    found = at_once(lambda i: run(*x[i]), threads=4)
    torch.testing.assert_close(found, want)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gla", "linear", "gateloop"])
def test_threads_with_streams_of_their_own(name):
    op = flagen.compile(name)
    x = [[y.cuda() for y in inputs(op, seed)] for seed in range(4)]
    state = state_of(op)
    state = tuple(y.cuda() for y in state) if isinstance(state, tuple) else state.cuda()
    want = [results(op, y, state, {}) for y in x]
    torch.cuda.synchronize()

    def run(i: int) -> list[Tensor]:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(5):
                found = results(op, x[i], state, {})
            torch.cuda.current_stream().synchronize()
            return found

    for got, one in zip(at_once(run, threads=4), want, strict=True):
        torch.testing.assert_close(got, one, rtol=0, atol=0)

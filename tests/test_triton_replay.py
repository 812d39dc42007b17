"""Launches that are repeated from a record: the same kernels, arguments and flow of data as the launcher's own.

There is no GPU here: kernels are compiled, and what a launch was given is noted (fake_driver)."""

from __future__ import annotations

import dataclasses
import functools
import gc
import threading
import weakref
from concurrent.futures import Future
from types import ModuleType, SimpleNamespace

import fake_driver
import pytest
import torch
import triton
from fake_driver import Calls, fake_gpu, stream_beside

from flagen import triton_ahead, triton_replay
from flagen.triton_replay import SEEN, UNFIT, Program, Replay

pytestmark = pytest.mark.skipif(not isinstance(triton.language.cdiv, triton.JITFunction), reason="interpreted")
NAMES = ("retnet", "mamba2", "linear", "gla", "mlstm")


def module_of() -> ModuleType:
    module = ModuleType("module")
    module.torch = torch
    return module


@pytest.fixture(scope="module")
def memory():
    with fake_gpu() as memory:
        yield memory


@pytest.fixture(scope="module")
def retnet():
    return Calls("retnet")


def test_nothing_is_recorded_while_a_graph_is_captured(memory, monkeypatch):
    """On a GPU a call that was recorded while torch.compile captured it ended in an error."""
    calls = Calls("retnet")
    with monkeypatch.context() as patch:
        patch.setattr(triton_replay, "captured", lambda tensors: True)
        first, *others = (calls.forward(memory, calls.inputs)[:2] for _ in range(3))
        assert first[0] and others == [first, first] and calls.programs() == []
    calls.forward(memory, calls.inputs)
    assert len(calls.programs()) == 1


def test_a_recording_holds_no_tensor_when_it_is_over(memory, monkeypatch):
    """Without waiting for the garbage collector: a graph's memory pool counts what is alive."""
    found = []

    class Watched(triton_replay.Recording):
        def _add(self, *given):
            value = super()._add(*given)
            found.append(weakref.ref(value))
            return value

    monkeypatch.setattr(triton_replay, "Recording", Watched)
    calls = Calls("gla")
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            _, _, out = calls.forward(memory, calls.inputs)
            calls.backward(memory, calls.inputs, out)
        assert len(calls.programs()) == 2 and len(found) > 20
        assert {one() for one in found} == {None}
    finally:
        gc.enable()


def test_a_capture_is_seen_on_a_gpu(monkeypatch):
    on_gpu = SimpleNamespace(is_cuda=True)
    for capturing in (True, False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        assert triton_replay.captured([None, on_gpu]) is capturing
        assert not triton_replay.captured([None, torch.ones(1)])


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("name", NAMES)
def test_a_record_does_what_the_launcher_does(name, packed, memory):
    calls = Calls(name)
    bounds = torch.tensor([0, 100, 600], dtype=torch.int32) if packed else None
    for initial in ((), calls.states(2 if packed else 1)):
        forward = functools.partial(calls.forward, memory, calls.inputs, initial, bounds)
        (first, recorded, again), _ = calls.thrice(memory, forward)
        assert first[:2] == recorded[:2] == again[:2]
        assert len(first[0]) > 1 and None not in first[1]
        for x, y in zip((first[2].o, *first[2].final, *first[2].saved),
                        (again[2].o, *again[2].final, *again[2].saved), strict=True):  # fmt: skip
            assert (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)
            assert x.data_ptr() != y.data_ptr()
        given = first[2]
        backward = functools.partial(calls.backward, memory, calls.inputs, given, initial, bounds)
        (first, recorded, again), _ = calls.thrice(memory, backward)
        assert first[::2] == recorded[::2] == again[::2]
        assert calls.without_torch(first[1]) == calls.without_torch(recorded[1]) == calls.without_torch(again[1])
        assert sum(one is not None for one in calls.without_torch(again[1])) > 1
    assert len(calls.programs()) == 4


def test_streams_beside_the_current_one_are_so_in_a_record(memory, monkeypatch):
    calls = Calls("mamba2")
    stream_beside(calls, memory, monkeypatch)
    decided = calls.backend.schedule
    monkeypatch.setattr(calls.backend, "schedule", lambda *given: dataclasses.replace(decided(*given), bwd_L=0))
    given = calls.forward(memory, calls.inputs)[2]
    seen, backward = [], functools.partial(calls.backward, memory, calls.inputs, given)
    for _ in range(3):
        backward()
        named = {fake_driver.STREAM: "main"}
        steps = []
        for kernel, *rest in memory.launches:
            streams = rest if kernel == "wait" else rest[4:5]
            for one in streams:
                named.setdefault(one, f"side {len(named)}")
            steps.append(
                (kernel.split()[0].removeprefix("mamba2_").removesuffix("_kernel"), *(named[x] for x in streams))
            )
        seen.append(steps)
    assert seen[0] == seen[1] == seen[2]
    assert seen[0] == [
        ("gsum", "main"), ("wait", "side 1", "main"), ("wait", "side 2", "main"), ("dk", "main"), ("dv", "side 1"),
        ("dq", "side 2"), ("wait", "main", "side 1"), ("wait", "main", "side 2"), ("dg", "main"),
    ]  # fmt: skip


def test_steps_are_in_place(memory):
    calls = Calls("mamba2")
    inputs = tuple(x[:, :1] if x.dim() > 1 else x for x in calls.inputs)
    seen = []
    for layout in (lambda x: x, lambda x: x.transpose(2, 3).contiguous().transpose(2, 3)):
        for _ in range(3):
            state = tuple(map(layout, calls.states(1)))
            memory.launches.clear()
            memory.define((*inputs, *calls.constants, *state))
            o = calls.backend.step(inputs, calls.constants, 0.5, state)
            seen.append(([one[:4] for one in memory.launches], memory.at[o.data_ptr()]))
            if layout(o) is o:
                assert memory.at[state[0].data_ptr()] != 1 + len(inputs) + len(calls.constants)
    assert seen[0] == seen[1] == seen[2]
    assert seen[3][0] == seen[4][0] == seen[5][0]
    assert len(calls.programs()) == 2


def test_addresses_that_are_aligned_otherwise_are_another_form(memory, retnet):
    q, k, v = retnet.inputs
    odd = torch.empty(k.numel() + 1, dtype=k.dtype)[1:].view(k.shape)
    expected = Calls("retnet").forward(memory, (q, odd, v))
    aligned = [retnet.forward(memory, (q, k, v)) for _ in range(3)][-1]
    assert retnet.forward(memory, (q, odd, v))[:2] == expected[:2] != aligned[:2]


def test_a_tensor_that_is_given_twice_is_not_the_form_of_two(memory):
    calls = Calls("retnet")
    q, k, v = calls.inputs
    expected = calls.forward(memory, (q, k, v))
    calls.backend._replay._forms.clear()
    for _ in range(3):
        calls.forward(memory, (q, q, q))
    assert len(calls.programs()) == 1
    assert calls.forward(memory, (q, k, v))[:2] == expected[:2]


def test_parts_of_one_tensor(memory):
    calls = Calls("retnet")
    together = torch.zeros(*calls.inputs[0].shape[:3], 48, dtype=torch.bfloat16)
    apart = tuple(x.detach().clone() for x in together.split(16, -1))
    expected = [memory.at.get(0), *calls.forward(memory, tuple(together.split(16, -1)))[:2]][1:]
    for _ in range(2):
        found = calls.forward(memory, tuple(together.split(16, -1)))[:2]
        assert list(found) == expected
    assert calls.forward(memory, apart)[1] != []
    assert calls.programs()


def test_hooks_see_every_launch(memory, retnet):
    for _ in range(3):
        retnet.forward(memory, retnet.inputs)
    used = []
    for one in retnet.programs():
        one.__dict__["_act"] = lambda tensors, one=one: used.append(one) or Program._act(one, tensors)
    retnet.forward(memory, retnet.inputs)
    assert used
    used.clear()
    hook = triton.knobs.runtime.launch_enter_hook
    hook.add(print)
    try:
        retnet.forward(memory, retnet.inputs)
    finally:
        hook.remove(print)
    assert not used


@pytest.mark.parametrize(
    "read", [lambda x: x.sum().item(), lambda x: x.nonzero().sum() * x[0]], ids=["item", "nonzero"]
)
def test_what_cannot_be_recorded_runs_as_it_is(read):
    module = module_of()
    module.fwd = lambda x: x + read(x)
    replay = Replay(module)
    replay.records = True
    for n in range(4):
        x = torch.full((3,), float(n))
        (found,) = replay("key", (x,), lambda launchers, x: (launchers.fwd(*x),))
        assert found.tolist() == [4.0 * n] * 3
    assert list(replay._forms.values()) == [UNFIT]


def test_operators_of_torch_are_repeated():
    """Views, results, what is written in place, constants from before, and an input that comes back."""
    module, weight = module_of(), torch.arange(4.0)

    def fwd(x, y):
        made = torch.zeros(4)
        made.copy_(x.view(2, 2).t().reshape(4))
        return made[1:3], made * weight, y, torch.cat([x, y])

    module.fwd = fwd
    replay = Replay(module)
    replay.records = True
    for n in range(4):
        x, y = torch.arange(4.0) + n, torch.full((2,), float(n), requires_grad=True)
        found = replay("key", (x, y), lambda launchers, x: launchers.fwd(*x))
        expected = fwd(x, y.detach())
        assert found[2] is y
        for mine, other in zip(found, expected, strict=True):
            assert mine.tolist() == other.tolist()
            assert mine is y or not mine.requires_grad
        assert isinstance(replay._forms[next(iter(replay._forms))], Program) == (n > 0)


def test_forms_are_forgotten_when_there_are_too_many(monkeypatch):
    monkeypatch.setattr(triton_replay, "MAX_FORMS", 4)
    module = module_of()
    module.fwd = lambda x: x + 1
    replay = Replay(module)
    replay.records = True
    for n in range(9):
        assert replay(n, (torch.ones(1),), lambda launchers, x: (launchers.fwd(*x),))[0].item() == 2
    assert list(replay._forms.values()) == [SEEN]


class AtOnce:
    """Does what it is given when it is given it."""

    def __init__(self, workers: int, thread_name_prefix: str) -> None:
        pass

    def submit(self, function, *arguments):
        future = Future()
        future.set_result(function(*arguments))
        return future

    def shutdown(self, wait: bool) -> None:
        pass


def compiled_by(calls: Calls, memory) -> tuple[list[str], list[str], list[tuple]]:
    """The threads that compiled kernels when a training step began, those of the step itself, and what it launched."""
    backend, threads = calls.backend, []
    before = triton.knobs.compilation.listener
    triton.knobs.compilation.listener = lambda **_: threads.append(threading.current_thread().name)
    for kernel in (one for key, one in vars(backend.module).items() if key.endswith("_kernel")):
        kernel.device_caches.clear()
    try:
        plan = backend.schedule(calls.inputs, backend._sizes(calls.inputs, None))
        for _ in range(2):
            backend._begin(plan, calls.inputs, calls.constants, 0.5, (), None, False)
        backend._ahead.wait()
        first = len(threads)
        given = calls.forward(memory, calls.inputs)
        launches = [*given[0], *calls.backward(memory, calls.inputs, given[2])[0]]
    finally:
        triton.knobs.compilation.listener = before
    return threads[:first], threads[first:], [(function, packed) for function, packed, *_ in launches]


@pytest.mark.parametrize("name", ["mamba2", "linear"])
def test_all_of_a_training_step_is_known_ahead(name, memory, monkeypatch):
    """One after the other and in this thread, so that nothing but a wrong guess leaves a kernel to the step."""
    monkeypatch.setattr(triton_ahead.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(triton_ahead, "ThreadPoolExecutor", AtOnce)
    ahead, later, launches = compiled_by(Calls(name), memory)
    # a kernel that forward and backward launch in the same form is compiled once
    assert 5 < len(ahead) == len(set(launches)) and later == []


def test_a_training_step_is_compiled_by_threads(memory, monkeypatch, caplog):
    """What one of them could not compile is said, and compiled where it is launched."""
    monkeypatch.setattr(triton_ahead.os, "cpu_count", lambda: 2)
    caplog.set_level("DEBUG", logger="flagen.code")
    ahead, later, launches = compiled_by(Calls("linear"), memory)
    assert len(ahead) > 3 and all(one.startswith("flagen-compile") for one in ahead)
    # what forward and backward launch in the same form is compiled once, or by two threads at once
    assert len(set(launches)) <= len(ahead) + len(later) <= len(launches)
    failed = [one for one in caplog.messages if one.startswith("not compiled ahead")]
    assert len(later) <= len(failed), failed


def test_what_is_not_compiled_ahead_is_said(memory, monkeypatch, caplog):
    """And costs nothing: the step compiles it."""
    calls = Calls("retnet")
    kernel = calls.backend.module.retnet_dq_kernel
    monkeypatch.setattr(triton_ahead.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(kernel, "warmup", lambda *args, **named: 1 / 0)
    caplog.set_level("DEBUG", logger="flagen.code")
    _, later, _ = compiled_by(calls, memory)
    assert later and "not compiled ahead: retnet_dq_kernel: ZeroDivisionError: division by zero" in caplog.messages

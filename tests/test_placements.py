"""Where a replay puts what a call allocates for itself: no two that are there at the same time share bytes, and no
more is taken than what is there at once."""

from __future__ import annotations

import functools
import random
from types import SimpleNamespace

import pytest
import torch
import triton
from fake_driver import Calls, fake_gpu, stream_beside, uncompiled
from triton.runtime.jit import JITFunction

from flagen import cost_launch, specs, triton_record
from flagen.compiler import prepare
from flagen.cost import MACHINES, meta_inputs
from flagen.load import load
from flagen.schedule import Shape
from flagen.triton_record import Recording, Value
from flagen.triton_replay import ALIGNMENT, placements

pytestmark = pytest.mark.skipif(not isinstance(triton.language.cdiv, triton.JITFunction), reason="interpreted")
NAMES = specs.names()
FORKING = ("retnet", "transnormer", "mamba2", "linear", "mlstm")


def empty(size: int) -> Value:
    return Value(torch.empty(size, dtype=torch.uint8), "empty")


def launch(*values: Value) -> tuple:
    return "launch", None, (1, 1, 1), [1.0, *values, None], 0


def spans(steps, needed=()) -> tuple[list[tuple[int, int] | None], int]:
    """Of what is allocated, one after the other: where it begins and ends."""
    placed, total = placements(steps, set(map(id, needed)))
    made = [step[1] for step in steps if step[0] == "empty"]
    assert set(placed) <= set(map(id, made))
    found = [(placed[id(x)], placed[id(x)] + x.tensor.numel()) if id(x) in placed else None for x in made]
    assert all(one is None or (one[0] % ALIGNMENT == 0 and one[1] <= total) for one in found)
    return found, total


def apart(a, b) -> bool:
    return a[1] <= b[0] or b[1] <= a[0]


def test_what_is_over_makes_room():
    a, b, c = map(empty, (1000, 600, 900))
    steps = [("empty", x) for x in (a, b, c)] + [launch(a), launch(a, b), launch(b, c), launch(c)]
    (at_a, at_b, at_c), total = spans(steps)
    assert apart(at_a, at_b) and apart(at_b, at_c) and at_a[0] == at_c[0] == 0 and total == 2048


def test_a_view_is_of_what_it_shows():
    whole, other = empty(2048), empty(2048)
    part = Value(whole.tensor[1024:], "view", whole)
    steps = [("empty", whole), launch(whole), ("empty", other), launch(other), launch(part)]
    assert apart(*spans(steps)[0])


def test_what_must_be_a_tensor_has_no_place():
    a, b, unused = empty(512), empty(512), empty(512)
    given, made = Value(torch.empty(512), "input"), Value(torch.zeros(512), "result")
    steps = [("empty", a), ("empty", b), ("empty", unused), launch(a, b, given, made)]
    assert spans(steps, [a]) == ([None, (0, 512), None], 512)
    assert spans(steps[2:3]) == ([None], 0)


@pytest.mark.parametrize("end", ["join", "never"])
def test_streams_beside_each_other_share_nothing(end):
    """What launches between fork and join have is there until the join, whatever their order."""
    before, one, two, three, after = map(empty, [512] * 5)
    steps = [("empty", x) for x in (before, one, two, three, after)]
    steps += [launch(before), ("fork", None), launch(one), launch(two), launch(three)]
    steps += [("join", None)] * (end == "join") + [launch(after)]
    (at, *among, last), total = spans(steps)
    assert all(apart(x, y) for x in among for y in among if x is not y)
    assert any(at == x for x in among)
    assert total == 512 * (3 if end == "join" else 4) and any(last == x for x in among) == (end == "join")


@pytest.mark.parametrize("seed", range(100))
def test_sequences_at_random(seed):
    """Against a simulation in which a launch marks what it uses, byte by byte."""
    draw = random.Random(seed)
    values = [empty(draw.choice((0, 1, 511, 512, 513, draw.randint(1, 9000)))) for _ in range(draw.randint(1, 30))]
    made, steps, beside = [], [], False
    for _ in range(draw.randint(1, 120)):
        what = draw.choice(("empty", "launch", "launch", "launch", "stream"))
        if what == "empty" and len(made) < len(values):
            steps.append(("empty", values[len(made)]))
            made.append(values[len(made)])
        elif what == "stream" and draw.random() < 0.4:
            steps.append(("join" if beside else "fork", None))
            beside = not beside
        elif made:
            steps.append(launch(*draw.sample(made, min(len(made), draw.randint(1, 3)))))
    needed = [x for x in made if draw.random() < 0.2]
    found, total = spans(steps, needed)
    at = {id(x): span for x, span in zip(made, found, strict=True)}
    runs, beside = [], False  # what is launched at once
    for kind, *rest in steps:
        if kind == "launch" and beside:
            runs[-1].update(id(x) for x in rest[2] if isinstance(x, Value))
        elif kind == "launch":
            runs.append({id(x) for x in rest[2] if isinstance(x, Value)})
        elif kind == "fork":
            beside = True
            runs.append(set())
        elif kind == "join":
            beside = False
    users = {x: [i for i, run in enumerate(runs) if x in run] for x in at}
    alive = [{x for x, used in users.items() if used and used[0] <= i <= used[-1] and at[x]} for i in range(len(runs))]
    for here in alive:
        for x in here:
            assert all(apart(at[x], at[y]) or at[x][0] == at[x][1] for y in here if y != x)
    assert all((at[id(x)] is None) == (x in needed or not users[id(x)]) for x in made)
    sizes = {id(x): -(-x.tensor.numel() // ALIGNMENT) * ALIGNMENT for x in made}
    assert max((sum(sizes[x] for x in here) for here in alive), default=0) <= total <= sum(sizes.values())


@pytest.fixture(scope="module")
def memory():
    with fake_gpu() as memory, uncompiled(memory):
        yield memory


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("name", NAMES)
def test_a_replay_has_apart_what_is_there_at_once(name, packed, memory):
    """Forward with and without what a backward reads, and backward."""
    calls = Calls(name)
    assert hasattr(calls.backend.module, "fork") == (name in FORKING)
    bounds = torch.tensor([0, 100, 600], dtype=torch.int32) if packed else None
    common = 0
    for save in (False, True):
        forward = functools.partial(calls.forward, memory, calls.inputs, (), bounds, save)
        (first, recorded, again), found = calls.thrice(memory, forward)
        assert first[:2] == recorded[:2] == again[:2]
        common += found
    backward = functools.partial(calls.backward, memory, calls.inputs, first[2], (), bounds)
    (first, recorded, again), found = calls.thrice(memory, backward)
    assert first[::2] == recorded[::2] == again[::2]
    assert calls.without_torch(first[1]) == calls.without_torch(recorded[1]) == calls.without_torch(again[1])
    assert len(calls.programs()) == 3
    # its launcher frees states for adjoints
    assert name != "based" or common + found > 0


@pytest.mark.parametrize("name", FORKING)
def test_streams_beside_each_other_have_apart_what_is_theirs(name, memory, monkeypatch):
    calls = Calls(name)
    stream_beside(calls, memory, monkeypatch)
    given = calls.forward(memory, calls.inputs)[2]
    backward = functools.partial(calls.backward, memory, calls.inputs, given)
    (first, recorded, again), _ = calls.thrice(memory, backward)
    launches, _, shapes = zip(first, recorded, again, strict=True)
    assert shapes[0] == shapes[1] == shapes[2]
    first, recorded, again = ([one for one in some if one[0] != "wait"] for some in launches)
    assert first == recorded == again
    assert sum(one[0] == "wait" for one in memory.launches) == 4


class Recorded:
    """In place of Replay: what each call needs is noted, on tensors without data."""

    records = False

    def __init__(self, module) -> None:
        self.launchers = triton_record.watched(module)
        self.bytes: list[tuple[int, int, int]] = []  # of the workspace, of tensors, the most that is there at once

    def __call__(self, key, tensors, run):
        with torch.no_grad():
            run(self.launchers, tensors)  # tables that launchers keep are made once
            recording = Recording(tensors)
            with recording:
                results = run(self.launchers, tensors)
            _, needed = recording.finished(results)
        steps = recording.steps
        made = [step[1] for step in steps if step[0] == "result" or (step[0] == "empty" and id(step[1]) in needed)]
        tensors = sum(one.tensor.untyped_storage().nbytes() for one in made)
        self.bytes.append((placements(steps, needed)[1], tensors, least(steps, needed)))
        recording.forget()
        return results


def least(steps, needed) -> int:
    """The most bytes that are there at once of what needs a place, launch by launch."""
    launches = [{id(x.root): x.root for x in step[3] if isinstance(x, Value)} for step in steps if step[0] == "launch"]
    users: dict[int, list[int]] = {}
    for at, given in enumerate(launches):
        for one in (one for one, x in given.items() if x.kind == "empty" and one not in needed):
            users.setdefault(one, []).append(at)
    roots = {one: x for given in launches for one, x in given.items()}
    size = {one: -(-roots[one].tensor.untyped_storage().nbytes() // ALIGNMENT) * ALIGNMENT for one in users}
    at_once = [sum(size[x] for x, used in users.items() if used[0] <= at <= used[-1]) for at in range(len(launches))]
    return max(at_once, default=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_replay_takes_what_is_predicted(name, monkeypatch):
    """At 8,192 tokens and 96 heads: no bytes of the workspace are lost, and forward and backward take what the cost
    model says that the launchers take."""
    spec = specs.get(name)
    plan, entry = prepare(spec)
    shape = Shape.dense(1, 8192, 96, 16 if plan.taylor else 128, 128)
    inputs = meta_inputs(spec, shape.of_vector() if plan.vector else shape, torch.bfloat16)
    device, module = MACHINES["h100"].device, load(entry)
    predicted = cost_launch.trace(plan, module, entry.source, inputs, device)
    backend = (cost_launch._VectorBackend if plan.vector else cost_launch._Backend)(plan, module, device)
    backend._replay = replay = Recorded(module)
    monkeypatch.setattr(JITFunction, "run", lambda *args, **named: SimpleNamespace(packed_metadata=()))
    call = inputs, (torch.empty(shape.H, device="meta"),) * len(plan.analysis.constants), 1.0
    backend.forward(*call, (), None, False, False)
    found = backend.forward(*call, (), None, False, True)
    ends, needs = (None,) * (1 + plan.normalized), (True,) * len(inputs)
    backend.backward(torch.empty_like(found.o), ends, found.o, found.saved, *call, (), None, needs, False)
    held = predicted.held + predicted.output
    expected = predicted.forward.peak, predicted.training.peak, predicted.backward.peak - held
    assert len(replay.bytes) == 3
    for (workspace, tensors, at_once), peak in zip(replay.bytes, expected, strict=True):
        assert workspace == at_once
        assert 0.99 * peak <= workspace + tensors <= 1.001 * peak

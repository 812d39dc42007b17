"""What a launcher did, done again: a call of a form that was seen before costs its launches and little more.

A launcher of a generated module works out strides, sizes and constants, allocates, and hands some sixty arguments to
each kernel, which Triton then binds, specialises and looks up. All of it follows from the form of the call: shapes,
strides, dtypes and alignment of its tensors, and numbers. So the second call of a form is recorded (`triton_record`).
From then on (`Program`) such calls allocate what is returned and one workspace for the rest, in which later values lie
where earlier ones were (`placements`), put addresses into the recorded arguments, and launch the compiled kernels
directly.

Where Triton has hooks, and under its interpreter, launchers run as they are; so do those that do what cannot be
recorded, such as waiting for a value.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor

from .triton_record import Recording, Unrecordable, Value, is_kernel, mapped, watched

ALIGNMENT = 512  # bytes, as torch's allocator aligns
MAX_FORMS = 512  # forms of calls that are kept
SEEN, UNFIT = 0, 1  # what is known of a form that has no program: it came once; it cannot be recorded

_logger = logging.getLogger("flagen.code")

Run = Callable[[Any, Sequence[Tensor | None]], Sequence[Tensor | None]]


class Replay:
    """Runs functions of a generated module's launchers, and repeats them for forms that it knows.

    launchers: the launchers of the module by name, in a copy whose launches can be watched.
    """

    def __init__(self, module: ModuleType) -> None:
        self.launchers = watched(module)
        # under the interpreter there are no compiled kernels
        self.records = any(is_kernel(name, one) for name, one in vars(module).items())
        self._forms: dict[Hashable, Program | int] = {}

    def __call__(self, key: Hashable, tensors: Sequence[Tensor | None], run: Run) -> Sequence[Tensor | None]:
        """run(launchers, tensors), a flat sequence of tensors and None. Its results may depend on `key` and the forms
        of the tensors alone, and on nothing that changes between calls.
        """
        if not self.records:
            with torch.no_grad():
                return run(self.launchers, tensors)
        form = form_of(key, tensors)
        known = self._forms.get(form)
        if type(known) is Program and not hooked():
            return known(tensors)
        with torch.no_grad():
            if known is None:
                if len(self._forms) >= MAX_FORMS:
                    self._forms.clear()
                self._forms[form] = SEEN
            elif known == SEEN and not hooked() and not captured(tensors):
                return self._recorded(form, tensors, run)
            return run(self.launchers, tensors)

    def _recorded(self, form: Hashable, tensors: Sequence[Tensor | None], run: Run) -> Sequence[Tensor | None]:
        self._forms[form] = UNFIT  # until it is seen to be fit; other threads run it as it is
        if any(x is not None and x.is_meta for x in tensors):
            return run(self.launchers, tensors)
        # a tensor that is given twice must not be taken for the one where in another call there are two
        seen: set[int] = set()
        tensors = [x if x is None or not (id(x) in seen or seen.add(id(x))) else x.detach() for x in tensors]
        recording = Recording(tensors)
        with recording:
            results = run(self.launchers, tensors)
        try:
            self._forms[form] = Program(recording, *recording.finished(results))
        except Unrecordable as reason:
            _logger.debug("not recorded: %s", reason)
        recording.forget()
        return results


def form_of(key: Hashable, tensors: Sequence[Tensor | None]) -> Hashable:
    """What a launcher's work follows from."""
    form: list[Any] = [key]
    for x in tensors:
        if x is None:
            form.append(None)
        else:
            # Triton compiles for addresses that are multiples of 16 apart from others
            form += (x.shape, x.stride(), x.dtype, x.data_ptr() & 15)
    for x in tensors:
        if x is not None:
            form.append(x.device)
            break
    return tuple(form)


def captured(tensors: Sequence[Tensor | None]) -> bool:
    """Whether launches go into a CUDA graph: a call that was recorded while one was captured for torch.compile ended in
    an error of the graph's memory pool. A capture is made once, so that nothing is lost."""
    return any(x is not None and x.is_cuda for x in tensors) and torch.cuda.is_current_stream_capturing()


def hooked() -> bool:
    """Whether somebody wants to see Triton's launches, such as a profiler."""
    runtime = triton.knobs.runtime
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        # a chain of hooks, or before that a function
        if hook is not None and getattr(hook, "calls", True):
            return True
    return False


class Program:
    """A recorded call: called with tensors of the recorded form, it does the same and returns what that did."""

    def __init__(self, recording: Recording, ends: Sequence[Value | None], needed: set[int]) -> None:
        self.device = recording.device
        self.index = self.device.index
        self.count = 0  # slots: of tensors, and of the addresses that they begin at
        self.inputs = []  # (position, slot)
        self.held: list[Tensor] = []
        self.actions: list[tuple[Any, ...]] = []
        for at, value in enumerate(recording.inputs):
            if value is not None and value.slot < 0:
                self.inputs.append((at, self._slot(value)))
        self.constants = [(self._slot(one), one.tensor) for one in recording.values.values() if one.kind == "constant"]
        placed, self.workspace = placements(recording.steps, needed)
        for kind, *rest in recording.steps:
            if kind == "launch":
                self._launch(placed, *rest)
            elif kind in ("fork", "join"):
                self.actions.append((kind,))
            elif kind == "empty" and id(rest[0]) in needed:
                x = rest[0].tensor
                made = (tuple(x.shape), tuple(x.stride()), x.dtype)
                self.actions.append(("empty", self._slot(rest[0]), *made))
            elif kind in ("result", "in place") or (kind == "view" and id(rest[0]) in needed):
                value, func, args, kwargs = rest
                slot = -1 if value is None else self._slot(value)
                self.actions.append(("torch", slot, func, self._bound(recording, args), self._bound(recording, kwargs)))
        self.ends = [None if one is None else self._slot(one) for one in ends]
        self.torch_runs = any(one[0] == "torch" for one in self.actions)

    def _slot(self, value: Value) -> int:
        value = value.shared or value
        if value.slot < 0:
            value.slot = self.count
            self.count += 1
        return value.slot

    def _launch(
        self, placed: dict[int, int], compiled: Any, grid: tuple[int, ...], places: list[Any], side: int
    ) -> None:
        arguments, addresses = [], []
        for at, one in enumerate(places):
            if not isinstance(one, Value):
                arguments.append(one)
                continue
            arguments.append(0)
            root = one.root
            if id(root) in placed:
                addresses.append((at, -1, placed[id(root)] + one.delta))
            else:
                addresses.append((at, root.slot, one.delta))
        self.actions.append(
            ("launch", compiled.run, compiled.function, compiled.packed_metadata, grid, arguments, addresses, side)
        )
        self.held.append(compiled)

    def _bound(self, recording: Recording, tree: Any) -> Any:
        """The arguments of an operator, with slots for tensors."""
        return mapped(tree, lambda x: _Slot(self._slot(recording.value(x))))

    def __call__(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        if self.index is not None and torch._C._cuda_getDevice() != self.index:
            with torch.cuda.device(self.index):
                return self._run(tensors)
        return self._run(tensors)

    def _run(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        if self.torch_runs and torch.is_grad_enabled():
            with torch.no_grad():
                return self._act(tensors)
        return self._act(tensors)

    def _act(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        device = self.device
        values: list[Any] = [None] * self.count
        starts = [0] * (self.count + 1)  # addresses; the last one is the workspace's
        for at, slot in self.inputs:
            x = values[slot] = tensors[at]
            starts[slot] = x.data_ptr()
        for slot, x in self.constants:
            values[slot] = x
            starts[slot] = x.data_ptr()
        if self.workspace:
            workspace = torch.empty(self.workspace, dtype=torch.uint8, device=device)
            starts[-1] = workspace.data_ptr()
        streams, sides = [_stream(self.index)], ()
        for kind, *rest in self.actions:
            if kind == "launch":
                run, function, metadata, grid, arguments, addresses, side = rest
                arguments = arguments.copy()
                for at, slot, delta in addresses:
                    arguments[at] = starts[slot] + delta
                run(*grid, streams[side], function, metadata, None, None, None, *arguments)
            elif kind == "fork":
                sides = forked(device)
                streams += (one.cuda_stream for one in sides)
            elif kind == "join":
                joined(sides)
                del streams[1:]
            elif kind == "empty":
                slot, shape, stride, dtype = rest
                x = values[slot] = torch.empty_strided(shape, stride, dtype=dtype, device=device)
                starts[slot] = x.data_ptr()
            else:
                slot, func, args, kwargs = rest
                x = func(*_filled(args, values), **_filled(kwargs, values))
                if slot >= 0:
                    values[slot] = x
                    starts[slot] = x.data_ptr()
        return [None if slot is None else values[slot] for slot in self.ends]


def placements(steps: Sequence[tuple[Any, ...]], needed: set[int]) -> tuple[dict[int, int], int]:
    """Where in one workspace that lies of which the address is enough, by id of value, and the bytes of it all.

    A value is there from the first launch that is given it to the last. Launches on one stream follow each other; all
    between fork and join count as one. Values that are there at the same time share no bytes: the largest is placed
    first, each as low as it fits.
    """
    lives: dict[int, tuple[int, int, int]] = {}  # bytes, first and last time
    now, beside = 0, False
    for kind, *rest in steps:
        if kind in ("fork", "join"):
            beside = kind == "fork"
            now += 1
        elif kind == "launch":
            now += not beside
            for root in (one.root for one in rest[2] if isinstance(one, Value)):
                if root.kind == "empty" and id(root) not in needed:
                    size = -(-root.tensor.untyped_storage().nbytes() // ALIGNMENT) * ALIGNMENT
                    lives[id(root)] = size, lives.get(id(root), (size, now))[1], now
    placed: dict[int, int] = {}
    for one, (size, first, last) in sorted(lives.items(), key=lambda item: -item[1][0]):
        begin = 0
        for other in sorted(placed, key=placed.__getitem__):
            bytes_, since, until = lives[other]
            if first <= until and since <= last and begin + size > placed[other]:
                begin = max(begin, placed[other] + bytes_)
        placed[one] = begin
    return placed, max((begin + lives[one][0] for one, begin in placed.items()), default=0)


def forked(device: torch.device) -> tuple[torch.cuda.Stream, ...]:
    """Two streams beside the current one, as the launchers' fork makes them."""
    sides = torch.cuda.Stream(device), torch.cuda.Stream(device)
    for side in sides:
        side.wait_stream(torch.cuda.current_stream(device))
    return sides


def joined(sides: Sequence[torch.cuda.Stream]) -> None:
    for side in sides:
        torch.cuda.current_stream(side.device).wait_stream(side)


class _Slot(int):
    """Where a tensor stands in recorded arguments."""


def _stream(index: int) -> int:
    return int(triton.runtime.driver.active.get_current_stream(index))


def _filled(tree: Any, values: Sequence[Any]) -> Any:
    if type(tree) is _Slot:
        return values[tree]
    if isinstance(tree, (list, tuple)):
        return type(tree)([_filled(one, values) for one in tree])
    if isinstance(tree, dict):
        return {name: _filled(one, values) for name, one in tree.items()}
    return tree

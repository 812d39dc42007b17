"""What one call of a launcher does: the operators of torch that it runs and the kernels that it launches.

The launchers run in a copy of their module's names, whose kernels are sites: a launch there is done as ever, and noted
where a recording of this thread is on, or only collected.
"""

from __future__ import annotations

import builtins
import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

_NOT_RECORDED = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded)
_EMPTY = ("aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty", "aten::new_empty_strided")


class Unrecordable(Exception):
    """A call that does what a Program cannot."""


class _State(threading.local):
    recording: Recording | None = None
    collected: list[tuple[JITFunction, tuple[Any, ...], dict[str, Any]]] | None = None


_state = _State()


@contextlib.contextmanager
def collecting() -> Iterator[list[tuple[JITFunction, tuple[Any, ...], dict[str, Any]]]]:
    """Inside, launches of this thread are noted and not done: kernel, arguments, named arguments."""
    _state.collected = found = []
    try:
        yield found
    finally:
        _state.collected = None


def is_collecting() -> bool:
    return _state.collected is not None


class _Site:
    """A kernel in the launchers' copy: launches are noted while a recording is on, or collected instead of done."""

    def __init__(self, kernel: JITFunction) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        recording, collected = _state.recording, _state.collected
        if collected is not None:
            return lambda *args, **named: collected.append((self.kernel, args, named))
        launch = self.kernel[grid]
        if recording is None:
            return launch

        def watched(*args: Any, **named: Any) -> Any:
            compiled = launch(*args, **named)
            recording.launch(self.kernel, compiled, grid, args, named)
            return compiled

        return watched


class _Streams:
    """`fork` and `join` of a launcher's copy, noted while a recording is on."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name, self.function = name, function

    def __call__(self, *args: Any) -> Any:
        sides = self.function(*args)
        if _state.recording is not None:
            _state.recording.streams(self.name, args[0] if sides is None else sides)
        return sides


def is_kernel(name: str, value: Any) -> bool:
    return name.endswith("_kernel") and isinstance(value, JITFunction)


def watched(module: ModuleType) -> Any:
    """A copy of the module's functions, whose kernels are sites; the module stays as it is."""
    names = {"__builtins__": builtins, **vars(module)}
    for name, value in vars(module).items():
        if is_kernel(name, value):
            names[name] = _Site(value)
        elif type(value) is FunctionType:
            names[name] = FunctionType(value.__code__, names, name, value.__defaults__, value.__closure__)
            names[name].__kwdefaults__ = value.__kwdefaults__
            if name in ("fork", "join"):
                names[name] = _Streams(name, names[name])
    return SimpleNamespace(**{name: names[name] for name in ("sizes", "peaks", "fwd", "bwd", "step") if name in names})


class Value:
    """A tensor of a recorded call. kind: "input", "constant" (from before the call), "empty", "view" or "result".
    `root` is the value whose memory it has, `delta` how many bytes after that one's first it begins.
    """

    def __init__(self, tensor: Tensor, kind: str, root: Value | None = None) -> None:
        self.tensor, self.kind = tensor, kind
        self._of = root  # None for itself: in a cycle it would hold its tensor until the garbage collector comes
        self.delta = tensor.data_ptr() - self.root.tensor.data_ptr()
        self.slot = -1
        self.shared: Value | None = None  # the value that this one is

    @property
    def root(self) -> Value:
        return self if self._of is None else self._of


class Recording(TorchDispatchMode):
    """Watches one call: every operator of torch, and every launch."""

    def __init__(self, inputs: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.values: dict[int, Value] = {}  # by id of tensor, which the value keeps
        self.by_storage: dict[int, list[Value]] = {}
        self.kept: list[Tensor] = []  # whose ids are in use
        self.steps: list[tuple[Any, ...]] = []
        self.fault = ""
        self.sides: list[int] = []  # handles of streams beside the current one
        self.inputs = [None if x is None else self._add(x, "input") for x in inputs]
        self.device = next(x.device for x in inputs if x is not None)

    def __enter__(self) -> Recording:
        _state.recording = self
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _state.recording = None

    def forget(self) -> None:
        """Lets go of all tensors: torch's first call under a dispatch mode may leave frames that hold this object."""
        for held in (self.values, self.by_storage, self.kept, self.steps, self.inputs):
            held.clear()  # type: ignore[attr-defined]

    def _add(self, x: Tensor, kind: str, root: Value | None = None) -> Value:
        value = self.values[id(x)] = Value(x, kind, root)
        self.by_storage.setdefault(x.untyped_storage()._cdata, []).append(value)
        return value

    def value(self, x: Tensor) -> Value:
        """What a tensor is: one that was seen, a view of such a one, or a constant."""
        found = self.values.get(id(x))
        if found is not None:
            return found
        roots = {id(one.root): one.root for one in self.by_storage.get(x.untyped_storage()._cdata, ())}
        if not roots:
            if x.device != self.device:
                self.fault = f"a tensor on {x.device}"
            return self._add(x, "constant")
        if len(roots) > 1:  # inputs that are parts of one tensor, at distances that the form does not hold
            self.fault = "a view of one of several tensors that share memory"
        return self._add(x, "view", next(iter(roots.values())))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        results = func(*args, **kwargs)
        given = [self.value(x) for x in tensors_of((args, kwargs))]
        if any(tag in func.tags for tag in _NOT_RECORDED) or not isinstance(results, Tensor):
            self.fault = self.fault or f"{func}"
        elif results.device != self.device:
            self.fault = f"{func} on {results.device}"
        elif id(results) not in self.values:  # otherwise it was written in place
            roots = {id(one.root): one.root for one in given if _share(one.tensor, results)}
            kind = "view" if roots else "empty" if func._schema.name in _EMPTY else "result"
            if len(roots) > 1:
                self.fault = f"{func} of tensors that share memory"
            same = next((one for one in given if kind == "view" and _same(one, results)), None)
            if same is not None:
                self.values[id(results)] = same
                self.kept.append(results)
                return results
            value = self._add(results, kind, next(iter(roots.values()), None))
            self.steps.append((kind, value, func, args, kwargs))
            return results
        self.steps.append(("in place", None, func, args, kwargs))
        return results

    def launch(self, kernel: JITFunction, compiled: Any, grid: tuple[int, ...], args: Any, named: Any) -> None:
        if kernel.pre_run_hooks or not hasattr(compiled, "packed_metadata"):
            self.fault = "a kernel with hooks"
        given = {**dict(zip(kernel.arg_names, args, strict=False)), **named}
        ordered = [given.get(name, one.default) for name, one in zip(kernel.arg_names, kernel.params, strict=True)]
        places = [self.value(x) if isinstance(x, Tensor) else x for x in ordered]
        stream = torch.cuda.current_stream(self.device).cuda_stream if self.sides else None
        side = 1 + self.sides.index(stream) if stream in self.sides else 0
        self.steps.append(("launch", compiled, (*grid, 1, 1)[:3], places, side))

    def streams(self, name: str, sides: Sequence[Any]) -> None:
        """A launcher's fork or join."""
        found = [one.cuda_stream for one in sides if one is not None]
        if found:
            self.sides = found if name == "fork" else []
            self.steps.append((name, None))

    def finished(self, results: Sequence[Tensor | None]) -> tuple[list[Value | None], set[int]]:
        """What the call returned, and the ids of the values that must be tensors when it is repeated; of the others
        the address is enough. Raises Unrecordable."""
        ends = [None if x is None else self.value(x) for x in results]
        needed = {id(one) for one in ends if one is not None}
        for kind, _, *rest in self.steps:
            if kind in ("result", "in place"):
                needed |= {id(self.value(x)) for x in tensors_of(rest[1:])}
        for kind, value, *rest in reversed(self.steps):  # what a view is of stands before it
            if kind == "view" and id(value) in needed:
                needed |= {id(self.value(x)) for x in tensors_of(rest[1:])}
        made = {id(value) for _, value, *_ in self.steps}
        if any(one.kind == "view" and id(one) in needed and id(one) not in made for one in self.values.values()):
            self.fault = self.fault or "a view that no operator made"
        if self.fault:
            raise Unrecordable(self.fault)
        self._without_reshapes(needed, {id(one) for one in ends if one is not None})
        return ends, needed

    def _without_reshapes(self, needed: set[int], ends: set[int]) -> None:
        """What is allocated and returned in another shape alone is allocated in that shape."""
        views = [(at, step[1]) for at, step in enumerate(self.steps) if step[0] == "view" and id(step[1]) in needed]
        for at, view in views:
            root, x = view.root, view.tensor
            others = [one for _, one in views if one is not view and one.root is root]
            used = any(root.tensor is x for step in self.steps if step[0] != "view" for x in tensors_of(step[2:]))
            if (
                root.kind == "empty" and not others and not used and id(root) not in ends and not view.delta
                and x.is_contiguous() and x.dtype == root.tensor.dtype and x.numel() == root.tensor.numel()
            ):  # fmt: skip
                view.shared = root
                root.tensor = x
                self.steps[at] = ("nothing",)


def _share(x: Tensor, y: Tensor) -> bool:
    return x.untyped_storage()._cdata == y.untyped_storage()._cdata


def _same(value: Value, x: Tensor) -> bool:
    """Whether x is a tensor of this call's own over again, as a reshape that changes nothing gives it."""
    y = value.tensor
    form = x.shape == y.shape and x.stride() == y.stride() and x.dtype == y.dtype and x.data_ptr() == y.data_ptr()
    return form and value.root.kind in ("empty", "result") and not x.is_conj() and not x.is_neg()


def mapped(tree: Any, change: Callable[[Tensor], Any]) -> Any:
    """The tree of lists, tuples and dicts with its tensors changed."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, (list, tuple)):
        return type(tree)([mapped(one, change) for one in tree])
    if isinstance(tree, Mapping):
        return {name: mapped(one, change) for name, one in tree.items()}
    return tree


def tensors_of(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []
    mapped(tree, found.append)
    return found

"""What the tests with hostile inputs share: where a spec runs, a run of it, and memory that tells who touched it.

The bodies of those tests stand in test_causality.py and test_hostile_*.py and take a `place`. There it is the torch
backend on a CPU, or the compiled kernels on a GPU; tests/kernels/test_interp_hostile_*.py runs them with the kernels
under the interpreter.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import cases
import pytest
import torch
from cases import ALL, SCALARS, SHIPPED, WITHOUT_KERNELS, make, make_states
from torch import Tensor

from flagen import compiler, reference
from flagen.analysis import Analysis, analyse
from flagen.compare import kind_of, limit_of, measure
from flagen.expr import Input
from flagen.spec import Spec
from flagen.torch_backend import TorchBackend

CHUNK = 16
NAMED = {spec.name: spec for spec in ALL + WITHOUT_KERNELS}
EVERY = pytest.mark.parametrize("spec", ALL, ids=lambda spec: spec.name)
CUT = pytest.mark.parametrize("cut", [False, True], ids=["whole", "pieces"])


def some(*names: str) -> Any:
    """Some of the specs of cases.py, as a mark."""
    return pytest.mark.parametrize("spec", [NAMED[name] for name in names], ids=lambda spec: spec.name)


# each kind of decay, bonus, phase, normaliser, Taylor map, an input of several roles, one without time
FEWER = some("scalar", "rwkv6", "phase_key_u", "key_u_norm")
FEW = some("scalar", "gla", "rwkv6", "value_u", "phase_key_u", "based", "key_u_norm", "shared", "fixed_key")


@dataclass(frozen=True)
class Place:
    """backend: "torch" or "triton"; device: where tensors are; dtype: of all inputs; piece: tokens to a piece of a
    sequence that is cut, and between the states that the kernels keep.
    """

    backend: str
    device: str
    dtype: torch.dtype = torch.float32
    piece: int = 32

    def __str__(self) -> str:
        kind = "" if self.dtype == torch.float32 else f"_{str(self.dtype).removeprefix('torch.')}"
        return f"{self.backend}_{self.device}{kind}"

    def backend_of(self, spec: Spec, cut: bool = False) -> Any:
        """A backend with chunks of CHUNK tokens. cut: sequences are cut into pieces, for PyTorch into spans."""
        if self.backend == "torch":
            backend = TorchBackend(_analysis(spec), CHUNK)
            if cut:
                backend._span_size = lambda sizes: self.piece  # type: ignore[method-assign]
            return backend
        return _kernels(spec, self.piece, cut)


@functools.cache
def _analysis(spec: Spec) -> Analysis:
    return analyse(spec)


@functools.cache
def _kernels(spec: Spec, piece: int, cut: bool) -> Any:
    from flagen.load import load
    from flagen.triton_backend import TritonBackend

    plan, entry = compiler.prepare(spec)
    backend = TritonBackend(plan, load(entry), CHUNK, None, piece)
    if cut:
        decided = backend.schedule
        backend.schedule = lambda inputs, sizes: dataclasses.replace(  # type: ignore[method-assign]
            decided(inputs, sizes), fwd_L=piece, bwd_L=piece, dq_L=piece
        )
    return backend


TORCH = Place("torch", "cpu")
INTERPRETER, BRIEF = Place("triton", "cpu"), Place("triton", "cpu", piece=16)
GPU = [
    pytest.param(Place("triton", "cuda"), marks=pytest.mark.gpu),
    pytest.param(Place("triton", "cuda", torch.bfloat16), marks=pytest.mark.gpu),
]
PLACE = pytest.mark.parametrize("place", [TORCH, *GPU], ids=str)


def wherever(specs: Sequence[Spec], compiled: Sequence[str], brief: Sequence[str]) -> Any:
    """The mark of `place` and `spec`: PyTorch with these specs, and a GPU, where to compile their kernels is what takes
    the time, with those of the names `compiled` in fp32 and `brief` in bf16."""
    given = [(TORCH, (), spec) for spec in specs]
    for at, names in zip(GPU, (compiled, brief), strict=True):
        given += [(at.values[0], at.marks, NAMED[name]) for name in names]
    params = [pytest.param(place, spec, marks=marks, id=f"{place}-{spec.name}") for place, marks, spec in given]
    return pytest.mark.parametrize(("place", "spec"), params)


# every spec wherever it runs: some have no kernels. On a GPU what is shipped, and one of each other kind
EVERYWHERE = wherever(
    ALL + WITHOUT_KERNELS,
    [*(spec.name for spec in SHIPPED), "value_u", "key_u_norm", "shared", "fixed_key"],
    ["scalar", "gla", "rwkv6", "linear"],
)
FEW_COMPILED = ("scalar", "gla", "rwkv6", "value_u", "based", "key_u_norm", "shared", "fixed_key")
FEW_EVERYWHERE = wherever(FEW.args[1], FEW_COMPILED, ["scalar", "gla"])


# --- runs


def sizes_of(spec: Spec) -> tuple[int, int]:
    """Key and value channels, no powers of two; a Taylor map squares the keys."""
    return (3 if spec.taylor else 6), 5


def inputs_of(place: Place, spec: Spec, batch: int, time: int, cu: Sequence[int] | None = None, heads: int = 2,
              seed: int = 0) -> tuple[Tensor, ...]:  # fmt: skip
    key, value = sizes_of(spec)
    made = make(spec, batch, time, heads, key, value, sequences=None if cu is None else len(cu) - 1, seed=seed)
    return tuple(x.to(place.device, place.dtype) for x in made)


def states_of(place: Place, spec: Spec, rows: int, heads: int = 2, seed: int = 1) -> tuple[Tensor, ...]:
    """An initial state as backends take it, fp32 or complex64."""
    made = make_states(spec, rows, heads, *sizes_of(spec), seed=seed)
    return tuple(x.to(place.device, torch.complex64 if x.is_complex() else torch.float32) for x in made)


def constants_of(place: Place, spec: Spec, heads: int) -> tuple[Tensor, ...]:
    """The constants of a spec as backends take them: fp64 for PyTorch, fp32 for kernels."""
    dtype = torch.float64 if place.backend == "torch" else torch.float32
    return tuple(x.to(place.device, dtype) for x in cases.constants_of(_analysis(spec), heads))


class Run:
    """A spec's forward on `inputs`, with a state unless start=False, and gradients `do`, `dfinal` of its results."""

    def __init__(
        self,
        place: Place,
        spec: Spec,
        inputs: tuple[Tensor, ...],
        *,
        cu: Sequence[int] | None = None,
        cut: bool = False,
        initial: tuple[Tensor, ...] | None = None,
        start: bool = True,
        seed: int = 8,
    ) -> None:
        self.place, self.spec, self.inputs = place, spec, inputs
        self.backend = place.backend_of(spec, cut)
        self.cu = None if cu is None else torch.tensor(cu, dtype=torch.int32, device=place.device)
        timed = next(x for x, one in zip(inputs, spec.inputs, strict=True) if "t" in one.axes)
        heads = max(x.shape[one.axes.index("h")] for x, one in zip(inputs, spec.inputs, strict=True) if "h" in one.axes)
        rows = timed.shape[0] if cu is None else len(cu) - 1
        if initial is None:
            initial = states_of(place, spec, rows, heads) if start else ()
        self.initial = initial
        self.constants = constants_of(place, spec, heads)
        self.out = self.backend.forward(inputs, self.constants, 0.4, self.initial, self.cu, True, True)
        generator = torch.Generator().manual_seed(seed)
        self.do = torch.randn(self.out.o.shape, generator=generator).to(place.device, self.out.o.dtype)
        self.dfinal = tuple(
            torch.randn(x.shape, generator=generator, dtype=x.dtype).to(place.device) for x in self.out.final
        )

    def backward(
        self, do: Tensor | None = None, dfinal: tuple[Tensor | None, ...] | None = None
    ) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        """Gradients by the inputs' names, and of the initial state; do and dfinal: instead of the run's own."""
        got, initial = self.backend.backward(
            self.do if do is None else do,
            self.dfinal if dfinal is None else dfinal,
            self.out.o,
            self.out.saved,
            self.inputs,
            self.constants,
            0.4,
            self.initial,
            self.cu,
            (True,) * len(self.inputs),
            bool(self.initial),
        )
        return {one.name: x for one, x in zip(self.spec.inputs, got, strict=True)}, initial

    def everything(self) -> dict[str, Tensor]:
        """Output, final state and all gradients, by name."""
        gradients, initial = self.backward()
        found = {"o": self.out.o} | {f"final {i}": x for i, x in enumerate(self.out.final)}
        found |= {f"d {name}": x for name, x in gradients.items()}
        return found | {f"d initial {i}": x for i, x in enumerate(initial)}

    def kept_states(self, before: int) -> list[Tensor]:
        """The states that the forward kept for the backward, of tokens up to `before`, without cu_seqlens."""
        batch, tokens = self.out.o.shape[:2]
        if self.place.backend == "torch":
            from flagen.torch_roles import Sizes

            spans = self.backend._spans(Sizes.of(self.spec.inputs, self.inputs), None)
            return [self.out.saved[0][i] for i, span in enumerate(spans) if span.begin <= before]
        slots = -(-tokens // self.place.piece)
        kept = self.out.saved[:2] if self.spec.normalizer is not None else self.out.saved[:1]
        return [x.view(batch, slots, -1)[:, : before // self.place.piece + 1] for x in kept]


def roles_of(spec: Spec, one: Input) -> set[str]:
    """The roles in whose expressions an input stands."""
    return {role for role, expr in spec.roles if one in expr.inputs}


def timed(spec: Spec) -> list[Input]:
    return [one for one in spec.inputs if "t" in one.axes]


def multiplied(spec: Spec, inputs: tuple[Tensor, ...], where: Any, factor: float = 50.0) -> tuple[Tensor, ...]:
    """The inputs with a time axis times `factor` at the tokens [:, where]; log decays stay <= 0."""
    changed = tuple(x.clone() for x in inputs)
    for one, x in zip(spec.inputs, changed, strict=True):
        if "t" in one.axes:
            x[:, where] *= factor
    return changed


def same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Bit for bit, and finite."""
    assert got.keys() == want.keys(), (got.keys(), want.keys())
    for name, x in got.items():
        assert x.isfinite().all(), f"{name} is not finite"
        assert torch.equal(x, want[name]), f"{name} differs by {float((x - want[name]).abs().max()):.1e}"


# --- memory

BAND = 4096  # bytes, more than a chunk of rows
PATTERN = 0xFF  # a NaN in every floating type when repeated, and -1 in integers


class Memory:
    """While it is entered, new tensors lie between bands of NaN. What torch.empty and its kin give is full of NaN too,
    so that what nobody wrote, and what was read out of bounds, is seen in the results; check() says what was written
    out of bounds. place(x): a copy of x between such bands, which check() finds as it was.
    """

    _MAKERS = ("empty", "zeros", "ones", "full", "empty_like", "zeros_like", "ones_like", "empty_strided")
    _METHODS = ("new_empty", "new_zeros", "new_full", "new_ones")

    def __init__(self) -> None:
        self._kept: list[tuple[str, Tensor, int]] = []
        self._inputs: list[tuple[Tensor, Tensor]] = []
        self._stack = contextlib.ExitStack()
        self._empty = torch.empty

    def __enter__(self) -> Memory:
        for owner, names in ((torch, self._MAKERS), (torch.Tensor, self._METHODS)):
            for name in names:
                made = self._within(name, getattr(owner, name))
                self._stack.enter_context(mock.patch.object(owner, name, made))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def place(self, x: Tensor, written: bool = False) -> Tensor:
        found = self._guarded("an input", x)
        found.copy_(x)
        if not written:
            self._inputs.append((found, x.clone()))
        return found

    def check(self) -> None:
        for name, raw, size in self._kept:
            for band in (raw[:BAND], raw[BAND + size :]):
                assert band.numel() == BAND, (name, band.shape)
                assert (band == PATTERN).all(), f"memory beside a tensor of {name} was written: {raw.shape} {size}"
        for x, before in self._inputs:
            assert torch.equal(x.nan_to_num(nan=7.0), before.nan_to_num(nan=7.0)), f"an input {x.shape} was written"

    def _within(self, name: str, make_: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(make_)
        def made(*args: Any, **kwargs: Any) -> Tensor:
            found = make_(*args, **kwargs)
            if found.device.type == "meta" or "out" in kwargs:
                return found
            mine = self._guarded(name, found)
            return mine if "empty" in name else mine.copy_(found)

        return made

    def _guarded(self, name: str, like: Tensor) -> Tensor:
        """An unwritten tensor of the form of `like` between bands."""
        size = like.numel() * like.element_size()
        raw = self._empty(size + 2 * BAND, dtype=torch.uint8, device=like.device).fill_(PATTERN)
        self._kept.append((name, raw, size))
        dense = like.is_contiguous() or not like.numel()
        inner = raw[BAND : BAND + size].view(like.dtype)
        return inner.view(like.shape) if dense else inner.as_strided(like.shape, like.stride(), inner.storage_offset())


@pytest.fixture
def memory() -> Iterator[Memory]:
    """Memory, entered by the test where it wants it."""
    found = Memory()
    yield found
    assert found._kept, "nothing was allocated in it"


def nan_like(x: Tensor) -> Tensor:
    return torch.full_like(x, math.nan)


# --- numbers


def agrees(run: Run) -> None:
    """A run, and its gradients, within the tolerances of compare.py of the reference in fp64 on the same inputs.

    Numbers below 1e-30, as behind a decay of exp(-100), are as good as zero. The gradient of a decay or a phase is a
    sum of terms about one in size, which may cancel; without a time axis it is the sum of such sums over all tokens,
    whose errors go in one direction.
    """
    spec, dtype = run.spec, run.place.dtype
    got = {name: x.cpu() for name, x in run.everything().items()}
    wide = [(x.cpu().to(torch.complex128 if x.is_complex() else torch.float64)).requires_grad_() for x in run.initial]
    inputs = [x.cpu().double().requires_grad_() for x in run.inputs]
    state = None if not wide else wide[0] if spec.normalizer is None else tuple(wide)
    options = {
        "initial_state": state,
        "output_final_state": True,
        "cu_seqlens": None if run.cu is None else run.cu.cpu(),
    }
    o, final = reference.run(spec, inputs, scalars=SCALARS, scale=0.4, **options)
    final = (final,) if isinstance(final, Tensor) else final
    loss = (o * run.do.cpu().double()).sum()
    loss = loss + sum((x * dx.cpu().to(x.dtype).conj()).real.sum() for x, dx in zip(final, run.dfinal, strict=True))
    gradients = torch.autograd.grad(loss, [*inputs, *wide], materialize_grads=True)
    want = {"o": (o, "o", 1e-30, True)} | {f"final {i}": (x, "o", 1e-30, True) for i, x in enumerate(final)}
    for one, x in zip(spec.inputs, gradients, strict=False):
        gate = 0.1 if "t" in one.axes else 0.05 * o.shape[1]
        floor = gate if roles_of(spec, one) & {"log_decay", "phase"} else 1e-30
        want[f"d {one.name}"] = x, kind_of(spec, one), floor, one.axes[-1] in "kv"
    for i, x in enumerate(gradients[len(inputs) :]):
        want[f"d initial {i}"] = x, "gate" if i else "gradient", 1e-30, True
    assert got.keys() == want.keys()
    for name, (x, kind, floor, channels) in want.items():
        assert got[name].isfinite().all(), f"{spec.name}: {name} is not finite"
        error = measure(got[name], x, floor=floor, channels=channels)
        assert error.within(limit_of(dtype, kind)), (spec.name, name, error)


def digest(place: Place, spec: Spec, seed: int = 0) -> str:
    """A hash of all results of a call: of every bit."""
    found = hashlib.sha256()
    for name, x in Run(place, spec, inputs_of(place, spec, 1, 40, seed=seed), cut=True).everything().items():
        found.update(name.encode())
        found.update(bytes(x.detach().cpu().contiguous().view(torch.uint8).flatten().tolist()))
    return found.hexdigest()

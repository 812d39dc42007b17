"""Tensors as they come: at odd addresses, of any strides, overlapping, the same one for several arguments, on another
device or stream than the current one; and gradients for any of them.

The bodies call an op as a user does. They run with PyTorch on a CPU, with the kernels on a GPU, and by
test_interp_hostile_layout.py with the kernels under the interpreter.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from hostile import FEW_COMPILED, FEW_EVERYWHERE, NAMED, Place, inputs_of, some, states_of, wherever

import flagen
from flagen.compare import limit_of, measure
from flagen.samples import LAYOUTS, arranged
from flagen.testing import make_scalars

TOKENS = 20


class Call:
    """An op called on `inputs`, with a state, and the gradients of all that `needs` marks; by name."""

    def __init__(self, place, spec):
        self.place, self.spec = place, spec
        self.op = flagen.compile(spec, chunk_size=16, backend=place.backend)
        self.scalars = make_scalars(spec)
        self.parts = 2 if spec.normalizer is not None else 1

    def __call__(self, inputs, states=(), *, needs=None, cu=None, do=None):
        inputs, states = tuple(x.detach() for x in inputs), tuple(x.detach() for x in states)
        leaves = (*inputs, *states)
        needs = needs or (True,) * len(leaves)
        for x, need in zip(leaves, needs, strict=True):
            x.requires_grad_(need)
        state = None if not states else states[0] if self.parts == 1 else states
        options = {"initial_state": state, "output_final_state": True, "cu_seqlens": cu, "scale": 0.4}
        o, final = self.op(*inputs, **options, **self.scalars)
        final = final if isinstance(final, tuple) else (final,)
        found = {"o": o.detach()} | {f"final {i}": x.detach() for i, x in enumerate(final)}
        if any(needs):
            generator = torch.Generator().manual_seed(8)
            if do is None:
                do = torch.randn(o.shape, generator=generator).to(o)
            ends = [torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device) for x in final]
            wanted = [x for x, need in zip(leaves, needs, strict=True) if need]
            gradients = iter(torch.autograd.grad([o, *final], wanted, [do, *ends]))
            found |= {f"d {i}": next(gradients) for i, need in enumerate(needs) if need}
        return found


def close(place, got, want):
    """To rounding: a BLAS may take another path for another address or stride. Gradients may cancel, of terms about one
    in size."""
    assert got.keys() == want.keys()
    for name, x in got.items():
        limit = {torch.float32: 2e-6}.get(place.dtype, limit_of(place.dtype, "o"))
        error = measure(x, want[name], floor=0.1)
        assert error.within(limit), (name, error)


def shifted(x, by=1):
    """A copy whose address is `by` elements past what an allocator gives."""
    room = torch.full((x.numel() + 8,), torch.nan, dtype=x.dtype, device=x.device)
    found = room[by : by + x.numel()].view(x.shape)
    assert x.numel() < 2 or found.data_ptr() % (2 * x.element_size())
    return found.copy_(x)


def at_odd_addresses(place, spec):
    call, inputs, states = Call(place, spec), inputs_of(place, spec, 2, TOKENS), states_of(place, spec, 2)
    close(place, call(map(shifted, inputs), map(shifted, states)), call(inputs, states))


def laid_out(place, spec, layout):
    """Inputs, and the gradient of the output, laid out as samples.py says, with NaN between them."""
    call, inputs = Call(place, spec), inputs_of(place, spec, 2, TOKENS)
    want = call(inputs)
    do = torch.randn(want["o"].shape, generator=torch.Generator().manual_seed(1)).to(want["o"])
    moved = [arranged(x, one.axes, layout) for x, one in zip(inputs, spec.inputs, strict=True)]
    assert any(x.stride() != y.stride() for x, y in zip(inputs, moved, strict=True))
    close(place, call(moved, do=arranged(do, "bthv", layout)), call(inputs, do=do))


def expanded(place, spec, along):
    """Stride 0 along some axes, in the inputs that have them, in the initial state and in the output's gradient."""
    call, inputs, states = Call(place, spec), inputs_of(place, spec, 2, TOKENS), states_of(place, spec, 2)

    def spread(x, axes):
        wide = x.shape
        for axis in along:
            at = axes.find(axis)
            x = x if at < 0 else x.narrow(at, 0, 1)
        return x.expand(wide)

    wide = [spread(x, one.axes) for x, one in zip(inputs, spec.inputs, strict=True)]
    starts = [spread(x, "bhkv"[: x.dim()]) for x in states]
    do = spread(torch.randn(2, TOKENS, 2, 5, generator=torch.Generator().manual_seed(1)).to(inputs[0]), "bthv")
    assert any(0 in x.stride() for x in (*wide, *starts))
    plain = [[x.clone(memory_format=torch.contiguous_format) for x in tensors] for tensors in (wide, starts)]
    close(place, call(wide, starts, do=do), call(*plain, do=do.contiguous()))


def any_subset_of_gradients(place, spec):
    """Those that are asked for are the same whatever else is."""
    call, inputs, states = Call(place, spec), inputs_of(place, spec, 1, TOKENS), states_of(place, spec, 1)
    count = len(inputs) + len(states)
    every = call(inputs, states)
    for needs in itertools.product((False, True), repeat=count):
        if place.device == "cuda" and sum(needs) > 1:
            continue  # kernels are compiled anew for each
        got = call(inputs, states, needs=needs)
        assert sum(name.startswith("d ") for name in got) == sum(needs)
        close(place, got, {name: every[name] for name in got})


def the_same_tensor_twice(place, spec):
    """q is k is v, and three slices of one tensor: the gradient is the sum, and the parts are those of copies."""
    call, (q, *others) = Call(place, spec), inputs_of(place, spec, 2, TOKENS)
    names = [one.name for one in spec.inputs]
    assert names[:3] == ["q", "k", "v"]
    rest = others[2:]
    want = call([q, q.clone(), q.clone(), *rest])
    leaf = q.clone().requires_grad_()
    do = torch.randn(want["o"].shape, generator=torch.Generator().manual_seed(1)).to(want["o"])
    o, _ = call.op(leaf, leaf, leaf, *rest, scale=0.4)
    (one,) = torch.autograd.grad(o, leaf, do)
    separate = [x.clone().requires_grad_() for x in (q, q, q)]
    again, _ = call.op(*separate, *rest, scale=0.4)
    parts = torch.autograd.grad(again, separate, do)
    close(place, {"o": o.detach(), "d": one}, {"o": want["o"], "d": sum(parts)})
    fused = torch.stack((q, q * 0.5, -q), 2).requires_grad_()  # as of one projection: [B, T, 3, H, D]
    o, _ = call.op(*fused.unbind(2), *rest, scale=0.4)
    (got,) = torch.autograd.grad(o, fused, do)
    separate = [x.detach().clone().requires_grad_() for x in fused.unbind(2)]
    again, _ = call.op(*separate, *rest, scale=0.4)
    parts = torch.autograd.grad(again, separate, do)
    close(place, {"o": o.detach(), "d": got}, {"o": again.detach(), "d": torch.stack(parts, 2)})


def a_sum_as_the_loss(place, spec):
    """o.sum().backward() hands down a gradient of stride 0 in every axis."""
    call, inputs = Call(place, spec), inputs_of(place, spec, 2, TOKENS)
    want = call(inputs, do=torch.ones(2, TOKENS, 2, 5).to(inputs[0]))
    leaves = [x.clone().requires_grad_() for x in inputs]
    o, final = call.op(*leaves, scale=0.4, output_final_state=True, **call.scalars)
    finals = final if isinstance(final, tuple) else (final,)
    generator = torch.Generator().manual_seed(8)
    ends = [torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device) for x in finals]
    (o.sum() + sum((x * d.conj()).real.sum() for x, d in zip(finals, ends, strict=True))).backward()
    close(
        place, {f"d {i}": x.grad for i, x in enumerate(leaves)}, {f"d {i}": want[f"d {i}"] for i in range(len(leaves))}
    )


def bounds_in_any_form(place, spec):
    """cu_seqlens of either integer type, every second element of another tensor, at an odd address."""
    cu = torch.tensor([0, 3, 3, 17], dtype=torch.int32, device=place.device)
    call, inputs = Call(place, spec), inputs_of(place, spec, 1, TOKENS, cu.tolist())
    want = call(inputs, cu=cu)
    strided = torch.stack((cu, cu), 1)[:, 0]
    assert not strided.is_contiguous()
    for other in (cu.long(), strided, strided.long(), torch.cat((cu[:1], cu))[1:]):
        got = call(inputs, cu=other)
        assert all(torch.equal(x, want[name]) for name, x in got.items())


@FEW_EVERYWHERE
def test_at_odd_addresses(place, spec):
    at_odd_addresses(place, spec)


@FEW_EVERYWHERE
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
def test_laid_out(place, spec, layout):
    laid_out(place, spec, layout)


# one axis after the other, on a GPU those that kernels see and those that they do not
@pytest.mark.parametrize(
    ("place", "spec", "along"),
    [
        pytest.param(*one.values, along, marks=one.marks, id=f"{one.id}-{along}")
        for one in FEW_EVERYWHERE.args[1]
        for along in (("bth", "kv") if one.marks else "bthkv")
    ],
)
def test_expanded(place, spec, along):
    expanded(place, spec, along)


SUBSETS = ("mamba2", "gla", "rwkv6", "value_u", "gateloop", "based", "key_u_norm", "transnormer", "phase_scalar_u")


@wherever([NAMED[name] for name in SUBSETS], ["mamba2", "gla", "rwkv6", "value_u", "based"], ["mamba2"])
def test_any_subset_of_gradients(place, spec):
    any_subset_of_gradients(place, spec)


SQUARE = [spec.replace(spec.name) for spec in (NAMED["plain"], NAMED["scalar_u"], NAMED["gla"], NAMED["linear"])]


@wherever(SQUARE, [spec.name for spec in SQUARE], ["gla"])
def test_the_same_tensor_twice(place, spec):
    the_same_tensor_twice(place, spec)


@FEW_EVERYWHERE
def test_a_sum_as_the_loss(place, spec):
    a_sum_as_the_loss(place, spec)


@FEW_EVERYWHERE
def test_bounds_in_any_form(place, spec):
    bounds_in_any_form(place, spec)


# --- a GPU alone


def _everything(place, spec, inputs):
    return Call(place, spec)(inputs, states_of(place, spec, 2))


@pytest.mark.gpu
@some(*FEW_COMPILED)
def test_another_device_than_the_current_one(spec):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    first, second = Place("triton", "cuda:0"), Place("triton", "cuda:1")
    want = _everything(first, spec, inputs_of(first, spec, 2, TOKENS))
    with torch.cuda.device(0):
        got = _everything(second, spec, inputs_of(second, spec, 2, TOKENS))
        assert torch.cuda.current_device() == 0
    assert all(x.device == torch.device("cuda:1") for x in got.values())
    assert all(torch.equal(x.cpu(), want[name].cpu()) for name, x in got.items())


@pytest.mark.gpu
@some(*FEW_COMPILED)
def test_two_streams(spec):
    """Each stream's work waits for its own inputs alone: what runs beside it changes nothing."""
    place = Place("triton", "cuda")
    inputs = inputs_of(place, spec, 2, TOKENS)
    want = _everything(place, spec, inputs)
    torch.cuda.synchronize()
    streams, found = [torch.cuda.Stream() for _ in range(2)], []
    for i in range(8):
        stream = streams[i % 2]
        with torch.cuda.stream(stream):
            torch.cuda._sleep(2_000_000)  # the inputs below are made late, on this stream
            late = tuple(x + 0 for x in inputs)
            found.append(_everything(place, spec, late))
            del late  # the allocator may hand its memory to this stream's next call
    torch.cuda.synchronize()
    for got in found:
        assert all(torch.equal(x, want[name]) for name, x in got.items())

"""Compiles every kernel of a shipped spec for a target, through its launchers on meta tensors."""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from typing import Any

import aot
import torch

from flagen import compiler, schedule, triton_backend
from flagen.load import load
from flagen.spec import Spec
from flagen.triton_backend import TritonBackend

# multiprocessors of an A100, an H100, a B200 and an MI300X
DEVICES = {
    name: schedule.Device(count, aot.SHARED[name], "ieee" if name.startswith("gfx") else "tf32x3")
    for name, count in {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}.items()
}
SHAPES = {
    "half": (64, 64, torch.bfloat16),
    "bf16": (128, 128, torch.bfloat16),
    "fp32": (64, 64, torch.float32),
    "odd": (60, 100, torch.bfloat16),
}
# all targets at the usual size; the other two at one of each vendor
CASES = [(target, "bf16") for target in DEVICES] + [("sm_80", "fp32"), ("sm_90", "odd"), ("gfx942", "fp32")]
# sums over rows alone, nothing for tensor cores
WITHOUT_PRODUCTS = (
    "scan_kernel", "step_kernel", "dg_kernel", "peak_kernel", "gsum_kernel", "norm_kernel", "dn_kernel"
)  # fmt: skip
# complex states and Taylor features take minutes at the usual size
SLOW_CASES = [(target, "half") for target in DEVICES]


@functools.cache
def _prepared(spec: Spec) -> tuple[Any, Any]:
    plan, entry = compiler.prepare(spec)
    return plan, load(entry)


def compiled(
    spec: Spec, target: str, monkeypatch: Any, *, B: int, T: int, H: int, K: int, V: int, dtype: torch.dtype
) -> dict[str, list[Any]]:
    """The kernels by name: of a training step in pieces, of a forward alone in one piece, and of decode."""
    monkeypatch.setattr(triton_backend, "device_of", lambda device: DEVICES[target])
    sizes = {"b": B, "t": T, "h": H, "k": K, "v": V}
    backend = TritonBackend(*_prepared(spec))
    inputs = tuple(_meta(one, sizes, dtype) for one in spec.inputs)
    now = tuple(_meta(one, sizes | {"t": 1}, dtype) for one in spec.inputs)
    constants = tuple(torch.empty(H, device="meta") for _ in backend.plan.analysis.constants)
    decided = backend.schedule

    with aot.compiling(target) as found:
        backend.schedule = lambda x, s: dataclasses.replace(decided(x, s), fwd_L=4096, bwd_L=4096)
        out = backend.forward(inputs, constants, 1.0, (), None, True, True)
        backend.backward(
            out.o, out.final, out.o, out.saved, inputs, constants, 1.0, out.final, None, (True,) * len(inputs), True
        )
        backend.schedule = lambda x, s: dataclasses.replace(decided(x, s), fwd_L=0, bwd_L=0)
        backend.forward(inputs, constants, 1.0, (), None, False, False)
        backend.step(now, constants, 1.0, tuple(torch.empty_like(x) for x in out.final))
    kernels = defaultdict(list)
    for kernel in found:
        kernels[kernel.metadata.name.removeprefix(f"{spec.name}_")].append(kernel)
    return kernels


def _meta(one: Any, sizes: dict[str, int], dtype: torch.dtype) -> torch.Tensor:
    """Gates are fp32."""
    kind = dtype if one.axes in ("bthk", "bthv") and one.name in ("q", "r", "k", "v") else torch.float32
    return torch.empty([sizes[axis] for axis in one.axes], dtype=kind, device="meta")


def too_large(kernels: dict[str, list[Any]], target: str) -> dict[str, int]:
    """Bytes of shared memory of the kernels that do not fit the target."""
    sizes = {name: max(kernel.metadata.shared for kernel in found) for name, found in kernels.items()}
    return {name: size for name, size in sizes.items() if size > aot.SHARED[target]}


def check(spec: Spec, target: str, shape: str, monkeypatch: Any) -> None:
    """Every kernel compiles and fits the target, and on sm_90 those over chunks use the tensor cores."""
    K, V, dtype = SHAPES[shape]
    kernels = compiled(
        spec, target, monkeypatch, B=1, T=8192, H=96, K=min(K, 16) if spec.taylor else K, V=V, dtype=dtype
    )
    needed = {kernel.name.removeprefix(f"{spec.name}_") for kernel in _prepared(spec)[0].kernels}
    if dtype != torch.bfloat16:
        needed.discard("gsum_kernel")  # steps are summed exactly there
    assert needed <= set(kernels), f"not launched: {needed - set(kernels)}"
    assert not too_large(kernels, target), (
        f"{too_large(kernels, target)} bytes of shared memory, of {aot.SHARED[target]}"
    )
    if target == "sm_90" and dtype == torch.bfloat16:
        for name, found in kernels.items():
            if name not in WITHOUT_PRODUCTS:
                # a backward of an erase launches this one for rows alone
                each = any if name == "intra_kernel" else all
                assert each("mma" in kernel.asm["ptx"] for kernel in found), f"{name} has no product on tensor cores"

"""A GPU for tests of launches without one: kernels are compiled for sm_90, and a launch notes what it was given."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

STREAM = 7


class Memory:
    """What launches made of the memory at addresses that they were given: numbers that depend on the kernel, its other
    arguments, and what was at all its addresses. launches: kernel, grid, arguments, addresses among them, stream."""

    def __init__(self) -> None:
        self.at: dict[int, int] = {}
        self.launches: list[tuple[Any, ...]] = []
        self.quiet = False  # whether launches do nothing, for timing
        self.stream = STREAM  # the current one

    def define(self, tensors: Any) -> None:
        self.at = {x.data_ptr(): 1 + i for i, x in enumerate(tensors) if x is not None}


class _Utils:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
        return name, f"{name} {hash(kernel)}", 32, 0, 1024


class FakeDriver:
    def __init__(self, memory: Memory, target: GPUTarget) -> None:
        self.memory, self.target = memory, target
        self.utils = _Utils()

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: Any) -> int:
        return self.memory.stream

    def launcher_cls(self, src: Any, metadata: Any) -> Any:
        kinds = [src.signature[name] for name in src.fn.arg_names]

        if self.memory.quiet:
            return lambda *arguments: None

        def launch(x: int, y: int, z: int, stream: int, function: str, packed: Any, _: Any, *rest: Any) -> None:
            arguments = rest[2:]
            assert len(arguments) == len(kinds)
            places = [i for i, kind in enumerate(kinds) if kind.startswith("*") and arguments[i] is not None]
            shown = [
                "address" if i in places else "constexpr" if kind == "constexpr" else one
                for i, (kind, one) in enumerate(zip(kinds, arguments, strict=True))
            ]
            addresses = [a if isinstance(a := arguments[i], int) else a.data_ptr() for i in places]
            self.memory.launches.append((function, packed, (x, y, z), tuple(shown), tuple(addresses), stream))
            before = tuple(self.memory.at.get(a, 0) for a in addresses)
            for i, a in zip(places, addresses, strict=True):
                self.memory.at[a] = hash((function, packed, (x, y, z), tuple(shown), before, i))

        return launch


@contextlib.contextmanager
def fake_gpu() -> Iterator[Memory]:
    """Inside, launches go to the memory that this yields."""
    memory, before = Memory(), driver._active
    driver.set_active(FakeDriver(memory, GPUTarget("cuda", 90, 32)))
    try:
        yield memory
    finally:
        driver._active = before

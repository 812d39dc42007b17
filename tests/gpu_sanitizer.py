"""Runs the kernels of every shipped spec under NVIDIA's compute-sanitizer, forward, backward and one token:

    python tests/gpu_sanitizer.py                            # memcheck, then racecheck
    python tests/gpu_sanitizer.py --tool initcheck gla rwkv6

memcheck finds accesses out of bounds and misaligned ones, racecheck hazards between the threads of a block in shared
memory, initcheck reads of global memory that nobody wrote, synccheck barriers that not all threads reach. Each tool
gets one process with small shapes: whole and cut sequences, dense and packed, fp32 and bf16. The process runs once
without the tool before, so that compiling, which is many times slower under it, is done. Exits 0 if nothing was found.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FOUND = 42  # the exit status by which the tool says that it found something
TESTS = Path(__file__).resolve().parent
TOKENS, SPANS = 40, [0, 0, 11, 28, 33]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("specs", nargs="*", help="names of shipped specs; none for all that have kernels")
    parser.add_argument("--tool", action="append", choices=TOOLS, help="may be given again; memcheck and racecheck")
    parser.add_argument("--sanitizer", help="the path of compute-sanitizer, if it is not on PATH or where CUDA is")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.run:
        run(chosen.specs, chosen.device)
        return 0
    sanitizer = chosen.sanitizer or found_sanitizer()
    if sanitizer is None:
        print(
            "compute-sanitizer was not found on PATH, in CUDA_HOME/bin or among Python's packages; it comes with the "
            "CUDA toolkit: give its path by --sanitizer",
            file=sys.stderr,
        )
        return 2
    program = [sys.executable, str(TESTS / "gpu_sanitizer.py"), "--run", "--device", chosen.device, *chosen.specs]
    print("compiling", flush=True)
    if status := subprocess.run(program, env=environment("none"), check=False).returncode:
        print(f"without a tool it ended with {status}", file=sys.stderr)
        return status
    failed = []
    for tool in chosen.tool or TOOLS[:2]:
        print(tool, flush=True)
        status = subprocess.run(command(sanitizer, tool, program), env=environment(tool), check=False).returncode
        print(f"{tool}: {'nothing found' if not status else 'errors' if status == FOUND else f'ended with {status}'}")
        failed += [tool] * bool(status)
    return 1 if failed else 0


def command(sanitizer: str, tool: str, program: Sequence[str]) -> list[str]:
    # compilers and the like that the process starts are none of its business
    options = ["--tool", tool, "--error-exitcode", str(FOUND), "--target-processes", "application-only"]
    return [sanitizer, *options, *program]


def environment(tool: str) -> dict[str, str]:
    """For memcheck every tensor is an allocation of its own: in the cache's blocks nothing is out of bounds."""
    found = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    found.pop("TRITON_INTERPRET", None)
    if tool in ("memcheck", "initcheck"):
        found["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    return found


def found_sanitizer() -> str | None:
    for place in _places():
        path = shutil.which("compute-sanitizer", path=place)
        if path is not None:
            return path
    return None


def _places() -> Iterator[str | None]:
    yield None  # PATH
    for root in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if root:
            yield str(Path(root) / "bin")
            yield str(Path(root) / "compute-sanitizer")
    for folder in sys.path:
        for path in Path(folder or ".").glob("nvidia/*/**/compute-sanitizer"):
            yield str(path.parent)


def run(names: Sequence[str], device: str) -> None:
    """Each spec in each form, in this process."""
    import torch
    from cases import SHIPPED
    from hostile import NAMED, Place, Run, inputs_of

    backend = "triton" if device.startswith("cuda") else "torch"
    for spec in [NAMED[name] for name in names] or SHIPPED:
        for dtype in (torch.float32, torch.bfloat16):
            place = Place(backend, device, dtype)
            for cu in (None, SPANS):
                for cut in (False, True):
                    found = Run(place, spec, inputs_of(place, spec, 1, TOKENS, cu), cu=cu, cut=cut).everything()
                    assert all(x.isfinite().all() for x in found.values()), (spec.name, place, cu, cut)
            one = Run(place, spec, inputs_of(place, spec, 2, 1))
            one.backend.step(one.inputs, one.constants, 0.4, tuple(x.clone() for x in one.initial))
        print(spec.name, flush=True)
    if device.startswith("cuda"):
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())

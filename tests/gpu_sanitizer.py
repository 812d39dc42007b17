"""Runs the kernels of every shipped spec under NVIDIA's compute-sanitizer, forward, backward and one token:

    python tests/gpu_sanitizer.py                            # memcheck, then racecheck
    python tests/gpu_sanitizer.py --shard 1/3                # a third of it, a sample of everything
    python tests/gpu_sanitizer.py --tool initcheck gla rwkv6

memcheck finds accesses out of bounds and misaligned ones, racecheck hazards between the threads of a block in shared
memory, initcheck reads of global memory that nobody wrote, synccheck barriers that not all threads reach. Each spec
runs with small shapes, in fp32 and bf16, once with whole sequences and once with packed ones that are cut; several
processes share these runs. They run without a tool first, so that compiling, which is many times slower under one, is
done. Exits 0 if nothing was found.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FOUND = 42  # the exit status by which the tool says that it found something
PATIENCE = 600  # seconds until a process must have begun
TESTS = Path(__file__).resolve().parent
TOKENS, SPANS = 40, [0, 0, 11, 28, 33]
FORMS = ("float32 whole", "bfloat16 packed", "float32 packed", "bfloat16 whole")
MOST_JOBS = 16
LAST = 200  # lines of what a process printed that are shown if it failed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("specs", nargs="*", help="names of shipped specs; none for all that have kernels")
    parser.add_argument("--tool", action="append", choices=TOOLS, help="may be given again; memcheck and racecheck")
    parser.add_argument("--shard", default="1/1", metavar="I/N", help="only part I of N of the runs")
    parser.add_argument("--jobs", type=int, default=min(MOST_JOBS, os.cpu_count() or 1), help="processes")
    parser.add_argument("--sanitizer", help="the path of compute-sanitizer, if it is not on PATH or where CUDA is")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--run", action="append", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.run:
        run(chosen.run, chosen.device)
        return 0
    sanitizer = chosen.sanitizer or found_sanitizer()
    if sanitizer is None:
        print(
            "compute-sanitizer was not found on PATH, in CUDA_HOME/bin or among Python's packages; it comes with the "
            "CUDA toolkit: give its path by --sanitizer",
            file=sys.stderr,
        )
        return 2
    units = sharded(chosen.specs or shipped(), chosen.shard)
    base = [sys.executable, str(TESTS / "gpu_sanitizer.py"), "--device", chosen.device]
    parts = [units[i :: chosen.jobs] for i in range(min(chosen.jobs, len(units)))]
    programs = [base + [word for unit in part for word in ("--run", unit)] for part in parts]
    print(f"compiling for {len(units)} runs, {len(programs)} processes", flush=True)
    if status := all_of(programs, "none"):
        print(f"without a tool it ended with {status}", file=sys.stderr)
        return status
    failed = []
    for tool in chosen.tool or TOOLS[:2]:
        status = all_of([command(sanitizer, tool, program) for program in programs], tool)
        said = "nothing found" if not status else "errors" if status == FOUND else f"ended with {status}"
        print(f"{tool}: {said}", flush=True)
        failed += [tool] * bool(status)
    return 1 if failed else 0


def shipped() -> list[str]:
    from cases import SHIPPED

    return [spec.name for spec in SHIPPED]


def sharded(names: Sequence[str], shard: str) -> list[str]:
    """Runs as "name dtype form", of all or of a part: in an order by chance, the same in every process."""
    part, _, count = shard.partition("/")
    runs = [f"{name} {form}" for name in names for form in FORMS]
    runs.sort(key=lambda run: hashlib.sha256(run.encode()).digest())
    return runs[int(part) - 1 :: int(count)]


def all_of(programs: Sequence[Sequence[str]], tool: str) -> int:
    """Runs them at once; the status of the worst, of which what it printed is shown: what was found comes last."""
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, str(i)) for i in range(len(programs))]
        started = []
        for program, log in zip(programs, logs, strict=True):
            with log.open("wb") as file:
                started.append(subprocess.Popen(program, env=environment(tool), stdout=file, stderr=file))
        statuses = [one.wait() for one in started]
        worst = max(statuses, key=lambda status: (status not in (0, FOUND), status == FOUND))
        for status, log in zip(statuses, logs, strict=True):
            if status:
                print("\n".join(log.read_text(errors="replace").splitlines()[-LAST:]), flush=True)
    return worst


def command(sanitizer: str, tool: str, program: Sequence[str]) -> list[str]:
    # Compilers and the like that the process starts are none of its business. A process that has not begun with CUDA
    # after 10 s, as on busy cores, is given up by default, and then waits for ever.
    options = ["--tool", tool, "--error-exitcode", str(FOUND), "--launch-timeout", str(PATIENCE)]
    options += ["--target-processes", "application-only"]
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


def run(units: Sequence[str], device: str) -> None:
    """These runs, in this process."""
    import torch
    from hostile import NAMED, Place, Run, inputs_of

    for unit in units:
        name, dtype, form = unit.split()
        spec, backend = NAMED[name], "triton" if device.startswith("cuda") else "torch"
        place = Place(backend, device, getattr(torch, dtype))
        cu = SPANS if form == "packed" else None
        found = Run(place, spec, inputs_of(place, spec, 1, TOKENS, cu), cu=cu, cut=cu is not None).everything()
        assert all(x.isfinite().all() for x in found.values()), unit
        one = Run(place, spec, inputs_of(place, spec, 2, 1))
        one.backend.step(one.inputs, one.constants, 0.4, tuple(x.clone() for x in one.initial))
        print(unit, flush=True)
    if device.startswith("cuda"):
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())

"""Cold and warm starts: the first forward and backward of a new process, whose caches are empty or full.

`python -m flagen.bench_child` is the process: it reads a JSON object from stdin and prints one, with the seconds of the
first forward and of the first backward after imports (of torch, Triton and flagen, and what torch itself imports for a
first gradient) and after the device has been woken.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .errors import FlagenError

ROOT = str(Path(__file__).parent.parent)


def first_call(
    spec_json: str, sizes: tuple[int, ...], dtype: str, device: str, backend: str, caches: Path, seconds: float
) -> dict[str, float]:
    """Seconds of the first forward and backward in a new process with its caches in the folder `caches`. Raises
    FlagenError, with what the process said, where it fails or takes longer than `seconds`."""
    asked = {"spec": spec_json, "sizes": list(sizes), "dtype": dtype, "device": device, "backend": backend}
    places = {
        "FLAGEN_CACHE_DIR": str(caches / "flagen"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "FLAGEN_CACHE": "on",
    }
    paths = [ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | places | {"PYTHONPATH": os.pathsep.join(paths)}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "flagen.bench_child"], input=json.dumps(asked), env=environment, text=True,
            capture_output=True, timeout=seconds, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise FlagenError(f"the new process took longer than {seconds:.0f} s") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        raise FlagenError(f"the new process ended with status {done.returncode}: {last}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> int:
    """In the new process."""
    import contextlib

    import torch

    import flagen

    from .bench import make_inputs
    from .samples import make_scalars
    from .schedule import Shape

    with contextlib.suppress(ImportError):
        import triton.language  # noqa: F401
    asked: dict[str, Any] = json.load(sys.stdin)
    device = asked["device"]
    spec = flagen.Spec.from_json(asked["spec"])
    scalars: dict[str, Any] = make_scalars(spec)
    _wake(device)
    inputs = make_inputs(spec, Shape.dense(*asked["sizes"]), getattr(torch, asked["dtype"]), device, scalars)

    def now() -> float:
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter()

    began = now()
    op = flagen.compile(spec, backend=asked["backend"])
    o, _ = op(*inputs, **scalars)
    middle = now()
    torch.autograd.grad(o, inputs, torch.ones_like(o), allow_unused=True)
    print(json.dumps({"forward": middle - began, "backward": now() - middle}))
    return 0


def _wake(device: str) -> None:
    """What torch imports for the first gradient of a process, SymPy among it, is torch's time."""
    import torch

    x = torch.ones(2, device=device, requires_grad=True)
    torch.autograd.grad(x * 2, x, torch.ones_like(x))


if __name__ == "__main__":
    sys.exit(main())

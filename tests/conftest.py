"""What holds for every test: which process runs it, where caches go, how many threads.

Triton decides at its import whether it interprets kernels, so the suite takes two processes (`make test`). Files
named test_interp_*.py run only with TRITON_INTERPRET=1, all others only without it. Tests marked `gpu` are skipped
without CUDA; `-m gpu -n N` gives those of one spec to one process, since what they take is compiling its kernels.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import hypothesis
import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2

# slow machines are no failure; in CI every run draws the same examples
hypothesis.settings.register_profile("flagen", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("flagen")


def pytest_configure(config: pytest.Config) -> None:
    # before any test module is imported: subprocesses of tests inherit all of it
    for name in ("FLAGEN_CACHE", "FLAGEN_DEBUG", "FLAGEN_LOGS"):
        os.environ.pop(name, None)
    os.environ["FLAGEN_CACHE_DIR"] = tempfile.mkdtemp(prefix="flagen-test-")
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(THREADS)


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(os.environ["FLAGEN_CACHE_DIR"], ignore_errors=True)


def pytest_report_header(config: pytest.Config) -> str:
    which = "interpreter: only test_interp_*.py" if INTERPRETED else "compiled: all but test_interp_*.py"
    return f"triton: {which}"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    if config.option.markexpr != "gpu":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class BySpec(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return compiled_by(nodeid)

    return BySpec(config, log)


def compiled_by(nodeid: str) -> str:
    """The tests that run the same kernels, those of one spec and dtype; what shares none with others is by itself."""
    from hostile import NAMED

    file, _, rest = nodeid.partition("::")
    parts = rest.partition("[")[2].rstrip("]").split("-")
    spec = next((part for part in parts if part in NAMED or part.startswith("raw")), None)
    place = next((part for part in parts if part.startswith("triton_cuda")), None)
    # those of a layout call an op, whose kernels have other constants than hostile.Run's
    is_layout = "layout" in file
    if spec is None or (place is None and not is_layout):
        return nodeid
    return f"{spec} {place or 'triton_cuda'} {'op' if is_layout else 'run'}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = [item for item in items if Path(item.path).name.startswith("test_interp_") == INTERPRETED]
    chosen = set(here)
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = here
    if any(item.get_closest_marker("gpu") for item in items) and not _has_cuda():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    import torch

    torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    """What a test draws without a generator of its own is the same in every run."""
    import torch

    torch.manual_seed(0)

"""The compile tests under other releases of Triton than the one that is installed: make compile-matrix.

    python tests/triton_versions.py [VERSION ...] [--folder DIR] [-k EXPRESSION] [--collect-only]

Each release is installed, by pip and without what it depends on, into a folder of its own, where it stays for the next
time, and tests/kernels/test_compile_*.py are run with that folder first on the path: every kernel compiled for every
target, without a GPU. "installed" is the release at hand. -k chooses cases as pytest's does: "gla and sm_90".

Exit status: 0 if all passed under each release, 1 otherwise. A release that is not the one that was asked for, and an
expression that chooses nothing, are failures.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

VERSIONS = ("3.6.0", "3.9.0")  # the one that a GPU was seen with, and the newest release
INSTALLED = "installed"
ROOT = Path(__file__).resolve().parents[1]
# the release that is found, before anything is believed of it
NAMED = "import triton; print(triton.__version__)"


def environment(version: str, folder: Path) -> dict[str, str]:
    """For a process with that release: the first one on its path, and a cache that no other shares."""
    found = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if version == INSTALLED:
        return found
    place = folder / version
    path = [str(place), str(ROOT), found.get("PYTHONPATH", "")]
    return found | {"PYTHONPATH": os.pathsep.join(filter(None, path)), "TRITON_CACHE_DIR": str(place / "cache")}


def found_version(version: str, folder: Path) -> str:
    """The release that a process with this environment imports; "" if none."""
    command = [sys.executable, "-c", NAMED]
    run = subprocess.run(command, env=environment(version, folder), capture_output=True, text=True, check=False)
    return run.stdout.strip()


def install(version: str, folder: Path) -> None:
    """Into a folder of its own, unless it is there."""
    place = folder / version
    if (place / "triton").is_dir():
        return
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, "--target", str(place), f"triton=={version}"], check=True)


def run(version: str, folder: Path, options: list[str]) -> str:
    """Runs the compile tests; returns what is wrong, or ""."""
    found = found_version(version, folder)
    if not found or version not in (INSTALLED, found):
        return f"Triton {found or 'cannot be imported'}, not {version}"
    print(f"--- Triton {found}", flush=True)
    files = sorted(str(path) for path in (ROOT / "tests" / "kernels").glob("test_compile_*.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, *files]
    code = subprocess.run(command, cwd=ROOT, env=environment(version, folder), check=False).returncode
    return {0: "", 5: "no case was chosen"}.get(code, f"pytest's exit status is {code}")


def main(arguments: list[str] | None = None) -> int:
    """See the module's documentation."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("versions", nargs="*", default=list(VERSIONS), metavar="VERSION")
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv" / "triton")
    parser.add_argument("-k", dest="expression", default="", help="the cases, as pytest's -k")
    parser.add_argument("--collect-only", action="store_true", help="show the cases, compile nothing")
    given = parser.parse_args(arguments)
    options = ["-k", given.expression] if given.expression else []
    options += ["--collect-only"] if given.collect_only else []
    wrong = {}
    for version in given.versions:
        if version != INSTALLED:
            install(version, given.folder)
        wrong[version] = run(version, given.folder, options)
    for version, problem in wrong.items():
        print(f"Triton {version}: {problem or ('collected' if given.collect_only else 'all passed')}")
    return int(any(wrong.values()))


if __name__ == "__main__":
    sys.exit(main())

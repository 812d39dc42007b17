"""cache and env: what is on disk, and what a bug report needs."""

from __future__ import annotations

import argparse
import platform
import sys

from . import __version__, config
from .errors import ConfigError

UNITS = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"))
PACKAGES = ("torch", "triton", "jinja2", "sympy", "einops")


def cache(arguments: argparse.Namespace) -> int:
    """dir, ls, clear, verify. verify has status 1 where an entry is damaged."""
    return {"dir": _directory, "ls": _list, "clear": _clear, "verify": _verify}[arguments.action]()


def _directory() -> int:
    from .cache import root

    print(root())
    return 0


def _list() -> int:
    from .cache import entries

    found = entries()
    for one in found:
        print(f"{one.name:20} {one.key[:16]}  {one.size / 1024:6.0f} kB  {age(one.age):>6}  {one.path}")
    print(f"{len(found)} entries, {sum(one.size for one in found) / 1024:.0f} kB", file=sys.stderr)
    return 0


def _clear() -> int:
    from .cache import clear, root

    print(f"removed {clear()} entries from {root()}")
    return 0


def _verify() -> int:
    from .cache import verify_all

    found = verify_all()
    for one, fault in found:
        print(f"{one.name:20} {one.key[:16]}  {fault or 'as written'}")
    damaged = sum(bool(fault) for _, fault in found)
    print(f"{len(found)} entries, {damaged} damaged", file=sys.stderr)
    return 1 if damaged else 0


def age(seconds: float) -> str:
    """Seconds in the largest unit of which there is one: 3 d, 2 h, 40 s."""
    for size, unit in UNITS:
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return "0 s"


def env(arguments: argparse.Namespace) -> int:
    """Versions, devices and settings."""
    print(f"flagen   {__version__}")
    print(f"python   {platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in PACKAGES:
        print(f"{package:8} {_version(package)}")
    _devices()
    for variable in config.VARIABLES:
        value = config.raw(variable.name)
        print(f"{variable.name} = {value!r}" if value else f"{variable.name} unset: {variable.default}")
    print(f"cache: {_cache_place()}")
    return 0


def _version(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> None:
    import torch

    print(f"threads  {torch.get_num_threads()}")
    if not torch.cuda.is_available():
        print("gpu      none; the torch backend runs on the CPU")
        return
    print(f"cuda     {torch.version.cuda or torch.version.hip}")
    for index in range(torch.cuda.device_count()):
        one = torch.cuda.get_device_properties(index)
        print(f"gpu {index}    {one.name}, capability {one.major}.{one.minor}, {one.total_memory / 2**30:.0f} GiB")


def _cache_place() -> str:
    from .cache import root

    try:
        return str(root())
    except (OSError, ConfigError) as error:
        return f"none ({error})"

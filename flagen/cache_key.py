"""What the text of a generated module follows from, as one key. Equal keys mean equal text.

The key is a sha256 over: the format of entries, the spec, flagen's own sources that shape the text, and the versions of
flagen, of what it generates with and of what the text is written for. No path, host, time, device or setting is in it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMAT = 1
_PACKAGE = Path(__file__).parent
# modules that no generated text depends on; every other one is part of the key, so that a new module never is forgotten
NOT_SHAPING = (
    "__init__", "__main__", "bench*", "cache", "cache_key", "checks", "cli*", "compare", "compiler",
    "config", "cost*", "demo*", "fuzz*", "kept", "kinks", "load", "logs", "op", "op_*", "private", "reference*",
    "samples", "schedule*", "testing*", "torch_*", "triton_*", "tuned*",
)  # fmt: skip
# the distributions that a version is looked for in
_DISTRIBUTIONS = {
    "jinja2": ("jinja2",),
    "sympy": ("sympy",),
    "torch": ("torch",),
    "triton": ("triton", "pytorch-triton", "pytorch-triton-rocm", "pytorch-triton-xpu", "triton-windows"),
}


@dataclass(frozen=True)
class Key:
    """The name of a spec and the fields that its text follows from, JSON values by name."""

    name: str
    fields: dict[str, Any]

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_]{0,40}", self.name):  # it becomes part of a path
            raise ValueError(f"{self.name!r} cannot name an entry of the cache")

    @functools.cached_property
    def digest(self) -> str:
        """64 hexadecimal digits."""
        return digest(self.fields)

    @property
    def directory(self) -> str:
        """The name of the entry's directory."""
        return f"{self.name}-{self.digest[:16]}"


def make_key(name: str, spec_json: str) -> Key:
    """The key of a spec, given by its name and JSON form. Raises OSError where flagen's own sources cannot be read."""
    fields = {"format": FORMAT, "spec": json.loads(spec_json), "sources": sources(), "versions": versions()}
    return Key(name, fields)


def canonical(value: Any) -> bytes:
    """The one JSON text of a value, as bytes. Raises ValueError on nan and infinities."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def digest(value: Any) -> str:
    """sha256 over the canonical JSON of a value, in hexadecimal."""
    return hashlib.sha256(canonical(value)).hexdigest()


def flat(fields: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """The fields with nested ones under dotted names, as short text: for messages."""
    found: dict[str, str] = {}
    for name, value in sorted(fields.items()):
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return found


@functools.cache
def sources() -> str:
    """sha256 over the templates and the modules of flagen that shape the text, by content."""
    return digest_of_files(_PACKAGE, shaping_files(_PACKAGE))


def shaping_files(package: Path) -> list[Path]:
    """The files below `package` that shape the text."""
    modules = [path for path in package.glob("*.py") if not any(Path(path.stem).match(one) for one in NOT_SHAPING)]
    templates = [path for path in (package / "templates").rglob("*.jinja") if path.is_file()]
    if not modules or not templates:
        raise FileNotFoundError(f"flagen's own sources are not files in {package}")
    return modules + templates


def digest_of_files(root: Path, files: list[Path]) -> str:
    """sha256 over paths below `root` and contents, each after its length, so that no two sets of files agree."""
    total = hashlib.sha256()
    for name, path in sorted((path.relative_to(root).as_posix(), path) for path in files):
        for part in (name.encode(), path.read_bytes()):
            total.update(len(part).to_bytes(8, "little") + part)
    return total.hexdigest()


@functools.cache
def versions() -> dict[str, str]:
    """The versions of flagen and of what its text depends on, "none" if not installed. Imports none of them."""
    from importlib import metadata

    from . import __version__

    found = {"flagen": __version__}
    for package, distributions in _DISTRIBUTIONS.items():
        found[package] = "none"
        for distribution in distributions:
            try:
                found[package] = metadata.version(distribution)
                break
            except metadata.PackageNotFoundError:
                continue
    return found

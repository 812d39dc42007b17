"""The cache of generated modules: one directory an entry, addressed by content, published by one rename, never edited.

    <root>/v1/<name>-<16 hexadecimal digits of the key>/kernels.py     the generated module
                                                        meta.json      the key in full, its fields, checksums, facts

Whoever can write an entry can have this user run code, so every directory must be writable by this user alone. The
checksums guard against truncation and accidents, not against somebody who can write there. Nothing is pickled and
nothing here is executed. No entry is locked: two processes that miss make the same text, and the first rename wins.
Where the disk cannot be used the entries stay in memory, with one warning.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import logging
import os
import re
import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn

from . import config, private
from .cache_key import FORMAT, Key, digest, flat
from .errors import CacheError

SOURCE, META = "kernels.py", "meta.json"
STALE_SECONDS = 3600.0  # a staging directory this old belongs to a process that died
_ENTRY = re.compile(r"[a-z][a-z0-9_]{0,40}-[0-9a-f]{16}")
_STAGING = re.compile(r"\.[0-9a-f]{16}\..+")
_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)

_logger = logging.getLogger("flagen.cache")
_memory: dict[tuple[str, str, str], Entry] = {}
_warned: set[str] = set()
_lock = threading.Lock()  # held for single operations on the two above, never while files are read or text is made


def _new_lock() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)  # a thread that held it does not exist in the child


class CacheWarning(UserWarning):
    """The cache cannot be used as it should be; flagen goes on without it."""


@dataclass(frozen=True)
class Entry:
    """One generated module. `path`: its file, None where it is in memory only. `facts`: JSON values kept beside it."""

    name: str
    key: str
    source: str
    facts: dict[str, Any]
    path: Path | None = None


@dataclass(frozen=True)
class Listed:
    """An entry on disk as the command line shows it: its size in bytes, and its age in seconds since it was written."""

    name: str
    key: str
    size: int
    age: float
    path: Path


class _DamagedError(Exception):
    """An entry whose content is not what was written."""


def root() -> Path:
    """Where entries are kept: $FLAGEN_CACHE_DIR, else $XDG_CACHE_HOME/flagen, else ~/.cache/flagen. Nothing is made.

    Raises OSError if there is no home directory, ConfigError if the variable is not allowed.
    """
    if (chosen := config.cache_dir()) is not None:
        return chosen
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))  # ignored when relative, as its specification says
    return (shared if shared.is_absolute() else config.home() / ".cache") / "flagen"


def find(key: Key) -> Entry | None:
    """The entry of a key, verified; None on a miss. With FLAGEN_CACHE=readonly a miss raises CacheError; with readonly
    or verify so does an entry that is damaged or cannot be read.
    """
    mode = config.cache_mode()
    with _lock:
        kept = _memory.get(_slot(mode, key))
    if mode == "off" or (kept is not None and mode != "verify"):
        return kept
    try:
        entry = _read(_entries_root(make=mode != "readonly") / key.directory, key.name, key.digest)
    except FileNotFoundError:
        _log_miss(key)
        if mode == "readonly":
            _refuse(mode, key, "there is no such entry")
        return None
    except (_DamagedError, OSError) as error:
        if mode != "on":
            _refuse(mode, key, str(error))
        if isinstance(error, _DamagedError):
            _warn(f"{error}; it is made again", once=str(error))
        else:
            _warn_memory_only(error)
        return None
    _logger.info("hit: %s", entry.path)
    _keep(mode, key, entry)
    return entry


def store(key: Key, source: str, facts: dict[str, Any]) -> Entry:
    """The entry of a module made for a key, published unless it is there. `facts` must be of JSON values.

    With FLAGEN_CACHE=verify an entry that is there must be the same, else CacheError; with readonly always CacheError.
    """
    mode = config.cache_mode()
    entry = Entry(key.name, key.digest, source, facts)
    if mode == "readonly":
        _refuse(mode, key, "the entry that is there does not serve")
    if mode != "off":
        try:
            entries_root = _entries_root(make=True)
            there = _compared(entries_root / key.directory, key, entry) if mode == "verify" else None
            entry = there or _publish(entries_root, key, entry)
        except (_DamagedError, OSError) as error:
            if mode == "verify":
                _refuse(mode, key, str(error))
            _warn_memory_only(error)
    _keep(mode, key, entry)
    return entry


def unusable(name: str, error: OSError) -> None:
    """Says once that there is no cache. With FLAGEN_CACHE=readonly or verify raises CacheError instead."""
    if (mode := config.cache_mode()) in ("readonly", "verify"):
        raise CacheError(f"{name}: FLAGEN_CACHE={mode}, but the cache cannot be used: {error}") from None
    _warn_memory_only(error)


def entries() -> list[Listed]:
    """The entries on disk, by name and age. Their content is not checked: see verify_all."""
    found = []
    for path in _entry_directories():
        try:
            files = [path / SOURCE, path / META]
            size = sum(file.stat().st_size for file in files if file.is_file())
            age = max(0.0, time.time() - path.stat().st_mtime)
        except FileNotFoundError:
            continue  # cleared meanwhile
        name, _, short = path.name.rpartition("-")
        found.append(Listed(name, _written_key(path) or short, size, age, path))
    return sorted(found, key=lambda one: (one.name, one.age))


def verify_all() -> list[tuple[Listed, str]]:
    """The entries on disk, each with what is wrong with it: "" where it is as it was written. Raises CacheError if
    others can write where the entries are.
    """
    try:
        _entries_root(make=False)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CacheError(f"the cache cannot be trusted: {error}") from None
    return [(one, _fault(one)) for one in entries()]


def clear() -> int:
    """Removes every entry, and what processes that died left behind; returns the number of entries removed."""
    entries_root, removed = root() / f"v{FORMAT}", 0
    for path in list(_entry_directories()):
        removed += _removed(path)
    for path in entries_root.iterdir() if entries_root.is_dir() else ():
        with contextlib.suppress(FileNotFoundError):  # its writer has renamed or removed it meanwhile
            if _STAGING.fullmatch(path.name) and time.time() - path.lstat().st_mtime > STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
    with _lock:
        _memory.clear()
    return removed


def _slot(mode: str, key: Key) -> tuple[str, str, str]:
    try:
        place = "" if mode == "off" else str(root())
    except OSError:
        place = ""
    return mode, place, key.digest


def _keep(mode: str, key: Key, entry: Entry) -> None:
    with _lock:
        _memory[_slot(mode, key)] = entry


def _entries_root(*, make: bool) -> Path:
    """<root>/v1, checked, and made where it is missing if `make`."""
    base = root()
    path = base / f"v{FORMAT}"
    for one in (base, path):
        if make:
            private.make_directory(one)
        private.check_directory(one, root_may_own=not make)
    return path


def _read(directory: Path, name: str, key: str) -> Entry:
    """The entry in `directory`, verified. FileNotFoundError: there is none. _DamagedError: it is not whole."""
    root_may_own = config.cache_mode() == "readonly"
    before = os.lstat(directory)
    try:
        private.check_directory(directory, root_may_own=root_may_own)
        meta = json.loads(private.read(directory / META, root_may_own=root_may_own))
        content = private.read(directory / SOURCE, root_may_own=root_may_own)
        _check(meta, content, {"format": FORMAT, "name": name, "key": key})
        return Entry(name, key, content.decode(), meta["facts"], directory / SOURCE)
    except FileNotFoundError as error:
        if (now := os.lstat(directory)).st_ino != before.st_ino or now.st_ctime_ns != before.st_ctime_ns:
            raise  # the whole entry was removed meanwhile, or another put in its place: a miss
        raise _DamagedError(f"the cache entry {directory} lacks {Path(error.filename).name}") from None
    except (private.NotPrivateError, ValueError, RecursionError) as error:
        raise _DamagedError(f"the cache entry {directory} is damaged: {error}") from None


def _check(meta: Any, content: bytes, expected: dict[str, Any]) -> None:
    """Raises ValueError where meta.json is not that of the entry, or a checksum in it does not fit."""
    if not isinstance(meta, dict) or any(meta.get(field) != value for field, value in expected.items()):
        raise ValueError(f"{META} is not that of this entry")
    if digest(meta.get("fields")) != expected["key"]:
        raise ValueError(f"the fields in {META} do not give its key")
    if meta.get("source_sha256") != sha256(content).hexdigest():
        raise ValueError(f"the checksum of {SOURCE} does not fit")
    if not isinstance(meta.get("facts"), dict) or meta.get("facts_sha256") != digest(meta["facts"]):
        raise ValueError("the checksum of the facts does not fit")


def _publish(entries_root: Path, key: Key, entry: Entry) -> Entry:
    """Writes the entry beside its place and renames it there. The result has the text that is in memory: on a network
    disk the winner's directory may stay unseen for a while.
    """
    final = entries_root / key.directory
    published = replace(entry, path=final / SOURCE)
    staging = Path(tempfile.mkdtemp(prefix=f".{key.digest[:16]}.", dir=entries_root))
    try:
        content = entry.source.encode()
        private.write(staging / SOURCE, content)
        private.write(staging / META, _meta(key, entry, content))
        for _ in range(2):
            try:
                staging.rename(final)
            except OSError as error:
                if error.errno not in _TAKEN:
                    raise
            else:
                _logger.info("written: %s", published.path)
                return published
            # somebody else was faster, or what is there is damaged
            try:
                if _read(final, entry.name, entry.key) == published:
                    return published
            except FileNotFoundError:
                return published
            except _DamagedError:
                pass
            _removed(final)
        raise FileExistsError(errno.EEXIST, "others keep writing other text there", str(final))
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _meta(key: Key, entry: Entry, content: bytes) -> bytes:
    meta = {
        "format": FORMAT,
        "name": entry.name,
        "key": entry.key,
        "fields": key.fields,
        "source_sha256": sha256(content).hexdigest(),
        "facts": entry.facts,
        "facts_sha256": digest(entry.facts),
    }
    return (json.dumps(meta, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def _removed(path: Path) -> bool:
    """Removes an entry, by one rename first, so that nobody reads half of it. False if it was gone already."""
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name[-16:]}.", dir=path.parent))
    try:
        path.rename(aside / "old")
    except FileNotFoundError:
        return False
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return True


def _compared(directory: Path, key: Key, made: Entry) -> Entry | None:
    """The entry that is there, if there is one. Raises CacheError if it differs from the one just made."""
    try:
        there = _read(directory, key.name, key.digest)
    except FileNotFoundError:
        return None
    if there == replace(made, path=there.path):
        return there
    import difflib

    texts = there.source.splitlines(), made.source.splitlines()
    changes = difflib.unified_diff(*texts, "cached", "generated", n=1, lineterm="")
    shown = list(itertools.islice(changes, 12)) or ["the facts beside the text differ"]
    _refuse("verify", key, "what is generated now is not what is cached:\n    " + "\n    ".join(shown) + "\n   ")


def _entry_directories() -> Iterator[Path]:
    path = root() / f"v{FORMAT}"
    if path.is_dir():
        yield from sorted(one for one in path.iterdir() if _ENTRY.fullmatch(one.name) and not one.is_symlink())


def _written_key(directory: Path) -> str:
    """The key in full as meta.json has it, if it can be read and fits the directory."""
    try:
        key = json.loads((directory / META).read_bytes()).get("key", "")
    except (OSError, ValueError, AttributeError, RecursionError):
        return ""
    return key if isinstance(key, str) and re.fullmatch(directory.name[-16:] + r"[0-9a-f]{48}", key) else ""


def _fault(listed: Listed) -> str:
    try:
        _read(listed.path, listed.name, listed.key)
    except FileNotFoundError:
        return "it was removed meanwhile"
    except (_DamagedError, OSError) as error:
        return str(error)
    return ""


def _refuse(mode: str, key: Key, reason: str) -> NoReturn:
    fields = "".join(f"\n    {name} = {value}" for name, value in flat(key.fields).items())
    remedy = {
        "readonly": "fill the cache with FLAGEN_CACHE=on first, with these versions of the packages",
        "verify": "remove the entry with 'flagen cache clear', and report this if it comes back",
    }[mode]
    try:
        place = str(root() / f"v{FORMAT}" / key.directory)
    except OSError as error:
        place = f"{key.directory} ({error})"
    raise CacheError(
        f"{key.name}: FLAGEN_CACHE={mode}, {place}: {reason}; {remedy}. The key's fields:{fields}"
    ) from None


def _log_miss(key: Key) -> None:
    """At debug level also the fields in which the nearest entry of that name differs."""
    _logger.info("miss: %s", key.directory)
    if not _logger.isEnabledFor(logging.DEBUG):
        return
    wanted, nearest = flat(key.fields), None
    for directory in _entry_directories():
        if directory.name.rpartition("-")[0] != key.name:
            continue
        try:
            there = flat(json.loads((directory / META).read_bytes())["fields"])
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            continue
        differing = sorted(name for name in wanted | there if wanted.get(name) != there.get(name))
        if nearest is None or len(differing) < len(nearest):
            nearest = [f"{name}: {there.get(name)} there, {wanted.get(name)} now" for name in differing]
    _logger.debug("nearest entry: %s", "; ".join(nearest) if nearest else "none of that name")


def _warn_memory_only(error: BaseException) -> None:
    _warn(
        f"the cache cannot be used ({error}); generated modules are kept in memory only, and made again by the next "
        "process. FLAGEN_CACHE=off does that without this warning",
        once="memory",
    )


def _warn(message: str, once: str) -> None:
    with _lock:
        if once in _warned:
            return
        _warned.add(once)
    warnings.warn(f"flagen: {message}", CacheWarning, stacklevel=2)

"""Choices of tiles, warps, stages and pieces that were timed once (`flagen tune`) and are remembered by device.

A table is a JSON file: a user's own beside the cache, `tuned/<device>.json`, and those that come with the package. The
user's goes first. An entry holds for one text of the kernels, one version of Triton, one dtype and one pair of head
sizes, and for numbers of programs and tokens near its own: what was checked and timed is what runs. A table that cannot
be read, or that is not one, is left aside with one warning; so is an entry that no longer fits the schedule.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import re
import threading
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import cache, config, private
from .errors import ConfigError, PlanError

if TYPE_CHECKING:
    from .schedule import Schedule, Shape

FORMAT = 1
SHIPPED = Path(__file__).parent / "tuned"
DTYPES = ("bfloat16", "float16", "float32")
# what a choice may change, and what it may be
TILES = ("fwd", "bwd", "intra", "bwd_intra")
ALLOWED = {
    "BT": (16, 32, 64, 128),
    "BV": (16, 32, 64, 128, 256),
    "num_warps": (1, 2, 4, 8, 16),
    "num_stages": (1, 2, 3, 4),
}
PIECES = ("fwd_L", "bwd_L")
SHARED_CHUNKS = (("fwd", "intra"), ("bwd", "bwd_intra"))  # of which one writes what the other reads, by chunks

Choice = Mapping[str, Any]
_ignored: list[bool] = []


class TunedWarning(UserWarning):
    """A table of tuned choices was left aside."""


class TableError(PlanError):
    """A table or a choice is not one, or does not fit the schedule."""


@dataclass(frozen=True, slots=True)
class Place:
    """What a choice holds for. text: name and digest of the generated module; programs, tokens: the powers of two that
    are nearest to sequences times heads and to the tokens of one."""

    text: str
    triton: str
    dtype: str
    K: int
    V: int
    programs: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Entry:
    """A choice and its place; default_ms, ms: the medians that it was chosen by; versions: of what it was made with."""

    place: Place
    choice: Choice
    default_ms: float
    ms: float
    versions: str = ""


def place_of(module: str, shape: Shape, dtype: Any) -> Place:
    """The place of a call. module: the name of the generated module, which holds the digest of its text."""
    return Place(
        text=module.removeprefix("_flagen_"),
        triton=_triton(),
        dtype=str(dtype).removeprefix("torch."),
        K=shape.K,
        V=shape.V,
        programs=bucket(shape.N * shape.H),
        tokens=bucket(shape.T),
    )


def bucket(number: int) -> int:
    """The nearest power of two, by ratio."""
    return 1 << round(math.log2(max(1, number)))


@functools.cache
def _triton() -> str:
    from importlib import metadata

    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "none"


# --- what the Triton backend asks


def chosen(schedule: Schedule, module: str, shape: Shape, dtype: Any, device: str) -> Schedule:
    """The schedule with what is remembered for this place, or as it is. device: its name, as the driver gives it."""
    place = place_of(module, shape, dtype)
    choice = lookup(place, device)
    if choice is None:
        return schedule
    try:
        return applied(schedule, choice)
    except TableError as error:
        _warn(f"a tuned choice for {place.text} on {device} is left aside: {error}")
        return schedule


def lookup(place: Place, device: str) -> Choice | None:
    """What is remembered for a place: by the user's table, else by the one that came with the package."""
    if _ignored:
        return None
    return _choices(device, str(_user_folder() or "")).get(place)


@functools.lru_cache(maxsize=16)
def _choices(device: str, folder: str) -> dict[Place, Choice]:
    """Of both tables, the user's over the shipped ones."""
    found: dict[Place, Choice] = {}
    for path, shipped in ((SHIPPED / file_name(device), True), (Path(folder or "/") / file_name(device), False)):
        if shipped or folder:
            found.update({one.place: one.choice for one in _entries(path, device, shipped)})
    return found


def _entries(path: Path, device: str, shipped: bool) -> list[Entry]:
    """The entries of a table; none, with a warning, where it is broken; none where there is none."""
    try:
        return read(path, device, shipped=shipped)
    except FileNotFoundError:
        return []
    except (OSError, TableError) as error:
        _warn(f"the tuned choices in {path} are left aside: {error}")
        return []


def _user_folder() -> Path | None:
    if config.cache_mode() == "off":
        return None
    try:
        return cache.root() / "tuned"
    except (OSError, ConfigError):
        return None


def file_name(device: str) -> str:
    """Of the table of a device."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


@contextlib.contextmanager
def ignored() -> Iterator[None]:
    """Inside, nothing is remembered, in all threads: while other choices are timed."""
    _ignored.append(True)
    try:
        yield
    finally:
        _ignored.pop()


# --- choices


def applied(schedule: Schedule, choice: Choice) -> Schedule:
    """The schedule with the tiles and pieces of a choice. Raises TableError where it is none or does not fit."""
    changes: dict[str, Any] = {}
    for name, value in choice.items():
        if not hasattr(schedule, name) or name not in TILES + PIECES:
            raise TableError(f"{name!r} is nothing that may be chosen; that is {', '.join(TILES + PIECES)}")
        changes[name] = _tile(getattr(schedule, name), name, value) if name in TILES else _tokens(name, value)
    made = dataclasses.replace(schedule, **changes)
    for one, other in SHARED_CHUNKS:
        if getattr(made, one).BT != getattr(made, other).BT:
            raise TableError(f"{one} and {other} must have the same BT")
    for name in TILES:
        if made.LC % getattr(made, name).BT:
            raise TableError(
                f"{name}: BT={getattr(made, name).BT} does not divide the {made.LC} tokens of a checkpoint"
            )
    for name in PIECES:
        if getattr(made, name) % made.LC:
            raise TableError(f"{name}={getattr(made, name)} is no multiple of the {made.LC} tokens of a checkpoint")
    return made


def _tile(tile: Any, name: str, value: Any) -> Any:
    if not isinstance(value, Mapping) or not value:
        raise TableError(f"{name} must be an object of {', '.join(ALLOWED)}, got {value!r}")
    for part, number in value.items():
        if part not in ALLOWED or type(number) is not int or number not in ALLOWED[part]:
            allowed = ", ".join(map(str, ALLOWED.get(part, ALLOWED)))
            raise TableError(f"{name}: {part}={number!r} is not allowed; use one of {allowed}")
    return dataclasses.replace(tile, **value)


def _tokens(name: str, value: Any) -> int:
    if type(value) is not int or value < 0:
        raise TableError(f"{name} must be a number of tokens or 0, got {value!r}")
    return value


# --- files


def read(path: Path, device: str, *, shipped: bool = False) -> list[Entry]:
    """The entries of a table, checked but for whether they fit a schedule. Raises TableError where the file is not a
    table of this device; OSError where it cannot be read, or can be written by somebody else. shipped: it lies where
    flagen's own modules lie, and is trusted as they are."""
    content = path.read_bytes() if shipped else private.read(path)
    try:
        table = json.loads(content.decode("utf-8"))
    except ValueError as error:
        raise TableError(f"it is no JSON text: {error}") from None
    if not isinstance(table, dict) or set(table) != {"format", "device", "entries"}:
        raise TableError("it is not an object of format, device and entries")
    if table["format"] != FORMAT:
        raise TableError(f"its format is {table['format']!r}, this is format {FORMAT}")
    if table["device"] != device:
        raise TableError(f"it is of the device {table['device']!r}, this is {device!r}")
    if not isinstance(table["entries"], list):
        raise TableError("its entries are no list")
    return [_entry(one) for one in table["entries"]]


def _entry(one: Any) -> Entry:
    try:
        place = Place(**one["place"])
        fields: list[tuple[Any, type]] = [
            (place.text, str),
            (place.triton, str),
            (place.dtype, str),
            (one["choice"], dict),
        ]
        fields += [(number, int) for number in (place.K, place.V, place.programs, place.tokens)]
        made = Entry(place, one["choice"], float(one["default_ms"]), float(one["ms"]), str(one["versions"]))
    except (KeyError, TypeError, ValueError) as error:
        raise TableError(f"it has an entry that is none: {type(error).__name__}: {error}") from None
    if any(type(value) is not kind for value, kind in fields):
        raise TableError(f"it has an entry with a field of the wrong type: {one!r}")
    return made


def remember(entries: list[Entry], device: str, folder: Path | None = None) -> Path:
    """Writes entries into the table of a device, in place of those for the same places; the others stay. An empty
    choice removes what was there. folder: None for the user's. Raises ConfigError where the cache may not be written.
    """
    if folder is None:
        if config.cache_mode() in ("off", "readonly"):
            raise ConfigError(
                f"FLAGEN_CACHE={config.cache_mode()}: choices cannot be remembered; unset it, or name a folder"
            )
        folder = cache.root() / "tuned"
        private.make_directory(folder)
        private.check_directory(folder)
    else:
        folder.mkdir(parents=True, exist_ok=True)
    path = folder / file_name(device)
    kept = {one.place: one for one in (*_entries(path, device, False), *entries)}
    listed = [dataclasses.asdict(one) for one in kept.values() if one.choice]
    content = json.dumps({"format": FORMAT, "device": device, "entries": listed}, indent=1) + "\n"
    new = path.with_name(f".{path.name}.{threading.get_ident()}.new")
    new.unlink(missing_ok=True)
    private.write(new, content.encode())
    new.replace(path)
    _choices.cache_clear()
    return path


_warned: set[str] = set()


def _warn(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(f"flagen: {message}", TunedWarning, stacklevel=3)

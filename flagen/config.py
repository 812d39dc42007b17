"""Every environment variable that flagen reads, in one table. They are read and parsed at use, never at import.

None of them changes the text of a generated module, so none is part of a cache key.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from .errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Variable:
    """One variable. Unset and empty mean the default. `affects_text`: whether it changes what is generated."""

    name: str
    default: str
    allowed: str
    meaning: str
    affects_text: bool = False


CACHE_MODES = ("on", "off", "readonly", "verify")
LOG_TOPICS = ("cache", "render", "code")

VARIABLES = (
    Variable(
        name="FLAGEN_CACHE",
        default="on",
        allowed=" | ".join(CACHE_MODES),
        meaning="on: generated modules are kept on disk. off: in memory only. readonly: one that is not there is an "
        "error. verify: each is generated again and must equal what is there.",
    ),
    Variable(
        name="FLAGEN_CACHE_DIR",
        default="$XDG_CACHE_HOME/flagen, else ~/.cache/flagen",
        allowed="an absolute path, or one that begins with ~/",
        meaning="where generated modules are kept; only you may be able to write there",
    ),
    Variable(
        name="FLAGEN_LOGS",
        default="nothing",
        allowed=f"topics among {', '.join(LOG_TOPICS)}, separated by commas; + before a topic for more of it",
        meaning="what is told on stderr: cache (hits, misses and why), render (what each stage took), code (where "
        "generated modules are)",
    ),
    Variable(
        name="FLAGEN_DEBUG",
        default="0",
        allowed="0 | 1",
        meaning="1: check the values of arguments at each call, which waits for the GPU",
    ),
)
_DEFAULTS = {variable.name: variable.default for variable in VARIABLES}


def raw(name: str) -> str:
    """The variable as it is set, "" if it is not. `name` must be in VARIABLES."""
    assert name in _DEFAULTS, name
    return os.environ.get(name, "")


def cache_mode() -> str:
    """FLAGEN_CACHE: "on", "off", "readonly" or "verify"."""
    return _choice("FLAGEN_CACHE", CACHE_MODES)


def debug() -> bool:
    """FLAGEN_DEBUG."""
    return _choice("FLAGEN_DEBUG", ("0", "1")) == "1"


def cache_dir() -> Path | None:
    """FLAGEN_CACHE_DIR, or None where it is not set."""
    value = raw("FLAGEN_CACHE_DIR")
    if not value:
        return None
    path = home() / value[2:] if value.startswith("~/") else Path(value)
    if not path.is_absolute():
        raise ConfigError(
            f"FLAGEN_CACHE_DIR={value!r} is relative, so the cache would depend on the working directory; "
            "set an absolute path, or one that begins with ~/"
        )
    return path


def home() -> Path:
    """The home directory: $HOME, else the user database's. Raises OSError if there is none."""
    if os.name != "posix":
        return Path.home()
    path = Path(os.environ.get("HOME") or _home_in_user_database())
    if not path.is_absolute():
        raise FileNotFoundError("there is no home directory: HOME is not set, and the user database has none")
    return path


def _home_in_user_database() -> str:
    import pwd

    try:
        return pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        return ""


def log_levels() -> dict[str, int]:
    """FLAGEN_LOGS: topic -> level of the logger "flagen.<topic>", for the topics that are asked for."""
    levels: dict[str, int] = {}
    value = raw("FLAGEN_LOGS")
    for part in value.split(",") if value else []:
        topic = part.strip().removeprefix("+")
        if topic not in LOG_TOPICS:
            raise ConfigError(
                f"FLAGEN_LOGS={value!r} has the topic {topic!r}; the topics are {', '.join(LOG_TOPICS)}, separated by "
                "commas, each with + before it for more, as in FLAGEN_LOGS=cache,+render"
            )
        level = logging.DEBUG if part.strip().startswith("+") else logging.INFO
        levels[topic] = min(level, levels.get(topic, level))
    return levels


def _choice(name: str, allowed: tuple[str, ...]) -> str:
    value = raw(name) or _DEFAULTS[name]
    if value not in allowed:
        raise ConfigError(f"{name}={value!r} is not allowed; set it to {', '.join(allowed[:-1])} or {allowed[-1]}")
    return value

"""Every exception flagen raises on purpose. Wrong tensors at a call raise plain ValueError or TypeError."""

from __future__ import annotations

import reprlib

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60


def shown(value: object) -> str:
    """A value as messages show it: its repr, of a bounded length whatever was given."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python writes no whole number of more than 4300 digits
        return f"{type(value).__name__} of too many digits"


class FlagenError(Exception):
    """Base of flagen's own errors."""


class SpecError(FlagenError, ValueError):
    """A spec that does not mean anything, or means something flagen refuses."""


class PlanError(FlagenError, ValueError):
    """A sound spec that this device, these sizes or these options cannot run."""


class CacheError(FlagenError, RuntimeError):
    """The cache was told to be strict (readonly, verify) and could not comply."""


class ConfigError(FlagenError, ValueError):
    """An environment variable FLAGEN_* with a value that is not allowed."""

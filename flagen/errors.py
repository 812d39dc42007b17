"""Every exception flagen raises on purpose. Wrong tensors at a call raise plain ValueError or TypeError."""


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

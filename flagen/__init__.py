"""flagen: a compiler for causal linear attention: from a small spec of a recurrence to one PyTorch function.

    import flagen
    from flagen import Input, Spec, logsigmoid

    g = Input("g", "b t h k")
    op = flagen.compile(Spec("my_gla", log_decay=logsigmoid(g) / 16))
    o, final_state = op(q, k, v, g)

The way from a spec to the function, each arrow one function and each stage printable:

    Spec --analyse--> Analysis --make_plan--> Plan --render--> text --cache--> entry --load--> module --bind--> Op

Importing flagen imports none of this yet: a public name is found in its module when it is first used. The language
has its own abs, and compile echoes torch.compile: `from flagen import *` leaves these two out, since they would hide
built-ins.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # `as` says to type checkers that the name is public
    from . import config as config
    from . import reference as reference
    from . import specs as specs
    from . import testing as testing
    from .compiler import compile as compile
    from .compiler import emit as emit
    from .errors import CacheError as CacheError
    from .errors import ConfigError as ConfigError
    from .errors import FlagenError as FlagenError
    from .errors import PlanError as PlanError
    from .errors import SpecError as SpecError
    from .expr import Expr as Expr
    from .expr import Input as Input
    from .expr import Scalar as Scalar
    from .expr import abs as abs
    from .expr import elu as elu
    from .expr import exp as exp
    from .expr import head as head
    from .expr import heads as heads
    from .expr import k as k
    from .expr import l2norm as l2norm
    from .expr import log as log
    from .expr import logsigmoid as logsigmoid
    from .expr import maximum as maximum
    from .expr import minimum as minimum
    from .expr import q as q
    from .expr import relu as relu
    from .expr import sigmoid as sigmoid
    from .expr import silu as silu
    from .expr import softplus as softplus
    from .expr import sqrt as sqrt
    from .expr import tanh as tanh
    from .expr import taylor as taylor
    from .expr import v as v
    from .spec import Spec as Spec
    from .spec import SpecWarning as SpecWarning

_MODULES = ("config", "reference", "specs", "testing")
# module -> the public names in it
_NAMES = {
    "compiler": ("compile", "emit"),
    "errors": ("CacheError", "ConfigError", "FlagenError", "PlanError", "SpecError"),
    "expr": (
        "Expr", "Input", "Scalar", "head", "heads", "q", "k", "v", "taylor",
        "abs", "elu", "exp", "l2norm", "log", "logsigmoid", "maximum", "minimum", "relu", "sigmoid", "silu", "softplus",
        "sqrt", "tanh",
    ),
    "spec": ("Spec", "SpecWarning"),
}  # fmt: skip
_HOME = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [*sorted(set(_HOME) - {"abs", "compile"}), *_MODULES, "__version__"]

logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_MODULES})

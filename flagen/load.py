"""Entry -> module. The one place of flagen that runs generated text.

Exactly the bytes that were verified are compiled and run; the file is not opened again. They are also pinned in
linecache, so that Triton (which reads the source of its kernels with inspect), debuggers and tracebacks see the same
text, whatever happens to the file, and for a module in memory too. No .pyc is written or read.
"""

from __future__ import annotations

import linecache
import os
import sys
import threading
from hashlib import sha256
from pathlib import Path
from types import ModuleType

from .cache import Entry

_lock = threading.RLock()  # held while a text runs, so that threads get one module
_running: list[str] = []  # the names of modules whose text is not at its end


def _begin_in_child() -> None:
    """After a fork: a thread that was loading does not exist here, and its module would stay half made."""
    global _lock
    _lock = threading.RLock()
    while _running:
        sys.modules.pop(_running.pop(), None)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_in_child)


def load(entry: Entry) -> ModuleType:
    """The module of a verified entry; the same text is loaded once a process."""
    return _load(entry.name, entry.source, str(entry.path or f"<flagen {entry.name}-{entry.key[:16]}>"))


def load_source(path: str | Path, name: str) -> ModuleType:
    """The module in a file that somebody edited, for trying a change of a kernel by hand. `name`: that of its spec.

    The text is run as it is: load what you would run yourself. Pass the module to TritonBackend with the spec's plan.
    """
    path = Path(path).absolute()
    return _load(name, path.read_text(encoding="utf-8"), str(path))


def module_name(name: str, source: str) -> str:
    """Under which a text is registered in sys.modules."""
    return f"_flagen_{name}_{sha256(source.encode()).hexdigest()[:16]}"


def _load(name: str, source: str, filename: str) -> ModuleType:
    registered = module_name(name, source)
    with _lock:
        if registered in sys.modules:
            return sys.modules[registered]
        module = ModuleType(registered)
        module.__file__ = filename
        # with no time of change, linecache never looks at the file again
        linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
        sys.modules[registered] = module
        _running.append(registered)
        try:
            # dont_inherit: the text has its own __future__ imports, or none
            exec(compile(source, filename, "exec", dont_inherit=True), module.__dict__)
        except BaseException:
            del sys.modules[registered]
            raise
        finally:
            _running.remove(registered)
        return module

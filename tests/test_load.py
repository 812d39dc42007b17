"""Loading: what runs is what was verified, its source can be read back, and nothing but sys.modules changes."""

from __future__ import annotations

import inspect
import linecache
import os
import signal
import sys
import threading
import time
import traceback
import warnings

import pytest

from flagen import load as module
from flagen.cache import Entry
from flagen.load import load, load_source

SOURCE = '''# a generated module
LOADS = []


def answer():
    """Forty-two."""
    return 42


def fault():
    raise RuntimeError("from generated text")
'''


@pytest.fixture(autouse=True)
def _restore():
    before = set(sys.modules), set(linecache.cache)
    yield
    for name in set(sys.modules) - before[0]:
        if name.startswith("_flagen_"):
            del sys.modules[name]
    for name in set(linecache.cache) - before[1]:
        del linecache.cache[name]


def entry(path=None, source=SOURCE, name="gla"):
    return Entry(name, "0123456789abcdef" * 4, source, {}, path)


@pytest.fixture
def on_disk(tmp_path):
    path = tmp_path / "kernels.py"
    path.write_text(SOURCE)
    return entry(path)


def test_a_module_runs_and_has_a_private_name(on_disk):
    loaded = load(on_disk)
    assert loaded.answer() == 42
    assert loaded.__file__ == str(on_disk.path)
    assert loaded.__name__.startswith("_flagen_gla_")
    assert sys.modules[loaded.__name__] is loaded
    assert loaded.answer.__module__ == loaded.__name__


def test_a_text_is_loaded_once(on_disk):
    assert load(on_disk) is load(entry(on_disk.path)) is load(entry())
    assert load(entry(source=SOURCE + "\n")) is not load(on_disk)
    assert load(entry(name="other")) is not load(on_disk)


def test_the_verified_bytes_run_whatever_the_file_says_meanwhile(on_disk):
    on_disk.path.write_text(SOURCE.replace("42", "666"))
    loaded = load(on_disk)
    assert loaded.answer() == 42
    assert "42" in inspect.getsource(loaded.answer)


def test_source_stays_readable_after_the_file_changes_or_goes(on_disk):
    loaded = load(on_disk)
    on_disk.path.write_text("# nothing of the kind\n")
    linecache.checkcache()
    assert inspect.getsource(loaded.answer) == 'def answer():\n    """Forty-two."""\n    return 42\n'
    on_disk.path.unlink()
    linecache.checkcache()
    assert inspect.getsourcelines(loaded.answer)[1] == 5


def test_a_module_in_memory_has_source_and_tracebacks_too():
    loaded = load(entry())
    assert loaded.__file__ == "<flagen gla-0123456789abcdef>"
    linecache.checkcache()
    assert inspect.getsource(loaded.answer).startswith("def answer():")
    with pytest.raises(RuntimeError) as caught:
        loaded.fault()
    shown = "".join(traceback.format_exception(caught.value))
    assert 'File "<flagen gla-0123456789abcdef>", line 11, in fault' in shown
    assert 'raise RuntimeError("from generated text")' in shown


def test_triton_reads_the_kernels_of_a_module_in_memory():
    triton = pytest.importorskip("triton")
    source = (
        "import triton\nimport triton.language as tl\n\n\n"
        "@triton.jit\ndef kernel(x, N: tl.constexpr):\n    tl.store(x, N)  # the comment\n"
    )
    loaded = load(entry(source=source))
    if isinstance(loaded.kernel, triton.runtime.JITFunction):
        assert "# the comment" in loaded.kernel.src
    assert "# the comment" in inspect.getsource(loaded.kernel.fn)


def test_nothing_is_written_beside_the_file(on_disk, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    load(on_disk)
    assert [path.name for path in on_disk.path.parent.iterdir()] == ["kernels.py"]


def test_future_imports_of_the_loader_are_not_inherited():
    loaded = load(entry(source="def f(x: int): pass\n"))
    assert loaded.f.__annotations__ == {"x": int}


def test_a_text_that_fails_leaves_no_half_module():
    broken = entry(source="X = 1\nraise ValueError('no')\n")
    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            load(broken)
    assert module.module_name(broken.name, broken.source) not in sys.modules


def test_threads_get_one_module():
    source = "import time\ntime.sleep(0.05)\nX = object()\n"
    found = []
    threads = [threading.Thread(target=lambda: found.append(load(entry(source=source)).X)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(map(id, found))) == 1


def test_a_process_forked_while_a_thread_loads():
    """The child has neither the thread nor what it locked, and loads for itself."""
    source = "import time\nBEFORE = 1\ntime.sleep(1)\nAFTER = 2\n"
    thread = threading.Thread(target=lambda: load(entry(source=source)))
    thread.start()
    while not hasattr(sys.modules.get(module.module_name("gla", source)), "BEFORE"):
        time.sleep(0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads, which is what this is about
        child = os.fork()
    if child == 0:
        signal.alarm(30)  # ends a child that waits for ever
        os._exit(42 if load(entry(source=source)).AFTER == 2 else 1)
    _, status = os.waitpid(child, 0)
    thread.join()
    assert os.waitstatus_to_exitcode(status) == 42
    assert load(entry(source=source)).AFTER == 2


def test_an_edited_file_can_be_loaded(tmp_path, monkeypatch):
    path = tmp_path / "edited.py"
    path.write_text("X = 1\n\n\ndef f():\n    return X\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    first = load_source("edited.py", "gla")
    assert (first.f(), first.__file__) == (1, str(path))
    path.write_text("X = 2\n\n\ndef f():\n    return X  # ü\n", encoding="utf-8")
    second = load_source(path, "gla")
    assert (first.f(), second.f()) == (1, 2)
    assert "ü" in inspect.getsource(second.f)

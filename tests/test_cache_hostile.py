"""The cache against what goes wrong outside: many processes, damage byte by byte, other users, full disks, no home.

What can be had for real is had: other users by fork and setuid, and a full disk by a small tmpfs, where the tests run
as root; a limit on the size of files everywhere. Each is also simulated, so that no machine leaves a case out.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flagen import cache, cache_key, compiler, config, private, specs
from flagen.cache import CacheWarning, clear, entries, find, store, verify_all
from flagen.cache_key import Key, make_key
from flagen.errors import CacheError
from flagen.load import load
from flagen.spec import Spec

REPOSITORY = Path(__file__).parent.parent
SOURCE = "# text of a module, with a letter beyond ASCII: ü\nX = 1\n"
FACTS = {"derivatives": {"gradients": [["query", "q", "1"]], "normalizer_gradient": None}}
KEY = Key("gla", {"format": 1, "spec": {"name": "gla"}, "versions": {"torch": "2"}})
AS_ROOT = os.name == "posix" and os.geteuid() == 0
NOBODY = 54_321  # a user that no database knows
MANY = 24


def forget() -> None:
    """As a new process."""
    cache._memory.clear()
    cache._warned.clear()


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty place for the cache, which does not exist yet."""
    monkeypatch.setenv("FLAGEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("FLAGEN_CACHE", raising=False)
    forget()
    yield tmp_path / "cache"
    forget()


@pytest.fixture
def entry(place: Path) -> Path:
    """The directory of a stored entry, which this process does not remember."""
    store(KEY, SOURCE, FACTS)
    forget()
    return place / "v1" / KEY.directory


# --- many processes


def together(code: str, *, count: int = MANY, arguments: tuple[str, ...] = (), **environment: str) -> list[str]:
    """What `count` new processes print that run `code`, each with its number as the last argument, all of which begin
    to do so at the same moment: when they have imported what they need and this process closes a pipe. They must end
    well, and say nothing on stderr.
    """
    started, go = os.pipe()
    preamble = "import os, sys, json, warnings; warnings.simplefilter('error'); from flagen import cache\n"
    preamble += "print('ready', flush=True); os.read(int(sys.argv[1]), 1)\n"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", preamble + code, str(started), *arguments, str(number)],
            cwd=REPOSITORY,
            env=os.environ | environment,
            pass_fds=(started,),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]
    for process in processes:
        process.stdout.readline()
    os.close(started)
    os.close(go)
    outputs = [process.communicate(timeout=300) for process in processes]
    faults = [error for (_, error), process in zip(outputs, processes, strict=True) if error or process.returncode]
    assert not faults, faults[0]
    return [out for out, _ in outputs]


PREPARE = """
from flagen import compiler, specs
plan, entry = compiler.prepare(specs.get("gla"))
print(json.dumps([str(entry.path), entry.key, entry.source]))
"""


def test_cold_processes_compile_one_spec(place):
    """The whole way from the spec to the entry, with whatever hash seed; a few, since each imports SymPy."""
    found = [json.loads(out) for out in together(PREPARE, count=6)]
    (one,) = {tuple(each) for each in found}
    _, entry = compiler.prepare(specs.get("gla"))
    assert one == (str(entry.path), entry.key, entry.source)
    assert [path.name for path in (place / "v1").iterdir()] == [entry.path.parent.name]
    assert [fault for _, fault in verify_all()] == [""]


RACE = """
from flagen.cache_key import Key
source, facts, fields = json.loads(sys.argv[2])
key = Key("gla", fields)
entry = cache.find(key) or cache.store(key, source, facts)
assert (entry.source, entry.facts) == (source, facts) and entry.path is not None
"""
STORED = (json.dumps([SOURCE, FACTS, KEY.fields]),)


@pytest.mark.parametrize("damage", ["none", "emptied", "tampered"])
def test_twenty_four_processes_at_once_on_one_key(place, damage):
    if damage != "none":
        store(KEY, SOURCE, FACTS)
        (place / "v1" / KEY.directory / "kernels.py").write_text("" if damage == "emptied" else "X = 2\n")
    quiet = "" if damage == "none" else "warnings.simplefilter('ignore', cache.CacheWarning)\n"
    together(quiet + RACE, arguments=STORED)
    assert [path.name for path in (place / "v1").iterdir()] == [KEY.directory]
    assert [fault for _, fault in verify_all()] == [""]


MEANWHILE = """
import time
from flagen.cache_key import Key
source, facts, fields = json.loads(sys.argv[2])
key, end, removed = Key("gla", fields), time.monotonic() + 1.0, 0
while time.monotonic() < end:
    cache._memory.clear()
    if sys.argv[-1] == "0":
        removed += cache.clear()
        continue
    entry = cache.find(key) or cache.store(key, source, facts)
    assert (entry.source, entry.facts) == (source, facts)
print(removed)
"""


def test_one_process_clears_while_others_read_and_write(place):
    removed, *_ = together(MEANWHILE, count=6, arguments=STORED)
    assert int(removed) > 1
    assert [path for path in (place / "v1").iterdir() if path.name.startswith(".")] == []
    assert [fault for _, fault in verify_all()] in ([], [""])


def test_an_entry_that_is_replaced_while_it_is_read_is_a_miss(place, entry, monkeypatch):
    """Its first file is read; then it is removed whole and made again before the second is opened."""
    read = private.read

    def between(path: Path, **options: Any) -> bytes:
        if path.name != "kernels.py":
            return read(path, **options)
        assert clear() == 1
        store(KEY, SOURCE, FACTS)
        raise FileNotFoundError(2, "gone", str(path))

    cache._memory.clear()
    with monkeypatch.context() as patched, warnings.catch_warnings():
        warnings.simplefilter("error")
        patched.setattr(private, "read", between)
        assert find(KEY) is None
    cache._memory.clear()
    assert find(KEY).source == SOURCE


def test_a_process_forked_while_a_thread_has_the_lock(entry):
    with cache._lock:
        assert in_child(lambda: signal.alarm(30) or find(KEY).source) == SOURCE


@pytest.mark.parametrize("after", ["mkdtemp", "kernels.py", "meta.json"])
def test_a_process_that_dies_while_it_writes_leaves_nothing_that_is_read(place, after):
    def dies() -> None:
        def write(path: Path, content: bytes, write: Callable[..., None] = private.write) -> None:
            if after != "mkdtemp":
                write(path, content)
            if after in ("mkdtemp", path.name):
                os.kill(os.getpid(), signal.SIGKILL)

        private.write = write
        store(KEY, SOURCE, FACTS)

    with pytest.raises(ChildProcessError, match="signal 9"):
        in_child(dies)
    (left,) = (place / "v1").iterdir()
    assert left.name.startswith(".")
    assert (find(KEY), entries(), verify_all()) == (None, [], [])
    assert store(KEY, SOURCE, FACTS).path.exists()
    os.utime(left, (0, 0))
    assert clear() == 1
    assert list((place / "v1").iterdir()) == []


def test_verify_accepts_what_another_process_made(place, monkeypatch):
    """FLAGEN_CACHE=verify over the shipped specs: each is generated again, in another process with another hash seed,
    and must be what is there to the letter, facts included.
    """
    fill = "from flagen import compiler, specs\nfor name in specs.names(): compiler.prepare(specs.get(name))"
    together(fill, count=1, PYTHONHASHSEED="4711")
    assert {one.name for one in entries()} == set(specs.names())
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    monkeypatch.setenv("FLAGEN_CACHE", "verify")
    for name in specs.names():
        compiler.prepare(specs.get(name))
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before


def test_verify_finds_what_checksums_cannot(entry, monkeypatch):
    """Whoever can write an entry can write its checksums too. Reading cannot see it, generating again does."""
    text = SOURCE.replace("1", "2")
    meta = json.loads((entry / "meta.json").read_text())
    (entry / "kernels.py").write_text(text, encoding="utf-8")
    meta["source_sha256"] = cache.sha256(text.encode()).hexdigest()
    (entry / "meta.json").write_text(json.dumps(meta))
    assert find(KEY).source == text
    monkeypatch.setenv("FLAGEN_CACHE", "verify")
    with pytest.raises(CacheError, match="not what is cached"):
        store(KEY, SOURCE, FACTS)


# --- damage, byte by byte


def test_no_byte_can_change_unnoticed(entry):
    """Each byte of both files with one bit flipped, and shorter files: a miss, or what was stored."""
    wanted = find(KEY)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CacheWarning)
        for name in ("kernels.py", "meta.json"):
            whole = (entry / name).read_bytes()
            variants = [whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in range(len(whole))]
            variants += [whole[:i] for i in range(0, len(whole), 5)]
            missed = 0
            for variant in variants:
                (entry / name).write_bytes(variant)
                forget()
                found = find(KEY)
                assert found in (None, wanted), variant
                missed += found is None
            # but for the last line's end in meta.json and blanks between its fields
            assert missed >= (len(variants) if name == "kernels.py" else 0.8 * len(variants))
            (entry / name).write_bytes(whole)
    forget()
    assert find(KEY) == wanted


def test_an_entry_cannot_stand_in_for_another(entry):
    """A whole, sound entry under another key's name, as after a wrong copy."""
    other = Key("gla", {"format": 1, "spec": {"name": "other"}})
    shutil.copytree(entry, entry.parent / other.directory)
    with pytest.warns(CacheWarning, match="not that of this entry"):
        assert find(other) is None
    named = Key("retnet", KEY.fields)
    shutil.copytree(entry, entry.parent / named.directory)
    with pytest.warns(CacheWarning, match="not that of this entry"):
        assert find(named) is None


@pytest.mark.parametrize("size", [private.MAX_BYTES + 1, 1 << 40])
def test_a_file_without_end_is_not_read(entry, size):
    os.truncate(entry / "kernels.py", size)  # a hole, which takes no room on the disk
    with pytest.warns(CacheWarning, match="the limit is"):
        assert find(KEY) is None


# --- other users


def in_child(run: Callable[[], Any], user: int | None = None) -> Any:
    """The JSON value of run() in a forked process, as another user if given. Raises ChildProcessError if it fails."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of fork beside threads: the child only touches files
        child = os.fork()
    if child == 0:
        try:
            forget()
            if user is not None:
                os.setgroups([])
                os.setgid(user)
                os.setuid(user)
            answer = json.dumps([run()])
        except BaseException as error:
            answer = json.dumps(repr(error))
        os.write(writer, answer.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        raise ChildProcessError(f"signal {os.WTERMSIG(status)}")
    answer = json.loads(text)
    if isinstance(answer, str):
        raise ChildProcessError(answer)
    return answer[0]


def made_anew() -> list[Any]:
    """[warnings, whether the entry was found, whether it is on disk now], of a process that needs an entry."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = find(KEY)
        stored = found or store(KEY, SOURCE, FACTS)
        assert (stored.source, stored.facts) == (SOURCE, FACTS)
        other = Key("retnet", {"format": 1})
        assert find(other) is not None or store(other, SOURCE, {}).source == SOURCE
    return [[str(one.message) for one in caught], found is not None, stored.path is not None]


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A place for the cache that every user can reach; the tests' own directory is for one user alone."""
    directory = Path(tempfile.mkdtemp(prefix="flagen-test-"))
    directory.chmod(0o755)
    monkeypatch.setenv("FLAGEN_CACHE_DIR", str(directory / "cache"))
    yield directory / "cache"
    shutil.rmtree(directory)


as_root = pytest.mark.skipif(not AS_ROOT, reason="takes root, to become another user")


def of_another(path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives a file or directory to somebody else, or has the system say so."""
    if how == "chown":
        os.chown(path, NOBODY, -1)
        return
    inode = path.stat().st_ino

    def changed(look: Callable[..., os.stat_result]) -> Callable[..., os.stat_result]:
        def look_again(*arguments: Any, **options: Any) -> os.stat_result:
            found = look(*arguments, **options)
            return os.stat_result([*found[:4], NOBODY, *found[5:]]) if found.st_ino == inode else found

        return look_again

    for name in ("lstat", "fstat"):
        monkeypatch.setattr(os, name, changed(getattr(os, name)))


PARTS = {"root": "../..", "version": "..", "entry": ".", "source": "kernels.py", "meta": "meta.json"}


@pytest.mark.parametrize("how", [pytest.param("chown", marks=as_root), "simulated"])
@pytest.mark.parametrize("part", PARTS)
def test_what_belongs_to_somebody_else_is_not_run(entry, part, how, monkeypatch):
    of_another((entry / PARTS[part]).resolve(), how, monkeypatch)
    for mode in ("readonly", "verify"):
        with monkeypatch.context() as patch:
            patch.setenv("FLAGEN_CACHE", mode)
            with pytest.raises(CacheError, match="belongs to user"):
                find(KEY)
    with pytest.warns(CacheWarning, match="belongs to user"):
        assert find(KEY) is None
    in_memory = part in ("root", "version")
    assert (store(KEY, SOURCE, FACTS).path is None) == in_memory


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o722, 0o720, 0o1777])
@pytest.mark.parametrize("part", PARTS)
def test_what_others_can_write_is_not_run(entry, part, mode, monkeypatch):
    (entry / PARTS[part]).resolve().chmod(mode)
    with monkeypatch.context() as patch:
        patch.setenv("FLAGEN_CACHE", "readonly")
        with pytest.raises(CacheError, match="chmod go-w"):
            find(KEY)
    with pytest.warns(CacheWarning, match="chmod go-w"):
        assert find(KEY) is None


@as_root
def test_another_users_cache_is_neither_read_nor_filled(shared):
    store(KEY, SOURCE, FACTS)
    for path in (shared, *shared.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    (told, found, on_disk) = in_child(made_anew, NOBODY)
    assert len(told) == 1
    assert f"belongs to user 0, this process runs as user {NOBODY}; set FLAGEN_CACHE_DIR" in told[0]
    assert (found, on_disk) == (False, False)
    assert [one.name for one in entries()] == ["gla"]


@as_root
def test_an_image_with_roots_cache_serves_every_user_read_only(shared, monkeypatch):
    store(KEY, SOURCE, FACTS)
    for path in (shared, *shared.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    monkeypatch.setenv("FLAGEN_CACHE", "readonly")
    assert in_child(lambda: find(KEY).source, NOBODY) == SOURCE
    (shared / "v1").chmod(0o777)
    with pytest.raises(ChildProcessError, match="chmod go-w"):
        in_child(lambda: find(KEY).source, NOBODY)


@as_root
def test_a_directory_without_permission_to_write(shared):
    """Its owner took the permission away, or it is on a disk mounted read-only: what is there is used."""
    store(KEY, SOURCE, FACTS)
    for path in (shared, *shared.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    for path in (shared, shared / "v1"):
        path.chmod(0o555)
    (told, found, on_disk) = in_child(made_anew, NOBODY)
    assert (found, on_disk, len(told)) == (True, True, 1)  # the warning is of the second key, which is not there
    assert "Permission denied" in told[0]


@as_root
def test_a_parent_without_permission_to_write(shared):
    assert in_child(made_anew, NOBODY)[1:] == [False, False]
    assert not shared.exists()


@as_root
def test_a_user_without_a_home(monkeypatch):
    """No HOME, and a number that the user database does not have, as containers run."""
    for name in ("FLAGEN_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    (told, found, on_disk) = in_child(made_anew, NOBODY)
    assert (found, on_disk, len(told)) == (False, False, 1)
    assert "there is no home directory: HOME is not set" in told[0]


@pytest.mark.parametrize("home", ["", "relative", "."])
def test_a_home_that_is_none(home, monkeypatch, tmp_path):
    for name in ("FLAGEN_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", home)
    monkeypatch.setattr(config, "_home_in_user_database", lambda: "")
    monkeypatch.chdir(tmp_path)
    (told, found, on_disk) = made_anew()
    assert (found, on_disk, len(told)) == (False, False, 1)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_below_a_linked_home(tmp_path, monkeypatch):
    """Only the cache's own directories must not be links: that a home or a disk is one is common."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "home").symlink_to(tmp_path / "disk")
    monkeypatch.setenv("FLAGEN_CACHE_DIR", str(tmp_path / "home" / "cache"))
    assert made_anew() == [[], False, True]
    forget()
    assert made_anew() == [[], True, True]


# --- disks


@contextlib.contextmanager
def small_disk(path: Path, size: str) -> Iterator[None]:
    """A file system of its own at `path`, where this process may mount one."""
    if not AS_ROOT or shutil.which("mount") is None:
        pytest.skip("takes root, to mount a file system")
    command = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "flagen-test", str(path)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this system lets nobody mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def test_a_full_disk_and_one_mounted_read_only(tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    monkeypatch.setenv("FLAGEN_CACHE_DIR", str(disk / "cache"))
    with small_disk(disk, "64k"):
        assert made_anew() == [[], False, True]
        forget()
        big = Key("based", {"format": 1})
        with pytest.warns(CacheWarning, match="No space left on device") as caught:
            assert store(big, "# " + "x" * 200_000, {}).path is None
        assert len(caught) == 1
        assert sorted(one.name for one in entries()) == ["gla", "retnet"]
        assert len(list((disk / "cache" / "v1").iterdir())) == 2, "a staging directory is left on the full disk"
        forget()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert made_anew() == [[], True, True]
        with pytest.warns(CacheWarning, match="Read-only file system"):
            assert store(big, SOURCE, {}).path is None


def test_a_file_that_stays_short(place):
    """A real fault in the middle of a write, by a limit on the size of files."""

    def limited() -> list[Any]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))
        return made_anew()

    (told, found, on_disk) = in_child(limited)
    assert (found, on_disk, len(told)) == (False, False, 1)
    assert os.strerror(errno.EFBIG) in told[0]
    assert list((place / "v1").iterdir()) == []
    assert made_anew() == [[], False, True]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", ["open", "fsync", "close"])
def test_a_disk_that_fills_up_within_a_write(place, monkeypatch, call, code):
    """At each call of private.write; close is where network disks tell."""

    def fails(*arguments: Any, **options: Any) -> Any:
        raise OSError(code, os.strerror(code))

    class Closing:
        def __init__(self, descriptor: int, mode: str) -> None:
            self.file = open(descriptor, mode)  # noqa: SIM115

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def __enter__(self) -> Closing:
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()
            fails()

    with monkeypatch.context() as patch:
        if call == "close":
            patch.setattr(os, "fdopen", Closing)
        elif call == "fsync":
            patch.setattr(os, "fsync", fails)
        else:
            opens = os.open
            patch.setattr(os, "open", lambda path, flags, *rest, **names: (
                fails if flags & os.O_CREAT else opens)(path, flags, *rest, **names))  # fmt: skip
        (told, found, on_disk) = made_anew()
        assert (found, on_disk, len(told)) == (False, False, 1)
        assert os.strerror(code) in told[0]
        # what the disk did not take is in memory
        assert find(KEY).source == SOURCE
    assert list((place / "v1").iterdir()) == []
    forget()
    assert made_anew() == [[], False, True]


ODD = ["with a space", "per%cent [a-z]* ?", "é" * 20, "new\nline", "quo'te\"s", "back\\slash", "\udcff"]


@pytest.mark.parametrize("name", ODD, ids=ascii)
def test_a_place_of_an_odd_name(tmp_path, monkeypatch, name):
    monkeypatch.setenv("FLAGEN_CACHE_DIR", str(tmp_path / name))
    assert made_anew() == [[], False, True]
    forget()
    entry = find(KEY)
    assert load(entry).X == 1
    assert [one.path for one in entries()] == [
        entry.path.parent,
        store(Key("retnet", {"format": 1}), SOURCE, {}).path.parent,
    ]
    assert clear() == 2


@pytest.mark.parametrize("name", ["x" * 300, "/".join(["x" * 200] * 30)])
def test_a_place_of_too_long_a_name(tmp_path, monkeypatch, name):
    monkeypatch.setenv("FLAGEN_CACHE_DIR", str(tmp_path / name))
    (told, found, on_disk) = made_anew()
    assert (found, on_disk, len(told)) == (False, False, 1)
    assert "File name too long" in told[0]


# --- the key: what changes it, and what does not


def digest_of(spec: Any) -> str:
    return make_key(spec.name, spec.to_json()).digest


GLA = json.loads(specs.get("gla").to_json())
SPEC_CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "name": lambda data: data.update(name="other"),
    "query": lambda data: data.update(query="q * 2"),
    "key": lambda data: data.update(key="k * 2"),
    "value": lambda data: data.update(value="v * 2"),
    "log_decay": lambda data: data.update(log_decay="g / 2"),
    "no log_decay": lambda data: (data.pop("log_decay"), data["inputs"].pop()),
    "phase": lambda data: data.update(phase="g"),
    "bonus": lambda data: data.update(bonus="1"),
    "feature_map": lambda data: data.update(feature_map="exp(x)"),
    "normalize": lambda data: data.update(normalize="maximum(abs(n), 1)"),
    "normalize and eps": lambda data: data.update(normalize=True, eps=1e-3),
    "scale": lambda data: data.update(scale=1),
    "scalars": lambda data: data.update(scalars=["sc"], log_decay="g * sc"),
    "order of inputs": lambda data: data["inputs"].reverse(),
    "axes": lambda data: data["inputs"][3].update(axes="b t h"),
    "low": lambda data: data["inputs"][3].update(low=-1),
    "high": lambda data: data["inputs"][3].update(high=0),
    "name of an input": lambda data: (data["inputs"][3].update(name="gg"), data.update(log_decay="gg")),
}


@pytest.mark.parametrize("change", SPEC_CHANGES)
@pytest.mark.filterwarnings("ignore::flagen.spec.SpecWarning")
def test_the_key_changes_with_each_field_of_the_spec(change):
    data = json.loads(json.dumps(GLA))
    SPEC_CHANGES[change](data)
    spec = specs.get("gla").from_json(json.dumps(data))
    assert digest_of(spec) != digest_of(specs.get("gla"))


def test_the_key_does_not_change_with_how_a_spec_is_written():
    data = dict(reversed(list(GLA.items())))
    data |= {"log_decay": "+(g)", "query": "((q))", "normalize": False, "scalars": []}
    data["inputs"] = [{"axes": one["axes"].replace(" ", ""), "name": one["name"]} for one in data["inputs"]]
    assert digest_of(specs.get("gla").from_json(json.dumps(data, indent=7))) == digest_of(specs.get("gla"))
    one, other = (specs.get("gla").replace("s", scale=scale, log_decay=None) for scale in (2, 2.0))
    assert digest_of(one) == digest_of(other)


@pytest.mark.parametrize("package", ["flagen", "jinja2", "sympy", "torch", "triton"])
def test_the_key_changes_with_each_version(package, monkeypatch):
    from importlib import metadata

    import flagen

    before = digest_of(specs.get("gla"))
    cache_key.versions.cache_clear()
    try:
        with monkeypatch.context() as patch:
            if package == "flagen":
                patch.setattr(flagen, "__version__", "0.0.0")
            else:
                look = metadata.version
                patch.setattr(metadata, "version", lambda name: "0.0.0" if name == package else look(name))
            assert digest_of(specs.get("gla")) != before
    finally:
        cache_key.versions.cache_clear()
    assert digest_of(specs.get("gla")) == before


def test_the_key_does_not_change_with_other_packages(monkeypatch):
    from importlib import metadata

    look = metadata.version
    ingredients = {one for names in cache_key._DISTRIBUTIONS.values() for one in names}
    before = digest_of(specs.get("gla"))
    cache_key.versions.cache_clear()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(metadata, "version", lambda name: look(name) if name in ingredients else "0.0.0")
            assert digest_of(specs.get("gla")) == before
    finally:
        cache_key.versions.cache_clear()


def test_the_key_changes_with_the_format(monkeypatch):
    before = digest_of(specs.get("gla"))
    monkeypatch.setattr(cache_key, "FORMAT", 2)
    assert digest_of(specs.get("gla")) != before


def test_every_source_file_either_shapes_the_key_or_leaves_it(tmp_path):
    """Each file of flagen is changed in turn: the key follows exactly where the file shapes text."""
    package, source = tmp_path / "flagen", Path(cache_key.__file__).parent
    shutil.copytree(source, package, ignore=shutil.ignore_patterns("__pycache__"))

    def digest() -> str:
        return cache_key.digest_of_files(package, cache_key.shaping_files(package))

    before, shaping = digest(), set(cache_key.shaping_files(package))
    files = [path for path in package.rglob("*") if path.is_file()]
    assert shaping <= set(files)
    assert len(shaping) > 25 and len(files) - len(shaping) > 25
    for path in files:
        content = path.read_bytes()
        path.write_bytes(content + b"\n")
        assert (digest() != before) == (path in shaping), path
        path.write_bytes(content)
    assert digest() == before


def test_the_options_of_a_call_are_no_ingredient(place):
    """Chunk, backend and precision are launch-time choices: one entry serves all."""
    spec = Spec("optional")  # of its own: a process compiles a spec once
    paths = {
        compiler.compile(spec, chunk_size=size, backend=backend, input_precision=precision).path
        for size in (None, 32)
        for backend in ("auto", "torch")
        for precision in (None, "ieee")
    }
    assert len(paths) == 1
    assert len(entries()) == 1

"""The cache: keys, publishing, damage, directories that others can write, strict modes, listings.

test_cache_hostile.py has many processes, other users and full disks.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from flagen import cache, cache_key, config, private, specs
from flagen.cache import CacheWarning, clear, entries, find, root, store, verify_all
from flagen.cache_key import Key, make_key
from flagen.errors import CacheError, ConfigError

SOURCE = "# text of a module, with a letter beyond ASCII: ü\nX = 1\n"
FACTS = {"derivatives": {"gradients": [["query", "q", "1"]], "normalizer_gradient": None}}
KEY = Key("gla", {"format": 1, "spec": {"name": "gla"}, "versions": {"torch": "2"}})


def forget() -> None:
    """As a new process."""
    cache._memory.clear()
    cache._warned.clear()


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
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


def stored_anew() -> cache.Entry:
    """What the next process stores where it found nothing."""
    assert find(KEY) is None
    return store(KEY, SOURCE, FACTS)


# --- the ordinary way


def test_an_entry_is_found_as_it_was_stored(place):
    assert find(KEY) is None
    stored = store(KEY, SOURCE, FACTS)
    assert (stored.source, stored.facts, stored.key) == (SOURCE, FACTS, KEY.digest)
    assert stored.path == place / "v1" / f"gla-{KEY.digest[:16]}" / "kernels.py"
    assert stored.path.read_text(encoding="utf-8") == SOURCE
    forget()
    assert find(KEY) == stored
    assert sorted(path.name for path in stored.path.parent.iterdir()) == ["kernels.py", "meta.json"]
    assert [path.name for path in (place / "v1").iterdir()] == [KEY.directory]


def test_everything_in_the_key_can_be_read_in_meta_json(entry):
    meta = json.loads((entry / "meta.json").read_text())
    assert meta["fields"] == KEY.fields
    assert meta["key"] == KEY.digest == cache_key.digest(meta["fields"])
    assert (meta["name"], meta["facts"]) == ("gla", FACTS)


def test_what_is_made_is_for_the_user_alone(entry):
    for path in (entry.parent.parent, entry.parent, entry):
        assert path.stat().st_mode & 0o777 == 0o700
    for path in entry.iterdir():
        assert path.stat().st_mode & 0o777 == 0o600


def test_private_whatever_the_umask(place):
    old = os.umask(0)
    try:
        store(KEY, SOURCE, FACTS)
    finally:
        os.umask(old)
    for path in (place, place / "v1", *(place / "v1").rglob("*")):
        assert not path.stat().st_mode & 0o022, path


def test_a_process_reads_an_entry_once(entry, monkeypatch):
    first = find(KEY)
    monkeypatch.setattr(private, "read", None)
    assert find(KEY) is first


def test_an_entry_is_never_edited(entry):
    before = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in entry.iterdir()}
    assert store(KEY, SOURCE, FACTS).path == entry / "kernels.py"
    assert {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in entry.iterdir()} == before


def test_another_root_is_another_cache(entry, monkeypatch, tmp_path):
    assert find(KEY) is not None
    monkeypatch.setenv("FLAGEN_CACHE_DIR", str(tmp_path / "other"))
    assert find(KEY) is None


def test_the_loser_of_a_race_takes_the_winners_entry(place, monkeypatch):
    winner = []

    def other_process_is_faster(path, content, write=private.write):
        write(path, content)
        if path.name == "meta.json" and not winner:
            winner.append(True)
            store(KEY, SOURCE, FACTS)

    monkeypatch.setattr(private, "write", other_process_is_faster)
    assert store(KEY, SOURCE, FACTS).path == place / "v1" / KEY.directory / "kernels.py"
    assert [path.name for path in (place / "v1").iterdir()] == [KEY.directory]


# --- damage


def emptied(entry: Path) -> None:
    for path in entry.iterdir():
        path.unlink()


def edited_meta(**changes):
    def damage(entry: Path) -> None:
        meta = json.loads((entry / "meta.json").read_text())
        (entry / "meta.json").write_text(json.dumps(meta | changes))

    return damage


DAMAGE = {
    "truncated": lambda entry: (entry / "kernels.py").write_text(SOURCE[:20]),
    "tampered": lambda entry: (entry / "kernels.py").write_text(SOURCE.replace("1", "2")),
    "not text": lambda entry: (entry / "kernels.py").write_bytes(b"\xff\xfe"),
    "no source": lambda entry: (entry / "kernels.py").unlink(),
    "source is a directory": lambda entry: ((entry / "kernels.py").unlink(), (entry / "kernels.py").mkdir()),
    "source is a link": lambda entry: (
        (entry / "kernels.py").rename(entry.parent / ".elsewhere"),
        (entry / "kernels.py").symlink_to(entry.parent / ".elsewhere"),
    ),
    "source is a pipe": lambda entry: ((entry / "kernels.py").unlink(), os.mkfifo(entry / "kernels.py")),
    "source can be written by others": lambda entry: (entry / "kernels.py").chmod(0o666),
    "no meta": lambda entry: (entry / "meta.json").unlink(),
    "empty meta": lambda entry: (entry / "meta.json").write_text(""),
    "meta is a list": lambda entry: (entry / "meta.json").write_text("[]"),
    "meta nests without end": lambda entry: (entry / "meta.json").write_text("[" * 100_000),
    "truncated meta": lambda entry: (entry / "meta.json").write_bytes((entry / "meta.json").read_bytes()[:-30]),
    "other key": edited_meta(key="0" * 64),
    "other fields": edited_meta(fields={"format": 2}),
    "no fields": edited_meta(fields=None),
    "fields with nan": edited_meta(fields=float("nan")),
    "other format": edited_meta(format=0),
    "other facts": edited_meta(facts={"derivatives": {}}),
    "facts of another kind": edited_meta(facts=3),
    "emptied": emptied,
    "a file": lambda entry: (shutil.rmtree(entry), entry.write_text("x")),
    "a link": lambda entry: (entry.rename(entry.parent / ".elsewhere"), entry.symlink_to(entry.parent / ".elsewhere")),
    "can be written by others": lambda entry: entry.chmod(0o777),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_entry_is_made_again_with_one_warning(entry, damage):
    damage(entry)
    with pytest.warns(CacheWarning, match=r"is (damaged|made again)") as caught:
        assert find(KEY) is None
        assert find(KEY) is None
    assert len(caught) == 1
    assert str(entry) in str(caught[0].message)
    assert store(KEY, SOURCE, FACTS).path == entry / "kernels.py"
    forget()
    assert find(KEY) == cache.Entry("gla", KEY.digest, SOURCE, FACTS, entry / "kernels.py")


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
@pytest.mark.parametrize("mode", ["readonly", "verify"])
def test_strict_modes_refuse_a_damaged_entry(entry, damage, mode, monkeypatch):
    damage(entry)
    monkeypatch.setenv("FLAGEN_CACHE", mode)
    with pytest.raises(CacheError, match=f"FLAGEN_CACHE={mode}"):
        find(KEY)


def test_an_entry_with_facts_of_old_is_replaced(entry):
    """The text is right, but what is beside it does not serve the reader, who made it anew."""
    other = {"derivatives": {"gradients": [], "normalizer_gradient": "1"}}
    assert store(KEY, SOURCE, other).facts == other
    forget()
    assert find(KEY).facts == other
    assert [path.name for path in entry.parent.iterdir()] == [KEY.directory]


def test_an_entry_that_is_removed_while_it_is_read_is_a_miss(entry, monkeypatch):
    def removed_first(path, **options):
        shutil.rmtree(entry, ignore_errors=True)
        raise FileNotFoundError(errno.ENOENT, "gone", str(path))

    monkeypatch.setattr(private, "read", removed_first)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find(KEY) is None


# --- a disk that cannot be used


def assert_in_memory_with_one_warning(match: str) -> None:
    with pytest.warns(CacheWarning, match=match) as caught:
        stored = stored_anew()
        other = Key("retnet", {"format": 1})
        assert find(other) is None
        store(other, SOURCE, {})
    assert len(caught) == 1
    assert "kept in memory only" in str(caught[0].message)
    assert (stored.source, stored.path) == (SOURCE, None)
    assert find(KEY) is stored


def test_a_root_that_others_can_write(place):
    place.mkdir()
    place.chmod(0o777)
    assert_in_memory_with_one_warning(f"chmod go-w {place}")
    assert list(place.iterdir()) == []


def test_a_version_directory_that_others_can_write(place):
    (place / "v1").mkdir(parents=True)
    place.chmod(0o755)
    (place / "v1").chmod(0o770)
    assert_in_memory_with_one_warning(f"chmod go-w {place}/v1")


def test_a_root_of_somebody_else(place, monkeypatch):
    place.mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: place.stat().st_uid + 1)
    assert_in_memory_with_one_warning("belongs to user")


def test_a_root_that_is_a_link(place, tmp_path):
    (tmp_path / "real").mkdir(mode=0o700)
    place.symlink_to(tmp_path / "real")
    assert_in_memory_with_one_warning("symbolic link; set FLAGEN_CACHE_DIR")
    assert list((tmp_path / "real").iterdir()) == []


def test_a_slash_at_the_end_does_not_hide_a_link(place, tmp_path, monkeypatch):
    (tmp_path / "real").mkdir(mode=0o700)
    place.symlink_to(tmp_path / "real")
    monkeypatch.setenv("FLAGEN_CACHE_DIR", f"{place}/")
    assert_in_memory_with_one_warning("symbolic link")


def test_a_root_that_is_a_file(place):
    place.write_text("")
    assert_in_memory_with_one_warning("is not a directory")


def test_a_root_below_a_file(place, monkeypatch):
    place.write_text("")
    monkeypatch.setenv("FLAGEN_CACHE_DIR", str(place / "below"))
    assert_in_memory_with_one_warning("cannot be used")


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.ESTALE, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", ["mkdir", "mkdtemp", "write", "rename"])
def test_every_fault_of_the_disk_leaves_the_entry_in_memory(place, monkeypatch, call, code):
    def fails(*arguments, **options):
        raise OSError(code, os.strerror(code))

    owner = {"mkdir": Path, "mkdtemp": cache.tempfile, "write": private, "rename": Path}[call]
    with monkeypatch.context() as patch:
        patch.setattr(owner, call, fails)
        assert_in_memory_with_one_warning(os.strerror(code))
    assert not place.exists() or list((place / "v1").iterdir()) == []


def test_faults_while_cleaning_up_are_of_no_consequence(place, monkeypatch):
    monkeypatch.setattr(os, "rmdir", lambda *arguments, **options: (_ for _ in ()).throw(OSError(errno.EBUSY, "busy")))
    store(KEY, SOURCE, FACTS)
    forget()
    (place / "v1" / KEY.directory / "meta.json").unlink()
    with pytest.warns(CacheWarning):
        assert stored_anew().path is not None


def test_an_entry_that_cannot_be_read_is_kept_in_memory(entry, monkeypatch):
    def fails(*arguments, **options):
        raise PermissionError(errno.EACCES, "no permission")

    monkeypatch.setattr(private, "read", fails)
    with pytest.warns(CacheWarning, match="no permission") as caught:
        stored = stored_anew()
    assert (len(caught), stored.path, find(KEY)) == (1, None, stored)


def test_no_home_directory(monkeypatch):
    for name in ("FLAGEN_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(config, "_home_in_user_database", lambda: "")
    with pytest.raises(FileNotFoundError, match="no home directory"):
        root()
    assert_in_memory_with_one_warning("no home directory")


def test_the_user_database_knows_the_home_directory(monkeypatch):
    import pwd

    for name in ("FLAGEN_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    assert root() == Path(pwd.getpwuid(os.getuid()).pw_dir) / ".cache" / "flagen"


# --- where it is, and the variables


def test_the_default_place(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert root() == tmp_path / "cache"
    monkeypatch.setenv("FLAGEN_CACHE_DIR", "~/mine")
    assert root() == tmp_path / "home" / "mine"
    monkeypatch.delenv("FLAGEN_CACHE_DIR")
    assert root() == tmp_path / "xdg" / "flagen"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert root() == tmp_path / "home" / ".cache" / "flagen"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert root() == tmp_path / "home" / ".cache" / "flagen"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", ["relative/path", ".", "~somebody/cache"])
def test_the_place_never_depends_on_the_working_directory(monkeypatch, value):
    monkeypatch.setenv("FLAGEN_CACHE_DIR", value)
    with pytest.raises(ConfigError, match="absolute path"):
        find(KEY)


@pytest.mark.parametrize("value", ["On", "1", "read-only", " off"])
def test_a_mode_that_does_not_exist(monkeypatch, value):
    monkeypatch.setenv("FLAGEN_CACHE", value)
    with pytest.raises(ConfigError, match="on, off, readonly or verify"):
        find(KEY)


def test_an_empty_variable_is_unset(monkeypatch):
    for variable in config.VARIABLES:
        monkeypatch.setenv(variable.name, "")
    assert (config.cache_mode(), config.cache_dir(), config.debug(), config.log_levels()) == ("on", None, False, {})


# --- modes


def test_off_touches_no_disk(place, monkeypatch):
    monkeypatch.setenv("FLAGEN_CACHE", "off")
    stored = stored_anew()
    assert (stored.path, find(KEY)) == (None, stored)
    assert not place.exists()


def test_readonly_refuses_a_miss_and_tells_the_key(place, monkeypatch):
    monkeypatch.setenv("FLAGEN_CACHE", "readonly")
    with pytest.raises(CacheError) as caught:
        find(KEY)
    for part in ("gla: FLAGEN_CACHE=readonly", KEY.directory, "no such entry", "FLAGEN_CACHE=on", "versions.torch = 2"):
        assert part in str(caught.value)
    assert not place.exists()


def test_readonly_reads_what_is_there(entry, monkeypatch):
    monkeypatch.setenv("FLAGEN_CACHE", "readonly")
    before = sorted(entry.parent.parent.rglob("*"))
    assert find(KEY).path == entry / "kernels.py"
    with pytest.raises(CacheError, match="does not serve"):
        store(KEY, SOURCE, FACTS)
    assert sorted(entry.parent.parent.rglob("*")) == before


def test_readonly_trusts_root_as_well(entry, monkeypatch):
    """A container's image holds a cache that root filled; here root's files are read as another user."""
    if entry.stat().st_uid != 0:
        pytest.skip("only root can make files of root")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("FLAGEN_CACHE", "readonly")
    assert find(KEY) is not None
    entry.parent.chmod(0o777)
    forget()
    with pytest.raises(CacheError, match="chmod go-w"):
        find(KEY)


def test_readonly_refuses_a_root_of_somebody_else(entry, monkeypatch):
    owner = entry.stat().st_uid
    os_lstat = os.lstat

    def of_another(path, **options):
        found = list(os_lstat(path, **options))
        return os.stat_result([*found[:4], owner + 4711, *found[5:]])

    monkeypatch.setattr(os, "lstat", of_another)
    monkeypatch.setenv("FLAGEN_CACHE", "readonly")
    with pytest.raises(CacheError, match="belongs to user"):
        find(KEY)


def test_verify_compares_with_what_is_there(entry, monkeypatch):
    monkeypatch.setenv("FLAGEN_CACHE", "verify")
    assert store(KEY, SOURCE, FACTS).path == entry / "kernels.py"
    with pytest.raises(CacheError) as caught:
        store(KEY, SOURCE.replace("1", "2"), FACTS)
    for part in ("not what is cached", "-X = 1", "+X = 2", "flagen cache clear"):
        assert part in str(caught.value)
    with pytest.raises(CacheError, match="facts beside the text differ"):
        store(KEY, SOURCE, {})


def test_verify_stores_what_is_not_there(place, monkeypatch):
    monkeypatch.setenv("FLAGEN_CACHE", "verify")
    assert stored_anew().path.exists()


def test_verify_never_trusts_memory(entry, monkeypatch):
    monkeypatch.setenv("FLAGEN_CACHE", "verify")
    assert find(KEY) is not None
    (entry / "kernels.py").write_text("")
    with pytest.raises(CacheError, match="checksum"):
        find(KEY)


def test_verify_refuses_a_root_that_cannot_be_used(place, monkeypatch):
    place.write_text("")
    monkeypatch.setenv("FLAGEN_CACHE", "verify")
    with pytest.raises(CacheError, match="not a directory"):
        find(KEY)
    with pytest.raises(CacheError, match="not a directory"):
        store(KEY, SOURCE, FACTS)


def test_verify_sees_a_root_that_appears_unusable_to_write(place, monkeypatch):
    monkeypatch.setenv("FLAGEN_CACHE", "verify")
    monkeypatch.setattr(private, "write", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "disk full")))
    with pytest.raises(CacheError, match="disk full"):
        store(KEY, SOURCE, FACTS)


# --- the view of the command line


def test_entries(place):
    assert entries() == []
    paths = [store(Key(name, {"format": 1}), SOURCE, {}).path.parent for name in ("retnet", "gla")]
    (place / "v1" / ".0123456789abcdef.staging").mkdir()
    (place / "v1" / "notes").mkdir()
    os.utime(paths[0], (time.time() - 90, time.time() - 90))
    gla, retnet = entries()
    assert (gla.name, gla.key, gla.path) == ("gla", Key("gla", {"format": 1}).digest, paths[1])
    assert gla.size == sum(path.stat().st_size for path in paths[1].iterdir())
    assert gla.age < 60
    assert 90 <= retnet.age < 150


def test_verify_all(place):
    for name in ("based", "gla", "retnet"):
        store(Key(name, {"format": 1}), SOURCE, {})
    (entries()[0].path / "kernels.py").write_text("")
    (entries()[1].path / "meta.json").unlink()
    faults = {one.name: fault for one, fault in verify_all()}
    assert "checksum" in faults["based"]
    assert "lacks meta.json" in faults["gla"]
    assert faults["retnet"] == ""
    (place / "v1").chmod(0o777)
    with pytest.raises(CacheError, match="chmod go-w"):
        verify_all()


def test_verify_all_of_nothing():
    assert verify_all() == []


def test_clear_removes_entries_and_what_dead_processes_left(place):
    assert clear() == 0
    store(KEY, SOURCE, FACTS)
    fresh, stale = (place / "v1" / f".0123456789abcdef.{name}" for name in ("fresh", "stale"))
    for path in (fresh, stale):
        path.mkdir()
        (path / "kernels.py").write_text("half")
    os.utime(stale, (time.time() - 2 * cache.STALE_SECONDS,) * 2)
    other = place / "v1" / "notes"
    other.mkdir()
    assert clear() == 1
    assert sorted((place / "v1").iterdir()) == [fresh, other]
    assert find(KEY) is None


# --- keys


def spec_key(name: str = "gla") -> Key:
    return make_key(name, specs.get(name).to_json())


def test_fields_of_a_key():
    fields = spec_key().fields
    assert list(fields) == ["format", "spec", "sources", "versions"]
    assert fields["spec"] == json.loads(specs.get("gla").to_json())
    assert list(fields["versions"]) == ["flagen", "jinja2", "sympy", "torch", "triton"]
    assert "none" not in fields["versions"].values()


def test_the_key_changes_with_each_field():
    flat = cache_key.flat(spec_key().fields)
    digests = {spec_key().digest}
    for name in flat:
        fields = json.loads(cache_key.canonical(spec_key().fields))
        *parents, last = name.split(".")
        inner = fields
        for parent in parents:
            inner = inner[parent]
        inner[last] = "other"
        digests.add(Key("gla", fields).digest)
    assert len(digests) == len(flat) + 1


def test_the_key_changes_with_the_spec():
    gla = specs.get("gla")
    others = [gla.replace("other"), gla.replace("gla", scale=1), gla.replace("gla", log_decay=None)]
    others.append(gla.replace("gla", inputs=("k", "q", "v", "g")))
    assert len({make_key(one.name, one.to_json()).digest for one in [gla, *others]}) == 5


PRINT_KEY = "from flagen import specs; from flagen.cache_key import make_key; s = specs.get('gla');"
PRINT_KEY += "print(make_key(s.name, s.to_json()).digest)"


def test_the_key_is_the_same_in_every_process(tmp_path):
    """Whatever the hash seed, the working directory, the settings, the home directory and the time of the files."""
    package = tmp_path / "flagen"
    source = Path(cache_key.__file__).parent
    shutil.copytree(source, package, ignore=shutil.ignore_patterns("__pycache__"))
    os.utime(package / "spec.py", (0, 0))
    (package / "torch_backend.py").write_text("# a module that shapes no text\n")
    (package / "specs" / "gla.py").write_text("# the model's comment\n" + (source / "specs" / "gla.py").read_text())
    changed = {
        "PYTHONPATH": str(tmp_path),
        "PYTHONHASHSEED": "7",
        "HOME": str(tmp_path),
        "FLAGEN_CACHE": "off",
        "FLAGEN_CACHE_DIR": "/nowhere",
        "FLAGEN_LOGS": "cache",
        "FLAGEN_DEBUG": "1",
        "LC_ALL": "C",
        "TZ": "Asia/Tokyo",
    }
    assert set(changed) >= {variable.name for variable in config.VARIABLES if not variable.affects_text}
    result = subprocess.run(
        [sys.executable, "-c", PRINT_KEY], cwd=tmp_path, env=os.environ | changed, capture_output=True, text=True
    )
    assert result.stdout.strip() == spec_key().digest, result.stderr


def test_the_key_changes_with_flagens_sources(tmp_path):
    source = Path(cache_key.__file__).parent
    package = tmp_path / "flagen"
    shutil.copytree(source, package, ignore=shutil.ignore_patterns("__pycache__"))

    def digest() -> str:
        return cache_key.digest_of_files(package, cache_key.shaping_files(package))

    before = digest()
    assert before == cache_key.sources()
    seen = {before}
    template = next(iter((package / "templates").rglob("*.jinja")))
    for path in (package / "functions.py", template):
        path.write_text(path.read_text() + "\n")
        seen.add(digest())
    (package / "a_new_module.py").write_text("")
    seen.add(digest())
    template.rename(template.with_name("renamed.jinja"))
    seen.add(digest())
    assert len(seen) == 5
    for name in ("op.py", "cli_new.py", "torch_new.py", "load.py"):
        (package / name).write_text("# no text depends on this\n")
    assert digest() in seen


def test_paths_and_contents_do_not_run_into_each_other(tmp_path):
    digests = set()
    for number, files in enumerate([{"a": "bc"}, {"ab": "c"}, {"a": "b", "c": ""}, {"a": "", "bc": ""}]):
        root = tmp_path / str(number)
        root.mkdir()
        for name, content in files.items():
            (root / name).write_text(content)
        digests.add(cache_key.digest_of_files(root, list(root.iterdir())))
    assert len(digests) == 4


def test_a_package_that_is_no_directory_has_no_key(tmp_path):
    with pytest.raises(FileNotFoundError, match="own sources"):
        cache_key.shaping_files(tmp_path)


@pytest.mark.parametrize("name", ["../gla", "gla/x", "Gla", "", "a" * 42, "gla\n"])
def test_a_name_that_is_no_part_of_a_path(name):
    with pytest.raises(ValueError, match="cannot name"):
        Key(name, {})


def test_keys_hold_numbers_only_that_json_has():
    with pytest.raises(ValueError, match="JSON"):
        cache_key.canonical({"x": float("nan")})

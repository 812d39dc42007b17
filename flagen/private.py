"""Files that only this user can have written. What is read here is run, so who can write it matters.

The checks are those of POSIX; elsewhere a directory below the user's home is trusted as it is.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path

MAX_BYTES = 16 << 20  # of one file; generated modules have some 50 kB
# never through a link, never waiting for the other end of a pipe; some systems lack some of these
_FLAGS = sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY", "O_CLOEXEC"))


class NotPrivateError(OSError):
    """A file or directory that somebody else can write, or that is not what it should be. The text says what to do."""


def make_directory(path: Path) -> None:
    """Makes the directory and its missing parents, for the user alone. One that is there is left as it is."""
    if not path.parent.is_dir():
        make_directory(path.parent)
    with contextlib.suppress(FileExistsError):  # check_directory says what is wrong, if something is
        path.mkdir(mode=0o700)


def check_directory(path: Path, *, root_may_own: bool = False) -> None:
    """Raises NotPrivateError unless `path` is a directory, no symbolic link, of this user (or of root, with
    root_may_own) and written by its owner alone; FileNotFoundError where there is none.
    """
    found = os.lstat(path)
    if stat.S_ISLNK(found.st_mode):
        raise NotPrivateError(f"{path} is a symbolic link; set FLAGEN_CACHE_DIR to the directory that it points to")
    if not stat.S_ISDIR(found.st_mode):
        raise NotPrivateError(f"{path} is not a directory; remove it, or set FLAGEN_CACHE_DIR to another path")
    _check_owner(path, found, root_may_own)


def read(path: Path, *, root_may_own: bool = False) -> bytes:
    """The content of a regular file that passes the checks of check_directory, made on the file that is read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | _FLAGS)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise NotPrivateError(f"{path} is a symbolic link") from None
        raise
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise NotPrivateError(f"{path} is not a file")
        _check_owner(path, found, root_may_own)
        if found.st_size > MAX_BYTES:
            raise NotPrivateError(f"{path} has {found.st_size} bytes, the limit is {MAX_BYTES}")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


def write(path: Path, content: bytes) -> None:
    """Writes a new file for the user alone, through to the disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FLAGS, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _check_owner(path: Path, found: os.stat_result, root_may_own: bool) -> None:
    if os.name != "posix":
        return
    owners = {os.geteuid()} | ({0} if root_may_own else set())
    if found.st_uid not in owners:
        raise NotPrivateError(
            f"{path} belongs to user {found.st_uid}, this process runs as user {os.geteuid()}; set FLAGEN_CACHE_DIR to "
            "a directory of your own"
        )
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise NotPrivateError(f"{path} can be written by others; run: chmod go-w {path}")

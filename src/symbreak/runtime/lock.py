"""One command at a time in an output folder: a lock of the operating system on the file ``.lock`` in it.

The lock goes with its process, however that ends, so a file that a killed one left locks nothing. Runs of one process
share it, and so do the ranks of one launch, for which the first one takes it. Between hosts it works where the file
system hands locks on (NFS from version 4, Lustre with flock, SMB); where it knows none at all, a line says so.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import shlex
import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from symbreak.runtime.errors import note
from symbreak.runtime.files import InputError, not_written, output_folder
from symbreak.runtime.ranks import agreed

__all__ = ["Hold", "locked", "release_all"]

NAME = ".lock"
FAR = 2**30  # Windows locks bytes, and keeps them from readers: one behind the text
BUSY = (errno.EAGAIN, errno.EACCES, errno.EDEADLK)
COMMAND = 200  # characters of a command line that are shown


@dataclass
class _Lock:
    """A lock that this process has, and how many hold it."""

    file: int
    made: list[Path]  # folders that were made for it, the innermost last
    holders: int = 0


_locks: dict[Path, _Lock] = {}  # of this process, by folder


@dataclass(eq=False)
class Hold:
    """Takes part in the lock of a folder until it is released, or nobody knows of it any more.

    Raises:
        InputError: where another process has the lock, or nothing can be written there.
    """

    folder: Path
    release: weakref.finalize = field(init=False, repr=False)

    def __post_init__(self) -> None:
        output_folder(self.folder)
        key = Path(os.path.realpath(self.folder))
        taken: list[_Lock] = []
        agreed(lambda: taken.append(_take(key, self.folder)))
        self.release = weakref.finalize(self, _release, key, taken[0]) if taken else weakref.finalize(self, int)


@contextmanager
def locked(folder: str | Path | None) -> Iterator[None]:
    """Within it no other process writes to a folder; nothing without one."""
    hold = None if folder is None else Hold(Path(folder))
    try:
        yield
    finally:
        if hold is not None:
            hold.release()


def _take(key: Path, folder: Path) -> _Lock:
    if key in _locks:
        _locks[key].holders += 1
        return _locks[key]
    made = [p for p in (*reversed(key.parents), key) if not p.exists()]
    file = -1
    try:
        key.mkdir(parents=True, exist_ok=True)
        file = _opened(key / NAME, folder)
        about = {"pid": os.getpid(), "host": platform.node(), "command": _command(), "since": time.time()}
        os.ftruncate(file, 0)
        os.write(file, json.dumps(about).encode())
    except OSError as error:
        if file >= 0:
            _free(key / NAME, file, made)
        raise not_written(folder, error) from None
    return _locks.setdefault(key, _Lock(file, made, 1))


def _opened(path: Path, folder: Path) -> int:
    """The lock's file, locked."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(file)
        except OSError as error:
            holder = _holder(path)
            os.close(file)
            if error.errno in BUSY:
                raise InputError(f"{folder} is in use by {holder}. Wait for it, or choose another folder.") from None
            note(f"{folder}: its file system knows no locks ({error.strerror}); let no two commands write there.")
            return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), os.stat(path)):
                return file
        os.close(file)  # whoever had it removed it meanwhile


def _lock(file: int) -> None:
    """Lock a file, or raise OSError at once."""
    if sys.platform == "win32":
        import msvcrt

        os.lseek(file, FAR, os.SEEK_SET)
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        os.lseek(file, 0, os.SEEK_SET)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _holder(path: Path) -> str:
    """Who has a lock: process, host, since when, command."""
    for _ in range(5):
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
            since = datetime.fromtimestamp(about["since"]).isoformat(" ", "seconds")
            return f"process {about['pid']} on {about['host']} since {since}: {about['command']}"
        except (OSError, ValueError, LookupError, TypeError):
            time.sleep(0.02)  # it was just taken, and says so in a moment
    return "another process"


def _command() -> str:
    text = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]) if sys.argv else "python"
    return text if len(text) <= COMMAND else f"{text[:COMMAND]} ..."


def release_all() -> None:
    """Release every lock of this process: at the end of a command, whoever still knows them."""
    for key, lock in list(_locks.items()):
        lock.holders = 1
        _release(key, lock)


def _release(key: Path, lock: _Lock) -> None:
    if _locks.get(key) is not lock:  # released with all others, or of a process that this one was forked from
        return
    lock.holders -= 1
    if not lock.holders:
        del _locks[key]
        _free(key / NAME, lock.file, lock.made)


def _free(path: Path, file: int, made: list[Path]) -> None:
    """Remove the lock's file while it is locked, then the lock, and the folders made for it that stayed empty."""
    with suppress(OSError):  # Windows removes no open file
        path.unlink()
    os.close(file)
    for folder in reversed(made):
        try:
            folder.rmdir()
        except OSError:  # there is something in it
            break


def _forget() -> None:
    for lock in _locks.values():
        os.close(lock.file)
    _locks.clear()


if hasattr(os, "register_at_fork"):  # the lock stays the parent's: a child that outlives it must not have it
    os.register_at_fork(after_in_child=_forget)

"""The locks of the store: of its entries, each beside a note of who holds it, and of the private folders.

A lock is a file that is locked with flock: the operating system frees it when its holder dies, in whatever container
the holder ran. Whether a process lives is never asked by its number, which means nothing in another container.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jit_kernel.engine import progress
from jit_kernel.engine.entry import read_file
from jit_kernel.engine.network import retried
from jit_kernel.engine.ownership import CacheError

if TYPE_CHECKING:
    from filelock import FileLock

_NAME = re.compile(r"([0-9a-f]{32})\.(lock|holder)")
_PRIVATE_NAME = re.compile(r"\d+-(?P<host>.+)-[0-9a-f]{8}")
_MARK = ".alive"  # the ending of the lock beside a private folder
# A folder of another machine, or one without a lock, is left alone for so long.
_FOREIGN_SECONDS = 24 * 3600
_POLL_SECONDS = 0.02
_ATTEMPTS = 10
_MOST_NOTE_BYTES = 4096
# What flock answers on a file system without locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
# What open answers where a folder, a link or a pipe lies in a lock file's place, or a file that may not be opened.
_NO_LOCK_FILE = (errno.EISDIR, errno.ELOOP, errno.EACCES, errno.ENXIO, errno.EINVAL)


@dataclass(frozen=True)
class Holder:
    """The process that holds an entry's lock, and how long the entry's last build took."""

    pid: int
    host: str
    since: float
    last_seconds: float | None


class EntryLock:
    """The lock of one entry, a file in `folder`."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._file = folder / f"{name}.lock"
        self._note = folder / f"{name}.holder"

    @classmethod
    def of(cls, folder: Path, kernel: str, target: str, key: str) -> EntryLock:
        """The lock of the entries that have this key."""
        return cls(folder, hashlib.sha256(f"{kernel}/{target}/{key}".encode()).hexdigest()[:32])

    @contextlib.contextmanager
    def held(self, waiting: Callable[[Holder | None, float], None], patience: float = 2.0) -> Iterator[None]:
        """Hold it. The operating system frees a dead holder's lock at once.

        `waiting(holder, seconds)` is called after `patience` seconds of waiting, and every ten from then on.
        """
        started = time.monotonic()
        while True:
            make_folder(self._folder, 0o700)
            # `remove_free` removed the empty folder meanwhile
            with contextlib.suppress(FileNotFoundError, FileExistsError):
                lock = _locked(self._file)
                if lock is not None:
                    break
            waited = time.monotonic() - started
            if waited >= patience:
                waiting(_read(self._note), waited)
                patience = time.monotonic() - started + 10.0
            time.sleep(_POLL_SECONDS)
        try:
            _write(self._note, self.last_duration())
            yield
        finally:
            lock.release()

    def record_duration(self, seconds: float) -> None:
        """Note how long the entry took to build, for the processes that wait for its next build."""
        _write(self._note, seconds)

    def last_duration(self) -> float | None:
        """How long the entry's last build took, if it is on record."""
        holder = _read(self._note)
        return holder.last_seconds if holder else None


def remove_free(folder: Path) -> None:
    """Remove the files of every lock that no process holds, and the folder once it is empty."""
    names: list[str] = []
    with contextlib.suppress(OSError):  # another process that clears the store may have removed it
        names = os.listdir(folder)
    for name in names:
        match = _NAME.fullmatch(name)
        if match is None:
            continue
        with contextlib.suppress(OSError):
            lock = _locked(folder / f"{match[1]}.lock", surely=True)
            if lock is not None:
                (folder / f"{match[1]}.holder").unlink(missing_ok=True)
                (folder / f"{match[1]}.lock").unlink(missing_ok=True)
                lock.release()
    with contextlib.suppress(OSError):
        folder.rmdir()


def try_lock(path: Path) -> Callable[[], None] | None:
    """Lock a file outside of the store if it is free; answers with what releases it, None where another holds it."""
    lock = _locked(path)
    return None if lock is None else lock.release


def _locked(path: Path, *, surely: bool = False) -> FileLock | None:
    """A lock file, locked; None where another holds it, or removed it meanwhile.

    Where the file system has no locks everybody gets it, unless it must be held `surely`: processes that ask at once
    compile the same, each for itself; one that must be held raises the file system's OSError. A forked child does not
    hold it (filelock closes its descriptor there).
    """
    from filelock import FileLock, Timeout  # with the first lock: it takes 7 of 30 ms of a call that only loads

    lock = FileLock(path, mode=0o600, thread_local=False, fallback_to_soft=False)
    try:
        retried(lambda: lock.acquire(blocking=False))
    except Timeout:
        return None
    except OSError as error:
        if error.errno in _NO_LOCKS:
            if surely:
                raise
            progress.warn_once(f"files in {path.parent} cannot be locked: processes that meet may compile twice")
            return lock
        if error.errno not in _NO_LOCK_FILE or os.lstat(path).st_uid != os.geteuid():
            raise
        remove(path)  # no lock file, or one that its owner cannot open
        return None
    folder = os.lstat(path.parent)
    if folder.st_uid == os.geteuid() and folder.st_mode & 0o022:  # filelock makes a missing folder by the umask
        os.chmod(path.parent, 0o700)
    return lock


# -- private folders -------------------------------------------------------------------------------

_alive: dict[Path, FileLock] = {}


def new_private_folder(parent: Path) -> Path:
    """A new folder for one compilation. As long as this process lives and keeps it, a lock beside it is held."""
    while True:
        folder = parent / f"{os.getpid()}-{socket.gethostname()}-{secrets.token_hex(4)}"
        mark = _locked(_mark_of(folder))
        if mark is not None:  # None: another process swept it away before it was locked
            _alive[folder] = mark
            make_folder(folder, 0o700)
            return folder


def release_private_folder(folder: Path) -> None:
    """Remove what marks a private folder as in use, after the folder was moved or removed."""
    mark = _alive.pop(folder, None)
    if mark is not None and mark.is_locked:  # a forked child's is not
        with contextlib.suppress(OSError):
            _mark_of(folder).unlink()
        mark.release()


def remove_abandoned(parent: Path) -> None:
    """Remove the private folders whose process is gone. Of another machine, where the lock may not be seen, and
    without a lock, only those that are a day old."""
    here = socket.gethostname()
    with contextlib.suppress(OSError):
        for name in {path.name.removesuffix(_MARK) for path in parent.iterdir()}:
            match = _PRIVATE_NAME.fullmatch(name)
            if match is None:
                continue
            folder = parent / name
            with contextlib.suppress(OSError):
                _remove_if_abandoned(folder, of_here=match["host"] == here)


def _remove_if_abandoned(folder: Path, *, of_here: bool) -> None:
    mark = None
    try:
        os.lstat(_mark_of(folder))
        mark = _locked(_mark_of(folder), surely=True)
        if mark is None:
            return
    except OSError as error:  # no lock, or none that can be seen on this file system
        if error.errno not in (errno.ENOENT, *_NO_LOCKS):
            raise
        of_here = False
    try:
        if of_here or not folder.exists() or time.time() - folder.stat().st_mtime > _FOREIGN_SECONDS:
            remove(folder)
            _mark_of(folder).unlink(missing_ok=True)
    finally:
        if mark is not None:
            mark.release()


def _mark_of(folder: Path) -> Path:
    return folder.with_name(folder.name + _MARK)


# -- folders and files -----------------------------------------------------------------------------


def make_folder(folder: Path, mode: int) -> None:
    """Make a folder, and those above it that are missing (0755), with these modes whatever the umask.

    Raises FileExistsError where something else is in its place.
    """
    for attempt in range(_ATTEMPTS):
        try:
            os.mkdir(folder, 0o700)
            os.chmod(folder, mode)
            return
        except FileNotFoundError:  # no parent, or removed meanwhile; in /proc nobody makes a folder
            if attempt + 1 == _ATTEMPTS:
                raise
            make_folder(folder.parent, 0o755)
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):  # removed since
                if not (stat.S_ISDIR(os.lstat(folder).st_mode) or folder.is_dir()):
                    raise
                return
    raise FileNotFoundError(errno.ENOENT, "it is removed as often as it is made", str(folder))


def remove(path: Path) -> None:
    """Remove a folder, a file or a link, as far as it can be."""
    with contextlib.suppress(OSError):
        if stat.S_ISDIR(os.lstat(path).st_mode):
            os.chmod(path, 0o700)
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.unlink(path)


def write_whole(path: Path, text: str, mode: int = 0o600) -> None:
    """Write a file so that a reader sees the old text or the new, never a part."""
    part = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(part, mode)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _write(note: Path, last_seconds: float | None) -> None:
    record = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time(), "last_seconds": last_seconds}
    with contextlib.suppress(OSError):  # on a full disk the processes that wait cannot name the holder
        write_whole(note, json.dumps(record))


def _read(note: Path) -> Holder | None:
    try:
        record = json.loads(read_file(note, note.parent, _MOST_NOTE_BYTES))
        last = record["last_seconds"]
        seconds = None if last is None else float(last)
        return Holder(int(record["pid"]), str(record["host"]), float(record["since"]), seconds)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError, CacheError):
        return None

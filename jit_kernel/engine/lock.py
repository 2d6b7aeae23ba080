"""The locks of the store's entries, each beside a note: which process holds it, and how long the last build took."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

_NAME = re.compile(r"([0-9a-f]{32})\.(lock|holder)")


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
    def held(self, waiting: Callable[[Holder | None, float], None]) -> Iterator[None]:
        """Hold it. The operating system frees a dead holder's lock at once.

        `waiting(holder, seconds)` is called after two seconds of waiting, and every ten from then on.
        """
        from filelock import FileLock, Timeout  # with the first lock: it takes 7 of 30 ms of a call that only loads

        lock = FileLock(self._file, mode=0o600, thread_local=False)
        started, patience = time.monotonic(), 2.0
        while True:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            try:
                lock.acquire(timeout=patience, poll_interval=0.02)
                break
            except Timeout:
                waiting(_read(self._note), time.monotonic() - started)
                patience = 10.0
            except FileNotFoundError:  # `remove_free` removed the empty folder meanwhile
                if self._folder.is_dir():
                    raise
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
    from filelock import FileLock, Timeout

    for path in list(folder.iterdir()) if folder.is_dir() else []:
        match = _NAME.fullmatch(path.name)
        if match is None:
            continue
        lock = FileLock(folder / f"{match[1]}.lock", mode=0o600, thread_local=False)
        with contextlib.suppress(Timeout), lock.acquire(timeout=0):
            (folder / f"{match[1]}.holder").unlink(missing_ok=True)
            (folder / f"{match[1]}.lock").unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old text or the new, never a part."""
    part = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _write(note: Path, last_seconds: float | None) -> None:
    record = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time(), "last_seconds": last_seconds}
    with contextlib.suppress(OSError):  # on a full disk the processes that wait cannot name the holder
        write_whole(note, json.dumps(record))


def _read(note: Path) -> Holder | None:
    try:
        record = json.loads(note.read_bytes())
        last = record["last_seconds"]
        seconds = None if last is None else float(last)
        return Holder(int(record["pid"]), str(record["host"]), float(record["since"]), seconds)
    except (OSError, ValueError, KeyError, TypeError):
        return None

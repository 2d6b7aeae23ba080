"""The store of compiled kernels: look up, lock, publish whole, verify, quarantine.

The only file that writes the store. An entry is a folder `<kernel>/<target>/<key>-<compiler>/` that holds the
artifact, the unit that was compiled and `manifest.json`; it appears by one rename and is never changed. Size
and sha256 of every file are verified before the entry is used: a truncated library kills the process with
SIGBUS at dlopen, which no `except` catches. A hit writes nothing and needs no lock.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

MANIFEST = "manifest.json"
_TMP, _LOCKS, _QUARANTINE, _FAILED = ".tmp", ".locks", ".quarantine", ".failed"
_COMPILERS = "compilers.json"
_QUARANTINE_KEPT = 8
_FOREIGN_TMP_SECONDS = 24 * 3600

log = logging.getLogger("jit_kernel")


class CacheError(RuntimeError):
    """The store cannot be used; the message says what to do about it."""


@dataclass(frozen=True)
class Entry:
    """A verified entry of the store."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def artifact(self) -> Path:
        """The file to load."""
        return self.folder / str(self.manifest["artifact"])


@dataclass(frozen=True)
class Miss:
    """Why there is no usable entry. A damaged one was there if `damaged`."""

    reason: str
    damaged: Path | None = None


@dataclass(frozen=True)
class Holder:
    """Who compiles an entry at the moment, as the one who waits is told."""

    pid: int
    host: str
    since: float
    last_seconds: float | None


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


class Store:
    """One folder of compiled kernels."""

    def __init__(self, root: Path) -> None:
        self.root = root

    # -- the folder itself ---------------------------------------------------------------------------

    def check(self) -> None:
        """Refuse a store that another user can write: its code would run in this process."""
        try:
            status = self.root.stat()
        except FileNotFoundError:
            return
        except OSError as error:
            raise CacheError(f"cache folder {self.root} cannot be read: {error}") from error
        if not stat.S_ISDIR(status.st_mode):
            raise CacheError(f"cache folder {self.root} is not a folder; set JIT_KERNEL_CACHE_DIR")
        if status.st_uid not in (os.geteuid(), 0):
            raise CacheError(
                f"cache folder {self.root} belongs to user {status.st_uid}, who could change the code in it; "
                "set JIT_KERNEL_CACHE_DIR to a folder of your own"
            )
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise CacheError(
                f"cache folder {self.root} can be written by other users (mode {status.st_mode & 0o7777:04o}); "
                f"mend it with: chmod go-w '{self.root}'"
            )

    def writable(self) -> bool:
        """Whether an entry can be added; makes the folder if it is missing."""
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            return False
        return os.access(self.root, os.W_OK | os.X_OK)

    # -- look-up -------------------------------------------------------------------------------------

    def lookup(self, kernel: str, target: str, key: str, compiler: str | None) -> Entry | Miss:
        """Find and verify an entry. `compiler` is the present compiler's short identity; without one any
        compiler's entry will do. Writes nothing."""
        parent = self.root / kernel / target
        if compiler is not None:
            return self.verify(parent / f"{key}-{compiler}", key)
        miss = Miss("no entry")
        try:
            names = sorted(name for name in os.listdir(parent) if name.startswith(f"{key}-"))
        except OSError:
            return miss
        for name in names:
            found = self.verify(parent / name, key)
            if isinstance(found, Entry):
                return found
            miss = found
        return miss

    def verify(self, folder: Path, key: str) -> Entry | Miss:
        """Read an entry's manifest and compare every file with it."""
        try:
            manifest = json.loads((folder / MANIFEST).read_bytes())
        except FileNotFoundError:
            if folder.is_dir():
                return Miss("its manifest is missing", folder)
            return Miss("no entry")
        except (OSError, ValueError) as error:
            return Miss(f"its manifest cannot be read ({error})", folder)
        try:
            if manifest["key"] != key:
                return Miss("its manifest names another key", folder)
            for name, expected in manifest["files"].items():
                path = folder / name
                size = path.stat().st_size
                if size != expected["size"]:
                    return Miss(f"{name} has {size} bytes, not {expected['size']}", folder)
                if sha256_of(path) != expected["sha256"]:
                    return Miss(f"{name} has other bytes than were compiled", folder)
            if manifest["artifact"] not in manifest["files"]:
                return Miss("its manifest names no artifact", folder)
        except (KeyError, TypeError, AttributeError) as error:
            return Miss(f"its manifest is malformed ({error!r})", folder)
        except OSError as error:
            return Miss(f"a file is missing or unreadable ({error})", folder)
        return Entry(folder, manifest)

    def manifests(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """The folder and manifest of every entry that can be read, unverified."""
        for path in sorted(self.root.glob(f"[!.]*/**/{MANIFEST}")):
            with contextlib.suppress(OSError, ValueError):
                manifest = json.loads(path.read_bytes())
                if isinstance(manifest, dict):
                    yield path.parent, manifest

    # -- writing -------------------------------------------------------------------------------------

    def private_folder(self) -> Path:
        """A new folder beside the entries, for one compilation. Dead processes' folders are swept."""
        parent = self.root / _TMP
        parent.mkdir(mode=0o700, exist_ok=True)
        self._sweep(parent)
        folder = parent / f"{os.getpid()}-{socket.gethostname()}-{secrets.token_hex(4)}"
        folder.mkdir(mode=0o700)
        return folder

    def publish(self, private: Path, kernel: str, target: str, name: str) -> Path:
        """Rename a finished private folder to its place in the store."""
        folder = self.root / kernel / target / name
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in private.iterdir():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        os.rename(private, folder)
        return folder

    def quarantine(self, folder: Path) -> Path | None:
        """Move a damaged entry out of the way; the newest few are kept to be looked at."""
        parent = self.root / _QUARANTINE
        parent.mkdir(mode=0o700, exist_ok=True)
        place = parent / f"{time.time_ns()}-{folder.name}"
        try:
            os.rename(folder, place)
        except FileNotFoundError:
            return None
        for old in sorted(parent.iterdir())[:-_QUARANTINE_KEPT]:
            shutil.rmtree(old, ignore_errors=True)
        return place

    def keep_failure(self, private: Path, name: str, log_text: str, command: str) -> Path:
        """Keep a failed compilation: its unit, the whole log and a script that repeats the command."""
        folder = self.root / _FAILED / name
        folder.parent.mkdir(mode=0o700, exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(private, folder)
        (folder / "compile.log").write_text(log_text, encoding="utf-8")
        script = folder / "repeat.sh"
        script.write_text(f'#!/bin/sh\ncd "$(dirname "$0")" && {command}\n', encoding="utf-8")
        script.chmod(0o700)
        return folder

    def _sweep(self, parent: Path) -> None:
        here = socket.gethostname()
        for folder in parent.iterdir():
            pid, _, rest = folder.name.partition("-")
            host = rest.rpartition("-")[0]
            with contextlib.suppress(OSError):
                old = time.time() - folder.stat().st_mtime > _FOREIGN_TMP_SECONDS
                if old or (host == here and not process_lives(int(pid) if pid.isdigit() else 0)):
                    shutil.rmtree(folder, ignore_errors=True)

    # -- the lock ------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def lock(self, name: str, waiting: Callable[[Holder | None, float], None]) -> Iterator[None]:
        """Hold the lock of one entry. The kernel frees a dead holder's lock at once.

        `waiting(holder, seconds)` is called after two seconds of waiting, and every ten from then on.
        """
        parent = self.root / _LOCKS
        parent.mkdir(mode=0o700, exist_ok=True)
        lock = FileLock(parent / f"{name}.lock", mode=0o600, thread_local=False)
        note = parent / f"{name}.holder"
        started, patience = time.monotonic(), 2.0
        while True:
            try:
                lock.acquire(timeout=patience, poll_interval=0.02)
                break
            except Timeout:
                waiting(_read_holder(note), time.monotonic() - started)
                patience = 10.0
        try:
            previous = _read_holder(note)
            self._write_holder(note, previous.last_seconds if previous else None)
            yield
        finally:
            lock.release()

    def record_duration(self, name: str, seconds: float) -> None:
        """Remember how long an entry took to build, for those who wait for its next build."""
        self._write_holder(self.root / _LOCKS / f"{name}.holder", seconds)

    def last_duration(self, name: str) -> float | None:
        """How long the last build of an entry took, if one is on record."""
        holder = _read_holder(self.root / _LOCKS / f"{name}.holder")
        return holder.last_seconds if holder else None

    def _write_holder(self, note: Path, last_seconds: float | None) -> None:
        record = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": time.time(),
            "last_seconds": last_seconds,
        }
        with contextlib.suppress(OSError):  # a full disk: those who wait are told less
            _write_whole(note, json.dumps(record))

    # -- compilers seen ------------------------------------------------------------------------------

    def recall_compiler(self, fingerprint: str) -> str | None:
        """The identity of a compiler file that was asked before; so a look-up need not start it."""
        try:
            seen = json.loads((self.root / _COMPILERS).read_bytes())
        except (OSError, ValueError):
            return None
        identity = seen.get(fingerprint) if isinstance(seen, dict) else None
        return identity if isinstance(identity, str) else None

    def remember_compiler(self, fingerprint: str, identity: str) -> None:
        """Keep a compiler's identity; where the store cannot be written it is asked for again next time."""
        try:
            seen = json.loads((self.root / _COMPILERS).read_bytes())
        except (OSError, ValueError):
            seen = {}
        kept = dict(list(seen.items())[-31:]) if isinstance(seen, dict) else {}
        with contextlib.suppress(OSError):
            if self.writable():
                _write_whole(self.root / _COMPILERS, json.dumps({**kept, fingerprint: identity}, indent=1))


def process_lives(pid: int) -> bool:
    """Whether a process of this machine is alive."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid > 0


def _write_whole(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _read_holder(note: Path) -> Holder | None:
    try:
        record = json.loads(note.read_bytes())
        last = record["last_seconds"]
        seconds = None if last is None else float(last)
        return Holder(int(record["pid"]), str(record["host"]), float(record["since"]), seconds)
    except (OSError, ValueError, KeyError, TypeError):
        return None

"""The store of compiled kernels: look up, publish whole, quarantine, clear.

The store is written here and, for its locks, in lock.py; nowhere else. An entry is a folder
`<kernel>/<target>/<key>-<compiler>/` that holds the artifact, the unit that was compiled and `manifest.json`; it
appears by one rename and is never changed. Size and sha256 of every file are verified before the entry is used: a
truncated library kills the process with SIGBUS at dlopen, which no `except` catches. A hit writes nothing and needs
no lock.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jit_kernel.engine.entry import MANIFEST, Entry, Miss, verify
from jit_kernel.engine.lock import EntryLock, Holder, remove_free, write_whole

_TMP, _LOCKS, _QUARANTINE, _FAILED = ".tmp", ".locks", ".quarantine", ".failed"
_COMPILERS = "compilers.json"
_QUARANTINE_KEPT = 8
_FOREIGN_TMP_SECONDS = 24 * 3600
# The names of what the store makes: nothing else in its folder is ever removed.
_ENTRY_NAME = re.compile(r"(?P<key>[0-9a-f]{32})-\w+")
_PRIVATE_NAME = re.compile(r"(?P<pid>\d+)-(?P<host>.+)-[0-9a-f]{8}")
_QUARANTINE_NAME = re.compile(rf"\d+-{_ENTRY_NAME.pattern}")


class CacheError(RuntimeError):
    """The store cannot be used; the message says what to do about it."""


class Store:
    """One folder of compiled kernels."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @classmethod
    def temporary(cls, prefix: str, *, kept: bool = False) -> Store:
        """A new store in the system's folder of temporary files, which ends with this process unless it is kept."""
        root = Path(tempfile.mkdtemp(prefix=prefix))
        if not kept:
            atexit.register(shutil.rmtree, root, ignore_errors=True)
        return cls(root)

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
            return verify(parent / f"{key}-{compiler}", key)
        miss = Miss("no entry")
        try:
            names = sorted(name for name in os.listdir(parent) if name.startswith(f"{key}-"))
        except OSError:
            return miss
        for name in names:
            found = verify(parent / name, key)
            if isinstance(found, Entry):
                return found
            miss = found
        return miss

    def manifests(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """The folder and manifest of every entry that can be read, unverified."""
        for path in sorted(self.root.glob(f"[!.]*/**/{MANIFEST}")):
            with contextlib.suppress(OSError, ValueError):
                manifest = json.loads(path.read_bytes())
                if isinstance(manifest, dict):
                    yield path.parent, manifest

    def lock(self, kernel: str, target: str, key: str) -> EntryLock:
        """The lock of the entries that have this key."""
        return EntryLock.of(self.root / _LOCKS, kernel, target, key)

    # -- writing -------------------------------------------------------------------------------------

    def private_folder(self) -> Path:
        """A new folder beside the entries, for one compilation. Dead processes' folders are removed."""
        parent = self.root / _TMP
        parent.mkdir(mode=0o700, exist_ok=True)
        self._remove_abandoned(parent)
        folder = parent / f"{os.getpid()}-{socket.gethostname()}-{secrets.token_hex(4)}"
        folder.mkdir(mode=0o700, parents=True)
        return folder

    def publish(self, private: Path, kernel: str, target: str, name: str) -> Path:
        """Rename a finished private folder to its place in the store."""
        for path in private.iterdir():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        folder = self.root / kernel / target / name
        while True:
            folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                os.rename(private, folder)
                return folder
            except FileNotFoundError:  # `clear` removed the empty parent meanwhile
                if not private.is_dir():
                    raise
            except OSError as error:
                # Where locks do not work (some network file systems), another process may have published the same.
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
                return folder

    def discard(self, private: Path) -> None:
        """Remove a private folder, if it is still there."""
        shutil.rmtree(private, ignore_errors=True)

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

    def clear(self, waiting: Callable[[Holder | None, float], None]) -> int:
        """Remove every entry, each under its lock, and what the store keeps beside them; nothing else.

        A compilation that runs meanwhile goes on: its private folder and its lock stay. Returns how many entries
        were removed; `waiting` is EntryLock's. Raises CacheError where the store cannot be written.
        """
        if not self.root.is_dir():
            return 0
        if not self.writable():
            raise CacheError(f"cache folder {self.root} cannot be written, so nothing was removed")
        removed = 0
        for folder, key in list(self._entries()):
            target = folder.parent
            kernel = target.parent.relative_to(self.root).as_posix()
            with self.lock(kernel, target.name, key).held(waiting):
                shutil.rmtree(folder, ignore_errors=True)
                removed += not folder.exists()
            _remove_empty(target, self.root)
        self._remove_abandoned(self.root / _TMP)
        for place, pattern in ((_QUARANTINE, _QUARANTINE_NAME), (_FAILED, _ENTRY_NAME)):
            for each in _children(self.root / place):
                if pattern.fullmatch(each.name):
                    shutil.rmtree(each, ignore_errors=True)
        (self.root / _COMPILERS).unlink(missing_ok=True)
        remove_free(self.root / _LOCKS)
        for place in (_TMP, _QUARANTINE, _FAILED):
            _remove_empty(self.root / place, self.root)
        return removed

    def _entries(self) -> Iterator[tuple[Path, str]]:
        """The folder and key of every entry, damaged ones too: a manifest below `<kernel>/<target>/<key>-...`."""
        for path in self.root.glob(f"[!.]*/**/{MANIFEST}"):
            match = _ENTRY_NAME.fullmatch(path.parent.name)
            if match is not None and ":" in path.parent.parent.name:
                yield path.parent, match["key"]

    def _remove_abandoned(self, parent: Path) -> None:
        """Remove the private folders of processes that are gone."""
        here = socket.gethostname()
        for folder in _children(parent):
            match = _PRIVATE_NAME.fullmatch(folder.name)
            if match is None:
                continue
            with contextlib.suppress(OSError):
                old = time.time() - folder.stat().st_mtime > _FOREIGN_TMP_SECONDS
                if old or (match["host"] == here and not process_lives(int(match["pid"]))):
                    shutil.rmtree(folder, ignore_errors=True)

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
                write_whole(self.root / _COMPILERS, json.dumps({**kept, fingerprint: identity}, indent=1))


def write_unit(private: Path, name: str, text: str) -> Path:
    """Write the text that is to be compiled into a private folder."""
    path = private / name
    path.write_text(text, encoding="utf-8")
    return path


def write_manifest(private: Path, manifest: dict[str, Any]) -> None:
    """Write what an entry was made of beside its files, the last of them."""
    (private / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def process_lives(pid: int) -> bool:
    """Whether a process of this machine is alive."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid > 0


def _children(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []


def _remove_empty(folder: Path, root: Path) -> None:
    """Remove a folder and those above it, up to the root, as far as they are empty."""
    with contextlib.suppress(OSError):
        while folder != root:
            folder.rmdir()
            folder = folder.parent

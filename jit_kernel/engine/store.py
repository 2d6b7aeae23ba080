"""The store of compiled kernels: look up, publish whole, quarantine; removal.py clears it.

The store is written here and, for its locks and folders, in lock.py; nowhere else. An entry is a folder
`<kernel>/<target>/<key>-<compiler>/` that holds the artifact, the unit that was compiled and `manifest.json`; it
appears by one rename and is never changed. Others may read what is published (0755, 0644), and nobody else may write
anything, whatever the umask; the store's own folders, whose names begin with a dot, are its user's alone (0700). A hit
writes nothing and needs no lock. docs/store.md holds the rules on one page.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import json
import os
import re
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jit_kernel import config
from jit_kernel.engine import lock as locks
from jit_kernel.engine import ownership
from jit_kernel.engine.entry import MANIFEST, DamagedError, Entry, Miss, manifest_of, places, read_file, verify
from jit_kernel.engine.lock import EntryLock, make_folder, remove, write_whole
from jit_kernel.engine.network import retried
from jit_kernel.engine.ownership import CacheError as CacheError
from jit_kernel.engine.progress import warn_once

TMP, LOCKS, QUARANTINE, FAILED = ".tmp", ".locks", ".quarantine", ".failed"
COMPILERS = ".compilers.json"
_MOST_COMPILERS_BYTES = 1 << 20
_QUARANTINE_KEPT = 8
QUARANTINE_NAME = re.compile(r"\d{19,}-.*")


class Store:
    """One folder of compiled kernels."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @classmethod
    def temporary(cls, prefix: str, *, kept: bool = False) -> Store:
        """A new store in the system's folder of temporary files, which ends with this process unless it is kept."""
        root = Path(tempfile.mkdtemp(prefix=prefix))
        if not kept:
            atexit.register(_remove_in, os.getpid(), root)
        return cls(root)

    # -- the folder itself ---------------------------------------------------------------------------

    def check(self) -> None:
        """Refuse a store that another user can write, at any place: its code would run in this process."""
        ownership.check_root(self.root)

    def writable(self, kernel: str = "", target: str = "") -> bool:
        """Whether an entry can be added; makes the folder if it is missing. Raises what `check` raises."""
        try:
            make_folder(self.root, 0o755)
        except OSError:
            return False
        self.check()  # what was missing may be there meanwhile, and another user's
        needed = (self.root, self.root / TMP, self.root / LOCKS, self.root / kernel, self.root / kernel / target)
        return all(os.access(place, os.W_OK | os.X_OK) for place in needed if place.is_dir())

    def _own(self, name: str, attempts: int = 5) -> Path:
        """A folder that the store keeps for itself, made if need be; what else has its name is moved away."""
        folder = self.root / name
        try:
            make_folder(folder, 0o700)
            ownership.check_folder(folder, self.root)
            if folder.stat().st_uid == os.geteuid() and not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
                folder.chmod(0o700)
        except FileNotFoundError:  # `clear` removed the empty folder meanwhile
            if attempts == 1:
                raise
            return self._own(name, attempts - 1)
        except (FileExistsError, NotADirectoryError):
            warn_once(f"{folder} is no folder; it is moved away")
            self.quarantine(folder)
            make_folder(folder, 0o700)
        return folder

    # -- look-up -------------------------------------------------------------------------------------

    def lookup(self, kernel: str, target: str, key: str, compiler: str | None) -> Entry | Miss:
        """Find and verify an entry. `compiler` is the present compiler's short identity; without one any
        compiler's entry will do. Writes nothing. Raises CacheError for what may not be read, or must not be."""
        if compiler is not None:
            return verify(self.root / f"{kernel}/{target}/{key}-{compiler}", key, self.root)
        miss = Miss("no entry")
        for name in self.names(kernel, target, key):
            found = verify(self.root / kernel / target / name, key, self.root)
            if isinstance(found, Entry):
                return found
            miss = found
        return miss

    def names(self, kernel: str, target: str, key: str) -> list[str]:
        """The folders of the entries that have a key, of whatever compiler, unverified."""
        parent = self.root / kernel / target
        try:
            return sorted(name for name in os.listdir(parent) if name.startswith(f"{key}-"))
        except PermissionError as error:
            raise ownership.unreadable(self.root, parent, error) from error
        except OSError:
            return []

    def manifests(self, below: Path | None = None) -> Iterator[tuple[Path, dict[str, Any]]]:
        """The folder and manifest of every entry that can be read, unverified; of all, or `below` a folder."""
        for folder, _ in places(below or self.root):
            manifest = manifest_of(folder, self.root)
            if manifest is not None:
                yield folder, manifest

    def verified(self, *, glance: bool = False) -> Iterator[tuple[Path, Entry | Miss]]:
        """Every entry, verified, or why it is of no use: damaged ones and those that this user cannot read too.

        At a glance the artifacts are not read: `verify` says what that misses."""
        for folder, key in places(self.root):
            try:
                yield folder, verify(folder, key, self.root, glance=glance)
            except CacheError as error:
                yield folder, Miss(str(error), folder)

    def lock(self, kernel: str, target: str, key: str) -> EntryLock:
        """The lock of the entries that have this key."""
        return EntryLock.of(self._own(LOCKS), kernel, target, key)

    # -- writing -------------------------------------------------------------------------------------

    def private_folder(self) -> Path:
        """A new folder beside the entries, for one compilation. Dead processes' folders are removed."""
        while True:
            parent = self._own(TMP)
            locks.remove_abandoned(parent)
            with contextlib.suppress(FileNotFoundError, FileExistsError):  # `clear` removed the folder meanwhile
                return locks.new_private_folder(parent)

    def holds_unit(self, private: Path) -> bool:
        """Whether a private folder is still there, with the unit in it: nobody has removed it meanwhile."""
        return any(private.glob("unit.*"))

    def publish(self, private: Path, kernel: str, target: str, name: str) -> Path:
        """Rename a finished private folder to its place in the store.

        Where another process has published the same meanwhile, its entry stays, and `private` does too."""
        for path in private.iterdir():
            if path.is_symlink() or not path.is_file():
                remove(path)  # a compiler's leftovers
                continue
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                os.fchmod(descriptor, 0o644)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        folder = self.root / kernel / target / name
        while True:
            make_folder(folder.parent, 0o755)
            private.chmod(0o755)
            try:
                retried(lambda: os.rename(private, folder))
                locks.release_private_folder(private)
                return folder
            except FileNotFoundError:  # `clear` removed the empty parent meanwhile
                if not private.is_dir():
                    raise
            except OSError as error:
                if error.errno == errno.ENOTDIR:  # no folder, but a file or a dangling link
                    self.quarantine(folder)
                elif error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
                else:
                    private.chmod(0o700)
                    return folder

    def discard(self, private: Path) -> None:
        """Remove a private folder, if it is still there."""
        remove(private)
        locks.release_private_folder(private)

    def keep_bytes(self, name: str, data: bytes) -> Path:
        """Write bytes to a file of a store that is private to this process."""
        path = self.root / name
        path.write_bytes(data)
        return path

    def quarantine(self, place: Path) -> Path | None:
        """Move what is damaged out of the way; the newest few are kept to be looked at."""
        parent = self.root / QUARANTINE
        moved = parent / f"{time.time_ns()}-{place.name}"
        with contextlib.suppress(OSError):
            if stat.S_ISDIR(os.lstat(place).st_mode):
                place.chmod(0o700)  # a folder that its owner cannot write cannot be moved
        if parent.is_symlink() or not parent.is_dir():
            remove(parent)
            make_folder(parent, 0o700)
        try:
            os.rename(place, moved)
        except FileNotFoundError:
            return None
        for old in sorted(children(parent))[:-_QUARANTINE_KEPT]:
            remove(old)
        return moved

    def keep_failure(self, private: Path, name: str, log_text: str, command: str) -> Path:
        """Keep a failed compilation: its unit, the whole log and a script that repeats the command."""
        folder = self._own(FAILED) / name
        remove(folder)
        os.rename(private, folder)
        locks.release_private_folder(private)
        script = f'#!/bin/sh\ncd "$(dirname "$0")" && {command}\n'
        (folder / "compile.log").write_text(log_text, encoding="utf-8", errors="replace")
        (folder / "repeat.sh").write_text(script, encoding="utf-8", errors="surrogateescape")
        for path in folder.iterdir():
            path.chmod(0o700 if path.name == "repeat.sh" or path.is_dir() else 0o600)
        return folder

    # -- compilers seen ------------------------------------------------------------------------------

    def _compilers(self) -> dict[str, str]:
        """The identities on record, by fingerprint; none where the file holds anything else."""
        try:
            seen = json.loads(read_file(self.root / COMPILERS, self.root, _MOST_COMPILERS_BYTES))
        except (OSError, ValueError, RecursionError, DamagedError):
            return {}
        plain = isinstance(seen, dict) and all(isinstance(each, str) for each in seen.values())
        return seen if plain else {}

    def recall_compiler(self, fingerprint: str) -> str | None:
        """The identity of a compiler file that was asked before; so a look-up need not start it."""
        return self._compilers().get(fingerprint)

    def remember_compiler(self, fingerprint: str, identity: str) -> None:
        """Keep a compiler's identity; where the store cannot be written it is asked for again next time."""
        kept = dict(list(self._compilers().items())[-31:])
        with contextlib.suppress(OSError):
            if self.writable():
                write_whole(self.root / COMPILERS, json.dumps({**kept, fingerprint: identity}, indent=1), 0o644)


def read_only_layers() -> list[Store]:
    """The layers under the user's store, in order. Raises CacheError for one that another user could change."""
    found = [Store(root) for root in config.cache_layers()]
    for layer in found:
        layer.check()
        if not layer.root.is_dir():
            warn_once(f"cache layer {layer.root} is not there, and counts as empty; JIT_KERNEL_CACHE_LAYERS names it")
    return found


def write_unit(private: Path, name: str, text: str) -> Path:
    """Write a text that is to be compiled into a private folder."""
    path = private / name
    for above in list(path.relative_to(private).parents)[-2::-1]:  # but not `private`: it may have been removed
        (private / above).mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def write_bytes(private: Path, name: str, data: bytes) -> None:
    """Write a file of an entry that was compiled elsewhere into a private folder."""
    (private / name).write_bytes(data)


def write_manifest(private: Path, manifest: dict[str, Any]) -> None:
    """Write what an entry was made of beside its files, the last of them."""
    (private / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _remove_in(process: int, folder: Path) -> None:
    """Remove a folder at the end of the process that made it, not at that of a forked child."""
    if os.getpid() == process:
        remove(folder)


def children(folder: Path) -> list[Path]:
    """What lies in a folder; nothing where it cannot be read."""
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def remove_empty(folder: Path, root: Path) -> None:
    """Remove a folder and those above it, up to the root, as far as they are empty."""
    with contextlib.suppress(OSError):
        while folder != root:
            folder.rmdir()
            folder = folder.parent

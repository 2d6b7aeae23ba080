"""One entry of the store, read: its manifest, and whether its files are those that were compiled.

Every file is read once. The bytes that were verified are kept in the Entry and are what is loaded: a file that is
changed, swapped or cut short meanwhile changes nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jit_kernel.engine import ownership
from jit_kernel.engine.network import retried

MANIFEST = "manifest.json"
# `<key>-<compiler>`: the name of an entry's folder, below a folder that is named after a target, "vendor:architecture".
NAME = re.compile(r"(?P<key>[0-9a-f]{32})-\w+")
FILE_NAME = re.compile(r"\w[\w.-]*", re.ASCII)
_MOST_MANIFEST_BYTES = 16 << 20
_KERNEL_FOLDERS = 4  # a kernel is named by at most so many folders


@dataclass(frozen=True)
class Entry:
    """A verified entry of the store, and the bytes of its files by name; `fresh` if this process compiled it.

    layer: the root of the store that it was found in.
    """

    folder: Path
    manifest: dict[str, Any]
    files: dict[str, bytes] = field(repr=False)
    fresh: bool = False
    layer: str = ""

    @property
    def image(self) -> bytes:
        """The bytes to load."""
        return self.files[self.manifest["artifact"]]

    @property
    def functions(self) -> set[str]:
        """The functions that a library must have, as far as they are known."""
        names = self.manifest.get("functions")
        return {name for name in names if isinstance(name, str)} if isinstance(names, list | tuple) else set()


@dataclass(frozen=True)
class Miss:
    """Why there is no usable entry. If `damaged`, it is in the way there and must be moved before another can be."""

    reason: str
    damaged: Path | None = None


class DamagedError(ValueError):
    """An entry is not what was published; the message says how."""


def sha256_of(data: bytes) -> str:
    """The sha256 of bytes, in hex."""
    return hashlib.sha256(data).hexdigest()


def read_file(path: Path | str, root: Path, most: int) -> bytes:
    """The bytes of a plain file, one more than `most` at most.

    Raises CacheError where another user may change it, DamagedError where it is no plain file, OSError.
    """
    # A pipe in its place would hold the reader, without O_NONBLOCK; a link is no file of this store.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        ownership.check_status(status, path, root)
        if not stat.S_ISREG(status.st_mode):
            raise DamagedError(f"{os.path.basename(path)} is not a plain file")
        parts = []
        while most >= 0 and (part := os.read(descriptor, min(most, status.st_size) + 1)):
            parts.append(part)
            most -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)
    finally:
        os.close(descriptor)


def verify(folder: Path, key: str, root: Path, *, glance: bool = False) -> Entry | Miss:
    """Read an entry below the store `root`, and compare every file with its manifest.

    At a glance no file but the manifest is read, only looked at: the entry has no bytes, and other bytes of the same
    number are not noticed. Raises CacheError where another user may change it, or where this user may not read what
    another user published.
    """
    place = str(root)
    try:
        for part in str(folder)[len(place) :].split(os.sep):  # as strings: paths would take 0.05 ms
            if part:
                place = f"{place}/{part}"
                ownership.check_folder(place, root)
    except FileNotFoundError:
        return Miss("no entry")
    except NotADirectoryError as error:
        return Miss(str(error), Path(place))
    except OSError as error:
        return _unreadable(Path(place), root, error)
    try:
        return retried(lambda: _read(folder, key, root, glance))
    except DamagedError as error:
        return Miss(str(error), folder)
    except FileNotFoundError as error:
        return Miss(f"its file {Path(error.filename).name} is missing", folder)
    except OSError as error:
        return _unreadable(folder, root, error)


def _unreadable(place: Path, root: Path, error: OSError) -> Miss:
    """What is unreadable is damaged where it is this user's own, and an error where it is another's."""
    if isinstance(error, PermissionError):
        try:
            mine = os.lstat(place).st_uid == os.geteuid()
        except OSError:
            mine = False
        if not mine:
            raise ownership.unreadable(root, error.filename or place, error) from error
    return Miss(f"it cannot be read ({error})", place)


def _read(folder: Path, key: str, root: Path, glance: bool) -> Entry:
    try:
        manifest = json.loads(read_file(f"{folder}/{MANIFEST}", root, _MOST_MANIFEST_BYTES))
    except FileNotFoundError:
        raise DamagedError("its manifest is missing") from None
    except DamagedError:
        raise
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"its manifest cannot be read ({type(error).__name__}: {error})") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise DamagedError("its manifest is malformed: it names no files")
    if manifest.get("key") != key:
        raise DamagedError("its manifest names another key")
    files: dict[str, bytes] = {}
    for name, expected in manifest["files"].items():
        if not FILE_NAME.fullmatch(name) or not isinstance(expected, dict):
            raise DamagedError(f"its manifest is malformed: {name!a} is no file of an entry")
        size, digest = expected.get("size"), expected.get("sha256")
        if type(size) is not int or size < 0 or not isinstance(digest, str):
            raise DamagedError(f"its manifest is malformed: it gives no size and sha256 of {name}")
        path = f"{folder}/{name}"
        files[name] = _looked_at(path, size) if glance else _verified(path, root, size, digest)
    artifact = manifest.get("artifact")
    if not isinstance(artifact, str) or artifact not in files:
        raise DamagedError("its manifest names no artifact")
    return Entry(folder, manifest, files)


def _verified(path: str, root: Path, size: int, digest: str) -> bytes:
    data = read_file(path, root, size)
    if len(data) != size:
        raise DamagedError(f"{os.path.basename(path)} has {os.lstat(path).st_size} bytes, not {size}")
    if sha256_of(data) != digest:
        raise DamagedError(f"{os.path.basename(path)} has other bytes than were compiled")
    return data


def _looked_at(path: str, size: int) -> bytes:
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode):
        raise DamagedError(f"{os.path.basename(path)} is not a plain file")
    if status.st_size != size:
        raise DamagedError(f"{os.path.basename(path)} has {status.st_size} bytes, not {size}")
    return b""


def places(root: Path) -> Iterator[tuple[Path, str]]:
    """The place and key of every entry of a store, damaged ones too, in order: `<kernel>/<target>/<key>-<compiler>`.

    Links are not followed: what lies behind one is not this store's. Folders that cannot be read hold none.
    """
    yield from _places(root, _KERNEL_FOLDERS)


def _places(folder: Path, depth: int) -> Iterator[tuple[Path, str]]:
    try:
        with os.scandir(folder) as found:
            inside = sorted(found, key=lambda each: each.name)
    except OSError:
        return
    for each in inside:
        match = NAME.fullmatch(each.name) if ":" in folder.name else None
        if match is not None:
            yield Path(each.path), match["key"]
        elif depth > 0 and not each.name.startswith(".") and each.is_dir(follow_symlinks=False):
            yield from _places(Path(each.path), depth - 1)


def size_of(folder: Path) -> int:
    """The bytes of an entry's files; what another process removes meanwhile has none."""
    size = 0
    with contextlib.suppress(OSError), os.scandir(folder) as found:
        for each in found:
            with contextlib.suppress(OSError):
                status = each.stat(follow_symlinks=False)
                size += status.st_size if stat.S_ISREG(status.st_mode) else 0
    return size


def manifest_of(folder: Path, root: Path) -> dict[str, Any] | None:
    """The manifest of an entry, unverified; None where it cannot be read."""
    try:
        manifest = json.loads(read_file(f"{folder}/{MANIFEST}", root, _MOST_MANIFEST_BYTES))
    except (OSError, ValueError, RecursionError, ownership.CacheError):
        return None
    return manifest if isinstance(manifest, dict) else None

"""One entry of the store, read: its manifest, and whether its files are those that were compiled."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


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


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def verify(folder: Path, key: str) -> Entry | Miss:
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

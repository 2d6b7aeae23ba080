"""A pack: entries of a store in one file, which is the same to the byte wherever the same kernels were compiled.

It is a tar file whose every byte follows from its index: `index.json` names each file of each entry with its size and
sha256, `index.hmac-sha256` signs the index if there is a key, then come the files in the index's order, with headers
that say nothing of time, owner or place. A manifest in it lacks what differs from build to build (duration, time,
command, compiler's path). Nothing is compressed: compressors differ from version to version, and images compress.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jit_kernel.device import Target
from jit_kernel.engine import signature
from jit_kernel.engine.entry import FILE_NAME, MANIFEST, NAME, Entry, Miss, sha256_of
from jit_kernel.engine.ownership import CacheError
from jit_kernel.engine.store import Store

FORMAT = "jit_kernel pack 1"
INDEX, SIGNATURE, ENTRIES = "index.json", "index.hmac-sha256", "entries"
MOST_INDEX_BYTES = 64 << 20
BLOCK = 512
END = bytes(2 * BLOCK)
_KERNEL = re.compile(r"\w[\w.-]*(?:/\w[\w.-]*){0,3}", re.ASCII)
# What a manifest keeps in a pack; the rest differs from build to build.
_KEPT = ("kernel", "target", "variant", "key", "inputs", "artifact", "functions", "files", "tvm_ffi")


class PackError(CacheError):
    """A file is no pack, or not one that may be unpacked; the message names what is wrong in it."""


@dataclass(frozen=True)
class Packed:
    """What was written: entries, the targets that they are for, the size, and whether it is signed."""

    entries: int
    targets: tuple[str, ...]
    size: int
    signed: bool


def place_of(text: str) -> tuple[str, str, str]:
    """The kernel, target and folder's name of an entry's place. Raises ValueError for anything that is none."""
    kernel, target, name = (["", "", *text.split("/")] if text.count("/") < 2 else text.rsplit("/", 2))[-3:]
    if not _KERNEL.fullmatch(kernel) or ".." in kernel:
        raise ValueError(f"{text!r} is no place of an entry: {kernel!r} is no kernel's name")
    try:
        parsed = str(Target.parse(target))
    except ValueError as error:
        raise ValueError(f"{text!r} is no place of an entry: {error}") from error
    if parsed != target or NAME.fullmatch(name) is None:
        raise ValueError(f"{text!r} is no place of an entry: it must be kernel/target/key-compiler")
    return kernel, target, name


def header(name: str, size: int) -> bytes:
    """The tar header of a file in a pack: nothing in it depends on when, where or by whom it is written."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    return member.tobuf(tarfile.USTAR_FORMAT)


def padding(size: int) -> bytes:
    """What fills a file's last block."""
    return bytes(-size % BLOCK)


def index_bytes(entries: Mapping[str, Mapping[str, bytes]]) -> bytes:
    """The index of entries, by place: the files of each by name, with size and sha256."""
    listed = {
        place: {name: {"size": len(data), "sha256": sha256_of(data)} for name, data in files.items()}
        for place, files in entries.items()
    }
    return canonical({"format": FORMAT, "entries": listed})


def canonical(value: object) -> bytes:
    """The one way in which a pack writes a JSON value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def files_of(entry: Entry) -> dict[str, bytes]:
    """The files of a verified entry as a pack holds them."""
    manifest: dict[str, Any] = {name: entry.manifest[name] for name in _KEPT if name in entry.manifest}
    compiler = entry.manifest.get("compiler")
    if isinstance(compiler, dict):
        manifest["compiler"] = {name: compiler[name] for name in ("name", "version") if name in compiler}
    return {**entry.files, MANIFEST: json.dumps(manifest, indent=1).encode()}


def collect(stores: Sequence[Store], wanted: Mapping[str, str] | None, targets: Iterable[str]) -> dict[str, Entry]:
    """The entries of some stores by their place, the first store's where two have the same.

    wanted: by "kernel/target/key", the title of each that is to be there; None for all that there are. targets: those
    that are let through; all without one. Raises PackError for an entry that is damaged, or is wanted and not there.
    """
    chosen, found, damaged = set(targets), {}, []
    for store in stores:
        for folder, entry in store.verified():
            place = folder.relative_to(store.root).as_posix()
            if (chosen and folder.parent.name not in chosen) or place in found:
                continue
            if wanted is not None and place.rpartition("-")[0] not in wanted:
                continue
            if isinstance(entry, Miss):
                damaged.append(f"{folder}: {entry.reason}")
            else:
                found[place] = entry
    if damaged:
        raise PackError("damaged entries are not packed; remove them with `cache rm`:\n" + "\n".join(damaged))
    there = {place.rpartition("-")[0] for place in found}
    absent = [title for key, title in (wanted or {}).items() if key not in there]
    if absent:
        raise PackError("not compiled, so not packed; run the warm-up first:\n" + "\n".join(sorted(absent)))
    return found


def write(path: Path, entries: Mapping[str, Entry], key: bytes | None) -> Packed:
    """Write a pack of some entries, by place, whole or not at all."""
    if not entries:
        raise PackError("there is nothing to pack: no entry of the store was chosen")
    contents = {}
    for place, entry in sorted(entries.items()):
        place_of(place)
        contents[place] = dict(sorted(files_of(entry).items()))
        bad = [name for name in contents[place] if not FILE_NAME.fullmatch(name)]
        if bad:
            raise PackError(f"{entry.folder} has a file {bad[0]!r}, which no pack holds")
    index = index_bytes(contents)
    members = [(INDEX, index)]
    if key is not None:
        members.append((SIGNATURE, signature.of(key, index).encode()))
    members += [(f"{ENTRIES}/{place}/{name}", data) for place in contents for name, data in contents[place].items()]
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        with open(part, "xb") as file:
            for name, data in members:
                file.write(header(name, len(data)) + data + padding(len(data)))
            file.write(END)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    targets = tuple(sorted({place_of(place)[1] for place in contents}))
    return Packed(len(contents), targets, path.stat().st_size, key is not None)

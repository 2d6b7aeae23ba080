"""A pack, read: whether every byte of it is what its index says, and its entries put into a store.

Nothing of a pack is believed before it is checked, and nothing is published before all of it was. Names come from the
index alone, each checked, and only plain files are read, so that no name leads out of the store.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import tarfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from jit_kernel.engine import artifact, removal, signature
from jit_kernel.engine.entry import FILE_NAME, MANIFEST, Entry, sha256_of, verify
from jit_kernel.engine.lock import Holder
from jit_kernel.engine.pack import (
    BLOCK,
    END,
    ENTRIES,
    FORMAT,
    INDEX,
    MOST_INDEX_BYTES,
    SIGNATURE,
    PackError,
    canonical,
    header,
    padding,
    place_of,
)
from jit_kernel.engine.store import Store, write_bytes

_MOST_FILE_BYTES = 4 << 30
_KINDS = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.DIRTYPE: "a folder",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
}

Index = dict[str, dict[str, tuple[int, str]]]


@dataclass(frozen=True)
class Unpacked:
    """What was done: entries that were published, and those that were there already."""

    published: int
    present: int
    signed: bool


@dataclass(frozen=True)
class Pack:
    """An open pack whose index was read: where each file begins, by place and name, and whether a right key signed."""

    file: BinaryIO
    index: Index
    begins: int
    signed: bool
    checked: bool

    def files(self) -> Iterator[tuple[str, str, int, int, str]]:
        """Place, name, offset of the header, size and sha256 of every file, in the pack's order."""
        offset = self.begins
        for place, files in self.index.items():
            for name, (size, digest) in files.items():
                yield place, name, offset, size, digest
                offset += BLOCK + size + len(padding(size))

    def read(self, offset: int, size: int) -> bytes:
        """The bytes of a file by its header's offset."""
        self.file.seek(offset + BLOCK)
        return self.file.read(size)

    def targets(self) -> set[str]:
        """The targets of its entries."""
        return {place_of(place)[1] for place in self.index}


def opened(file: BinaryIO, key: bytes | None) -> Pack:
    """Read the index of a pack. With a key, one that it did not sign is refused.

    Raises PackError that names what is wrong.
    """
    index = _member(file, INDEX, MOST_INDEX_BYTES)
    begins = file.tell()
    signed = _name_in(file.read(BLOCK)) == SIGNATURE
    file.seek(begins)
    if signed:
        said = _member(file, SIGNATURE, 64)
        begins = file.tell()
        if key is not None and not signature.is_right(key, index, said.decode("ascii", errors="replace")):
            raise PackError(f"{SIGNATURE} is wrong: the pack was changed, or signed with another key")
    elif key is not None:
        raise PackError("it is not signed, and JIT_KERNEL_PACK_KEY asks for a signature")
    return Pack(file, _parsed(index), begins, signed, key is not None)


def _member(file: BinaryIO, name: str, most: int) -> bytes:
    """The bytes of the next file, which must have this name."""
    block = file.read(BLOCK)
    found = _described(block)
    if found is None or found.name != name or not found.isreg():
        raise PackError(f"it is no pack of jit_kernel: its next file is {_said(found)}, not {name}")
    if block != header(name, found.size) or found.size > most:
        raise PackError(f"the header of {name} was changed")
    data = file.read(found.size)
    if len(data) != found.size or file.read(len(padding(found.size))) != padding(found.size):
        raise PackError(f"{name} is cut short, or what fills its last block was changed")
    return data


def _parsed(data: bytes) -> Index:
    try:
        said = json.loads(data)
        if canonical(said) != data:
            raise PackError(f"{INDEX} is not written as a pack's is")
        if said["format"] != FORMAT or set(said) != {"format", "entries"}:
            raise PackError(f"{INDEX} is of format {said['format']!r}; this version reads {FORMAT!r}")
        return {place: _entry(place, files) for place, files in said["entries"].items()}
    except PackError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PackError(f"{INDEX} is malformed: {error}") from error


def _entry(place: str, files: dict[str, dict[str, Any]]) -> dict[str, tuple[int, str]]:
    place_of(place)
    if MANIFEST not in files:
        raise ValueError(f"{place} has no {MANIFEST}")
    for name, said in files.items():
        size, digest = said["size"], said["sha256"]
        if not FILE_NAME.fullmatch(name):
            raise ValueError(f"{place} has a file {name!r}, which is no name of an entry's file")
        if type(size) is not int or not 0 <= size <= _MOST_FILE_BYTES or not isinstance(digest, str):
            raise ValueError(f"{place} gives no size and sha256 of {name}")
    return {name: (said["size"], said["sha256"]) for name, said in files.items()}


def _described(block: bytes) -> tarfile.TarInfo | None:
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return None


def _name_in(block: bytes) -> str:
    """The name in a tar header; empty where it is none."""
    found = _described(block)
    return found.name if found is not None else ""


def _said(found: tarfile.TarInfo | None) -> str:
    if found is None:
        return "not one of a tar file"
    return f"{found.name!a}" + (f", {_KINDS[found.type]}" if found.type in _KINDS else "")


def problems(pack: Pack, targets: Collection[str] = ()) -> list[str]:
    """What is wrong with the files of a pack, each by name; nothing where all are right.

    targets: those that are wanted, all without one: what cannot run on this machine is wrong among them alone.
    """
    found: list[str] = []
    end = pack.begins
    manifests: dict[str, dict[str, Any]] = {}
    for place, name, offset, size, digest in pack.files():
        full = f"{ENTRIES}/{place}/{name}"
        pack.file.seek(offset)
        block = pack.file.read(BLOCK)
        if block != header(full, size):
            there = _described(block)
            if there is None or there.name != full or not there.isreg():
                return [*found, f"{full}: in its place is {_said(there)}"]  # what follows may lie anywhere
            found.append(f"{full}: its header was changed")
        data = pack.read(offset, size)
        if len(data) != size:
            return [*found, f"{full}: it is cut short at {len(data)} of {size} bytes"]
        if pack.file.read(len(padding(size))) != padding(size):
            found.append(f"{full}: what fills its last block was changed")
        if sha256_of(data) != digest:
            found.append(f"{full}: it has other bytes than were packed")
        elif name == MANIFEST:
            manifests[place] = _manifest(data)
        elif name == artifact.LIBRARY and (not targets or place_of(place)[1] in targets):
            found += [f"{full}: {problem}" for problem in artifact.foreign(data)]
        end = offset + BLOCK + size + len(padding(size))
    pack.file.seek(end)
    if pack.file.read(len(END) + 1) != END:
        found.append("something stands behind the last file, or the end is cut off")
    return found + [text for place, manifest in manifests.items() for text in _disagreements(pack, place, manifest)]


def _manifest(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _disagreements(pack: Pack, place: str, manifest: dict[str, Any]) -> Iterator[str]:
    """Where a manifest says otherwise than the place of its entry, or than the index."""
    kernel, target, name = place_of(place)
    inputs = manifest.get("inputs")
    told = inputs.get("target") if isinstance(inputs, dict) else None
    for field, said, wanted in (
        ("kernel", manifest.get("kernel"), kernel),
        ("target", manifest.get("target"), target),
        ("target that it was compiled for", told, target),
        ("key", manifest.get("key"), name.partition("-")[0]),
    ):
        if said != wanted:
            yield f"{ENTRIES}/{place}/{MANIFEST}: its {field} is {said!r}, its place says {wanted!r}"
    files = {name: {"size": size, "sha256": digest} for name, (size, digest) in pack.index[place].items()}
    files.pop(MANIFEST)
    if manifest.get("files") != files:
        yield f"{ENTRIES}/{place}/{MANIFEST}: it names other files than the index"


def unpack(
    pack: Pack, store: Store, targets: Collection[str], waiting: Callable[[Holder | None, float], None]
) -> Unpacked:
    """Put the entries of a pack into a store, after all of it was checked; those of some targets, or all.

    An entry that is there already stays; one that is damaged is replaced. Raises PackError, CacheError and OSError.
    """
    unknown = sorted(set(targets) - pack.targets())
    if unknown:
        raise PackError(f"it holds nothing for {', '.join(unknown)}; its targets: {', '.join(sorted(pack.targets()))}")
    wrong = problems(pack, targets)
    if wrong:
        raise PackError("nothing was unpacked:\n" + "\n".join(wrong))
    removal.require_writable(store)
    published = present = 0
    folder = store.root
    offsets = {(place, name): offset for place, name, offset, _, _ in pack.files()}
    for place, files in pack.index.items():
        kernel, target, name = place_of(place)
        if targets and target not in targets:
            continue
        key, folder = name.partition("-")[0], store.root / place
        with store.lock(kernel, target, key).held(waiting):
            if isinstance(verify(folder, key, store.root), Entry):
                present += 1
                continue
            if os.path.lexists(folder):
                store.quarantine(folder)
            private = store.private_folder()
            try:
                for file, (size, digest) in files.items():
                    data = pack.read(offsets[place, file], size)
                    if sha256_of(data) != digest:  # another process writes to the pack
                        raise PackError(f"{ENTRIES}/{place}/{file} was changed after it was checked")
                    write_bytes(private, file, data)
                store.publish(private, kernel, target, name)
                published += 1
            finally:
                store.discard(private)
    removal.keep_within(store, folder)
    return Unpacked(published, present, pack.signed)


@contextlib.contextmanager
def open_pack(path: Path, key: bytes | None) -> Iterator[Pack]:
    """A pack whose index was read, open as long as the block lasts. A PackError has its path."""
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise PackError("it is not a plain file")
            yield opened(file, key)
    except PackError as error:
        raise PackError(f"{path}: {error}") from error
    except OSError as error:
        raise PackError(f"{path} cannot be used: {error.strerror or error}") from error

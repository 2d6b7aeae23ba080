"""What the store campaign does to a store while processes use it: each fault is a function of the store and of chance.

A fault works on what it finds and answers with whether it did anything. The files of a compilation that runs are
removed, never changed: what a compiler is fed, or has just made, nothing can verify.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from jit_kernel.engine import pack, removal, unpack
from jit_kernel.engine.store import Store
from tests.support import tiny

STRANGER = 12345


def _paths(store: Path) -> list[Path]:
    found = []
    for folder, folders, files in os.walk(store):
        found += [Path(folder, name) for name in (*folders, *files)]
    return sorted(found)


def _any(store: Path, chance: random.Random, *, published: bool = False) -> Path | None:
    """Some file or folder of the store; with `published`, of no compilation that runs."""
    found = [path for path in _paths(store) if not (published and ".tmp" in path.parts)]
    return chance.choice(found) if found else None


def _artifacts(store: Path) -> list[Path]:
    return [path / "kernel.so" for path in tiny.entries(store)]


def truncate(store: Path, chance: random.Random) -> bool:
    """Cut a file short, or to nothing."""
    path = _any(store, chance, published=True)
    if path is None or not path.is_file():
        return False
    os.truncate(path, chance.choice([0, path.stat().st_size // 2, max(0, path.stat().st_size - 1)]))
    return True


def flip(store: Path, chance: random.Random) -> bool:
    """Change some bytes of a file where they lie."""
    path = _any(store, chance, published=True)
    if path is None or not path.is_file() or path.stat().st_size == 0:
        return False
    with path.open("r+b") as file:
        for _ in range(chance.choice([1, 64])):
            file.seek(chance.randrange(path.stat().st_size))
            file.write(bytes([chance.randrange(256)]))
    return True


def extend(store: Path, chance: random.Random) -> bool:
    """Write more behind a file's end."""
    path = _any(store, chance, published=True)
    if path is None or not path.is_file():
        return False
    with path.open("ab") as file:
        file.write(b"[" * chance.choice([1, 200_000]))
    return True


def delete(store: Path, chance: random.Random) -> bool:
    """Remove a file, or a folder with all that is in it."""
    path = _any(store, chance)
    if path is None:
        return False
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() and not path.is_symlink() else path.unlink()
    return True


def delete_all(store: Path, chance: random.Random) -> bool:
    """Remove the whole store."""
    shutil.rmtree(store, ignore_errors=True)
    return True


def swap_artifacts(store: Path, chance: random.Random) -> bool:
    """Put one kernel's artifact in the place of another's: by a rename, or by writing over its bytes."""
    found = _artifacts(store)
    if len(found) < 2:
        return False
    ours, theirs = chance.sample(found, 2)
    if chance.random() < 0.5:
        ours.write_bytes(theirs.read_bytes())
    else:
        part = ours.with_name("part")
        shutil.copyfile(theirs, part)
        os.replace(part, ours)
    return True


def swap_entries(store: Path, chance: random.Random) -> bool:
    """Let two entries change places."""
    found = tiny.entries(store)
    if len(found) < 2:
        return False
    ours, theirs = chance.sample(found, 2)
    aside = ours.with_name("aside")
    os.rename(ours, aside)
    os.rename(theirs, ours)
    os.rename(aside, theirs)
    return True


def move_away(store: Path, chance: random.Random) -> bool:
    """Rename something to a name that nobody looks for."""
    path = _any(store, chance)
    if path is None:
        return False
    os.rename(path, path.with_name(f"moved-{chance.randrange(10**9)}"))
    return True


def put_in_place(store: Path, chance: random.Random) -> bool:
    """Put something of another kind in the place of a file or folder."""
    path = _any(store, chance, published=True)
    if path is None:
        return False
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() and not path.is_symlink() else path.unlink()
    kind = chance.randrange(5)
    if kind == 0:
        path.write_text("[" * 100_000)
    elif kind == 1:
        path.symlink_to("nowhere")
    elif kind == 2:
        path.symlink_to(chance.choice(_paths(store)) if _paths(store) else "/")
    elif kind == 3:
        os.mkfifo(path)
    else:
        path.mkdir()
    return True


def change_mode(store: Path, chance: random.Random) -> bool:
    """Forbid everybody something, or let everybody write."""
    path = _any(store, chance)
    if path is None or path.is_symlink():
        return False
    path.chmod(chance.choice([0o000, 0o400, 0o444, 0o555, 0o777, 0o775, 0o666, 0o1777]))
    return True


def change_owner(store: Path, chance: random.Random) -> bool:
    """Give something away."""
    path = _any(store, chance)
    if path is None or os.geteuid() != 0:
        return False
    os.chown(path, STRANGER, STRANGER, follow_symlinks=False)
    return True


def jump_in_time(store: Path, chance: random.Random) -> bool:
    """Let a file or folder be of another year."""
    path = _any(store, chance)
    if path is None:
        return False
    seconds = chance.choice([0, 10**9, 4 * 10**9])
    os.utime(path, (seconds, seconds), follow_symlinks=False)
    return True


def clear(store: Path, chance: random.Random) -> bool:
    """`cache clear`, beside whatever runs."""
    found = Store(store)
    found.check()
    removal.clear(found, lambda holder, waited: None)
    return True


def prune(store: Path, chance: random.Random) -> bool:
    """`cache prune`, beside whatever runs."""
    found = Store(store)
    found.check()
    return store.is_dir() and removal.prune(found, chance.choice([1, 20_000, 40_000])).removed > 0


def pack_and_unpack(store: Path, chance: random.Random) -> bool:
    """Pack what is stored, perhaps flip a byte or cut the end, remove some entries, and unpack them."""
    path = store.parent.parent / f"{chance.randrange(10**9)}.pack"
    found = Store(store)
    found.check()
    try:
        pack.write(path, pack.collect([found], None, ()), None)
        data = path.read_bytes()
        place, damaged = chance.randrange(len(data)), chance.random() < 0.5
        if damaged:
            path.write_bytes(chance.choice([data[:place], data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]]))
        for entry in tiny.entries(store):
            if chance.random() < 0.5:
                shutil.rmtree(entry, ignore_errors=True)
        try:
            with unpack.open_pack(path, None) as opened:
                unpack.unpack(opened, found, (), lambda holder, waited: None)
        except pack.PackError:
            if not damaged:
                raise
            return True
        if damaged:
            raise AssertionError(f"a pack that was damaged at byte {place} was unpacked")
    finally:
        path.unlink(missing_ok=True)
    return True


def intrude(store: Path, chance: random.Random) -> bool:
    """Another user tries to write wherever it can; that it can is a failure, whatever the umask was."""
    written = []
    os.setgroups([])
    os.setresgid(STRANGER, STRANGER, STRANGER)
    os.setresuid(STRANGER, STRANGER, STRANGER)
    for path in [store, *_paths(store)]:
        with contextlib.suppress(OSError):
            if path.is_dir():
                (path / "intruder").touch()
            else:
                path.open("ab").close()
            written.append(str(path))
    if written:
        raise AssertionError(f"another user could write {written}")
    return True


# Run one at a time, each in a process of its own: those of the second line need a store that nothing has opened up.
FAULTS: tuple[Callable[[Path, random.Random], bool], ...] = (
    *(truncate, flip, extend, delete, delete_all, swap_artifacts, swap_entries, move_away, put_in_place),
    *(change_mode, change_owner, jump_in_time, clear, prune, pack_and_unpack),
)
HARMLESS_MODES = {
    *(truncate, flip, extend, delete, delete_all, swap_artifacts, swap_entries, jump_in_time, clear, prune),
    pack_and_unpack,
}


def repair(store: Path) -> None:
    """What a person mends after an error said so: owners and modes of the store, and of nothing else."""
    for path in [store, *_paths(store)]:
        with contextlib.suppress(OSError):
            if os.geteuid() == 0:
                os.chown(path, 0, 0, follow_symlinks=False)
            if not path.is_symlink():
                path.chmod(path.stat().st_mode & ~0o7022 | (0o700 if path.is_dir() else 0o600))

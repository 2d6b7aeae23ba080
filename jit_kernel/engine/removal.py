"""What is taken out of a store: one entry, all of them, or those that were not used for longest.

Each is removed under its lock, so that a compilation that runs meanwhile goes on, and by one rename first, so that
another process sees it whole or not at all. A process that has loaded an entry needs its files no more.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jit_kernel import config
from jit_kernel.engine import lock as locks
from jit_kernel.engine import use
from jit_kernel.engine.entry import NAME, places, size_of
from jit_kernel.engine.lock import Holder, remove
from jit_kernel.engine.progress import warn_once
from jit_kernel.engine.store import (
    COMPILERS,
    FAILED,
    LOCKS,
    QUARANTINE,
    QUARANTINE_NAME,
    TMP,
    CacheError,
    Store,
    children,
    remove_empty,
)  # fmt: skip

Waiting = Callable[[Holder | None, float], None]


class _HeldError(Exception):
    """The lock of an entry is held by another process, and is not waited for."""


@dataclass(frozen=True)
class Pruned:
    """What a pruning removed and what is left; `used` are the entries that it left because a process uses them."""

    removed: int
    removed_bytes: int
    left: int
    left_bytes: int
    used: int


def clear(store: Store, waiting: Waiting) -> int:
    """Remove every entry, each under its lock, and what the store keeps beside them; nothing else.

    A compilation that runs meanwhile goes on: its private folder and its lock stay. Returns how many entries
    were removed; `waiting` is EntryLock's. Raises CacheError where the store cannot be written.
    """
    if not store.root.is_dir():
        return 0
    require_writable(store)
    removed = sum(remove_entry(store, folder, key, waiting) for folder, key in list(places(store.root)))
    locks.remove_abandoned(store.root / TMP)
    for place, pattern in ((QUARANTINE, QUARANTINE_NAME), (FAILED, NAME)):
        for each in children(store.root / place):
            if pattern.fullmatch(each.name):
                remove(each)
    remove(store.root / COMPILERS)
    locks.remove_free(store.root / LOCKS)
    for place in (TMP, QUARANTINE, FAILED):
        remove_empty(store.root / place, store.root)
    return removed


def require_writable(store: Store) -> None:
    """Raise CacheError where nothing can be removed."""
    if not store.writable():
        raise CacheError(f"cache folder {store.root} cannot be written, so nothing was removed")


def remove_entry(store: Store, folder: Path, key: str, waiting: Waiting, *, unused: bool = False) -> bool:
    """Remove one entry under its lock, whether it is sound or not; answers with whether it is gone.

    `unused`: only if no live process holds it, asked under the lock, which is not waited for then.
    """
    target = folder.parent
    kernel = target.parent.relative_to(store.root).as_posix()
    with store.lock(kernel, target.name, key).held(waiting, 0.0 if unused else 2.0):
        if unused and use.is_used(folder):
            return False
        _remove_whole(store, folder)
        gone = not os.path.lexists(folder)
    remove_empty(target, store.root)
    return gone


def _remove_whole(store: Store, folder: Path) -> None:
    """Move an entry to a private folder of the store, and remove it there."""
    private: Path | None = None
    try:
        with contextlib.suppress(OSError):  # what cannot be moved, or on a full disk, is removed where it is
            private = store.private_folder()
            os.rename(folder, private / folder.name)
        remove(folder)
    finally:
        if private is not None:
            store.discard(private)


def prune(store: Store, limit: int, *, older_than: float = 0.0, keep: Path | None = None, dry: bool = False) -> Pruned:
    """Remove entries, the one that was used longest ago first, until the others have `limit` bytes or less.

    older_than: with a limit of 0, those that were last used so many seconds ago or earlier. An entry that a live
    process uses stays, as does `keep`. Those that another process compiles or removes just now are passed over.
    """
    if not dry:
        require_writable(store)
    found = sorted((use.last_used(folder), size_of(folder), folder, key) for folder, key in places(store.root))
    total, removed, removed_bytes, used = sum(each[1] for each in found), 0, 0, 0
    now = time.time()
    for last, size, folder, key in found:
        if (limit and total - removed_bytes <= limit) or (older_than and now - last < older_than):
            break
        if folder == keep:
            continue
        if use.is_used(folder):
            used += 1
            continue
        if dry or _removed_now(store, folder, key):
            removed += 1
            removed_bytes += size
    return Pruned(removed, removed_bytes, len(found) - removed, total - removed_bytes, used)


def _removed_now(store: Store, folder: Path, key: str) -> bool:
    """Remove an entry if nobody uses it or holds its lock."""
    try:
        return remove_entry(store, folder, key, _refuse, unused=True)
    except _HeldError:
        return False


def _refuse(holder: Holder | None, waited: float) -> None:
    raise _HeldError


def keep_within(store: Store, published: Path) -> None:
    """Hold the store to JIT_KERNEL_CACHE_LIMIT after an entry was published; that one stays."""
    limit = config.settings().cache_limit
    if not limit or bytes_of(store) <= limit:
        return
    pruned = prune(store, limit, keep=published)
    if pruned.removed:
        warn_once(
            f"cache folder {store.root} had more than JIT_KERNEL_CACHE_LIMIT's {limit} bytes: {pruned.removed} entries "
            f"({pruned.removed_bytes} bytes) were removed, those not used for longest first",
            key=("limit", store.root),
        )
    if pruned.left_bytes > limit:
        warn_once(
            f"cache folder {store.root} has {pruned.left_bytes} bytes, more than JIT_KERNEL_CACHE_LIMIT's {limit}: "
            f"{pruned.used} entries are in use, and stay",
            key=("over", store.root),
        )


def bytes_of(store: Store) -> int:
    """The bytes of all entries of a store together."""
    return sum(size_of(folder) for folder, _ in places(store.root))

"""Where a kernel is looked for: the user's store, then the read-only layers under it, in order.

A layer is a store that this process never writes: an image's, a shared volume's, an installed wheel's. Whoever put it
there chose its compiler, so of its entries any compiler's will do; in the user's store the present compiler's counts,
if there is one. A hit in any of them starts no compiler that was seen before, and writes nothing.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from jit_kernel import config
from jit_kernel.engine import seal
from jit_kernel.engine.entry import Entry, Miss
from jit_kernel.engine.progress import warn_once
from jit_kernel.engine.store import Store, read_only_layers
from jit_kernel.engine.wanted import Wanted

Unusable = tuple[Entry, str] | None


def find(wanted: Wanted, store: Store, unusable: Unusable = None) -> Entry | Miss:
    """The verified entry of a kernel, from the user's store or a layer; else why the user's store has none.

    `unusable` is an entry that cannot be loaded here, and why: it is passed over. Raises CacheError for what may not
    be read, or must not be.
    """
    own = _own(wanted, store, unusable)
    if isinstance(own, Entry):
        return replace(own, layer=str(store.root))
    for layer in read_only_layers():
        found = _any(wanted, layer, unusable)
        if isinstance(found, Entry):
            if own.damaged is not None:
                warn_once(f"{wanted.spec} in {own.damaged} is unusable: {own.reason}; {layer.root} serves it")
            return replace(found, layer=str(layer.root))
        if found.damaged is not None:
            warn_once(f"{wanted.spec} in {found.damaged} of a read-only layer is passed over: {found.reason}")
    return own


def _own(wanted: Wanted, store: Store, unusable: Unusable) -> Entry | Miss:
    """What the user's own store has: of the present compiler, if one is there; of any in a sealed process."""
    if seal.is_sealed():
        return _any(wanted, store, unusable)
    seen = wanted.compiler_seen()
    if seen is not None:
        return _usable(store.lookup(wanted.spec.kernel, wanted.place, wanted.key, seen), unusable)
    if not store.names(wanted.spec.kernel, wanted.place, wanted.key):
        return Miss("no entry")
    asked = wanted.compiler_asked()
    if asked is None:
        return _any(wanted, store, unusable)
    return _usable(store.lookup(wanted.spec.kernel, wanted.place, wanted.key, asked), unusable)


def _any(wanted: Wanted, store: Store, unusable: Unusable) -> Entry | Miss:
    """The first usable entry of any compiler, the present one's before the others."""
    kernel, seen = wanted.spec.kernel, wanted.compiler_seen()
    if seen is not None:
        found = _usable(store.lookup(kernel, wanted.place, wanted.key, seen), unusable)
        if isinstance(found, Entry):
            return found
    miss = Miss("no entry")
    for name in store.names(kernel, wanted.place, wanted.key):
        found = _usable(store.lookup(kernel, wanted.place, wanted.key, name.rpartition("-")[2]), unusable)
        if isinstance(found, Entry):
            return found
        miss = found
    return miss


def _usable(found: Entry | Miss, unusable: Unusable) -> Entry | Miss:
    if unusable is not None and isinstance(found, Entry) and found.files == unusable[0].files:
        return Miss(f"it cannot be loaded here ({unusable[1]})", found.folder)
    return found


def of_folder(folder: Path) -> Store | None:
    """The layer that an entry's folder lies in, if it is one."""
    return next((layer for layer in map(Store, config.cache_layers()) if folder.is_relative_to(layer.root)), None)

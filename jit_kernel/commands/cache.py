"""`python -m jit_kernel cache list | verify | clear`: look after the store of compiled kernels."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from jit_kernel import config
from jit_kernel.engine import progress, removal
from jit_kernel.engine.entry import Entry, size_of
from jit_kernel.engine.lock import Holder
from jit_kernel.engine.store import CacheError, Store


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; answers with its exit status: 0, 1 when an entry is damaged or the store cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m jit_kernel cache", description="Look after the store of compiled kernels."
    )
    actions = {"list": _list, "verify": _verify, "clear": _clear}
    parser.add_argument("action", choices=actions, help="list or verify the entries, or remove them all")
    options = parser.parse_args(argv)
    store = Store(config.cache_dir())
    try:
        store.check()
        return actions[options.action](store)
    except (CacheError, OSError) as error:  # a folder of the store that root made, say
        progress.write(f"{store.root}: {error}\n" if isinstance(error, OSError) else f"{error}\n")
        return 1


def _list(store: Store) -> int:
    damaged = 0
    for folder, found in store.verified():
        if not isinstance(found, Entry):
            damaged += 1
            print(f"damaged: {folder}: {found.reason}")
            continue
        manifest = found.manifest
        variant = manifest.get("variant")
        fields = ", ".join(f"{name}={value}" for name, value in variant.items()) if isinstance(variant, dict) else ""
        size = size_of(folder)
        print(
            f"{manifest.get('created')}  {size / 1e6:6.2f} MB  {manifest.get('seconds')!s:>5} s  "
            f"{manifest.get('target')}  {manifest.get('kernel')}  {fields}"
        )
    if damaged:
        progress.write(f"{damaged} damaged entries in {store.root}\n")
    return 1 if damaged else 0


def _verify(store: Store) -> int:
    damaged = 0
    for folder, found in store.verified():
        if not isinstance(found, Entry):
            damaged += 1
            print(f"damaged: {folder}: {found.reason}")
    print(f"{damaged} damaged entries in {store.root}")
    return 1 if damaged else 0


def _clear(store: Store) -> int:
    print(f"{removal.clear(store, _report_waiting)} entries removed from {store.root}")
    return 0


def _report_waiting(holder: Holder | None, waited: float) -> None:
    process = f"process {holder.pid} on {holder.host}" if holder else "another process"
    progress.write(f"waiting {waited:.0f} s for an entry that {process} compiles\n")

"""python -m jit_kernel doctor | cache list, verify, clear | why."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence

from jit_kernel import config
from jit_kernel.engine.store import CacheError, Entry, Store


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the commands; answers with its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["why"]:
        from jit_kernel.commands import why

        return why.main(words[1:])
    parser = argparse.ArgumentParser(prog="python -m jit_kernel", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser("doctor", help="devices, compilers, versions, cache and implementations")
    doctor.add_argument("--json", action="store_true")
    cache = commands.add_parser("cache", help="look after the store of compiled kernels")
    cache.add_argument("action", choices=("list", "verify", "clear"))
    commands.add_parser("why", help="which implementation serves a call, and why the others do not")
    options = parser.parse_args(words)
    if options.command == "doctor":
        return _doctor(options.json)
    store = Store(config.cache_dir())
    try:
        store.check()
    except CacheError as error:
        print(error, file=sys.stderr)
        return 1
    return {"list": _list, "verify": _verify, "clear": _clear}[options.action](store)


def _doctor(as_json: bool) -> int:
    from jit_kernel.commands import doctor

    facts = doctor.report()
    print(json.dumps(facts, indent=1) if as_json else doctor.text(facts))
    return 0


def _list(store: Store) -> int:
    for folder, manifest in store.manifests():
        fields = ", ".join(f"{name}={value}" for name, value in manifest["variant"].items())
        size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
        print(
            f"{manifest['created']}  {size / 1e6:6.2f} MB  {manifest['seconds']:5.1f} s  {manifest['target']}  "
            f"{manifest['kernel']}  {fields}"
        )
    return 0


def _verify(store: Store) -> int:
    damaged = 0
    for folder, manifest in store.manifests():
        found = store.verify(folder, str(manifest.get("key")))
        if not isinstance(found, Entry):
            damaged += 1
            print(f"damaged: {folder}: {found.reason}")
    print(f"{damaged} damaged entries in {store.root}")
    return 1 if damaged else 0


def _clear(store: Store) -> int:
    count = sum(1 for _ in store.manifests())
    if store.root.is_dir():
        for path in store.root.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    print(f"{count} entries removed from {store.root}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`python -m jit_kernel cache ...`: look after the store of compiled kernels, and pack it for other machines.

What only some of the actions need is imported by them: a list of 1,000 entries takes 30 ms less.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jit_kernel import config
from jit_kernel.device import Target
from jit_kernel.engine import progress
from jit_kernel.engine.entry import Entry, places
from jit_kernel.engine.lock import Holder
from jit_kernel.engine.store import CacheError, Store, read_only_layers

if TYPE_CHECKING:
    from jit_kernel.engine import unpack


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; answers with its exit status: 0, 1 when something is damaged or refused, 2 for a wrong word."""
    options = _parser().parse_args(argv)
    store = Store(config.cache_dir())
    action: Callable[[Store, argparse.Namespace], int] = options.run
    try:
        store.check()
        return action(store, options)
    except (CacheError, OSError, ValueError) as error:  # a folder of the store that root made, say
        progress.write(f"{store.root}: {error}\n" if isinstance(error, OSError) else f"{error}\n")
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jit_kernel cache", description="Look after the store of compiled kernels."
    )
    actions = parser.add_subparsers(dest="action", metavar="action", required=True)

    def add(name: str, run: Callable[[Store, argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        found = actions.add_parser(name, help=text, description=text)
        found.set_defaults(run=run)
        return found

    def with_targets(to: argparse.ArgumentParser) -> None:
        to.add_argument("--target", action="append", default=[], type=_target, help="only this target; may be repeated")

    listed = add("list", _list, "list the entries of the store and of its layers, and what is damaged at a glance")
    listed.add_argument("--json", action="store_true", help="print one JSON list")
    verified = add("verify", _verify, "read every byte of the entries, or of a pack, and name each bad file")
    verified.add_argument("pack", nargs="?", type=Path, help="a pack, in place of the store and its layers")
    add("show", _show, "print everything that is known of some entries").add_argument("key", nargs="+", type=_key)
    add("rm", _rm, "remove some entries of the store").add_argument("key", nargs="+", type=_key)
    pruned = add("prune", _prune, "remove entries that no process uses, those not used for longest first")
    pruned.add_argument("--limit", help="until this is left, as 500MiB (default: JIT_KERNEL_CACHE_LIMIT)")
    pruned.add_argument("--older", type=float, metavar="DAYS", help="what was not used for so many days, at any size")
    pruned.add_argument("--dry-run", action="store_true", help="say what would be removed, and remove nothing")
    add("clear", _clear, "remove every entry of the store")
    packed = add("pack", _pack, "write entries of the store and its layers into one file")
    packed.add_argument("file", type=Path)
    with_targets(packed)
    packed.add_argument("--profile", type=Path, help="only the kernels that a run wrote to JIT_KERNEL_RECORD's file")
    unpacked = add("unpack", _unpack, "check a pack, and put its entries into the store")
    unpacked.add_argument("file", type=Path)
    with_targets(unpacked)
    why = add("why", _why, "why kernels are not stored: the parts of the key that differ from the nearest entry")
    with_targets(why)
    why.add_argument("--select", nargs="+", default=[], metavar="FIELD=VALUE", help="only variants that serve this")
    why.add_argument("--module", action="append", default=[], help="kernels that this module declares; not attention's")
    return parser


def _target(text: str) -> str:
    try:
        return str(Target.parse(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _key(text: str) -> str:
    if len(text) < 4 or set(text) - set("0123456789abcdef"):
        raise argparse.ArgumentTypeError(f"key is {text!r}; it must be the first four digits of a key or more")
    return text


def _all(store: Store) -> list[Store]:
    """The store and its layers."""
    return [store, *read_only_layers()]


def _list(store: Store, options: argparse.Namespace) -> int:
    damaged = 0
    records: list[dict[str, Any]] = []
    for each in _all(store):
        for folder, found in each.verified(glance=True):
            if not isinstance(found, Entry):
                damaged += 1
                records.append({"folder": str(folder), "layer": str(each.root), "damaged": found.reason})
            else:
                records.append(_record(each, folder, found.manifest))
    if options.json:
        from jit_kernel.engine import use

        for record in records:
            record["last_used"] = use.last_used(Path(record["folder"]))  # a look at each file of 1,000 entries: 80 ms
        print(json.dumps(records, indent=1))
    else:
        sys.stdout.write("".join(_line(record, store) for record in records))
    if damaged:
        progress.write(f"{damaged} damaged entries in {store.root}\n")
    return 1 if damaged else 0


def _record(store: Store, folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    taken = ("kernel", "target", "variant", "key", "created", "seconds", "peak_bytes", "tvm_ffi")
    return {
        **{name: manifest.get(name) for name in taken},
        "bytes": sum(file["size"] for file in manifest["files"].values()),
        "folder": str(folder),
        "layer": str(store.root),
    }


def _line(record: dict[str, Any], store: Store) -> str:
    if "damaged" in record:
        return f"damaged: {record['folder']}: {record['damaged']}\n"
    variant = record["variant"]
    fields = ", ".join(f"{name}={value}" for name, value in variant.items()) if isinstance(variant, dict) else ""
    layer = "" if record["layer"] == str(store.root) else f"  in {record['layer']}"
    return (
        f"{str(record['key'])[:12]}  {record['created'] or 'unpacked':20}  {record['bytes'] / 1e6:6.2f} MB  "
        f"{record['seconds'] or '-'!s:>5} s  {record['target']}  {record['kernel']}  {fields}{layer}\n"
    )


def _verify(store: Store, options: argparse.Namespace) -> int:
    if options.pack is not None:
        from jit_kernel.engine import signature, unpack

        with unpack.open_pack(options.pack, signature.key()) as found:
            wrong = unpack.problems(found, found.targets())
            for text in wrong:
                print(f"bad: {text}")
            print(f"{len(wrong)} bad files in {options.pack}: {len(found.index)} entries, {_signature(found)}")
            return 1 if wrong else 0
    damaged = 0
    for each in _all(store):
        for folder, entry in each.verified():
            if not isinstance(entry, Entry):
                damaged += 1
                print(f"damaged: {folder}: {entry.reason}")
    print(f"{damaged} damaged entries in {' and '.join(str(each.root) for each in _all(store))}")
    return 1 if damaged else 0


def _signature(found: unpack.Pack) -> str:
    if not found.signed:
        return "not signed"
    return "rightly signed" if found.checked else "signed; no JIT_KERNEL_PACK_KEY to check it with"


def _chosen(store: Store, keys: list[str]) -> list[tuple[Path, str]]:
    found = [(folder, key) for folder, key in places(store.root) if any(map(key.startswith, keys))]
    for wanted in keys:
        if not any(key.startswith(wanted) for _, key in found):
            raise CacheError(f"no entry of {store.root} has a key that begins with {wanted}")
    return found


def _show(store: Store, options: argparse.Namespace) -> int:
    from jit_kernel.engine import use

    shown = 0
    for each in _all(store):
        for folder, found in each.verified():
            if not any(map(folder.name.startswith, options.key)):
                continue
            shown += 1
            about: dict[str, Any] = {"folder": str(folder), "in_use": use.is_used(folder)}
            about["last_used"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(use.last_used(folder)))
            about.update(found.manifest if isinstance(found, Entry) else {"damaged": found.reason})
            print(json.dumps(about, indent=1))
    if not shown:
        raise CacheError(f"no entry of {store.root} or a layer has a key that begins with {', '.join(options.key)}")
    return 0


def _rm(store: Store, options: argparse.Namespace) -> int:
    from jit_kernel.engine import removal

    chosen = _chosen(store, options.key)
    removal.require_writable(store)
    removed = sum(removal.remove_entry(store, folder, key, _report_waiting) for folder, key in chosen)
    print(f"{removed} of {len(chosen)} entries removed from {store.root}")
    return 0 if removed == len(chosen) else 1


def _prune(store: Store, options: argparse.Namespace) -> int:
    from jit_kernel.engine import removal

    seconds = (options.older or 0.0) * 86400
    text = options.limit or ("0" if options.older is not None else str(config.settings().cache_limit))
    limit = config.bytes_of(text)
    if not limit and options.older is None and options.limit is None:
        raise CacheError("JIT_KERNEL_CACHE_LIMIT is 0, which bounds nothing; say how much with --limit or --older")
    done = removal.prune(store, limit, older_than=seconds, dry=options.dry_run)
    words = "would be removed" if options.dry_run else "removed"
    print(
        f"{done.removed} entries ({done.removed_bytes / 1e6:.2f} MB) {words}, {done.left} left "
        f"({done.left_bytes / 1e6:.2f} MB), {done.used} passed over because they are in use; {store.root}"
    )
    return 0


def _clear(store: Store, options: argparse.Namespace) -> int:
    from jit_kernel.engine import removal

    print(f"{removal.clear(store, _report_waiting)} entries removed from {store.root}")
    return 0


def _pack(store: Store, options: argparse.Namespace) -> int:
    from jit_kernel.engine import pack, signature

    wanted = None
    if options.profile is not None:
        from jit_kernel import ready
        from jit_kernel.engine.build import key_of

        kernels = ready.kernels_of(options.profile, [Target.parse(text) for text in options.target])
        wanted = {f"{spec.kernel}/{to}/{key_of(spec, to)[0]}": f"{spec} for {to}" for spec, to in kernels}
    entries = pack.collect(_all(store), wanted, options.target)
    done = pack.write(options.file, entries, signature.key())
    signed = "signed" if done.signed else "not signed"
    print(f"{done.entries} entries for {', '.join(done.targets)}, {done.size / 1e6:.2f} MB, {signed}: {options.file}")
    return 0


def _unpack(store: Store, options: argparse.Namespace) -> int:
    from jit_kernel.engine import signature, unpack

    with unpack.open_pack(options.file, signature.key()) as found:
        done = unpack.unpack(found, store, options.target, _report_waiting)
        print(f"{done.published} entries unpacked, {done.present} there already; {_signature(found)}; {store.root}")
    return 0


def _why(store: Store, options: argparse.Namespace) -> int:
    from jit_kernel import warmup
    from jit_kernel.commands.selecting import selections
    from jit_kernel.device import detect_device, device_target
    from jit_kernel.engine.build import why

    selects = selections(options.select)
    missing = 0
    for target in [Target.parse(text) for text in options.target] or [device_target(detect_device())]:
        for spec in warmup.selected(target, selects, options.module or ()):
            place, reason = why(spec, target)
            missing += not place
            print(f"stored  {target} {spec}: {place}" if place else f"missing {target} {spec}: {reason}")
    return 1 if missing else 0


def _report_waiting(holder: Holder | None, waited: float) -> None:
    process = f"process {holder.pid} on {holder.host}" if holder else "another process"
    progress.write(f"waiting {waited:.0f} s for an entry that {process} compiles\n")

"""One entry of the store, found or made: the steps behind jit.load.

What it is called by is engine/wanted.py's.
"""

from __future__ import annotations

import errno
import functools
import time
from pathlib import Path

from jit_kernel import config
from jit_kernel.device import Target
from jit_kernel.engine import (
    compiler,
    events,
    explain,
    failures,
    identity,
    jobs,
    layers,
    progress,
    removal,
    seal,
)  # fmt: skip
from jit_kernel.engine.entry import Entry, Miss, sha256_of
from jit_kernel.engine.lock import EntryLock
from jit_kernel.engine.spec import Event, KernelSpec
from jit_kernel.engine.store import CacheError, Store, read_only_layers, write_manifest, write_unit
from jit_kernel.engine.wanted import Wanted, wanted_of
from jit_kernel.engine.wanted import key_of as key_of

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# How often a compilation is begun whose private folder is taken away meanwhile.
_ATTEMPTS = 5


def is_stored(spec: KernelSpec, target: Target) -> bool:
    """Whether `obtain` would compile nothing. Starts no compiler that it has seen before."""
    store = _store()
    return isinstance(layers.find(wanted_of(spec, target, store), store), Entry)


def _store() -> Store:
    store = Store(config.cache_dir())
    store.check()
    return store


def obtain(spec: KernelSpec, target: Target, unusable: tuple[Entry, str] | None = None) -> Entry:
    """The verified entry of a kernel: from disk, else compiled under the lock of that entry.

    `unusable` is an entry that was found and could not be loaded, and why; it is replaced. Raises
    compiler.CompilerError or CacheError.
    """
    started = time.perf_counter()
    store = _store()
    wanted = wanted_of(spec, target, store)
    found = layers.find(wanted, store, unusable)
    if isinstance(found, Miss):
        if seal.is_sealed():
            why = _explained_miss(wanted, found, store)
            raise seal.refusal(spec, target, wanted.key, why, time.perf_counter() - started)
        if isinstance(wanted.compiler, compiler.CompilerNotFoundError):
            raise wanted.compiler
        if not store.writable(spec.kernel, str(target)):
            return _build_outside(wanted, _explained_miss(wanted, found, store), store)
        try:
            found = _under_lock(wanted, store, unusable)
        except OSError as error:
            if error.errno in _FULL:
                raise failures.disk_full(spec, store.root) from error
            raise CacheError(f"cache folder {store.root} cannot be used for {spec}: {error}") from error
        if found.fresh:
            removal.keep_within(store, found.folder)
            return found
    seconds = time.perf_counter() - started
    events.post(Event(spec, target, "loaded", seconds, key=wanted.key, layer=found.layer))
    progress.say(f"loaded {spec} from {found.folder} in {seconds * 1e3:.1f} ms", "debug")
    return found


def unloadable(spec: KernelSpec, target: Target, entry: Entry, problem: str) -> compiler.CompileError:
    """The error for an entry that was just compiled and cannot be loaded; it is taken out of the store.

    Where it cannot be taken out, that stands in the error, whose subject stays what the loader said.
    """
    stays = ""
    try:
        store = _store()
        if entry.folder.is_relative_to(store.root):
            store.quarantine(entry.folder)
    except (OSError, CacheError) as error:
        stays = f"\nit stays in the store, and is compiled again when it is next asked for: {error}"
    command = str(entry.manifest.get("command"))
    return compiler.CompileError(
        f"{spec} for {target} was compiled and cannot be loaded: {problem}\ncompiled by: {command}\nset CXX to a "
        f"compiler that makes code for this machine{stays}",
        log=problem,
        command=command,
    )


def _under_lock(wanted: Wanted, store: Store, unusable: tuple[Entry, str] | None) -> Entry:
    """Look again under the lock, and compile if need be."""
    lock = store.lock(wanted.spec.kernel, str(wanted.target), wanted.key)
    with lock.held(functools.partial(failures.report_waiting, wanted.spec)):
        found = layers.find(wanted, store, unusable)
        return _build(wanted, found, store, lock) if isinstance(found, Miss) else found


def _build(wanted: Wanted, miss: Miss, store: Store, lock: EntryLock) -> Entry:
    """Compile under the lock and publish. A failure leaves no entry and no private folder."""
    spec, reason = wanted.spec, miss.reason
    if miss.damaged is not None:
        progress.warn_once(f"{spec} in {miss.damaged} is unusable: {reason}; compiling it again")
        store.quarantine(miss.damaged)
    else:
        reason = _explained_miss(wanted, miss, store)
    name = f"{wanted.key}-{wanted.compiler}"
    for attempt in range(_ATTEMPTS):
        private = store.private_folder()
        try:
            entry = _compile_into(private, wanted, reason, lock.last_duration())
            folder = store.publish(private, spec.kernel, str(wanted.target), name)
            lock.record_duration(entry.manifest["seconds"])
            return _published(wanted, entry, folder, private, store)
        except (compiler.CompileError, OSError) as error:
            if not store.holds_unit(private) and attempt + 1 < _ATTEMPTS:
                progress.say(f"{private} was removed while {spec} was compiled in it; compiling it again")
                continue
            if isinstance(error, OSError):
                raise
            raise failures.explained(spec, wanted.target, error, private, store, name) from error
        finally:
            store.discard(private)
    raise AssertionError("the last attempt returns or raises")


def _published(wanted: Wanted, entry: Entry, folder: Path, private: Path, store: Store) -> Entry:
    """The entry at its place: the one that was there first, where another process published the same meanwhile."""
    if private.exists():
        first = store.lookup(wanted.spec.kernel, wanted.place, wanted.key, wanted.compiler_asked())
        if isinstance(first, Entry):
            return first
        store.quarantine(folder)
        store.publish(private, wanted.spec.kernel, str(wanted.target), folder.name)
    return Entry(folder, entry.manifest, entry.files, fresh=True)


def _build_outside(wanted: Wanted, reason: str, store: Store) -> Entry:
    """Compile for this process alone, where the store has no entry and cannot be written."""
    progress.warn_once(
        f"cache folder {store.root} cannot be written and holds no {wanted.spec}; compiling it for this process "
        "alone. Set JIT_KERNEL_CACHE_DIR to a folder that can be written"
    )
    try:
        home = Store.temporary("jit_kernel-")
        folder = home.private_folder()
        try:
            return _compile_into(folder, wanted, reason, None)
        except compiler.CompileError as error:
            raise failures.explained(wanted.spec, wanted.target, error, folder, store, None) from error
        finally:
            home.discard(folder)
    except OSError as error:
        if error.errno in _FULL:
            raise failures.disk_full(wanted.spec, Path(str(error.filename or "the temporary files"))) from error
        raise CacheError(
            f"{wanted.spec} cannot be compiled: neither {store.root} nor the folder of temporary files can be written "
            f"({error}); set JIT_KERNEL_CACHE_DIR or TMPDIR"
        ) from error


def _compile_into(folder: Path, wanted: Wanted, reason: str, last_seconds: float | None) -> Entry:
    import tvm_ffi

    spec, target = wanted.spec, wanted.target
    started = time.perf_counter()
    unit = write_unit(folder, compiler.UNIT_NAMES[spec.route], spec.unit)
    if spec.sources is not None:
        for name, text in spec.sources.text:
            write_unit(folder, f"{compiler.TEXTS}/{name}", text)
    with jobs.slot(spec, target, wanted.store), progress.compiling(f"{spec} for {target}", last_seconds):
        made = compiler.compile_unit(spec, folder, target)
    found = compiler.require(spec.route)
    names = [unit.name, made.artifact]
    names += [compiler.LAUNCH_METADATA] if (folder / compiler.LAUNCH_METADATA).exists() else []
    files = {name: (folder / name).read_bytes() for name in names}
    if files[unit.name] != spec.unit.encode():
        problem = f"{unit.name} was changed while it was compiled by {found}"
        raise compiler.CompileError(problem, log="", command=made.command)
    manifest = {
        "kernel": spec.kernel,
        "target": str(target),
        "variant": dict(spec.variant),
        "key": wanted.key,
        "inputs": wanted.inputs,
        "artifact": made.artifact,
        "functions": made.functions,
        "files": {name: {"size": len(data), "sha256": sha256_of(data)} for name, data in files.items()},
        "command": made.command,
        "compiler": {"name": found.name, "path": str(found.path), "version": identity.of(found, None)},
        "tvm_ffi": tvm_ffi.__version__,
        "seconds": round(made.seconds, 3),
        "peak_bytes": made.peak_bytes,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    write_manifest(folder, manifest)
    seconds = time.perf_counter() - started
    events.post(Event(spec, target, "compiled", seconds, reason, made.peak_bytes, key=wanted.key))
    return Entry(folder, manifest, files, fresh=True)


def _explained_miss(wanted: Wanted, miss: Miss, store: Store) -> str:
    """Why it is not stored: what lies in its place, else what differs from the nearest entry."""
    if miss.damaged is not None:
        return miss.reason
    stores = [store, *read_only_layers()]
    reason = explain.why_missed(wanted.spec, wanted.target, wanted.key, wanted.inputs, stores) or miss.reason
    progress.say(f"{wanted.spec} is not stored: {reason}", "debug")
    return reason


def why(spec: KernelSpec, target: Target) -> tuple[str, str]:
    """Where a kernel is stored, or "" and why it is not: behind `cache why` and `why --module`.

    Raises what `is_stored` raises.
    """
    store = _store()
    wanted = wanted_of(spec, target, store)
    found = layers.find(wanted, store)
    return (str(found.folder), "") if isinstance(found, Entry) else ("", _explained_miss(wanted, found, store))

"""One entry of the store, found or made: the steps behind jit.load.

What an artifact depends on stands in its key: the unit's text, the bytes of every file that it includes or imports,
directly or not, the flags, the target and tvm-ffi's version. The compiler's identity is a second name beside the
key, so that an image without a compiler still finds what another built, and a new compiler gets an entry of its own.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import shutil
import time
from functools import partial
from pathlib import Path

from jit_kernel import config
from jit_kernel.device import Target
from jit_kernel.engine import closure, compiler, identity, progress
from jit_kernel.engine.entry import Entry, Miss, sha256_of
from jit_kernel.engine.lock import EntryLock, Holder
from jit_kernel.engine.spec import Event, KernelSpec, recorded
from jit_kernel.engine.store import CacheError, Store, write_manifest, write_unit

# With less than this free after a failed compilation, the disk is what failed.
_FULL_BYTES = 256 << 10


def is_stored(spec: KernelSpec, target: Target) -> bool:
    """Whether `obtain` would compile nothing. Starts no compiler that it has seen before."""
    store = _store()
    present = identity.present(spec.route, store)
    return isinstance(store.lookup(spec.kernel, str(target), key_of(spec, target)[0], present), Entry)


def _store() -> Store:
    store = Store(config.cache_dir())
    store.check()
    return store


def obtain(spec: KernelSpec, target: Target, unusable: Path | None = None) -> Entry:
    """The verified entry of a kernel: from disk, else compiled under the lock of that entry.

    `unusable` is an entry that was found and could not be loaded; it is replaced.
    """
    started = time.perf_counter()
    store = _store()
    key, inputs = key_of(spec, target)
    present = identity.present(spec.route, store)
    find = partial(store.lookup, spec.kernel, str(target), key, present)
    found = Miss("it could not be loaded", unusable) if unusable else find()
    if isinstance(found, Miss):
        compiler.require(spec.route)
        if not store.writable():
            return _build_outside(spec, target, key, inputs, found.reason, store)
        lock = store.lock(spec.kernel, str(target), key)
        try:
            with lock.held(partial(_report_waiting, spec)):
                again = found if unusable else find()
                if isinstance(again, Miss):
                    return _build(spec, target, key, inputs, again, store, lock)
                found = again
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise _disk_full(spec, store.root) from error
            raise
    seconds = time.perf_counter() - started
    recorded.append(Event(spec, target, "loaded", seconds))
    progress.say(f"loaded {spec} from {found.folder} in {seconds * 1e3:.1f} ms", "debug")
    return found


def _build(
    spec: KernelSpec,
    target: Target,
    key: str,
    inputs: dict[str, str],
    miss: Miss,
    store: Store,
    lock: EntryLock,
) -> Entry:
    """Compile under the lock and publish. A failure leaves no entry and no private folder."""
    reason = miss.reason
    if miss.damaged is not None:
        progress.warn_once(f"{spec} in {miss.damaged} is unusable: {reason}; compiling it again")
        store.quarantine(miss.damaged)
    else:
        reason = _why_missed(spec, target, inputs, store) or reason
    name = f"{key}-{identity.present(spec.route, store)}"
    private = store.private_folder()
    try:
        entry = _compile_into(private, spec, target, key, inputs, reason, lock.last_duration())
        folder = store.publish(private, spec.kernel, str(target), name)
        lock.record_duration(entry.manifest["seconds"])
        return Entry(folder, entry.manifest)
    except compiler.CompileError as error:
        raise _explained(spec, target, error, private, store, name) from error
    finally:
        store.discard(private)


def _build_outside(
    spec: KernelSpec, target: Target, key: str, inputs: dict[str, str], reason: str, store: Store
) -> Entry:
    """Compile for this process alone, where the store has no entry and cannot be written."""
    progress.warn_once(
        f"cache folder {store.root} cannot be written and holds no {spec}; compiling it for this process "
        "alone. Set JIT_KERNEL_CACHE_DIR to a folder that can be written"
    )
    folder = Store.temporary("jit_kernel-").private_folder()
    try:
        return _compile_into(folder, spec, target, key, inputs, reason, None)
    except compiler.CompileError as error:
        raise _explained(spec, target, error, folder, store, None) from error


def _compile_into(
    folder: Path,
    spec: KernelSpec,
    target: Target,
    key: str,
    inputs: dict[str, str],
    reason: str,
    last_seconds: float | None,
) -> Entry:
    import tvm_ffi

    started = time.perf_counter()
    unit = write_unit(folder, compiler.UNIT_NAMES[spec.route], spec.unit)
    source_folder = config.kernel_sources_dir() / spec.kernel
    with progress.compiling(f"{spec} for {target}", last_seconds):
        made = compiler.compile_unit(spec.route, folder, target, spec.flags, source_folder)
    found = compiler.require(spec.route)
    names = [unit.name, made.artifact]
    names += [compiler.LAUNCH_METADATA] if (folder / compiler.LAUNCH_METADATA).exists() else []
    manifest = {
        "kernel": spec.kernel,
        "target": str(target),
        "variant": dict(spec.variant),
        "key": key,
        "inputs": inputs,
        "artifact": made.artifact,
        "files": {name: {"size": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)} for name in names},
        "command": made.command,
        "compiler": {"name": found.name, "path": str(found.path), "version": identity.of(found, None)},
        "tvm_ffi": tvm_ffi.__version__,
        "seconds": round(made.seconds, 3),
        "peak_bytes": made.peak_bytes,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    write_manifest(folder, manifest)
    seconds = time.perf_counter() - started
    recorded.append(Event(spec, target, "compiled", seconds, reason, made.peak_bytes))
    return Entry(folder, manifest)


def key_of(spec: KernelSpec, target: Target) -> tuple[str, dict[str, str]]:
    """The key of an artifact and the inputs that it was made of, each with its sha256."""
    import tvm_ffi

    inputs = {"unit": hashlib.sha256(spec.unit.encode()).hexdigest()}
    inputs |= closure.files_of(spec.unit, spec.route, spec.kernel, str(config.kernel_sources_dir()))
    inputs["flags"] = " ".join(compiler.flags(spec.route, target, spec.flags))
    inputs["target"] = str(target)
    inputs["tvm-ffi"] = tvm_ffi.__version__
    text = json.dumps([spec.kernel, spec.route, sorted(inputs.items())])
    return hashlib.sha256(text.encode()).hexdigest()[:32], inputs


def _why_missed(spec: KernelSpec, target: Target, inputs: dict[str, str], store: Store) -> str | None:
    """What changed since the newest entry of the same variant, for the event and the log."""
    same = [
        manifest
        for _, manifest in Store(store.root / spec.kernel / str(target)).manifests()
        if manifest.get("variant") == dict(spec.variant) and isinstance(manifest.get("inputs"), dict)
    ]
    if not same:
        return None
    old = max(same, key=lambda manifest: str(manifest.get("created")))["inputs"]
    changed = sorted(name for name in {*old, *inputs} if old.get(name) != inputs.get(name))
    reason = f"changed since the last build: {', '.join(changed) if changed else 'the compiler'}"
    progress.say(f"{spec}: {reason}", "debug")
    return reason


def _explained(
    spec: KernelSpec,
    target: Target,
    error: compiler.CompileError,
    private: Path,
    store: Store,
    name: str | None,
) -> Exception:
    # A linker on a full disk prints so, or dies of a signal and prints nothing.
    if "No space left on device" in error.log or shutil.disk_usage(private).free < _FULL_BYTES:
        return _disk_full(spec, private.parent)
    where = "its folder could not be kept"
    with contextlib.suppress(OSError):
        home = store if name else Store.temporary("jit_kernel-failed-", kept=True)
        kept = home.keep_failure(private, name or "build", error.log, error.command)
        where = f"log: {kept / 'compile.log'}\nrepeat it with: {kept / 'repeat.sh'}"
    return compiler.CompileError(
        f"{spec} for {target} did not compile:\n{error}\n{where}", log=error.log, command=error.command
    )


def _disk_full(spec: KernelSpec, place: Path) -> CacheError:
    return CacheError(
        f"the disk that holds {place} is full: {spec} was not compiled; free some space, or set "
        "JIT_KERNEL_CACHE_DIR to a folder on another disk"
    )


def _report_waiting(spec: KernelSpec, holder: Holder | None, waited: float) -> None:
    if holder is None:
        progress.say(f"waiting for {spec}, which another process compiles ({waited:.0f} s so far)")
        return
    last = f", its last build took {holder.last_seconds:.1f} s" if holder.last_seconds else ""
    progress.say(
        f"waiting for {spec}: process {holder.pid} on {holder.host} has been compiling it for "
        f"{max(0.0, time.time() - holder.since):.0f} s{last}"
    )

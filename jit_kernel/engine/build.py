"""One entry of the store, found or made: the steps behind jit.load.

What an artifact depends on stands in its key: the unit's text, the bytes of every file that it includes or imports,
directly or not, the flags, the target and tvm-ffi's version. The compiler's identity is a second name beside the
key, so that an image without a compiler still finds what another built, and a new compiler gets an entry of its own.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from jit_kernel import config
from jit_kernel.device import Target
from jit_kernel.engine import closure, compiler, progress
from jit_kernel.engine.store import MANIFEST, CacheError, Entry, Holder, Miss, Store, sha256_of

log = logging.getLogger("jit_kernel")

Scalar = str | int | bool


@dataclass(frozen=True)
class KernelSpec:
    """What to compile.

    kernel: the folder below kernel_sources and below the store, "flash_attention_v3/cpu".
    unit: the text that is compiled: an #include of the real source and one export.
    route: "host" (a shared library), "cuda" or "triton" (a cubin).
    variant: the template arguments by name, for the manifest, warm-up and doctor.
    flags: compiler flags beyond the route's own.
    """

    kernel: str
    unit: str
    route: str
    variant: tuple[tuple[str, Scalar], ...] = ()
    flags: tuple[str, ...] = ()

    def __str__(self) -> str:
        fields = ", ".join(f"{name}={value}" for name, value in self.variant)
        return f"{self.kernel} ({fields})" if fields else self.kernel


@dataclass(frozen=True)
class Event:
    """One kernel that this process compiled or loaded; `reason` says why it was not found, if so."""

    spec: KernelSpec
    target: Target
    action: str
    seconds: float
    reason: str = ""
    peak_bytes: int = 0


# With less than this free after a failed compilation, the disk is what failed.
_FULL_BYTES = 256 << 10

recorded: list[Event] = []
_said: set[str] = set()


def is_stored(spec: KernelSpec, target: Target) -> bool:
    """Whether `obtain` would compile nothing. Starts no compiler that it has seen before."""
    store = _store()
    present = _present_compiler(spec.route, store)
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
    present = _present_compiler(spec.route, store)
    find = partial(store.lookup, spec.kernel, str(target), key, present)
    found = Miss("it could not be loaded", unusable) if unusable else find()
    if isinstance(found, Miss):
        compiler.require(spec.route)
        if not store.writable():
            return _build_outside(spec, target, key, inputs, found.reason, store)
        lock_name = hashlib.sha256(f"{spec.kernel}/{target}/{key}".encode()).hexdigest()[:32]
        try:
            with store.lock(lock_name, partial(_tell_waiting, spec)):
                again = found if unusable else find()
                if isinstance(again, Miss):
                    return _build(spec, target, key, inputs, again, store, lock_name)
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
    lock_name: str,
) -> Entry:
    """Compile under the lock and publish. A failure leaves no entry and no private folder."""
    reason = miss.reason
    if miss.damaged is not None:
        warn(f"{spec} in {miss.damaged} is unusable: {reason}; compiling it again")
        store.quarantine(miss.damaged)
    else:
        reason = _why_missed(spec, target, inputs, store) or reason
    name = f"{key}-{_present_compiler(spec.route, store)}"
    private = store.private_folder()
    try:
        entry = _compile_into(private, spec, target, key, inputs, reason, store.last_duration(lock_name))
        folder = store.publish(private, spec.kernel, str(target), name)
        store.record_duration(lock_name, entry.manifest["seconds"])
        return Entry(folder, entry.manifest)
    except compiler.CompileError as error:
        raise _explained(spec, target, error, private, store, name) from error
    finally:
        shutil.rmtree(private, ignore_errors=True)


def _build_outside(
    spec: KernelSpec, target: Target, key: str, inputs: dict[str, str], reason: str, store: Store
) -> Entry:
    """Compile for this process alone, where the store has no entry and cannot be written."""
    warn(
        f"cache folder {store.root} cannot be written and holds no {spec}; compiling it for this process "
        "alone. Set JIT_KERNEL_CACHE_DIR to a folder that can be written"
    )
    folder = Path(tempfile.mkdtemp(prefix="jit_kernel-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
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
    unit = folder / compiler.UNIT_NAMES[spec.route]
    unit.write_text(spec.unit, encoding="utf-8")
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
        "compiler": {"name": found.name, "path": str(found.path), "version": _identity(found, None)},
        "tvm_ffi": tvm_ffi.__version__,
        "seconds": round(made.seconds, 3),
        "peak_bytes": made.peak_bytes,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
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


_identities: dict[str, str] = {}


def _identity(found: compiler.Found, store: Store | None) -> str:
    fingerprint = compiler.fingerprint(found)
    identity = _identities.get(fingerprint)
    if identity is None:
        identity = store.recall_compiler(fingerprint) if store else None
        if identity is None:
            identity = compiler.identify(found)
            if store:
                store.remember_compiler(fingerprint, identity)
        _identities[fingerprint] = identity
    return identity


def _present_compiler(route: str, store: Store) -> str | None:
    """The short identity of the compiler that is installed here, None without one.

    The C library counts as part of it: a library built against a newer one does not load on an older one.
    """
    try:
        found = compiler.find(route)
        if found is None:
            return None
        identity = _identity(found, store)
    except compiler.CompilerNotFoundError:
        return None
    with contextlib.suppress(ValueError, OSError, AttributeError):
        identity += f"\n{os.confstr('CS_GNU_LIBC_VERSION')}" if route == "host" else ""
    return hashlib.sha256(identity.encode()).hexdigest()[:8]


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
    # A linker on a full disk may say so, or die of a signal without a word.
    if "No space left on device" in error.log or shutil.disk_usage(private).free < _FULL_BYTES:
        return _disk_full(spec, private.parent)
    where = "its folder could not be kept"
    with contextlib.suppress(OSError):
        home = store if name else Store(Path(tempfile.mkdtemp(prefix="jit_kernel-failed-")))
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


def _tell_waiting(spec: KernelSpec, holder: Holder | None, waited: float) -> None:
    if holder is None:
        progress.say(f"waiting for {spec}, which another process compiles ({waited:.0f} s so far)")
        return
    last = f", its last build took {holder.last_seconds:.1f} s" if holder.last_seconds else ""
    progress.say(
        f"waiting for {spec}: process {holder.pid} on {holder.host} has been compiling it for "
        f"{max(0.0, time.time() - holder.since):.0f} s{last}"
    )


def warn(message: str) -> None:
    """Log a warning, once a process."""
    if message not in _said:
        _said.add(message)
        log.warning(message)

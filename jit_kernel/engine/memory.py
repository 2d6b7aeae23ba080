"""What this process has compiled or loaded: memory in front of `build`, one lock for each kernel."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jit_kernel.device import Target
from jit_kernel.engine import build as builds
from jit_kernel.engine import compiler, library, record, use
from jit_kernel.engine.entry import Entry
from jit_kernel.engine.forks import Lock
from jit_kernel.engine.spec import KernelSpec


@dataclass(frozen=True)
class Cubin:
    """A compiled device kernel: its image, the compiler's launch metadata and the file it came from."""

    image: bytes
    metadata: dict[str, Any]
    path: Path


_modules: dict[tuple[KernelSpec, Target], Any] = {}
_cubins: dict[tuple[KernelSpec, Target], Cubin] = {}
_guards: dict[tuple[KernelSpec, Target], Lock] = {}


def load(spec: KernelSpec, target: Target) -> Any:
    """The loaded library (a tvm_ffi.Module) of a "host" spec.

    Raises compiler.CompilerNotFoundError, compiler.CompileError or store.CacheError when it can be neither
    loaded nor compiled.
    """
    module = _modules.get((spec, target))
    if module is None:
        with _guard(spec, target):
            module = _modules.get((spec, target))
            if module is None:
                module = _modules[spec, target] = _load_library(spec, target)
    return module


def load_cubin(spec: KernelSpec, target: Target) -> Cubin:
    """The compiled cubin of a "cuda" or "triton" spec. Raises what `load` raises."""
    cubin = _cubins.get((spec, target))
    if cubin is None:
        with _guard(spec, target):
            cubin = _cubins.get((spec, target))
            if cubin is None:
                entry = builds.obtain(spec, target)
                _note(spec, target, entry)
                metadata = entry.files.get(compiler.LAUNCH_METADATA)
                path = entry.folder / str(entry.manifest["artifact"])
                cubin = Cubin(entry.image, json.loads(metadata) if metadata else {}, path)
                _cubins[spec, target] = cubin
    return cubin


def build(spec: KernelSpec, target: Target) -> Path:
    """Make sure that a kernel is in the store, without loading it. Returns its entry's folder."""
    with _guard(spec, target):
        return builds.obtain(spec, target).folder


def _guard(spec: KernelSpec, target: Target) -> Lock:
    return _guards.setdefault((spec, target), Lock())  # one operation of the interpreter


def is_loaded(spec: KernelSpec, target: Target) -> bool:
    """Whether this process has loaded a kernel."""
    return (spec, target) in _modules or (spec, target) in _cubins


def _note(spec: KernelSpec, target: Target, entry: Entry) -> None:
    """What is loaded stands in the profile that JIT_KERNEL_RECORD asks for, and is in use."""
    record.note(spec, target)
    use.hold(entry.folder)


def _load_library(spec: KernelSpec, target: Target) -> Any:
    entry = builds.obtain(spec, target)
    _note(spec, target, entry)
    try:
        return library.load(entry.image, str(spec), entry.functions)
    except library.UnloadableError as error:
        if entry.fresh:
            raise builds.unloadable(spec, target, entry, str(error)) from error
        # Built for another C library, say: bytes that were verified and still cannot be loaded here.
        entry = builds.obtain(spec, target, unusable=(entry, str(error)))
    try:
        return library.load(entry.image, str(spec), entry.functions)
    except library.UnloadableError as error:
        raise builds.unloadable(spec, target, entry, str(error)) from error

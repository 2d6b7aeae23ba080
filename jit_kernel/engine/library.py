"""A shared library loaded from its bytes, so that what was verified is what runs.

The bytes go into a sealed file in memory, which nobody can change and which needs no folder: a store on a file system
that is mounted noexec works too. Where the system has no such files, or forbids to run what they hold, a private copy
in the folder of temporary files takes its place.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jit_kernel.engine.forks import Lock
from jit_kernel.engine.ownership import CacheError
from jit_kernel.engine.store import Store

_NOEXEC_SEAL = 0x8  # MFD_NOEXEC_SEAL, since Linux 6.3: mapping it needs no x bit, and some systems allow nothing else
_guard = Lock()
_last_number = 2


class UnloadableError(RuntimeError):
    """The bytes are no library that can be loaded here; the message is the loader's."""


def load(image: bytes, title: str, functions: set[str]) -> Any:
    """The library as a tvm_ffi.Module, kept for the life of the process. `title` names it in debuggers and profilers.

    Raises UnloadableError where it cannot be loaded, or lacks a function; CacheError where this system runs no code
    from memory and none from the folder of temporary files.
    """
    in_memory = _in_memory(image, title)
    problem = "this system has no sealed files in memory"
    if in_memory is not None:
        try:
            return _open(in_memory, functions)
        except UnloadableError as error:
            os.close(int(in_memory.rpartition("/")[2]))  # nothing of it was loaded, or nothing that is used
            problem = str(error)
            if not _cannot_be_mapped(problem):
                raise
    with _private_copy(image, problem) as copy:
        try:
            return _open(str(copy), functions)
        except UnloadableError as error:
            if not _cannot_be_mapped(str(error)):
                raise
            noexec = bool(os.statvfs(copy).f_flag & os.ST_NOEXEC)
            raise CacheError(
                f"{title} cannot be run: neither from memory ({problem}) nor from {copy.parent}, "
                f"{'which is mounted noexec' if noexec else 'from which this system runs no code'} ({error}); set "
                "TMPDIR to a folder that is not mounted noexec"
            ) from error


def _cannot_be_mapped(problem: str) -> bool:
    """Whether the file could not be opened or mapped as code, whatever its bytes are."""
    return "failed to map segment" in problem or "cannot open shared object" in problem


def _in_memory(image: bytes, title: str) -> str | None:
    """The path of a sealed file in memory that holds the bytes; None where the system has none.

    The path stays the library's name: the dynamic loader takes a path that it has seen for the library that it loaded
    from there. So no descriptor's number serves twice, and the file stays open, which lets a debugger read it.
    """
    global _last_number
    if not hasattr(os, "memfd_create"):
        return None
    name = title.replace("/", ".")[:200]
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        try:
            first = os.memfd_create(name, flags | _NOEXEC_SEAL)
        except OSError:  # an older kernel
            first = os.memfd_create(name, flags)
        try:
            view = memoryview(image)
            while view:
                view = view[os.write(first, view) :]
            seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
            fcntl.fcntl(first, fcntl.F_ADD_SEALS, seals)
            me = os.readlink("/proc/self")
            with _guard:
                number = _last_number = fcntl.fcntl(first, fcntl.F_DUPFD_CLOEXEC, _last_number + 1)
        finally:
            os.close(first)
    except OSError:
        return None
    return f"/proc/{me}/fd/{number}"


@contextlib.contextmanager
def _private_copy(image: bytes, problem: str) -> Iterator[Path]:
    """The bytes in a file of a new folder, which is removed at once: what is loaded from it needs it no more."""
    store = None
    try:
        store = Store.temporary("jit_kernel-library-", kept=True)
        yield store.keep_bytes("kernel.so", image)
    except OSError as error:
        raise CacheError(
            f"a library cannot be loaded: not from memory ({problem}), and a private copy cannot be written to "
            f"{tempfile.gettempdir()} ({error}); set TMPDIR to a folder that can be written"
        ) from error
    finally:
        if store is not None:
            store.discard(store.root)


def _open(path: str, functions: set[str]) -> Any:
    import tvm_ffi

    try:
        # load_module tells the format by the path's ending, and one in /proc has none.
        module = tvm_ffi.get_global_func("ffi.Module.load_from_file.so")(path, "so")
    except (OSError, RuntimeError, ValueError) as error:
        raise UnloadableError(str(error)) from error
    missing = [name for name in sorted(functions) if not module.implements_function(name)]
    if missing:
        raise UnloadableError(f"it has no {', '.join(missing)}")
    tvm_ffi.get_global_func("ffi.ModuleGlobalsAdd")(module)
    return module

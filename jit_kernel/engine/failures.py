"""What is said of a compilation that failed, and of one that is waited for."""

from __future__ import annotations

import contextlib
import shutil
import time
from pathlib import Path

from jit_kernel.device import Target
from jit_kernel.engine import compiler, progress
from jit_kernel.engine.lock import Holder
from jit_kernel.engine.spec import KernelSpec
from jit_kernel.engine.store import CacheError, Store

# With less than this free after a failed compilation, the disk is what failed.
_FULL_BYTES = 256 << 10


def explained(
    spec: KernelSpec, target: Target, error: compiler.CompileError, private: Path, store: Store, name: str | None
) -> Exception:
    """The error for a compilation that failed: a full disk, else the compiler's own words and where its log is kept.

    name: of the entry that it would have become; None where it is kept in the folder of temporary files.
    """
    # A linker on a full disk prints so, or dies of a signal and prints nothing.
    with contextlib.suppress(OSError):
        if "No space left on device" in error.log or shutil.disk_usage(private).free < _FULL_BYTES:
            return disk_full(spec, private.parent)
    where = "its folder could not be kept"
    with contextlib.suppress(OSError, CacheError):
        home = store if name else Store.temporary("jit_kernel-failed-", kept=True)
        kept = home.keep_failure(private, name or "build", error.log, error.command)
        where = f"log: {kept / 'compile.log'}\nrepeat it with: {kept / 'repeat.sh'}"
    return compiler.CompileError(
        f"{spec} for {target} did not compile:\n{error}\n{where}", log=error.log, command=error.command
    )


def disk_full(spec: KernelSpec, place: Path) -> CacheError:
    """The error for a compilation that a full disk ended."""
    return CacheError(
        f"the disk that holds {place} is full: {spec} was not compiled; free some space, or set "
        "JIT_KERNEL_CACHE_DIR to a folder on another disk"
    )


def report_waiting(spec: KernelSpec, holder: Holder | None, waited: float) -> None:
    """Say who compiles what is waited for."""
    if holder is None:
        progress.say(f"waiting for {spec}, which another process compiles ({waited:.0f} s so far)")
        return
    last = f", its last build took {holder.last_seconds:.1f} s" if holder.last_seconds else ""
    progress.say(
        f"waiting for {spec}: process {holder.pid} on {holder.host} has been compiling it for "
        f"{max(0.0, time.time() - holder.since):.0f} s{last}"
    )

"""How many compilations run at a time: bounded for all processes of one user on this host together.

Each compilation holds one of a few lock files in /dev/shm, else in the folder of temporary files, from when it starts
to its end; the system frees those of a process that dies. There are as many as processors, and as fit into four fifths
of the memory (a container's own, if it has a limit) when each takes the most that such a compilation was measured to
take. Beside others, one starts only while that much is free. Where no such folder can be had, nothing is bounded.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from jit_kernel.device import Target
from jit_kernel.engine import lock as locks
from jit_kernel.engine import machine, progress
from jit_kernel.engine.spec import KernelSpec
from jit_kernel.engine.store import Store

# What a compilation takes of which none was measured: the CPU kernel 0.4 to 1.2 GB under g++ 9 to 14 and clang 14.
_USUAL_BYTES = 1_500_000_000
_LEAST_BYTES = 100_000_000
_SHARE = 0.8  # of the memory, for all compilations together
_POLL_SECONDS = 0.05
_PATIENCE = 10.0
_MOST_SECONDS = 300.0
_peaks: dict[tuple[Path, str, str], int] = {}


def peak_of(spec: KernelSpec, target: Target, store: Store) -> int:
    """The most bytes that a compilation of this kernel for this target took, by the store's own record."""
    place = (store.root, spec.kernel, str(target))
    if place not in _peaks:
        measured = (manifest.get("peak_bytes") for _, manifest in store.manifests(store.root / spec.kernel / place[2]))
        _peaks[place] = max((each for each in measured if type(each) is int), default=0)
    return max(_peaks[place], _LEAST_BYTES) if _peaks[place] else _USUAL_BYTES


def most(peak: int, root: Path = Path("/")) -> int:
    """How many compilations that take `peak` bytes each may run at a time on this machine; at least one."""
    found, cores = machine.memory(root), max(2, machine.processors(root))  # a launcher and its first kernel
    return max(1, min(cores, int(found.limit * _SHARE / peak) if found else cores))


@contextlib.contextmanager
def slot(spec: KernelSpec, target: Target, store: Store) -> Iterator[None]:
    """A block in which one compilation may run; begins when the machine has room for it."""
    folder = _folder()
    if folder is None:
        yield
        return
    release = _acquired(folder, spec, peak_of(spec, target, store))
    try:
        yield
    finally:
        if release is not None:
            release()
        _peaks.pop((store.root, spec.kernel, str(target)), None)  # this one was measured


def _acquired(folder: Path, spec: KernelSpec, peak: int) -> Callable[[], None] | None:
    started, patience = time.monotonic(), _PATIENCE
    while True:
        bound = most(peak)
        for number in range(bound):
            try:
                release = locks.try_lock(folder / f"{number}.lock")
            except OSError:  # the folder was removed, or the disk is full: it is the compilation's to say so
                return None
            if release is None:
                continue
            found = machine.memory()
            if number == 0 or found is None or found.free >= peak:
                return release
            release()
            break
        waited = time.monotonic() - started
        if waited > _MOST_SECONDS:  # a compiler that hangs must not keep every other from its work
            progress.warn_once(f"no room to compile {spec} for {waited:.0f} s; it is compiled beside the others")
            return None
        if waited > patience:
            progress.say(f"waiting {waited:.0f} s to compile {spec}: {bound} compilations at a time fit this machine")
            patience += _PATIENCE
        time.sleep(_POLL_SECONDS)


def _folder() -> Path | None:
    """This user's folder of lock files, made if need be; None where it cannot be had, or is somebody else's."""
    shared = Path("/dev/shm")  # of the whole host or container, where TMPDIR may be a process's own
    parent = shared if os.access(shared, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())
    folder = parent / f"jit_kernel-jobs-{os.geteuid()}"
    with contextlib.suppress(OSError):
        locks.make_folder(folder, 0o700)
        status = os.lstat(folder)
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022:
            return folder
    return None

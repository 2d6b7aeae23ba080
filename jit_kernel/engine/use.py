"""Which entries of a store live processes use, and when each was used last; told without a write to the store.

A process that loads an entry keeps its manifest open with a shared lock (flock), which the system frees with the
process. Removing an entry that somebody loaded would hurt nobody, since what runs are bytes in memory; but it would be
compiled again at the next start. The time of the last use is the artifact's access time as the file system keeps it:
to a day where it is mounted relatime, and the time of its compilation where it is mounted noatime.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from jit_kernel.engine.entry import MANIFEST

# More are not held: a process has 1,024 descriptors or more, and they are its user's. What is loaded last is used last.
_MOST_HELD = 256
_held: dict[Path, int] = {}


def hold(folder: Path) -> None:
    """Mark an entry as in use as long as this process, or a child that it forks, lives. Writes nothing."""
    if folder in _held or len(_held) >= _MOST_HELD:
        return
    with contextlib.suppress(OSError):  # removed meanwhile, no locks here, no descriptor left: nothing is lost
        descriptor = os.open(folder / MANIFEST, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise
        _held[folder] = descriptor


def is_used(folder: Path) -> bool:
    """Whether a live process holds an entry; also where that cannot be known, as without locks."""
    try:
        descriptor = os.open(folder / MANIFEST, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False  # without its manifest it serves nobody
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def last_used(folder: Path) -> float:
    """When an entry was used last, in seconds since 1970; 0 where it has gone."""
    newest = 0.0
    with contextlib.suppress(OSError), os.scandir(folder) as found:
        for each in found:
            with contextlib.suppress(OSError):
                status = each.stat(follow_symlinks=False)
                newest = max(newest, status.st_mtime, 0.0 if each.name == MANIFEST else status.st_atime)
    return newest

"""What a forked child must not take over from its parent: locks of threads that it does not have, and descriptors.

A lock that another thread held at the fork would never be free in the child. A child that kept a copy of a lock
file's descriptor would hold the lock after its parent's death, and one that kept the end of a compiler's pipe would
keep the compiler alive.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Iterator


class Lock:
    """A lock between threads that is free in a forked child, whichever thread of the parent held it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        _locks.add(self)

    def acquire(self, blocking: bool = True) -> bool:
        """Take it; without blocking, answers at once whether it was free."""
        return self._lock.acquire(blocking)

    def release(self) -> None:
        """Give it back; in a child of a fork that fell inside the block, it is free already."""
        if self._lock.locked():
            self._lock.release()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self.release()


@contextlib.contextmanager
def postponed() -> Iterator[None]:
    """A block during which no other thread forks: what is opened and closed in it is in no child."""
    with _guard:
        yield


class Descriptor:
    """An open file descriptor of this process alone: a forked child closes its copy at once."""

    def __init__(self, open_one: Callable[[], int]) -> None:
        with _guard:
            self.number = open_one()
            _descriptors.add(self)

    def close(self) -> None:
        """Close it; does nothing where it is closed already, by a fork too."""
        with _guard:
            number, self.number = self.number, -1
            if number >= 0:
                os.close(number)


_guard = threading.RLock()
_descriptors: weakref.WeakSet[Descriptor] = weakref.WeakSet()
_locks: weakref.WeakSet[Lock] = weakref.WeakSet()


def _after_in_child() -> None:
    _guard.release()
    for descriptor in list(_descriptors):
        descriptor.close()
    for lock in list(_locks):
        lock._lock = threading.Lock()


os.register_at_fork(before=_guard.acquire, after_in_parent=_guard.release, after_in_child=_after_in_child)

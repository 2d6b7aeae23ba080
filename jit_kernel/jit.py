"""The only way to compiled code: memory, then disk, then the compiler."""

from __future__ import annotations

from jit_kernel.engine.build import is_stored
from jit_kernel.engine.events import Stats, on_event, stats
from jit_kernel.engine.memory import Cubin, build, load, load_cubin
from jit_kernel.engine.seal import SealedError, seal
from jit_kernel.engine.spec import Event, KernelSpec, recorded

__all__ = [
    "Cubin",
    "Event",
    "KernelSpec",
    "SealedError",
    "Stats",
    "build",
    "events",
    "is_stored",
    "load",
    "load_cubin",
    "on_event",
    "seal",
    "stats",
]


def events() -> list[Event]:
    """What this process compiled and loaded so far, in order."""
    return list(recorded)

"""What is compiled, as a small value, and what a process has compiled and loaded so far."""

from __future__ import annotations

from dataclasses import dataclass

from jit_kernel.device import Target
from jit_kernel.engine.sources import Sources

Scalar = str | int | bool


@dataclass(frozen=True)
class KernelSpec:
    """What to compile.

    kernel: the folder below the store, "flash_attention_v3/cpu"; of jit_kernel's own, below kernel_sources too.
    unit: the text that is compiled: an #include of the real source and one export.
    route: "host" (a shared library), "cuda" or "triton" (a cubin).
    variant: the template arguments by name, for the manifest, warm-up and doctor.
    flags: compiler flags beyond the route's own.
    sources: what the unit includes or imports; None for kernel_sources.
    entry: of a "cuda" unit, the kernel that the generic launcher calls, with its template arguments; "" for a unit
        whose launcher knows its kernel.
    """

    kernel: str
    unit: str
    route: str
    variant: tuple[tuple[str, Scalar], ...] = ()
    flags: tuple[str, ...] = ()
    sources: Sources | None = None
    entry: str = ""

    def __str__(self) -> str:
        fields = ", ".join(f"{name}={value}" for name, value in self.variant)
        return f"{self.kernel} ({fields})" if fields else self.kernel


@dataclass(frozen=True)
class Event:
    """One kernel that this process compiled or loaded, or that it was refused.

    action: "loaded", "compiled", or "refused": it would have to be compiled, after seal() or during a graph's capture.
    reason: why it was not found, or was refused. layer: the store that it was loaded from.
    """

    spec: KernelSpec
    target: Target
    action: str
    seconds: float
    reason: str = ""
    peak_bytes: int = 0
    key: str = ""
    layer: str = ""


recorded: list[Event] = []

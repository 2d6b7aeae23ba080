"""What is compiled, as a small value, and what a process has compiled and loaded so far."""

from __future__ import annotations

from dataclasses import dataclass

from jit_kernel.device import Target

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


recorded: list[Event] = []

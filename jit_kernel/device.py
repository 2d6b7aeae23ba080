"""Devices and targets: what a kernel is compiled for, as a small value that prints and parses."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

VENDORS = ("cpu", "cuda", "musa")

# What a CPU target may name beyond its architecture, and the /proc/cpuinfo flags that it needs.
CPU_FEATURES = {
    "avx512bf16": ("avx512_bf16",),
    "avx512vnni": ("avx512_vnni",),
    "amxbf16": ("amx_bf16", "amx_tile"),
}
_V3 = ("avx2", "fma", "f16c", "bmi1", "bmi2", "movbe")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")

_ARCHITECTURES = {
    "cpu": re.compile(r"[a-z0-9][a-z0-9_-]*"),
    "cuda": re.compile(r"sm_\d{2,3}[af]?"),
    "musa": re.compile(r"mp_\d{2}"),
}


@dataclass(frozen=True)
class Target:
    """A vendor, an architecture and, on a CPU, the features beyond it that code may use.

    Its string is its name in the store: "cpu:x86-64-v4+avx512bf16", "cuda:sm_90a", "musa:mp_31".
    """

    vendor: str
    architecture: str
    features: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.vendor}:{'+'.join((self.architecture, *self.features))}"

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read a target's string; "cpu:native" is this machine, "cpu:generic" its plainest code.

        Raises ValueError for a string that names no target.
        """
        vendor, colon, rest = text.partition(":")
        if not colon or vendor not in VENDORS:
            raise ValueError(
                f"target is {text!r}; it must be vendor:architecture, for example cpu:native, "
                "cpu:x86-64-v4+avx512bf16, cuda:sm_90a or musa:mp_31"
            )
        if text == "cpu:native":
            return cpu_target()
        if text == "cpu:generic":
            return cls("cpu", _machine())
        architecture, *features = rest.split("+")
        if not _ARCHITECTURES[vendor].fullmatch(architecture):
            raise ValueError(f"target is {text!r}; {architecture!r} is no {vendor} architecture")
        known = tuple(CPU_FEATURES) if vendor == "cpu" else ()
        for feature in features:
            if feature not in known:
                raise ValueError(
                    f"target is {text!r}; feature {feature!r} must be one of {', '.join(known)}"
                    if known
                    else f"target is {text!r}; a {vendor} target has no features"
                )
        return cls(vendor, architecture, tuple(sorted(set(features))))


def _machine() -> str:
    """The processor family, in the spelling that compilers use."""
    name = platform.machine().lower()
    return {"x86_64": "x86-64", "amd64": "x86-64", "arm64": "aarch64"}.get(name, name)


def _cpu_flags() -> frozenset[str]:
    """The instruction sets of the processor and the name of its vendor."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            vendor = ""
            for line in file:
                if line.startswith("vendor_id"):
                    vendor = line.partition(":")[2].strip()
                if line.startswith("flags"):
                    return frozenset([vendor, *line.partition(":")[2].split()])
    except OSError:
        return frozenset()
    return frozenset()


_cpu: Target | None = None


def cpu_target() -> Target:
    """The target of this machine's processor, with every feature that makes a kernel faster."""
    global _cpu
    if _cpu is None:
        machine, flags = _machine(), _cpu_flags()
        if machine != "x86-64":
            _cpu = Target("cpu", machine)
        elif flags.issuperset(_V4):
            features = {name for name, needs in CPU_FEATURES.items() if flags.issuperset(needs)}
            # Without AMX: VDPBF16PS does 105 GFLOP/s a core on Granite Rapids, FMA 200; on Zen 4 it is twice FMA.
            if "GenuineIntel" in flags and "amxbf16" not in features:
                features.discard("avx512bf16")
            # Integers take the place of fp16 products, which tiles have here: 2 s of compilation for nothing.
            if "amx_fp16" in flags:
                features.discard("avx512vnni")
            _cpu = Target("cpu", "x86-64-v4", tuple(sorted(features)))
        else:
            _cpu = Target("cpu", "x86-64-v3" if flags.issuperset(_V3) else "x86-64")
    return _cpu


_targets: dict[str, Target] = {}


def device_target(device: torch.device | str) -> Target:
    """The target that kernels for a tensor's device are compiled for.

    Raises NotImplementedError for a device that no implementation serves.
    """
    name = str(device)
    target = _targets.get(name)
    if target is None:
        target = _targets[name] = _device_target(name)
    return target


def _device_target(name: str) -> Target:
    kind = name.partition(":")[0]
    if kind == "cpu":
        return cpu_target()
    if kind not in VENDORS:
        raise NotImplementedError(f"device {name!r}: jit_kernel serves cpu, cuda and musa")
    capability = get_device_capability(name)
    if capability is None:
        raise NotImplementedError(f"device {name!r}: no such device is present")
    major, minor = capability
    if kind == "musa":
        return Target("musa", f"mp_{major}{minor}")
    # sm_90a is Hopper's own instruction set (wgmma, setmaxnreg); its code runs on 9.0 alone.
    return Target("cuda", "sm_90a" if capability == (9, 0) else f"sm_{major}{minor}")


def get_device_capability(device: torch.device | str | None = None) -> tuple[int, int] | None:
    """(major, minor) of a CUDA or MUSA device; None for the CPU and for a device that is absent."""
    name = str(device) if device is not None else detect_device()
    kind, _, index = name.partition(":")
    if kind == "cuda":
        import torch

        if not torch.cuda.is_available() or int(index or 0) >= torch.cuda.device_count():
            return None
        major, minor = torch.cuda.get_device_capability(name)
        return int(major), int(minor)
    if kind == "musa":
        from jit_kernel import moore_threads

        return moore_threads.capability(int(index) if index else None)
    return None


def is_musa() -> bool:
    """Whether a Moore Threads GPU and the software to drive it are present."""
    from jit_kernel import moore_threads

    return moore_threads.probe().usable


def detect_device() -> str:
    """The device of a call without tensors: the first of cuda, musa, cpu that is present."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "musa" if is_musa() else "cpu"


def stream_of(device: torch.device) -> int:
    """The current stream of a device as a number; 0 on the CPU."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.current_stream(device).cuda_stream)
    if device.type == "musa":
        return int(torch.musa.current_stream(device).musa_stream)  # type: ignore[attr-defined]
    return 0


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream of a device is being captured into a graph."""
    import torch

    if device.type == "cuda":
        return bool(torch.cuda.is_current_stream_capturing())
    if device.type == "musa":
        return bool(torch.musa.is_current_stream_capturing())  # type: ignore[attr-defined]
    return False


def cpu_count() -> int:
    """Processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

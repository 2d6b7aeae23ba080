"""What a kernel's device= may be, and the target that it stands for."""

from __future__ import annotations

import re

import torch

from jit_kernel.device import Target, device_target

_NAMED = re.compile(r"(\w+)(?::(\d+))?")  # compiled where it is imported: 2 ms of a first call
EXAMPLES = {"cpu": "cpu:native", "cuda": "cuda:0 or cuda:sm_90a"}

Device = str | torch.device | Target | None


def target_of(device: Device, vendor: str) -> Target | None:
    """The target of a device or of a target's own string; None for None, which means the present one.

    Raises ValueError for another vendor's device, and what `device_target` raises for one that is absent.
    """
    if device is None:
        return None
    if isinstance(device, Target):
        target = device
    elif (match := _NAMED.fullmatch(str(device))) is not None:
        kind = match[1]
        target = device_target(str(device)) if kind == vendor else Target(kind, "")
    else:
        target = Target.parse(str(device))
    if target.vendor != vendor:
        raise ValueError(f"device is {str(device)!r}; it must be of {vendor}, as {EXAMPLES[vendor]}, or None")
    return target


def index_of(device: Device) -> int | None:
    """The number of the GPU that a device names, None where it names none."""
    if device is None or isinstance(device, Target):
        return None
    match = _NAMED.fullmatch(str(device))
    return int(match[2]) if match is not None and match[2] else None

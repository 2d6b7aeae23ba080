"""Which attention serves dense calls of one kind: FlashAttention, SageAttention or torch's SDPA, and why.

Never silently another than asked for: a fallback is one WARNING with the reason and the command that installs what is
missing, and an error under strict.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from jit_kernel import config
from jit_kernel.attention.backend import resolved_device
from jit_kernel.attention.dense import sage
from jit_kernel.device import device_target
from jit_kernel.engine.progress import warn_once
from jit_kernel.fa3 import dispatch
from jit_kernel.fa3.decision import Rejected
from jit_kernel.fa3.features import DTYPE_NAMES, Features

BACKENDS = ("fa", "sage", "sdpa")
# What is tried in turn for each wish. Sage rounds to 8 bits, so it is taken only where it is asked for.
ORDER = {None: ("fa", "sdpa"), "fa": ("fa", "sdpa"), "sage": ("sage", "fa", "sdpa"), "sdpa": ("sdpa",)}
INSTALL_FA = {
    "cuda": "pip install nvidia-cuda-nvrtc nvidia-cuda-runtime nvidia-cuda-crt triton",
    "musa": "python -m jit_kernel doctor",
    "cpu": "install g++",
}


@dataclass(frozen=True)
class Selection:
    """What was asked for, what is taken, and why each one before it was not."""

    requested: str | None
    backend: str
    reasons: tuple[str, ...]


def select_backend(
    backend: str | None,
    head_size: int,
    dtype: torch.dtype,
    device: torch.device | str,
    strict: bool = False,
) -> Selection:
    """The backend that serves dense attention of this head size and dtype on a device.

    backend: "fa", "sage", "sdpa", or None for the best. Raises ValueError for another name, NotImplementedError for a
    device that is absent, and, under `strict` or JIT_KERNEL_STRICT=1, when what was asked for cannot be had.
    """
    if backend not in ORDER:
        raise ValueError(f"backend is {backend!r}; it must be one of {', '.join(BACKENDS)}, or None for the best")
    where = resolved_device(device)
    reasons: list[str] = []
    for candidate in ORDER[backend]:
        reason = rejection(candidate, head_size, dtype, where)
        if reason is None:
            return _answer(Selection(backend, candidate, tuple(reasons)), where, strict)
        reasons.append(f"{candidate}: {reason}")
    raise AssertionError("sdpa serves everything")


def _answer(found: Selection, device: torch.device, strict: bool) -> Selection:
    wanted = ORDER[found.requested][0]
    if found.backend == wanted:
        return found
    install = (sage.INSTALL if wanted == "sage" else INSTALL_FA).get(device.type)
    hint = f"; to install: {install}" if install else ""
    text = f"attention backend {wanted!r} is not available on {device.type}: {'; '.join(found.reasons)}{hint}"
    if strict or config.strict():
        raise NotImplementedError(text)
    warn_once(f"{text}; {found.backend!r} takes its place", (wanted, text))
    return found


def rejection(candidate: str, head_size: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a backend does not serve such calls, or None."""
    if candidate == "sdpa":
        return None
    if candidate == "sage":
        found = sage.find()
        return found if isinstance(found, str) else found.rejection(head_size, dtype, device)
    return _fa_rejection(head_size, dtype, device)


def _fa_rejection(head_size: int, dtype: torch.dtype, device: torch.device) -> str | None:
    if dtype not in DTYPE_NAMES or dtype == torch.float8_e4m3fn:
        return f"dtype {str(dtype)[6:]} is not served without descales"
    features = plain_features_of(head_size, dtype)
    try:
        choice = dispatch.choose(device_target(device), features, "flash_attn_func")
    except NotImplementedError as error:
        return str(error)
    if choice.name is not None:
        return None
    return "; ".join(f"{name}: {d.reason}" for name, d in choice.decisions if isinstance(d, Rejected))


def plain_features_of(head_size: int, dtype: torch.dtype) -> Features:
    """The features of a dense call that asks for nothing else."""
    name = DTYPE_NAMES[dtype]
    return Features(name, name, head_size, head_size, group=1, cache=False, aligned=head_size % 8 == 0)

"""Attention kernels that are compiled, or loaded from a cache, when a call first needs them.

Importing this package loads no torch, reads no device and makes no folder; the public names are imported
when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

_PUBLIC = (
    "_is_fa3_supported",
    "_load_fa3_kernels",
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
    "merge_state",
)
# Of a process that serves: the file of each.
_OPERATION = {
    "on_event": "jit_kernel.jit",
    "preload": "jit_kernel.ready",
    "seal": "jit_kernel.jit",
    "stats": "jit_kernel.jit",
}
__all__ = ["__version__", *_PUBLIC, *_OPERATION]

if TYPE_CHECKING:
    from jit_kernel.flash_attention_v3 import (
        _is_fa3_supported,
        _load_fa3_kernels,
        flash_attn_combine,
        flash_attn_func,
        flash_attn_varlen_func,
        flash_attn_with_kvcache,
        get_scheduler_metadata,
        merge_state,
    )
    from jit_kernel.jit import on_event, seal, stats
    from jit_kernel.ready import preload


def __getattr__(name: str) -> object:
    if name not in _PUBLIC and name not in _OPERATION:
        raise AttributeError(f"module 'jit_kernel' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_OPERATION.get(name, "jit_kernel.flash_attention_v3")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC, *_OPERATION})

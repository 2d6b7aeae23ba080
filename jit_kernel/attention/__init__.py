"""The attention layer for serving engines: a backend object, cascade, context parallelism, selection.

Nothing here knows an engine's classes: everything takes plain tensors and small frozen dataclasses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

_ROOMS = {
    "FlashAttentionBackend": "backend",
    "ForwardMetadata": "metadata",
    "AttentionLayer": "metadata",
    "GraphMetadata": "scheduler_metadata",
    "Half": "context_parallel",
    "forward_zigzag": "context_parallel",
    "all_gather_attention": "context_parallel",
    "ring_attention": "ring",
    "plan_ring": "ring",
    "backend_name": "communication",
    "shard": "zigzag",
    "unshard": "zigzag",
    "select_backend": "selection",
    "Selection": "selection",
    "DiffusionAttention": "diffusion",
}
__all__ = sorted(_ROOMS)

if TYPE_CHECKING:
    from jit_kernel.attention.backend import FlashAttentionBackend
    from jit_kernel.attention.communication import backend_name
    from jit_kernel.attention.context_parallel import Half, all_gather_attention, forward_zigzag
    from jit_kernel.attention.diffusion import DiffusionAttention
    from jit_kernel.attention.metadata import AttentionLayer, ForwardMetadata
    from jit_kernel.attention.ring import plan_ring, ring_attention
    from jit_kernel.attention.scheduler_metadata import GraphMetadata
    from jit_kernel.attention.selection import Selection, select_backend
    from jit_kernel.attention.zigzag import shard, unshard


def __getattr__(name: str) -> object:
    if name not in _ROOMS:
        raise AttributeError(f"module 'jit_kernel.attention' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"jit_kernel.attention.{_ROOMS[name]}"), name)
    globals()[name] = value
    return value

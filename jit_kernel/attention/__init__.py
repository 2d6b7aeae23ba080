"""The attention layer for serving engines: a backend object, cascade, context parallelism, selection.

Nothing here knows an engine's classes: everything takes plain tensors and small frozen dataclasses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

_ROOMS = {
    "FlashAttentionBackend": "backend",
    "ForwardMetadata": "metadata",
    "AttentionLayer": "metadata",
    "GraphMetadata": "plan",
    "Half": "parallel.all_gather",
    "forward_zigzag": "parallel.all_gather",
    "all_gather_attention": "parallel.all_gather",
    "ring_attention": "parallel.ring",
    "plan_ring": "parallel.ring",
    "all_to_all_attention": "parallel.all_to_all",
    "two_level_attention": "parallel.all_to_all",
    "context_attention": "parallel.choice",
    "plan_context": "parallel.choice",
    "ContextPlan": "parallel.choice",
    "Prefix": "parallel.prefix",
    "RankError": "parallel.failures",
    "backend_name": "parallel.exchange",
    "shard": "parallel.zigzag",
    "unshard": "parallel.zigzag",
    "select_backend": "dense.selection",
    "Selection": "dense.selection",
    "DiffusionAttention": "dense.diffusion",
}
__all__ = sorted(_ROOMS)

if TYPE_CHECKING:
    from jit_kernel.attention.backend import FlashAttentionBackend
    from jit_kernel.attention.dense.diffusion import DiffusionAttention
    from jit_kernel.attention.dense.selection import Selection, select_backend
    from jit_kernel.attention.metadata import AttentionLayer, ForwardMetadata
    from jit_kernel.attention.parallel.all_gather import Half, all_gather_attention, forward_zigzag
    from jit_kernel.attention.parallel.all_to_all import all_to_all_attention, two_level_attention
    from jit_kernel.attention.parallel.choice import ContextPlan, context_attention, plan_context
    from jit_kernel.attention.parallel.exchange import backend_name
    from jit_kernel.attention.parallel.failures import RankError
    from jit_kernel.attention.parallel.prefix import Prefix
    from jit_kernel.attention.parallel.ring import plan_ring, ring_attention
    from jit_kernel.attention.parallel.zigzag import shard, unshard
    from jit_kernel.attention.plan import GraphMetadata


def __getattr__(name: str) -> object:
    if name not in _ROOMS:
        raise AttributeError(f"module 'jit_kernel.attention' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"jit_kernel.attention.{_ROOMS[name]}"), name)
    globals()[name] = value
    return value

"""The forward step that runs now: immutable contexts on a stack that gives back what it found.

The stack is a ContextVar, so threads and asyncio tasks each see their own; leaving a step restores the outer one,
whatever happened inside. A step owns its scheduler metadata, which is dropped with it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor

from jit_kernel import config
from jit_kernel.attention.metadata import AttentionLayer, ForwardMetadata
from jit_kernel.attention.plan import (
    GraphMetadata,
    Maker,
    MetadataKey,
    SchedulerMetadata,
    batch_of,
    capacity,
    identity_of,
    made_for,
)
from jit_kernel.device import is_capturing, stream_of
from jit_kernel.fa3.call import MetadataParameters

_numbers = itertools.count(1)


@dataclass(frozen=True)
class ForwardContext:
    """One forward step of one backend. `made` holds the step's scheduler metadata by key."""

    owner: int
    device: torch.device
    stream: int
    step: int
    graph: GraphMetadata | None
    made: dict[MetadataKey, SchedulerMetadata] = field(default_factory=dict, compare=False, repr=False)


_stack: ContextVar[tuple[ForwardContext, ...]] = ContextVar("jit_kernel_forward_contexts", default=())


def current(owner: int) -> ForwardContext | None:
    """The innermost step that `owner` has open in this thread or task."""
    return next((context for context in reversed(_stack.get()) if context.owner == owner), None)


@contextmanager
def entered(owner: int, device: torch.device, graph: GraphMetadata | None) -> Iterator[ForwardContext]:
    """A new step, the innermost one until the block ends."""
    context = ForwardContext(owner, device, stream_of(device), next(_numbers), graph)
    token = _stack.set((*_stack.get(), context))
    try:
        yield context
    finally:
        _stack.reset(token)


def key_for(
    context: ForwardContext | None,
    metadata: ForwardMetadata,
    layer: AttentionLayer,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    num_splits: int,
) -> MetadataKey:
    """The key of one call. max_seqlen_k is bounded by what the cache or table holds, else the last keys are lost."""
    graph = None if context is None else context.graph
    lengths = (metadata.cache_seqlens, metadata.cu_seqlens_q, metadata.cache_leftpad)
    parameters = MetadataParameters(
        batch_size=batch_of(metadata),
        max_seqlen_q=metadata.max_seqlen_q if metadata.cu_seqlens_q is not None else int(q.shape[1]),
        max_seqlen_k=min(metadata.max_seqlen_k, capacity(k_cache, metadata.page_table)),
        num_heads_q=q.shape[-2],
        num_heads_kv=k_cache.shape[-2],
        headdim=q.shape[-1],
        cache_seqlens=metadata.cache_seqlens,  # type: ignore[arg-type]  # batch_of has seen that it is there
        qkv_dtype=q.dtype,
        headdim_v=v_cache.shape[-1],
        cu_seqlens_q=metadata.cu_seqlens_q,
        cache_leftpad=metadata.cache_leftpad,
        page_size=None if metadata.page_table is None else k_cache.shape[1],
        causal=layer.causal,
        window_size=layer.window_size,
        attention_chunk=layer.attention_chunk,
        has_softcap=layer.softcap > 0,
        num_splits=num_splits,
        pack_gqa=layer.pack_gqa,
    )
    return MetadataKey(
        device=str(q.device),
        stream_or_graph=stream_of(q.device) if graph is None else graph.name,
        step=0 if context is None or graph is not None else context.step,
        tag=metadata.tag,
        parameters=parameters,
        lengths=tuple(identity_of(tensor, static=graph is not None) for tensor in lengths),
    )


def obtain(
    context: ForwardContext | None, key: MetadataKey, metadata: ForwardMetadata, maker: Maker, device: torch.device
) -> Tensor:
    """The metadata for `key`: what this step or graph has already made for it, else newly made.

    Raises RuntimeError while a graph is captured without metadata made for it before: none is made or taken then.
    """
    graph = None if context is None else context.graph
    if is_capturing(device):
        found = None if graph is None else graph.find(key)
        if found is None:
            raise RuntimeError(
                f"tag {metadata.tag!r}: no scheduler metadata was made for this graph before its capture; run the step "
                "once inside backend.step(graph=...) with the same GraphMetadata, then capture it"
            )
        return found.tensor
    known = None if context is None else graph.find(key) if graph is not None else context.made.get(key)
    if known is not None and graph is None and not config.force_metadata_update():
        return known.tensor
    made = SchedulerMetadata(key, made_for(key, metadata, maker))
    if graph is not None:
        if known is not None:  # the memory that the graph reads stays; only its numbers are new
            known.tensor.copy_(made.tensor)
            return known.tensor
        graph.add(made, maker)
    elif context is not None:
        context.made[key] = made
    return made.tensor

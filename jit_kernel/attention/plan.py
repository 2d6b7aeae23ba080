"""Scheduler metadata: made once for each kind of call in a step, and used for no other.

Metadata used for a call with other parameters gives wrong numbers without an error, so the key names all of them, and
the lengths by memory and version: lengths that were written in place are other lengths. A key's entry keeps the
length tensors alive, so that no other tensor can take their address.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from jit_kernel import config
from jit_kernel.attention import step as contexts
from jit_kernel.attention.metadata import AttentionLayer, ForwardMetadata
from jit_kernel.attention.step import ForwardContext

Maker = Callable[..., Tensor]


@dataclass(frozen=True)
class MetadataKey:
    """Everything that scheduler metadata depends on; `lengths` names the tensors, see `identity_of`."""

    device: str
    stream_or_graph: object
    step: int
    tag: str
    batch_size: int
    max_seqlen_q: int
    max_seqlen_k: int
    num_heads_q: int
    num_heads_kv: int
    headdim: int
    headdim_v: int
    dtype: torch.dtype
    page_size: int | None
    causal: bool
    window_size: tuple[int, int]
    attention_chunk: int
    has_softcap: bool
    num_splits: int
    pack_gqa: bool | None
    lengths: tuple[object, ...]


@dataclass(frozen=True)
class SchedulerMetadata:
    """Metadata and what it was made for; `held` keeps the length tensors alive."""

    key: MetadataKey
    tensor: Tensor
    held: tuple[Tensor | None, ...]


class GraphMetadata:
    """The static scheduler metadata of one captured graph: filled before capture, refreshed before each replay."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._plans: dict[MetadataKey, tuple[SchedulerMetadata, Maker]] = {}

    def find(self, key: MetadataKey) -> SchedulerMetadata | None:
        plan = self._plans.get(key)
        return None if plan is None else plan[0]

    def add(self, made: SchedulerMetadata, maker: Maker) -> None:
        """Keep a plan. Raises ValueError for a second batch under one tag: refresh could not tell the two apart."""
        for key in self._plans:
            if key.tag == made.key.tag and key.lengths != made.key.lengths:
                raise ValueError(
                    f"graph {self.name!r}: tag {key.tag!r} has two batches, told by the memory of their lengths; each "
                    "must have a tag of its own"
                )
        self._plans[made.key] = (made, maker)

    def refresh(self, metadata: Mapping[str, ForwardMetadata]) -> None:
        """Compute each plan anew from the metadata of its tag, into the memory that the graph reads.

        Raises KeyError for a tag that is missing, ValueError for metadata of another batch or maximum than captured.
        """
        for key, (plan, maker) in self._plans.items():
            if key.tag not in metadata:
                raise KeyError(f"graph {self.name!r} was captured with tag {key.tag!r}; refresh got {sorted(metadata)}")
            now = metadata[key.tag]
            for name, was, is_now in (
                ("batch size", key.batch_size, batch_of(now)),
                ("max_seqlen_q", key.max_seqlen_q, now.max_seqlen_q),
            ):
                if was != is_now:
                    raise ValueError(f"graph {self.name!r}, tag {key.tag!r}: {name} is {is_now}; captured with {was}")
            fresh = maker(key, now)
            if fresh.shape != plan.tensor.shape or fresh.data_ptr() == plan.tensor.data_ptr():
                raise ValueError(f"graph {self.name!r}, tag {key.tag!r}: metadata of another shape than captured")
            plan.tensor.copy_(fresh)


def batch_of(metadata: ForwardMetadata) -> int:
    """How many sequences there are."""
    if metadata.cache_seqlens is None:
        raise ValueError("metadata has no cache_seqlens; scheduler metadata is for calls with a cache")
    return int(metadata.cache_seqlens.shape[0])


def identity_of(tensor: Tensor | None, *, static: bool) -> tuple[object, ...] | None:
    """Memory and shape of a tensor and, unless it is a graph's static memory, its version: another after a write in
    place. Inference tensors have no version."""
    if tensor is None:
        return None
    version = -1 if static or tensor.is_inference() else tensor._version
    return tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()), version


def capacity(k_cache: Tensor, page_table: Tensor | None) -> int:
    """The most keys that one sequence can have in the cache."""
    return int(k_cache.shape[1] if page_table is None else page_table.shape[1] * k_cache.shape[1])


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
    return MetadataKey(
        device=str(q.device),
        stream_or_graph=contexts.stream_of(q.device) if graph is None else graph.name,
        step=0 if context is None or graph is not None else context.step,
        tag=metadata.tag,
        batch_size=batch_of(metadata),
        max_seqlen_q=metadata.max_seqlen_q if metadata.cu_seqlens_q is not None else int(q.shape[1]),
        max_seqlen_k=min(metadata.max_seqlen_k, capacity(k_cache, metadata.page_table)),
        num_heads_q=q.shape[-2],
        num_heads_kv=k_cache.shape[-2],
        headdim=q.shape[-1],
        headdim_v=v_cache.shape[-1],
        dtype=q.dtype,
        page_size=None if metadata.page_table is None else k_cache.shape[1],
        causal=layer.causal,
        window_size=layer.window_size,
        attention_chunk=layer.attention_chunk,
        has_softcap=layer.softcap > 0,
        num_splits=num_splits,
        pack_gqa=layer.pack_gqa,
        lengths=tuple(identity_of(tensor, static=graph is not None) for tensor in lengths),
    )


def obtain(
    context: ForwardContext | None, key: MetadataKey, metadata: ForwardMetadata, maker: Maker, device: torch.device
) -> Tensor:
    """The metadata for `key`: what this step or graph has already made for it, else newly made.

    Raises RuntimeError while a graph is captured without metadata made for it before: none is made or taken then.
    """
    graph = None if context is None else context.graph
    held = (metadata.cache_seqlens, metadata.cu_seqlens_q, metadata.cache_leftpad)
    if contexts.is_capturing(device):
        found = None if graph is None else graph.find(key)
        if found is None:
            raise RuntimeError(
                f"tag {metadata.tag!r}: no scheduler metadata was made for this graph before its capture; run the step "
                "once inside backend.step(graph=...) with the same GraphMetadata, then capture it"
            )
        return found.tensor
    known = None if context is None else graph.find(key) if graph is not None else context.made.get(key)
    if known is not None and graph is None and not config.force_metadata_update():
        return _tensor(known)
    made = SchedulerMetadata(key, maker(key, metadata), held)
    if graph is not None:
        if known is not None:  # the memory that the graph reads stays; only its numbers are new
            known.tensor.copy_(made.tensor)
            return _tensor(known)
        graph.add(made, maker)
    elif context is not None:
        context.made[key] = made
    return made.tensor


def _tensor(made: Any) -> Tensor:
    tensor: Tensor = made.tensor
    return tensor


def maker_for(get_scheduler_metadata: Callable[..., Tensor]) -> Maker:
    """What computes a key's metadata from the lengths of `metadata`."""

    def make(key: MetadataKey, metadata: ForwardMetadata) -> Tensor:
        return get_scheduler_metadata(
            batch_size=key.batch_size,
            max_seqlen_q=key.max_seqlen_q,
            max_seqlen_k=key.max_seqlen_k,
            num_heads_q=key.num_heads_q,
            num_heads_kv=key.num_heads_kv,
            headdim=key.headdim,
            cache_seqlens=metadata.cache_seqlens,
            qkv_dtype=key.dtype,
            headdim_v=key.headdim_v,
            cu_seqlens_q=metadata.cu_seqlens_q,
            cache_leftpad=metadata.cache_leftpad,
            page_size=key.page_size,
            causal=key.causal,
            window_size=key.window_size,
            attention_chunk=key.attention_chunk,
            has_softcap=key.has_softcap,
            num_splits=key.num_splits,
            pack_gqa=key.pack_gqa,
        )

    return make


def retagged(metadata: ForwardMetadata, suffix: str) -> ForwardMetadata:
    """The same sequences under a tag of their own."""
    return replace(metadata, tag=f"{metadata.tag}/{suffix}")

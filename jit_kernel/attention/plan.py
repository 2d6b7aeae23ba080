"""Scheduler metadata: made once for each kind of call in a step, and used for no other.

Metadata used for a call with other parameters gives wrong numbers without an error, so the key holds all of them, and
names the lengths by memory and version: lengths that were written in place are other lengths. A key keeps the length
tensors alive, so that no other tensor can take their address.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from jit_kernel.attention.metadata import ForwardMetadata
from jit_kernel.fa3.call import MetadataParameters

Maker = Callable[..., Tensor]  # get_scheduler_metadata


@dataclass(frozen=True)
class MetadataKey:
    """Everything that scheduler metadata depends on; `lengths` names the tensors, see `identity_of`."""

    device: str
    stream_or_graph: object
    step: int
    tag: str
    parameters: MetadataParameters
    lengths: tuple[object, ...]


@dataclass(frozen=True)
class SchedulerMetadata:
    """Metadata and what it was made for."""

    key: MetadataKey
    tensor: Tensor


def made_for(key: MetadataKey, metadata: ForwardMetadata, maker: Maker) -> Tensor:
    """New metadata for a key's parameters, from the lengths of `metadata`."""
    parameters = replace(
        key.parameters,
        cache_seqlens=metadata.cache_seqlens,  # type: ignore[arg-type]  # calls with a cache alone have a key
        cu_seqlens_q=metadata.cu_seqlens_q,
        cache_leftpad=metadata.cache_leftpad,
    )
    return maker(**parameters.arguments())


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
                    f"graph {self.name!r}: tag {key.tag!r} has two batches, whose lengths are different memory; each "
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
                ("batch size", key.parameters.batch_size, batch_of(now)),
                ("max_seqlen_q", key.parameters.max_seqlen_q, now.max_seqlen_q),
            ):
                if was != is_now:
                    raise ValueError(f"graph {self.name!r}, tag {key.tag!r}: {name} is {is_now}; captured with {was}")
            fresh = made_for(key, now, maker)
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


def retagged(metadata: ForwardMetadata, suffix: str) -> ForwardMetadata:
    """The same sequences under a tag of their own."""
    return replace(metadata, tag=f"{metadata.tag}/{suffix}")

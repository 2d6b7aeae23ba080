"""What a forward pass tells about its sequences and its layer, as small frozen values of plain tensors."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class ForwardMetadata:
    """The sequences of one call path of one step: queries, and keys in a cache, or raw keys of the same step.

    cu_seqlens_q: (b + 1,) int32, for q of (total_q, hq, d); None for q of (b, sq, hq, d).
    max_seqlen_q: the longest query sequence.
    cache_seqlens: (b,) int32, keys of each sequence in the cache, new ones included; None for raw keys alone.
    max_seqlen_k: a bound on cache_seqlens that the host knows; also the longest sequence of raw keys.
    page_table: (b, max_pages) int32 for a paged cache; None for a dense one. Which entries must be valid, the docstring
        of `flash_attn_with_kvcache` says.
    cu_seqlens_k: (b + 1,) int32 of raw keys; None means that they lie as the queries do (cu_seqlens_q).
    cache_batch_idx, cache_leftpad: (b,) int32 or None, as in `flash_attn_with_kvcache`.
    tag: the path that these sequences belong to ("base", "swa", "encoder", "draft", "ubatch1"): scheduler metadata is
        shared within a tag and never between two.
    """

    cu_seqlens_q: Tensor | None
    max_seqlen_q: int
    cache_seqlens: Tensor | None = None
    max_seqlen_k: int = 0
    page_table: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    cache_batch_idx: Tensor | None = None
    cache_leftpad: Tensor | None = None
    tag: str = "base"

    @property
    def has_cache(self) -> bool:
        return self.cache_seqlens is not None

    def raw_arguments(self) -> dict[str, Any]:
        """The lengths for `flash_attn_varlen_func` over raw keys, which lie as the queries do by default."""
        own = self.cu_seqlens_k is not None
        return {
            "cu_seqlens_q": self.cu_seqlens_q,
            "cu_seqlens_k": self.cu_seqlens_k if own else self.cu_seqlens_q,
            "max_seqlen_q": self.max_seqlen_q,
            "max_seqlen_k": self.max_seqlen_k if own else self.max_seqlen_q,
        }

    def cache_arguments(self) -> dict[str, Any]:
        """The lengths and tables for `flash_attn_with_kvcache`."""
        return {
            "cache_seqlens": self.cache_seqlens,
            "cache_batch_idx": self.cache_batch_idx,
            "cache_leftpad": self.cache_leftpad,
            "page_table": self.page_table,
            "cu_seqlens_q": self.cu_seqlens_q,
            "max_seqlen_q": self.max_seqlen_q if self.cu_seqlens_q is not None else None,
        }


@dataclass(frozen=True)
class AttentionLayer:
    """What one layer asks for; the meaning of each is that of the public functions' argument of the same name."""

    softmax_scale: float | None = None
    causal: bool = True
    window_size: tuple[int, int] = (-1, -1)
    attention_chunk: int = 0
    softcap: float = 0.0
    sinks: Tensor | None = None
    pack_gqa: bool | None = None

    def arguments(self) -> dict[str, Any]:
        """Each by its name in the public functions."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def with_lse(self) -> dict[str, Any]:
        """The same for a result that its lse comes with."""
        return {**self.arguments(), "return_softmax_lse": True}

    def part_arguments(self, causal: bool) -> dict[str, Any]:
        """The same for a part of the keys, causal or not, whose result is merged by its lse."""
        return {**self.with_lse(), "causal": causal, "window_size": (-1, -1)}

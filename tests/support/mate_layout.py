"""How the arguments of MATE's double lie, and what they come to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

_ROUNDED = (64, 128, 192, 256, 384, 512)


@dataclass(frozen=True)
class Layout:
    batch: int
    seqlen_q: int
    seqlen_k: int
    out_shape: tuple[int, ...]
    lse_shape: tuple[int, ...]


STRIDED = ("q", "k", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "page_table")


VARLEN_ONLY = (
    "cu_seqlens_q",
    "cu_seqlens_k",
    "max_seqlen_q",
    "max_seqlen_k",
    "seqused_q",
    "seqused_k",
    "page_table",
    "scheduler_metadata",
    "out",
)


def last_dim_dense(x: Tensor | None) -> Tensor | None:
    return x.contiguous() if x is not None and x.stride(-1) != 1 else x


def resolved(a: dict[str, Any]) -> dict[str, Any]:
    """What the wrapper and the core do to the arguments before any check."""
    a = {**a, "sinks": a["sinks"] if a["sinks"] is not None else a["s_aux"]}
    a["qv"] = a["qv"] if a["qv"] is not None else a.get("q_v")
    a["window_size"] = (-1, -1) if a["window_size"] is None else tuple(a["window_size"])
    a["attention_chunk"] = a["attention_chunk"] or 0
    if a["softmax_scale"] is None:
        width = a["q"].shape[-1] + (a["qv"].shape[-1] if a["qv"] is not None else 0)
        a["softmax_scale"] = width**-0.5
    return a


def rounded(head_dim: int) -> int:
    return next((n for n in _ROUNDED if head_dim <= n), 512)  # beyond 512 it is rounded down


def mask_of(a: dict[str, Any], layout: Layout) -> tuple[bool, bool]:
    """(is_causal, is_local) of the compiled kernel."""
    left, right = a["window_size"]
    chunk = a["attention_chunk"]
    ragged = ("cu_seqlens_q", "cu_seqlens_k", "cu_seqlens_k_new", "seqused_q", "seqused_k", "page_table", "k_new")
    fixed = all(a.get(name) is None for name in ragged) and a.get("cache_leftpad") is None
    if chunk > 0 and fixed and layout.seqlen_q <= layout.seqlen_k <= chunk:
        chunk = 0
    left = -1 if left is None or left >= layout.seqlen_k - 1 else left
    right = -1 if right is None or right >= layout.seqlen_q - 1 else right
    right = 0 if a["causal"] else right
    causal = left < 0 and right == 0 and chunk == 0
    return causal, (left >= 0 or right >= 0 or chunk >= 1) and not causal

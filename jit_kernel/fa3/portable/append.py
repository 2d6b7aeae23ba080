"""The host side of the append kernel: new keys and values into the cache, queries rotated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from jit_kernel.fa3.features import DTYPE_NAMES
from jit_kernel.fa3.portable import forward as portable_forward
from jit_kernel.fa3.portable import planning as portable_plan
from jit_kernel.fa3.portable.kernels import APPEND_ROWS
from jit_kernel.fa3.portable.planning import Layout


def append(call: Mapping[str, Any]) -> Tensor:
    """Put the new keys and values of a checked kvcache call into the cache; returns q, rotated where it says so."""
    q, k_new, v_new = call["q"], call["k"], call["v"]
    k_cache, v_cache = call["k_cache"], call["v_cache"]
    cos, sin, page_table = call["rotary_cos"], call["rotary_sin"], call["page_table"]
    ragged_q, ragged_new = call["cu_seqlens_q"] is not None, call["cu_seqlens_k_new"] is not None
    heads, head_dim, kv_heads, head_dim_v = q.shape[-2], q.shape[-1], k_new.shape[-2], v_new.shape[-1]
    batch = call["cu_seqlens_q"].shape[0] - 1 if ragged_q else q.shape[0]
    rotated = q
    if cos is not None:
        # Rows of a multiple of 16 bytes, so that the attention kernel loads them as wide as q's own.
        wide = torch.empty((*q.shape[:-1], -(-head_dim // 8) * 8), dtype=q.dtype, device=q.device)
        rotated = wide[..., :head_dim]
    rows = q.shape[-3] if call["max_seqlen_q"] is None else call["max_seqlen_q"]
    seqlen_new = k_new.shape[0] if ragged_new else k_new.shape[1]
    tiles_new = -(-seqlen_new * kv_heads // APPEND_ROWS)
    tiles_q = -(-rows * heads // APPEND_ROWS) if cos is not None else 0
    programs = (2 * tiles_new + tiles_q) * batch
    if programs == 0:
        return rotated
    page_size = 1 if page_table is None else k_cache.shape[1]
    table_width = 0 if page_table is None else page_table.shape[1]
    capacity = k_cache.shape[1] if page_table is None else page_size * table_width
    tensors = (q, rotated, k_new, v_new, k_cache, v_cache)
    strides = [stride for x in tensors for stride in Layout(x.shape, x.stride()).rows]
    aligned = not any(x.data_ptr() & 15 for x in tensors) and not any(stride & 7 for stride in strides)
    if aligned:
        strides = [stride >> 3 for stride in strides]
    kernels = portable_forward.kernels_of(q.device)
    kernels.launch(
        kernels.handle(("append", DTYPE_NAMES[q.dtype], head_dim, head_dim_v, aligned)), programs,
        *tensors, cos, sin, call["cu_seqlens_q"], call["cu_seqlens_k_new"],
        call["cache_seqlens"], call["rotary_seqlens"], call["cache_batch_idx"], page_table,
        *strides, table_width, *((0, 0) if cos is None else (cos.stride(0), sin.stride(0))),
        q.shape[0] if ragged_q else q.shape[1], seqlen_new, capacity, page_size, heads, kv_heads,
        *((0, 0) if cos is None else (cos.shape[1] * 2, cos.shape[0])), tiles_new, tiles_q, _flags(call),
    )  # fmt: skip
    return rotated


def _flags(call: Mapping[str, Any]) -> int:
    present = {
        "cu_seqlens_q": portable_plan.CU_SEQLENS_Q,
        "cu_seqlens_k_new": portable_plan.CU_SEQLENS_K_NEW,
        "cache_seqlens": portable_plan.SEQUSED_K,
        "cache_batch_idx": portable_plan.CACHE_BATCH_IDX,
        "page_table": portable_plan.PAGE_TABLE,
        "rotary_cos": portable_plan.ROTARY,
        "rotary_seqlens": portable_plan.ROTARY_SEQLENS,
    }
    flags = sum(bit for name, bit in present.items() if call[name] is not None)
    if call["rotary_interleaved"]:
        flags |= portable_plan.ROTARY_INTERLEAVED
    # Without a mask that follows positions, all query tokens turn by the first one's angle.
    if call["causal"] or max(call["window_size"]) >= 0 or call["attention_chunk"] > 0:
        flags |= portable_plan.ROTATE_QUERY_BY_TOKEN
    return flags

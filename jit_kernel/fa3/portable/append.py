"""The host side of the append kernel: new keys and values into the cache, queries rotated."""

from __future__ import annotations

import torch
from torch import Tensor

from jit_kernel.fa3.call import Call, batch_of
from jit_kernel.fa3.features import DTYPE_NAMES
from jit_kernel.fa3.portable import factors, forward, planning
from jit_kernel.fa3.portable.kernels import APPEND_ROWS
from jit_kernel.fa3.portable.planning import Layout


def append(call: Call) -> Tensor:
    """Put the new keys and values of a checked kvcache call into the cache; returns q, rotated where it says so."""
    q, k_cache, v_cache, k_new, v_new = call.q, call.k, call.v, call.k_new, call.v_new
    if k_new is None or v_new is None:
        return q
    cos, sin, page_table = call.rotary_cos, call.rotary_sin, call.page_table
    ragged_q, ragged_new = call.cu_seqlens_q is not None, call.cu_seqlens_k_new is not None
    heads, head_dim, kv_heads, head_dim_v = q.shape[-2], q.shape[-1], k_new.shape[-2], v_new.shape[-1]
    batch = batch_of(call)
    rotated = q
    if cos is not None:
        # Rows of a multiple of 16 bytes, so that the attention kernel loads them as wide as q's own.
        piece = 16 // q.element_size()
        wide = torch.empty((*q.shape[:-1], -(-head_dim // piece) * piece), dtype=q.dtype, device=q.device)
        rotated = wide[..., :head_dim]
    rows = call.max_seqlen_q or 0
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
    names = [DTYPE_NAMES[x.dtype] for x in tensors]
    of_rows = [(Layout(tuple(x.shape), x.stride()).rows, name) for x, name in zip(tensors, names, strict=True)]
    strides, aligned = planning.in_units(of_rows, not any(x.data_ptr() & 15 for x in tensors))
    factor_strides = factors.strides(call)[2:]  # but for q's
    kernels = forward.kernels_of(q.device)
    kernels.launch(
        kernels.handle(("append", names[0], head_dim, head_dim_v, aligned, names[4], names[2])), programs,
        *tensors, cos, sin, call.cu_seqlens_q, call.cu_seqlens_k_new,
        call.seqused_k, call.rotary_seqlens, call.cache_batch_idx, page_table,
        *factors.of_keys(call), *strides, *factor_strides, table_width,
        *((0, 0) if cos is None or sin is None else (cos.stride(0), sin.stride(0))),
        q.shape[0] if ragged_q else q.shape[1], seqlen_new, capacity, page_size, heads, kv_heads,
        *((0, 0) if cos is None else (cos.shape[1] * 2, cos.shape[0])), tiles_new, tiles_q, _flags(call),
    )  # fmt: skip
    return rotated


def _flags(call: Call) -> int:
    present = {
        "cu_seqlens_q": planning.CU_SEQLENS_Q,
        "cu_seqlens_k_new": planning.CU_SEQLENS_K_NEW,
        "seqused_k": planning.SEQUSED_K,
        "cache_batch_idx": planning.CACHE_BATCH_IDX,
        "page_table": planning.PAGE_TABLE,
        "rotary_cos": planning.ROTARY,
        "rotary_seqlens": planning.ROTARY_SEQLENS,
    }
    flags = sum(bit for name, bit in present.items() if getattr(call, name) is not None) | factors.flags(call)
    if call.rotary_interleaved:
        flags |= planning.ROTARY_INTERLEAVED
    # Without a mask that follows positions, all query tokens turn by the first one's angle.
    if call.causal or max(call.window_size) >= 0 or call.attention_chunk:
        flags |= planning.ROTATE_QUERY_BY_TOKEN
    return flags

"""Puts new keys and values into the cache, the keys rotated, and rotates the queries beside them."""

import triton
import triton.language as tl
from flash_attention_v3.portable.sequence import (
    HAS_CACHE_BATCH_IDX,
    HAS_CU_SEQLENS_K_NEW,
    HAS_CU_SEQLENS_Q,
    HAS_PAGE_TABLE,
    HAS_ROTARY,
    HAS_ROTARY_SEQLENS,
    HAS_SEQUSED_K,
    ROTARY_INTERLEAVED,
    ROTATE_QUERY_BY_TOKEN,
    load_index,
)

# As forward.SIGNATURE: types of the run-time arguments in the launcher's order, strides in elements.
SIGNATURE = {
    "q": "*element",
    "q_rotated": "*element",
    "k_new": "*element",
    "v_new": "*element",
    "k_cache": "*element",
    "v_cache": "*element",
    "rotary_cos": "*element",
    "rotary_sin": "*element",
    "cu_seqlens_q": "*i32",
    "cu_seqlens_k_new": "*i32",
    "cache_seqlens": "*i32",
    "rotary_seqlens": "*i32",
    "cache_batch_idx": "*i32",
    "page_table": "*i32",
    "q_stride_batch": "i64",
    "q_stride_token": "i64",
    "q_stride_head": "i64",
    "rotated_stride_batch": "i64",
    "rotated_stride_token": "i64",
    "rotated_stride_head": "i64",
    "k_new_stride_batch": "i64",
    "k_new_stride_token": "i64",
    "k_new_stride_head": "i64",
    "v_new_stride_batch": "i64",
    "v_new_stride_token": "i64",
    "v_new_stride_head": "i64",
    "k_stride_batch": "i64",
    "k_stride_token": "i64",
    "k_stride_head": "i64",
    "v_stride_batch": "i64",
    "v_stride_token": "i64",
    "v_stride_head": "i64",
    "page_table_stride": "i64",
    "rotary_stride_cos": "i64",
    "rotary_stride_sin": "i64",
    "seqlen_q": "i32",
    "seqlen_k_new": "i32",
    "capacity_k": "i32",
    "page_size": "i32",
    "num_heads": "i32",
    "num_heads_k": "i32",
    "rotary_dim": "i32",
    "rotary_positions": "i32",
    "tiles_new": "i32",
    "tiles_q": "i32",
    "flags": "i32",
}
ALIGNED_POINTERS = ("q", "q_rotated", "k_new", "v_new", "k_cache", "v_cache")


@triton.jit
def rotate(
    values,
    row_pointers,
    columns,
    positions,
    valid,
    rotary_cos,
    rotary_sin,
    rotary_stride_cos,
    rotary_stride_sin,
    rotary_dim,
    rotary_positions,
    flags,
):
    """(BLOCK_M, width) rows turned by their positions' angles; columns past rotary_dim stay."""
    interleaved = (flags & ROTARY_INTERLEAVED) != 0
    half = rotary_dim // 2
    in_first = tl.where(interleaved, columns % 2 == 0, columns < half)
    partner = tl.where(interleaved, columns ^ 1, tl.where(in_first, columns + half, columns - half))
    angle = tl.where(interleaved, columns // 2, tl.where(in_first, columns, columns - half))
    turned = columns < rotary_dim
    mask = valid[:, None] & turned[None, :]
    others = tl.load(row_pointers[:, None] + partner[None, :], mask=mask, other=0.0)
    # A position past the table is the caller's mistake; it must not read past the table.
    in_table = mask & (positions < rotary_positions)[:, None]
    rows = positions.to(tl.int64)
    cos_pointers = rotary_cos + (rows * rotary_stride_cos)[:, None] + angle[None, :]
    sin_pointers = rotary_sin + (rows * rotary_stride_sin)[:, None] + angle[None, :]
    cos = tl.load(cos_pointers, mask=in_table, other=1.0).to(tl.float32)
    sin = tl.load(sin_pointers, mask=in_table, other=0.0).to(tl.float32)
    signed = tl.where(in_first, -1.0, 1.0)[None, :] * others.to(tl.float32)
    result = values.to(tl.float32) * cos + signed * sin
    return tl.where(turned[None, :], result, values.to(tl.float32)).to(values.dtype)


@triton.jit
def append(
    q,
    q_rotated,
    k_new,
    v_new,
    k_cache,
    v_cache,
    rotary_cos,
    rotary_sin,
    cu_seqlens_q,
    cu_seqlens_k_new,
    cache_seqlens,
    rotary_seqlens,
    cache_batch_idx,
    page_table,
    q_stride_batch,
    q_stride_token,
    q_stride_head,
    rotated_stride_batch,
    rotated_stride_token,
    rotated_stride_head,
    k_new_stride_batch,
    k_new_stride_token,
    k_new_stride_head,
    v_new_stride_batch,
    v_new_stride_token,
    v_new_stride_head,
    k_stride_batch,
    k_stride_token,
    k_stride_head,
    v_stride_batch,
    v_stride_token,
    v_stride_head,
    page_table_stride,
    rotary_stride_cos,
    rotary_stride_sin,
    seqlen_q,
    seqlen_k_new,
    capacity_k,
    page_size,
    num_heads,
    num_heads_k,
    rotary_dim,
    rotary_positions,
    tiles_new,
    tiles_q,
    flags,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    HEAD_DIM_V_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
):
    """Grid: (tiles of new keys, of new values, of queries) x batch; a tile is BLOCK_M (token, head) items.

    Strides of q, q_rotated and the new and cached keys and values are in units of STRIDE_UNIT elements.
    """
    program = tl.program_id(0)
    tiles = 2 * tiles_new + tiles_q
    batch = program // tiles
    tile = program % tiles
    lanes = tl.arange(0, BLOCK_M)
    cached = load_index(cache_seqlens, batch, flags, HAS_SEQUSED_K, 0)
    rotary_start = load_index(rotary_seqlens, batch, flags, HAS_ROTARY_SEQLENS, cached)

    if tile < 2 * tiles_new:
        new_start = load_index(cu_seqlens_k_new, batch, flags, HAS_CU_SEQLENS_K_NEW, 0)
        new_end = load_index(cu_seqlens_k_new, batch + 1, flags, HAS_CU_SEQLENS_K_NEW, seqlen_k_new)
        items = (tile % tiles_new) * BLOCK_M + lanes
        tokens = items // num_heads_k
        heads = items % num_heads_k
        slots = cached + tokens
        # A slot past the capacity is the caller's mistake; it must not write past the cache.
        valid = (tokens < new_end - new_start) & (slots >= 0) & (slots < capacity_k)
        cache_row = load_index(cache_batch_idx, batch, flags, HAS_CACHE_BATCH_IDX, batch)
        paged = (flags & HAS_PAGE_TABLE) != 0
        table_row = page_table + cache_row * page_table_stride
        pages = tl.load(table_row + slots // page_size, mask=valid & paged, other=0)
        block = tl.where(paged, pages, cache_row).to(tl.int64)
        slot = tl.where(paged, slots % page_size, slots)
        token_rows = new_start.to(tl.int64) + tokens
        if tile < tiles_new:
            columns = tl.arange(0, HEAD_DIM_PADDED)
            sources = (
                k_new
                + batch * (k_new_stride_batch * STRIDE_UNIT)
                + token_rows * (k_new_stride_token * STRIDE_UNIT)
                + heads * (k_new_stride_head * STRIDE_UNIT)
            )
            mask = valid[:, None] & (columns < HEAD_DIM)[None, :]
            values = tl.load(sources[:, None] + columns[None, :], mask=mask, other=0.0)
            if (flags & HAS_ROTARY) != 0:
                values = rotate(
                    values, sources, columns, rotary_start + tokens, valid, rotary_cos, rotary_sin,
                    rotary_stride_cos, rotary_stride_sin, rotary_dim, rotary_positions, flags,
                )  # fmt: skip
            rows = (
                k_cache
                + block * (k_stride_batch * STRIDE_UNIT)
                + slot * (k_stride_token * STRIDE_UNIT)
                + heads * (k_stride_head * STRIDE_UNIT)
            )
            tl.store(rows[:, None] + columns[None, :], values, mask=mask)
        else:
            # Names of their own: Triton joins equal names of both branches, and their sizes differ.
            columns_v = tl.arange(0, HEAD_DIM_V_PADDED)
            sources_v = (
                v_new
                + batch * (v_new_stride_batch * STRIDE_UNIT)
                + token_rows * (v_new_stride_token * STRIDE_UNIT)
                + heads * (v_new_stride_head * STRIDE_UNIT)
            )
            mask_v = valid[:, None] & (columns_v < HEAD_DIM_V)[None, :]
            values_v = tl.load(sources_v[:, None] + columns_v[None, :], mask=mask_v, other=0.0)
            rows_v = (
                v_cache
                + block * (v_stride_batch * STRIDE_UNIT)
                + slot * (v_stride_token * STRIDE_UNIT)
                + heads * (v_stride_head * STRIDE_UNIT)
            )
            tl.store(rows_v[:, None] + columns_v[None, :], values_v, mask=mask_v)
    else:
        q_start = load_index(cu_seqlens_q, batch, flags, HAS_CU_SEQLENS_Q, 0)
        q_end = load_index(cu_seqlens_q, batch + 1, flags, HAS_CU_SEQLENS_Q, seqlen_q)
        items = (tile - 2 * tiles_new) * BLOCK_M + lanes
        tokens = items // num_heads
        heads = items % num_heads
        valid = tokens < q_end - q_start
        by_token = (flags & ROTATE_QUERY_BY_TOKEN) != 0
        positions = rotary_start + tl.where(by_token, tokens, 0)
        columns = tl.arange(0, HEAD_DIM_PADDED)
        token_rows = q_start.to(tl.int64) + tokens
        sources = (
            q
            + batch * (q_stride_batch * STRIDE_UNIT)
            + token_rows * (q_stride_token * STRIDE_UNIT)
            + heads * (q_stride_head * STRIDE_UNIT)
        )
        mask = valid[:, None] & (columns < HEAD_DIM)[None, :]
        values = tl.load(sources[:, None] + columns[None, :], mask=mask, other=0.0)
        values = rotate(
            values, sources, columns, positions, valid, rotary_cos, rotary_sin,
            rotary_stride_cos, rotary_stride_sin, rotary_dim, rotary_positions, flags,
        )  # fmt: skip
        rows = (
            q_rotated
            + batch * (rotated_stride_batch * STRIDE_UNIT)
            + token_rows * (rotated_stride_token * STRIDE_UNIT)
            + heads * (rotated_stride_head * STRIDE_UNIT)
        )
        tl.store(rows[:, None] + columns[None, :], values, mask=mask)

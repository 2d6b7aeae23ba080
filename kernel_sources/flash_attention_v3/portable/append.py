"""Puts new keys and values into the cache, the keys rotated, and rotates the queries beside them.

Here e4m3 tensors are bytes on every device: `QUANTISE` says that the cache is e4m3 and what is new is not.
"""

import triton
import triton.language as tl
from flash_attention_v3.portable.e4m3 import as_element, load_descale, narrowed, widened
from flash_attention_v3.portable.sequence import (
    HAS_CACHE_BATCH_IDX,
    HAS_CU_SEQLENS_K_NEW,
    HAS_CU_SEQLENS_Q,
    HAS_K_DESCALE,
    HAS_K_SCALE,
    HAS_PAGE_TABLE,
    HAS_ROTARY,
    HAS_ROTARY_SEQLENS,
    HAS_SEQUSED_K,
    HAS_V_DESCALE,
    HAS_V_SCALE,
    ROTARY_INTERLEAVED,
    ROTATE_QUERY_BY_TOKEN,
    load_index,
)

# As forward.SIGNATURE: types of the run-time arguments in the launcher's order, strides in elements.
SIGNATURE = {
    "q": "*query",
    "q_rotated": "*query",
    "k_new": "*new",
    "v_new": "*new",
    "k_cache": "*cache",
    "v_cache": "*cache",
    "rotary_cos": "*query",
    "rotary_sin": "*query",
    "cu_seqlens_q": "*i32",
    "cu_seqlens_k_new": "*i32",
    "cache_seqlens": "*i32",
    "rotary_seqlens": "*i32",
    "cache_batch_idx": "*i32",
    "page_table": "*i32",
    "k_descale": "*fp32",
    "v_descale": "*fp32",
    "k_scale": "*fp32",
    "v_scale": "*fp32",
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
    "k_descale_stride_batch": "i64",
    "k_descale_stride_head": "i64",
    "v_descale_stride_batch": "i64",
    "v_descale_stride_head": "i64",
    "k_scale_stride_batch": "i64",
    "k_scale_stride_token": "i64",
    "k_scale_stride_head": "i64",
    "v_scale_stride_batch": "i64",
    "v_scale_stride_token": "i64",
    "v_scale_stride_head": "i64",
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
    """(BLOCK_M, width) float32 rows turned by their positions' angles; columns past rotary_dim stay."""
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
    cos = tl.load(cos_pointers, mask=in_table, other=0.0)
    sin = tl.load(sin_pointers, mask=in_table, other=0.0)
    # A cosine that is not there is 1: bytes of e4m3 have another one than 1.0.
    wide_cos = tl.where(in_table, widened(cos, tl.float32), 1.0)
    signed = tl.where(in_first, -1.0, 1.0)[None, :] * widened(others, tl.float32)
    wide = widened(values, tl.float32)
    return tl.where(turned[None, :], wide * wide_cos + signed * widened(sin, tl.float32), wide)


@triton.jit
def token_factors(
    descale,
    scale,
    batch,
    block,
    slot,
    heads,
    valid,
    descale_stride_batch,
    descale_stride_head,
    scale_stride_batch,
    scale_stride_token,
    scale_stride_head,
    flags,
    descale_bit,
    scale_bit,
):
    """(BLOCK_M,) what one step of e4m3 is worth in each new row: descale times the token's scale."""
    factor = load_descale(descale, batch, heads, descale_stride_batch, descale_stride_head, flags, descale_bit)
    places = block * scale_stride_batch + slot * scale_stride_token + heads * scale_stride_head
    return factor * tl.load(scale + places, mask=valid & ((flags & scale_bit) != 0), other=1.0)


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
    k_descale,
    v_descale,
    k_scale,
    v_scale,
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
    k_descale_stride_batch,
    k_descale_stride_head,
    v_descale_stride_batch,
    v_descale_stride_head,
    k_scale_stride_batch,
    k_scale_stride_token,
    k_scale_stride_head,
    v_scale_stride_batch,
    v_scale_stride_token,
    v_scale_stride_head,
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
    QUANTISE: tl.constexpr,
    QUERY_UNIT: tl.constexpr,
    NEW_UNIT: tl.constexpr,
    CACHE_UNIT: tl.constexpr,
):
    """Grid: (tiles of new keys, of new values, of queries) x batch; a tile is BLOCK_M (token, head) items.

    Strides of q and q_rotated are in units of QUERY_UNIT elements, of new keys and values of NEW_UNIT, of cached ones
    of CACHE_UNIT. QUANTISE: a new number is divided by its descale and its token's scale, and becomes e4m3.
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
                + batch * (k_new_stride_batch * NEW_UNIT)
                + token_rows * (k_new_stride_token * NEW_UNIT)
                + heads * (k_new_stride_head * NEW_UNIT)
            )
            mask = valid[:, None] & (columns < HEAD_DIM)[None, :]
            values = tl.load(sources[:, None] + columns[None, :], mask=mask, other=0.0)
            wide = widened(values, tl.float32)
            if (flags & HAS_ROTARY) != 0:
                wide = rotate(
                    values, sources, columns, rotary_start + tokens, valid, rotary_cos, rotary_sin,
                    rotary_stride_cos, rotary_stride_sin, rotary_dim, rotary_positions, flags,
                )  # fmt: skip
                values = as_element(wide, values.dtype)
            if QUANTISE:
                factors = token_factors(
                    k_descale, k_scale, batch, block, slot, heads, valid, k_descale_stride_batch, k_descale_stride_head,
                    k_scale_stride_batch, k_scale_stride_token, k_scale_stride_head, flags, HAS_K_DESCALE, HAS_K_SCALE,
                )  # fmt: skip
                values = narrowed(wide / factors[:, None])
            rows = (
                k_cache
                + block * (k_stride_batch * CACHE_UNIT)
                + slot * (k_stride_token * CACHE_UNIT)
                + heads * (k_stride_head * CACHE_UNIT)
            )
            tl.store(rows[:, None] + columns[None, :], values, mask=mask)
        else:
            # Names of their own: Triton joins equal names of both branches, and their sizes differ.
            columns_v = tl.arange(0, HEAD_DIM_V_PADDED)
            sources_v = (
                v_new
                + batch * (v_new_stride_batch * NEW_UNIT)
                + token_rows * (v_new_stride_token * NEW_UNIT)
                + heads * (v_new_stride_head * NEW_UNIT)
            )
            mask_v = valid[:, None] & (columns_v < HEAD_DIM_V)[None, :]
            values_v = tl.load(sources_v[:, None] + columns_v[None, :], mask=mask_v, other=0.0)
            rows_v = (
                v_cache
                + block * (v_stride_batch * CACHE_UNIT)
                + slot * (v_stride_token * CACHE_UNIT)
                + heads * (v_stride_head * CACHE_UNIT)
            )
            if QUANTISE:
                factors_v = token_factors(
                    v_descale, v_scale, batch, block, slot, heads, valid, v_descale_stride_batch, v_descale_stride_head,
                    v_scale_stride_batch, v_scale_stride_token, v_scale_stride_head, flags, HAS_V_DESCALE, HAS_V_SCALE,
                )  # fmt: skip
                values_v = narrowed(values_v.to(tl.float32) / factors_v[:, None])
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
            + batch * (q_stride_batch * QUERY_UNIT)
            + token_rows * (q_stride_token * QUERY_UNIT)
            + heads * (q_stride_head * QUERY_UNIT)
        )
        mask = valid[:, None] & (columns < HEAD_DIM)[None, :]
        values = tl.load(sources[:, None] + columns[None, :], mask=mask, other=0.0)
        turned = rotate(
            values, sources, columns, positions, valid, rotary_cos, rotary_sin,
            rotary_stride_cos, rotary_stride_sin, rotary_dim, rotary_positions, flags,
        )  # fmt: skip
        rows = (
            q_rotated
            + batch * (rotated_stride_batch * QUERY_UNIT)
            + token_rows * (rotated_stride_token * QUERY_UNIT)
            + heads * (rotated_stride_head * QUERY_UNIT)
        )
        tl.store(rows[:, None] + columns[None, :], as_element(turned, values.dtype), mask=mask)

"""The attention kernel: one tile of query rows against its keys, or against one split of them.

Rows of a tile are (token, head) pairs: with heads_per_tile > 1 the query heads that share a
key/value head are packed into one tile, so that few query tokens still fill it. Keys are walked in
ascending order in tiles that start at multiples of BLOCK_N: a row's result is a function of its own
keys alone, whichever rows share its tile.
"""

import triton
import triton.language as tl
from flash_attention_v3.portable.epilogue import add_sink, fill_rest, half_exponents, normalized
from flash_attention_v3.portable.mainloop import LARGEST_FLOAT, attend
from flash_attention_v3.portable.sequence import (
    HAS_CACHE_BATCH_IDX,
    HAS_CACHE_LEFTPAD,
    HAS_CU_SEQLENS_K,
    HAS_CU_SEQLENS_K_NEW,
    HAS_CU_SEQLENS_Q,
    HAS_LSE,
    HAS_SEQUSED_K,
    HAS_SEQUSED_Q,
    HAS_SINKS,
    ZERO_REST,
    call_row,
    end_visible_key,
    first_visible_key,
    load_index,
    token_range,
)

# Types of the run-time arguments, in order: the host side passes them in this order, the compiler's side compares it
# with the function's, the launcher checks number and types. Strides are in elements.
SIGNATURE = {
    "q": "*element",
    "k": "*element",
    "v": "*element",
    "out": "*element",
    "lse": "*fp32",
    "out_partial": "*fp32",
    "lse_partial": "*fp32",
    "cu_seqlens_q": "*i32",
    "cu_seqlens_k": "*i32",
    "cu_seqlens_k_new": "*i32",
    "seqused_q": "*i32",
    "seqused_k": "*i32",
    "page_table": "*i32",
    "cache_batch_idx": "*i32",
    "cache_leftpad": "*i32",
    "sinks": "*element",
    "draft_mask": "*i32",
    "q_stride_batch": "i64",
    "q_stride_token": "i64",
    "q_stride_head": "i64",
    "k_stride_batch": "i64",
    "k_stride_token": "i64",
    "k_stride_head": "i64",
    "v_stride_batch": "i64",
    "v_stride_token": "i64",
    "v_stride_head": "i64",
    "out_stride_batch": "i64",
    "out_stride_token": "i64",
    "out_stride_head": "i64",
    "lse_stride_batch": "i64",
    "lse_stride_head": "i64",
    "page_table_stride": "i64",
    "total_rows": "i64",
    "draft_stride": "i64",
    "seqlen_q": "i32",
    "capacity_k": "i32",
    "seqlen_k_new": "i32",
    "page_size": "i32",
    "num_heads": "i32",
    "heads_per_tile": "i32",
    "group_size": "i32",
    "row_tiles": "i32",
    "num_splits": "i32",
    "window_left": "i32",
    "window_right": "i32",
    "attention_chunk": "i32",
    "draft_words": "i32",
    "flags": "i32",
    "softmax_scale": "fp32",
    "softcap": "fp32",
}
ALIGNED_POINTERS = ("q", "k", "v", "out", "out_partial")


@triton.jit
def forward(
    q,
    k,
    v,
    out,
    lse,
    out_partial,
    lse_partial,
    cu_seqlens_q,
    cu_seqlens_k,
    cu_seqlens_k_new,
    seqused_q,
    seqused_k,
    page_table,
    cache_batch_idx,
    cache_leftpad,
    sinks,
    draft_mask,
    q_stride_batch,
    q_stride_token,
    q_stride_head,
    k_stride_batch,
    k_stride_token,
    k_stride_head,
    v_stride_batch,
    v_stride_token,
    v_stride_head,
    out_stride_batch,
    out_stride_token,
    out_stride_head,
    lse_stride_batch,
    lse_stride_head,
    page_table_stride,
    total_rows,
    draft_stride,
    seqlen_q,
    capacity_k,
    seqlen_k_new,
    page_size,
    num_heads,
    heads_per_tile,
    group_size,
    row_tiles,
    num_splits,
    window_left,
    window_right,
    attention_chunk,
    draft_words,
    flags,
    softmax_scale,
    softcap,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    HEAD_DIM_V_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGED: tl.constexpr,
    LOCAL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DRAFT: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Grid: row tiles (last first, the longest under a causal mask) x head tiles x splits x batch.

    The strides of q, k, v and out come in units of STRIDE_UNIT elements: 8 where every row is
    16-byte aligned, so that the compiler knows it and loads 16 bytes at a time; else 1.
    """
    program = tl.program_id(0)
    row_tile = row_tiles - 1 - program % row_tiles
    program = program // row_tiles
    head_tiles = num_heads // heads_per_tile
    head_tile = program % head_tiles
    program = program // head_tiles
    split = program % num_splits
    batch = program // num_splits

    q_start, sq = token_range(batch, cu_seqlens_q, HAS_CU_SEQLENS_Q, seqused_q, HAS_SEQUSED_Q, flags, seqlen_q)
    out_base = out + batch * (out_stride_batch * STRIDE_UNIT)
    lse_base = lse + batch * lse_stride_batch
    if (flags & (ZERO_REST | HAS_LSE)) != 0 and split == 0:
        is_last = batch == tl.num_programs(0) // (row_tiles * head_tiles * num_splits) - 1
        fill_rest(
            out_base, lse_base, out_stride_token * STRIDE_UNIT, out_stride_head * STRIDE_UNIT, lse_stride_head,
            cu_seqlens_q, q_start, sq, seqlen_q, batch, is_last, row_tile, row_tiles, head_tile, heads_per_tile,
            flags, HEAD_DIM_V, HEAD_DIM_V_PADDED, BLOCK_M,
        )  # fmt: skip
    if row_tile * BLOCK_M >= sq * heads_per_tile:
        return
    cache_row = load_index(cache_batch_idx, batch, flags, HAS_CACHE_BATCH_IDX, batch)
    leftpad = load_index(cache_leftpad, batch, flags, HAS_CACHE_LEFTPAD, 0)
    k_start = load_index(cu_seqlens_k, batch, flags, HAS_CU_SEQLENS_K, 0)
    k_end = load_index(cu_seqlens_k, batch + 1, flags, HAS_CU_SEQLENS_K, capacity_k)
    new_start = load_index(cu_seqlens_k_new, batch, flags, HAS_CU_SEQLENS_K_NEW, 0)
    new_end = load_index(cu_seqlens_k_new, batch + 1, flags, HAS_CU_SEQLENS_K_NEW, seqlen_k_new)
    used = load_index(seqused_k, batch, flags, HAS_SEQUSED_K, k_end - k_start) + new_end - new_start
    # A length past the capacity must not lead out of the tensor.
    sk = tl.maximum(tl.minimum(used, k_end - k_start) - leftpad, 0)

    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    tokens = rows // heads_per_tile
    heads = head_tile * heads_per_tile + rows % heads_per_tile
    kv_head = (head_tile * heads_per_tile) // group_size
    row_valid = tokens < sq

    first_token = (row_tile * BLOCK_M) // heads_per_tile
    last_token = tl.minimum(((row_tile + 1) * BLOCK_M - 1) // heads_per_tile, sq - 1)
    first_key = first_visible_key(tokens, sq, sk, window_left, attention_chunk)
    end_key = end_visible_key(tokens, sq, sk, window_right, attention_chunk)
    seen_begin = first_visible_key(first_token, sq, sk, window_left, attention_chunk)
    seen_end = end_visible_key(last_token, sq, sk, window_right, attention_chunk)
    tile_begin = seen_begin // BLOCK_N
    tile_end = tl.cdiv(seen_end, BLOCK_N)
    tiles_per_split = tl.cdiv(tl.maximum(tile_end - tile_begin, 0), num_splits)
    tile_begin = tile_begin + split * tiles_per_split
    tile_end = tl.minimum(tile_end, tile_begin + tiles_per_split)
    # Every row of the tile sees every key of the tiles from full_begin to full_end.
    full_end = end_visible_key(first_token, sq, sk, window_right, attention_chunk) // BLOCK_N
    if LOCAL:
        last_first = first_visible_key(last_token, sq, sk, window_left, attention_chunk)
        full_begin = tl.minimum(tl.maximum(tl.cdiv(last_first, BLOCK_N), tile_begin), tile_end)
    else:
        full_begin = tile_begin
    draft_row, draft_begin = tokens, sk  # without a draft mask nothing reads them
    if DRAFT:
        draft_row = draft_mask + (call_row(batch, q_start, seqlen_q, flags) + tl.minimum(tokens, sq - 1)) * draft_stride
        draft_begin = sk - 32 * draft_words
        full_end = tl.minimum(full_end, tl.maximum(draft_begin, 0) // BLOCK_N)
        # Rows that only fill up the tile see nothing: what they see would be read.
        end_key = tl.where(row_valid, end_key, 0)
    full_end = tl.maximum(tl.minimum(full_end, tile_end), full_begin)

    k_base_row = tl.where((flags & HAS_CU_SEQLENS_K) != 0, k_start.to(tl.int64), 0)
    if PAGED:
        k_tile_base = k + kv_head * (k_stride_head * STRIDE_UNIT)
        v_tile_base = v + kv_head * (v_stride_head * STRIDE_UNIT)
        table_row = page_table + cache_row * page_table_stride
    else:
        k_base_row += leftpad
        k_tile_base = (
            k
            + cache_row * (k_stride_batch * STRIDE_UNIT)
            + k_base_row * (k_stride_token * STRIDE_UNIT)
            + kv_head * (k_stride_head * STRIDE_UNIT)
        )
        v_tile_base = (
            v
            + cache_row * (v_stride_batch * STRIDE_UNIT)
            + k_base_row * (v_stride_token * STRIDE_UNIT)
            + kv_head * (v_stride_head * STRIDE_UNIT)
        )
        table_row = page_table

    columns = tl.arange(0, HEAD_DIM_PADDED)
    q_rows = (
        (q_start.to(tl.int64) + tokens) * (q_stride_token * STRIDE_UNIT)
        + heads * (q_stride_head * STRIDE_UNIT)
    )  # fmt: skip
    q_pointers = q + batch * (q_stride_batch * STRIDE_UNIT) + q_rows[:, None] + columns[None, :]
    q_mask = row_valid[:, None] & (columns < HEAD_DIM)[None, :]
    q_tile = tl.load(q_pointers, mask=q_mask, other=0.0)
    if INTERPRETED:
        q_tile = q_tile.to(tl.float32)

    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, HEAD_DIM_V_PADDED), tl.float32)
    if LOCAL:
        acc, row_sum, row_max = attend(
            acc, row_sum, row_max, q_tile, k_tile_base, v_tile_base, table_row,
            tile_begin, full_begin, first_key, end_key, seen_begin, seen_end, draft_row, draft_begin, draft_words,
            leftpad, page_size,
            k_stride_batch * STRIDE_UNIT, k_stride_token * STRIDE_UNIT,
            v_stride_batch * STRIDE_UNIT, v_stride_token * STRIDE_UNIT, softmax_scale, softcap,
            HEAD_DIM, HEAD_DIM_V, HEAD_DIM_PADDED, HEAD_DIM_V_PADDED, BLOCK_N,
            PAGED, SOFTCAP, DRAFT, STRIDE_UNIT > 1, True, True, INTERPRETED,
        )  # fmt: skip
    acc, row_sum, row_max = attend(
        acc, row_sum, row_max, q_tile, k_tile_base, v_tile_base, table_row,
        full_begin, full_end, first_key, end_key, 0, seen_end, draft_row, draft_begin, draft_words,
        leftpad, page_size,
        k_stride_batch * STRIDE_UNIT, k_stride_token * STRIDE_UNIT,
        v_stride_batch * STRIDE_UNIT, v_stride_token * STRIDE_UNIT, softmax_scale, softcap,
        HEAD_DIM, HEAD_DIM_V, HEAD_DIM_PADDED, HEAD_DIM_V_PADDED, BLOCK_N,
        PAGED, SOFTCAP, False, STRIDE_UNIT > 1, False, False, INTERPRETED,
    )  # fmt: skip
    acc, row_sum, row_max = attend(
        acc, row_sum, row_max, q_tile, k_tile_base, v_tile_base, table_row,
        full_end, tile_end, first_key, end_key, 0, seen_end, draft_row, draft_begin, draft_words,
        leftpad, page_size,
        k_stride_batch * STRIDE_UNIT, k_stride_token * STRIDE_UNIT,
        v_stride_batch * STRIDE_UNIT, v_stride_token * STRIDE_UNIT, softmax_scale, softcap,
        HEAD_DIM, HEAD_DIM_V, HEAD_DIM_PADDED, HEAD_DIM_V_PADDED, BLOCK_N,
        PAGED, SOFTCAP, DRAFT, STRIDE_UNIT > 1, True, False, INTERPRETED,
    )  # fmt: skip

    half_max = half_exponents(row_max, softmax_scale, SOFTCAP)
    if (flags & HAS_SINKS) != 0 and num_splits == 1:
        acc, row_sum, half_max = add_sink(acc, row_sum, half_max, sinks, heads, flags)
    acc, row_lse = normalized(acc, row_sum, half_max)

    columns = tl.arange(0, HEAD_DIM_V_PADDED)
    out_mask = row_valid[:, None] & (columns < HEAD_DIM_V)[None, :]
    if num_splits > 1:
        # Partials are (splits, row, head, dv), row counting the tokens of the whole call.
        row = call_row(batch, q_start, seqlen_q, flags) + tokens
        item = (split * total_rows + row) * num_heads + heads
        # Finite where the split saw a key, as an infinite one marks a part that saw nothing.
        part_lse = tl.maximum(tl.minimum(row_lse, LARGEST_FLOAT), -LARGEST_FLOAT)
        part_lse = tl.where((row_sum == 0.0) | (row_sum != row_sum), row_lse, part_lse)
        tl.store(lse_partial + item, part_lse, mask=row_valid)
        tl.store(out_partial + (item * HEAD_DIM_V)[:, None] + columns[None, :], acc, mask=out_mask)
    else:
        out_rows = (
            (q_start.to(tl.int64) + tokens) * (out_stride_token * STRIDE_UNIT)
            + heads * (out_stride_head * STRIDE_UNIT)
        )  # fmt: skip
        out_tile = acc.to(out.dtype.element_ty)
        tl.store(out_base + out_rows[:, None] + columns[None, :], out_tile, mask=out_mask)
        lse_rows = heads * lse_stride_head + q_start + tokens
        tl.store(lse_base + lse_rows, row_lse, mask=row_valid & ((flags & HAS_LSE) != 0))

"""The attention kernel: one tile of query rows against its keys, or against one split of them.

Rows of a tile are (token, head) pairs: with heads_per_tile > 1 the query heads that share a
key/value head are packed into one tile, so that few query tokens still fill it. Keys are walked in
ascending order in tiles that start at multiples of BLOCK_N: a row's result is a function of its own
keys alone, whichever rows share its tile.
"""

import triton
import triton.language as tl
from flash_attention_v3.portable.arguments import ALIGNED_POINTERS, SIGNATURE  # noqa: F401  (the compiler's)
from flash_attention_v3.portable.e4m3 import load_descale, with_sign
from flash_attention_v3.portable.epilogue import add_sink, fill_rest, half_exponents, normalized
from flash_attention_v3.portable.mainloop import LARGEST_FLOAT, attend, operand
from flash_attention_v3.portable.sequence import (
    HAS_CACHE_BATCH_IDX,
    HAS_CACHE_LEFTPAD,
    HAS_CU_SEQLENS_K,
    HAS_CU_SEQLENS_K_NEW,
    HAS_CU_SEQLENS_Q,
    HAS_K_DESCALE,
    HAS_LSE,
    HAS_Q_DESCALE,
    HAS_SEQUSED_K,
    HAS_SEQUSED_Q,
    HAS_SINKS,
    HAS_V_DESCALE,
    ZERO_REST,
    call_row,
    end_visible_key,
    first_visible_key,
    load_index,
    token_range,
)


@triton.jit
def load_queries(
    base,
    offsets,
    row_valid,
    factor,
    SIZE: tl.constexpr,
    SIZE_PADDED: tl.constexpr,
    TURN: tl.constexpr,
    CONVERT: tl.constexpr,
    WIDE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """(BLOCK_M, SIZE_PADDED) rows of q or qv, zero past SIZE; with TURN of the other sign for a negative factor."""
    columns = tl.arange(0, SIZE_PADDED)
    mask = row_valid[:, None] & (columns < SIZE)[None, :]
    rows = tl.load(base + offsets[:, None] + columns[None, :], mask=mask, other=0.0)
    if TURN:
        rows = with_sign(rows, factor)
    return operand(rows, CONVERT and rows.dtype.primitive_bitwidth == 8, True, WIDE, INTERPRETED)


@triton.jit
def forward(
    q,
    k,
    v,
    qv,
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
    q_descale,
    k_descale,
    v_descale,
    k_scale,
    v_scale,
    q_stride_batch,
    q_stride_token,
    q_stride_head,
    k_stride_batch,
    k_stride_token,
    k_stride_head,
    v_stride_batch,
    v_stride_token,
    v_stride_head,
    qv_stride_batch,
    qv_stride_token,
    qv_stride_head,
    out_stride_batch,
    out_stride_token,
    out_stride_head,
    q_descale_stride_batch,
    q_descale_stride_head,
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
    LEAD: tl.constexpr,
    LOCAL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DRAFT: tl.constexpr,
    QV: tl.constexpr,
    QUERY_E4M3: tl.constexpr,
    CACHE_E4M3: tl.constexpr,
    TOKEN_SCALES: tl.constexpr,
    NATIVE: tl.constexpr,
    STAGED: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    QUERY_UNIT: tl.constexpr,
    CACHE_UNIT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Grid: row tiles (last first, the longest under a causal mask) x head tiles x splits x batch.

    The strides of out come in units of STRIDE_UNIT elements, those of q and qv of QUERY_UNIT, of k and v of CACHE_UNIT:
    16 bytes where every row is 16-byte aligned, so that the compiler knows it and loads 16 bytes at a time; else 1.

    QV: 0 without qv, 1 with it, 2 with it alone: k is not read then. QUERY_E4M3 and CACHE_E4M3 say which of (q, qv) and
    (k, v) are e4m3, NATIVE that the device multiplies e4m3; where it does not, and where the queries have 16 bits, keys
    become 16 bits wide first. Values always do before they meet the weights (STAGED: see attend), which so are not
    rounded to e4m3.
    """
    CONVERT: tl.constexpr = CACHE_E4M3 and not (QUERY_E4M3 and NATIVE)
    WIDE: tl.constexpr = tl.float16 if QUERY_E4M3 else q.dtype.element_ty
    # One factor for all scores of a head belongs to the softmax's scale: no multiplication for each.
    FOLDED: tl.constexpr = CACHE_E4M3 and QV == 0 and not TOKEN_SCALES
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

    k_factor, v_factor, v_descale_factor = 1.0, 1.0, 1.0
    if CACHE_E4M3:
        q_factor = load_descale(
            q_descale, batch, kv_head, q_descale_stride_batch, q_descale_stride_head, flags, HAS_Q_DESCALE
        )
        k_factor = q_factor * load_descale(
            k_descale, batch, kv_head, k_descale_stride_batch, k_descale_stride_head, flags, HAS_K_DESCALE
        )
        v_descale_factor = load_descale(
            v_descale, batch, kv_head, v_descale_stride_batch, v_descale_stride_head, flags, HAS_V_DESCALE
        )
        v_factor = q_factor * v_descale_factor
        if FOLDED:
            softmax_scale = softmax_scale * tl.abs(k_factor)

    k_base_row = tl.where((flags & HAS_CU_SEQLENS_K) != 0, k_start.to(tl.int64), 0)
    k_tile_base = k + kv_head * (k_stride_head * CACHE_UNIT)
    v_tile_base = v + kv_head * (v_stride_head * CACHE_UNIT)
    k_scale_base = k_scale + kv_head * k_scale_stride_head
    v_scale_base = v_scale + kv_head * v_scale_stride_head
    table_row = page_table
    if PAGED:
        table_row += cache_row * page_table_stride
    else:
        k_base_row += leftpad
        k_tile_base += cache_row * (k_stride_batch * CACHE_UNIT) + k_base_row * (k_stride_token * CACHE_UNIT)
        v_tile_base += cache_row * (v_stride_batch * CACHE_UNIT) + k_base_row * (v_stride_token * CACHE_UNIT)
        k_scale_base += cache_row * k_scale_stride_batch + k_base_row * k_scale_stride_token
        v_scale_base += cache_row * v_scale_stride_batch + k_base_row * v_scale_stride_token

    q_row = q_start.to(tl.int64) + tokens
    q_tile, qv_tile = rows, rows
    if QV < 2:
        q_offsets = q_row * (q_stride_token * QUERY_UNIT) + heads * (q_stride_head * QUERY_UNIT)
        q_tile = load_queries(
            q + batch * (q_stride_batch * QUERY_UNIT), q_offsets, row_valid, k_factor,
            HEAD_DIM, HEAD_DIM_PADDED, FOLDED, CONVERT, WIDE, INTERPRETED,
        )  # fmt: skip
    if QV > 0:
        qv_offsets = q_row * (qv_stride_token * QUERY_UNIT) + heads * (qv_stride_head * QUERY_UNIT)
        qv_tile = load_queries(
            qv + batch * (qv_stride_batch * QUERY_UNIT), qv_offsets, row_valid, k_factor,
            HEAD_DIM_V, HEAD_DIM_V_PADDED, FOLDED, CONVERT, WIDE, INTERPRETED,
        )  # fmt: skip

    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, HEAD_DIM_V_PADDED), tl.float32)
    v_top = 0.0
    if LOCAL:
        acc, row_sum, row_max, v_top = attend(
            acc, row_sum, row_max, v_top, q_tile, qv_tile, k_tile_base, v_tile_base, k_scale_base, v_scale_base,
            table_row, tile_begin, full_begin, first_key, end_key, seen_begin, seen_end,
            draft_row, draft_begin, draft_words, leftpad, page_size,
            k_stride_batch * CACHE_UNIT, k_stride_token * CACHE_UNIT,
            v_stride_batch * CACHE_UNIT, v_stride_token * CACHE_UNIT,
            k_scale_stride_batch, k_scale_stride_token, v_scale_stride_batch, v_scale_stride_token,
            k_factor, v_factor, flags, softmax_scale, softcap,
            HEAD_DIM, HEAD_DIM_V, HEAD_DIM_PADDED, HEAD_DIM_V_PADDED, BLOCK_N,
            PAGED, LEAD, SOFTCAP, DRAFT, STRIDE_UNIT > 1, QV, CACHE_E4M3, TOKEN_SCALES, CONVERT, STAGED, WIDE,
            True, True, INTERPRETED,
        )  # fmt: skip
    acc, row_sum, row_max, v_top = attend(
        acc, row_sum, row_max, v_top, q_tile, qv_tile, k_tile_base, v_tile_base, k_scale_base, v_scale_base,
        table_row, full_begin, full_end, first_key, end_key, 0, seen_end,
        draft_row, draft_begin, draft_words, leftpad, page_size,
        k_stride_batch * CACHE_UNIT, k_stride_token * CACHE_UNIT,
        v_stride_batch * CACHE_UNIT, v_stride_token * CACHE_UNIT,
        k_scale_stride_batch, k_scale_stride_token, v_scale_stride_batch, v_scale_stride_token,
        k_factor, v_factor, flags, softmax_scale, softcap,
        HEAD_DIM, HEAD_DIM_V, HEAD_DIM_PADDED, HEAD_DIM_V_PADDED, BLOCK_N,
        PAGED, LEAD, SOFTCAP, False, STRIDE_UNIT > 1, QV, CACHE_E4M3, TOKEN_SCALES, CONVERT, STAGED, WIDE,
        False, False, INTERPRETED,
    )  # fmt: skip
    acc, row_sum, row_max, v_top = attend(
        acc, row_sum, row_max, v_top, q_tile, qv_tile, k_tile_base, v_tile_base, k_scale_base, v_scale_base,
        table_row, full_end, tile_end, first_key, end_key, 0, seen_end,
        draft_row, draft_begin, draft_words, leftpad, page_size,
        k_stride_batch * CACHE_UNIT, k_stride_token * CACHE_UNIT,
        v_stride_batch * CACHE_UNIT, v_stride_token * CACHE_UNIT,
        k_scale_stride_batch, k_scale_stride_token, v_scale_stride_batch, v_scale_stride_token,
        k_factor, v_factor, flags, softmax_scale, softcap,
        HEAD_DIM, HEAD_DIM_V, HEAD_DIM_PADDED, HEAD_DIM_V_PADDED, BLOCK_N,
        PAGED, LEAD, SOFTCAP, DRAFT, STRIDE_UNIT > 1, QV, CACHE_E4M3, TOKEN_SCALES, CONVERT, STAGED, WIDE,
        True, False, INTERPRETED,
    )  # fmt: skip

    half_max = half_exponents(row_max, softmax_scale, SOFTCAP)
    if (flags & HAS_SINKS) != 0 and num_splits == 1:
        acc, row_sum, half_max = add_sink(acc, row_sum, half_max, sinks, heads, flags)
    acc, row_lse = normalized(acc, row_sum, half_max)
    if TOKEN_SCALES:
        v_descale_factor *= v_top
    if CACHE_E4M3:
        acc = acc * v_descale_factor

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

"""The attention kernel: one tile of query rows against its keys, or against one split of them.

Rows of a tile are (token, head) pairs: with heads_per_tile > 1 the query heads that share a
key/value head are packed into one tile, so that few query tokens still fill it. Keys are walked in
ascending order in tiles that start at multiples of BLOCK_N: a row's result is a function of its own
keys alone, whichever rows share its tile.
"""

import triton
import triton.language as tl
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
    SINKS_ARE_FLOAT32,
    ZERO_REST,
    end_visible_key,
    first_visible_key,
    load_index,
    token_range,
)

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

# Types of the run-time arguments, in order; launcher.cpp fills them in the same order and compares
# the names when it loads a kernel. Strides are in elements.
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
    "flags": "i32",
    "softmax_scale": "fp32",
    "softcap": "fp32",
}
ALIGNED_POINTERS = ("q", "k", "v", "out", "out_partial")


@triton.jit
def load_pages(table_row, first, seqlen_k, leftpad, page_size, BLOCK_N: tl.constexpr, INTERPRETED: tl.constexpr):
    """(BLOCK_N,) page numbers of the keys from `first` on, and their places inside these pages."""
    # Table entries past a sequence's length are never read: those lanes take the last key's.
    keys = tl.maximum(tl.minimum(first + tl.arange(0, BLOCK_N), seqlen_k - 1), 0)
    positions = leftpad + keys
    entries = table_row + positions // page_size
    if INTERPRETED:
        pages = tl.load(entries)
    else:
        # Not tl.load: the software pipeline would spend its stages on the table, not on the keys.
        pages = tl.inline_asm_elementwise(
            "ld.global.nc.b32 $0, [$1];", "=r,l", [entries.to(tl.int64)], tl.int32, True, 1
        )
    return pages, positions % page_size


@triton.jit
def load_keys(
    base,
    pages,
    slots,
    first,
    seqlen_k,
    stride_batch,
    stride_token,
    SIZE: tl.constexpr,
    SIZE_PADDED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGED: tl.constexpr,
    NARROW: tl.constexpr,
    MASKED: tl.constexpr,
):
    """(BLOCK_N, SIZE_PADDED) keys or values from key `first` on; zero past the sequence and SIZE."""
    offsets = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, SIZE_PADDED)
    if PAGED:
        rows = pages.to(tl.int64) * stride_batch + slots * stride_token
        pointers = base + rows[:, None] + columns[None, :]
    else:
        tile = base + first.to(tl.int64) * stride_token
        if NARROW:
            stride_token = stride_token.to(tl.int32)
        pointers = tile + (offsets * stride_token)[:, None] + columns[None, :]
    if MASKED:
        mask = (first + offsets < seqlen_k)[:, None]
        if SIZE != SIZE_PADDED:
            mask = mask & (columns < SIZE)[None, :]
        return tl.load(pointers, mask=mask, other=0.0)
    if SIZE != SIZE_PADDED:
        return tl.load(pointers, mask=(columns < SIZE)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def attend(
    acc,
    row_sum,
    row_max,
    q_tile,
    k,
    v,
    table_row,
    tile_begin,
    tile_end,
    first_key,
    end_key,
    seqlen_k,
    leftpad,
    page_size,
    k_stride_batch,
    k_stride_token,
    v_stride_batch,
    v_stride_token,
    softmax_scale,
    softcap,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    HEAD_DIM_V_PADDED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    NARROW: tl.constexpr,
    MASKED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Online softmax over the key tiles tile_begin <= tile < tile_end; maxima in log2 units.

    The maximum is taken before scaling, one multiplication less per score: the scale is positive.
    """
    if SOFTCAP:
        # A finite factor: 0 times infinity would be NaN.
        to_exponent = tl.minimum(2.0 * LOG2_E * softmax_scale / softcap, 1e30)
    pages, slots = tile_begin, tile_begin  # without pages nothing reads them
    if PAGED:
        pages, slots = load_pages(table_row, tile_begin * BLOCK_N, seqlen_k, leftpad, page_size, BLOCK_N, INTERPRETED)
    for tile in range(tile_begin, tile_end):
        first = tile * BLOCK_N
        k_tile = load_keys(
            k, pages, slots, first, seqlen_k, k_stride_batch, k_stride_token,
            HEAD_DIM, HEAD_DIM_PADDED, BLOCK_N, PAGED, NARROW, MASKED,
        )  # fmt: skip
        v_tile = load_keys(
            v, pages, slots, first, seqlen_k, v_stride_batch, v_stride_token,
            HEAD_DIM_V, HEAD_DIM_V_PADDED, BLOCK_N, PAGED, NARROW, MASKED,
        )  # fmt: skip
        if PAGED:
            # A tile ahead: decoding over pages of 64 takes 4240 GB/s so, 3690 with the lookup in front.
            pages, slots = load_pages(table_row, first + BLOCK_N, seqlen_k, leftpad, page_size, BLOCK_N, INTERPRETED)
        if INTERPRETED:
            k_tile = k_tile.to(tl.float32)
        scores = tl.dot(q_tile, tl.trans(k_tile))
        if SOFTCAP:
            # tanh(x) = 1 - 2 / (exp(2x) + 1): exact to 1e-7 at both ends, unlike tanh.approx.
            exponent = tl.exp2(scores * to_exponent)
            scores = softcap * (1.0 - 2.0 / (exponent + 1.0))
            scale = LOG2_E
        else:
            scale = softmax_scale * LOG2_E
        if MASKED:
            keys = first + tl.arange(0, BLOCK_N)
            visible = (keys[None, :] >= first_key[:, None]) & (keys[None, :] < end_key[:, None])
            scores = tl.where(visible, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale)
        shift = new_max
        if MASKED:
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(scores * scale - shift[:, None])
        rescale = tl.exp2(row_max - shift)
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        acc = acc * rescale[:, None]
        weights = weights.to(v_tile.dtype)
        if INTERPRETED:
            weights = weights.to(tl.float32)
            v_tile = v_tile.to(tl.float32)
        acc = tl.dot(weights, v_tile, acc)
        row_max = new_max
    return acc, row_sum, row_max


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
        # What lies behind the last sequence of a ragged tensor belongs to that one's programs.
        last = batch == tl.num_programs(0) // (row_tiles * head_tiles * num_splits) - 1
        owned = load_index(cu_seqlens_q, batch + 1, flags, HAS_CU_SEQLENS_Q, seqlen_q)
        owned = tl.where(last, seqlen_q, owned) - q_start - sq
        for begin in range(row_tile * BLOCK_M, owned * heads_per_tile, row_tiles * BLOCK_M):
            rest = begin + tl.arange(0, BLOCK_M)
            rest_tokens = q_start.to(tl.int64) + sq + rest // heads_per_tile
            rest_heads = head_tile * heads_per_tile + rest % heads_per_tile
            is_rest = rest < owned * heads_per_tile
            lse_pointers = lse_base + rest_heads * lse_stride_head + rest_tokens
            nothing = tl.full((BLOCK_M,), float("-inf"), tl.float32)
            tl.store(lse_pointers, nothing, mask=is_rest & ((flags & HAS_LSE) != 0))
            columns = tl.arange(0, HEAD_DIM_V_PADDED)
            pointers = (
                out_base
                + (rest_tokens * (out_stride_token * STRIDE_UNIT) + rest_heads * (out_stride_head * STRIDE_UNIT))[
                    :, None
                ]
            )
            zero_mask = (is_rest & ((flags & ZERO_REST) != 0))[:, None]
            zeros = tl.zeros((BLOCK_M, HEAD_DIM_V_PADDED), out.dtype.element_ty)
            tl.store(pointers + columns[None, :], zeros, mask=zero_mask & (columns < HEAD_DIM_V)[None, :])
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
    tile_begin = first_visible_key(first_token, sq, sk, window_left, attention_chunk) // BLOCK_N
    tile_end = tl.cdiv(end_visible_key(last_token, sq, sk, window_right, attention_chunk), BLOCK_N)
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
            tile_begin, full_begin, first_key, end_key, sk, leftpad, page_size,
            k_stride_batch * STRIDE_UNIT, k_stride_token * STRIDE_UNIT,
            v_stride_batch * STRIDE_UNIT, v_stride_token * STRIDE_UNIT, softmax_scale, softcap,
            HEAD_DIM, HEAD_DIM_V, HEAD_DIM_PADDED, HEAD_DIM_V_PADDED, BLOCK_N,
            PAGED, SOFTCAP, STRIDE_UNIT > 1, True, INTERPRETED,
        )  # fmt: skip
    acc, row_sum, row_max = attend(
        acc, row_sum, row_max, q_tile, k_tile_base, v_tile_base, table_row,
        full_begin, full_end, first_key, end_key, sk, leftpad, page_size,
        k_stride_batch * STRIDE_UNIT, k_stride_token * STRIDE_UNIT,
        v_stride_batch * STRIDE_UNIT, v_stride_token * STRIDE_UNIT, softmax_scale, softcap,
        HEAD_DIM, HEAD_DIM_V, HEAD_DIM_PADDED, HEAD_DIM_V_PADDED, BLOCK_N,
        PAGED, SOFTCAP, STRIDE_UNIT > 1, False, INTERPRETED,
    )  # fmt: skip
    acc, row_sum, row_max = attend(
        acc, row_sum, row_max, q_tile, k_tile_base, v_tile_base, table_row,
        full_end, tile_end, first_key, end_key, sk, leftpad, page_size,
        k_stride_batch * STRIDE_UNIT, k_stride_token * STRIDE_UNIT,
        v_stride_batch * STRIDE_UNIT, v_stride_token * STRIDE_UNIT, softmax_scale, softcap,
        HEAD_DIM, HEAD_DIM_V, HEAD_DIM_PADDED, HEAD_DIM_V_PADDED, BLOCK_N,
        PAGED, SOFTCAP, STRIDE_UNIT > 1, True, INTERPRETED,
    )  # fmt: skip

    if (flags & HAS_SINKS) != 0 and num_splits == 1:
        sink = load_sink(sinks, heads, flags)
        with_sink = tl.maximum(row_max, sink)
        shift = tl.where(with_sink == float("-inf"), 0.0, with_sink)
        row_sum = row_sum * tl.exp2(row_max - shift) + tl.exp2(sink - shift)
        acc = acc * tl.exp2(row_max - shift)[:, None]
        row_max = with_sink
    # A row that sees nothing has a sum of 0: out 0 and lse -inf.
    acc = acc * tl.where(row_sum > 0.0, 1.0 / row_sum, 0.0)[:, None]
    row_lse = (row_max + tl.log2(row_sum)) * LN_2
    row_lse = tl.where(row_sum > 0.0, row_lse, float("-inf"))

    columns = tl.arange(0, HEAD_DIM_V_PADDED)
    out_mask = row_valid[:, None] & (columns < HEAD_DIM_V)[None, :]
    if num_splits > 1:
        # Partials are (splits, row, head, dv), row counting the tokens of the whole call.
        dense = (flags & HAS_CU_SEQLENS_Q) == 0
        row = tl.where(dense, batch.to(tl.int64) * seqlen_q, q_start) + tokens
        item = (split * total_rows + row) * num_heads + heads
        tl.store(lse_partial + item, row_lse, mask=row_valid)
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


@triton.jit
def load_sink(sinks, heads, flags):
    """Sink logits in log2 units; the tensor is float32 or of the queries' type."""
    as_float32 = (flags & SINKS_ARE_FLOAT32) != 0
    wide = tl.load(sinks.to(tl.pointer_type(tl.float32)) + heads, mask=as_float32, other=0.0)
    narrow = tl.load(sinks + heads, mask=as_float32 == 0, other=0.0)
    return tl.where(as_float32, wide, narrow.to(tl.float32)) * LOG2_E

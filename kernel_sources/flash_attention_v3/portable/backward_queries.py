"""The gradient of queries: one tile of a head's rows against the keys that they see, as the forward kernel walks them.

Nothing is added across programs: the result is the same from run to run.
"""

import triton
import triton.language as tl
from flash_attention_v3.portable.backward_common import load_rows, rounded, store_rows, weights_of, zero_rest
from flash_attention_v3.portable.mainloop import LOG2_E, is_within
from flash_attention_v3.portable.sequence import (
    HAS_CU_SEQLENS_K,
    HAS_CU_SEQLENS_Q,
    HAS_SEQUSED_K,
    HAS_SEQUSED_Q,
    end_visible_key,
    first_visible_key,
    token_range,
)

# As arguments.SIGNATURE: types of the run-time arguments in the launcher's order, strides in elements.
SIGNATURE = {
    "q": "*element",
    "k": "*element",
    "v": "*element",
    "grad_out": "*element",
    "lse": "*fp32",
    "delta": "*fp32",
    "grad_q": "*element",
    "cu_seqlens_q": "*i32",
    "cu_seqlens_k": "*i32",
    "seqused_q": "*i32",
    "seqused_k": "*i32",
    "q_stride_batch": "i64",
    "q_stride_token": "i64",
    "q_stride_head": "i64",
    "k_stride_batch": "i64",
    "k_stride_token": "i64",
    "k_stride_head": "i64",
    "v_stride_batch": "i64",
    "v_stride_token": "i64",
    "v_stride_head": "i64",
    "grad_out_stride_batch": "i64",
    "grad_out_stride_token": "i64",
    "grad_out_stride_head": "i64",
    "grad_q_stride_batch": "i64",
    "grad_q_stride_token": "i64",
    "grad_q_stride_head": "i64",
    "lse_stride_batch": "i64",
    "lse_stride_head": "i64",
    "seqlen_q": "i32",
    "seqlen_k": "i32",
    "batches": "i32",
    "num_heads": "i32",
    "group_size": "i32",
    "row_tiles": "i32",
    "window_left": "i32",
    "window_right": "i32",
    "attention_chunk": "i32",
    "flags": "i32",
    "softmax_scale": "fp32",
    "softcap": "fp32",
}
ALIGNED_POINTERS = ("q", "k", "v", "grad_out", "grad_q")


@triton.jit
def add_keys(
    grad_q,
    q_tile,
    grad_tile,
    row_lse,
    row_delta,
    k,
    v,
    first_tile,
    tiles,
    jump_at,
    jump,
    first_key,
    end_key,
    seen_begin,
    seen_end,
    k_stride_token,
    v_stride_token,
    softmax_scale,
    softcap,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    HEAD_DIM_V_PADDED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DTYPE: tl.constexpr,
    MASKED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """What `tiles` tiles of keys add to the gradient; from the tile jump_at on, `jump` tiles are left out."""
    for step in range(tiles):
        tile = first_tile + step
        if MASKED:
            tile += tl.where(step >= jump_at, jump, 0)
        first = tile * BLOCK_N
        k_tile = load_rows(
            k, first, k_stride_token, seen_begin, seen_end, HEAD_DIM, HEAD_DIM_PADDED, BLOCK_N, MASKED, INTERPRETED
        )
        scores = tl.dot(q_tile, tl.trans(k_tile))
        v_tile = load_rows(
            v, first, v_stride_token, seen_begin, seen_end, HEAD_DIM_V, HEAD_DIM_V_PADDED, BLOCK_N, MASKED, INTERPRETED
        )
        grad_weights = tl.dot(grad_tile, tl.trans(v_tile))
        weights, slope = weights_of(scores, row_lse[:, None], softmax_scale, softcap, SOFTCAP)
        grad_scores = weights * (grad_weights - row_delta[:, None])
        if SOFTCAP:
            grad_scores = grad_scores * slope
        if MASKED:
            visible = is_within(first_key, end_key, first + tl.arange(0, BLOCK_N))
            grad_scores = tl.where(visible, grad_scores, 0.0)
        grad_q = tl.dot(rounded(grad_scores, DTYPE, INTERPRETED), k_tile, grad_q)
    return grad_q


@triton.jit
def backward_queries(
    q,
    k,
    v,
    grad_out,
    lse,
    delta,
    grad_q,
    cu_seqlens_q,
    cu_seqlens_k,
    seqused_q,
    seqused_k,
    q_stride_batch,
    q_stride_token,
    q_stride_head,
    k_stride_batch,
    k_stride_token,
    k_stride_head,
    v_stride_batch,
    v_stride_token,
    v_stride_head,
    grad_out_stride_batch,
    grad_out_stride_token,
    grad_out_stride_head,
    grad_q_stride_batch,
    grad_q_stride_token,
    grad_q_stride_head,
    lse_stride_batch,
    lse_stride_head,
    seqlen_q,
    seqlen_k,
    batches,
    num_heads,
    group_size,
    row_tiles,
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
    SOFTCAP: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Grid: row tiles x query heads x batch. Of a causal mask the last tile has the most keys, and is the first."""
    program = tl.program_id(0)
    tile = row_tiles - 1 - program % row_tiles
    head = program // row_tiles % num_heads
    batch_index = program // row_tiles // num_heads
    q_start, sq = token_range(batch_index, cu_seqlens_q, HAS_CU_SEQLENS_Q, seqused_q, HAS_SEQUSED_Q, flags, seqlen_q)
    k_start, sk = token_range(batch_index, cu_seqlens_k, HAS_CU_SEQLENS_K, seqused_k, HAS_SEQUSED_K, flags, seqlen_k)
    batch = batch_index.to(tl.int64)
    k_row, q_row = k_start.to(tl.int64), q_start.to(tl.int64)
    q_token, grad_out_token = q_stride_token * STRIDE_UNIT, grad_out_stride_token * STRIDE_UNIT
    k_token, v_token = k_stride_token * STRIDE_UNIT, v_stride_token * STRIDE_UNIT
    grad_q_token = grad_q_stride_token * STRIDE_UNIT
    grad_q += batch * (grad_q_stride_batch * STRIDE_UNIT) + head * (grad_q_stride_head * STRIDE_UNIT)
    grad_q += q_row * grad_q_token
    zero_rest(
        grad_q, sq, grad_q_token, cu_seqlens_q, HAS_CU_SEQLENS_Q, batch_index, batches, seqlen_q, tile, row_tiles,
        flags, HEAD_DIM, HEAD_DIM_PADDED, BLOCK_M,
    )  # fmt: skip
    first = tile * BLOCK_M
    if first >= sq:
        return

    tokens = first + tl.arange(0, BLOCK_M)
    last_token = tl.minimum(first + BLOCK_M, sq) - 1
    first_key = first_visible_key(tokens, sq, sk, window_left, attention_chunk)
    end_key = end_visible_key(tokens, sq, sk, window_right, attention_chunk)
    seen_begin = first_visible_key(first, sq, sk, window_left, attention_chunk)
    seen_end = end_visible_key(last_token, sq, sk, window_right, attention_chunk)
    tile_begin = seen_begin // BLOCK_N
    tile_end = tl.maximum(tl.cdiv(seen_end, BLOCK_N), tile_begin)
    # Every row of the tile sees every key of the tiles from full_begin to full_end.
    full_begin = tl.cdiv(first_visible_key(last_token, sq, sk, window_left, attention_chunk), BLOCK_N)
    full_begin = tl.minimum(full_begin, tile_end)
    full_end = end_visible_key(first, sq, sk, window_right, attention_chunk) // BLOCK_N
    full_end = tl.maximum(tl.minimum(full_end, tile_end), full_begin)

    q += batch * (q_stride_batch * STRIDE_UNIT) + head * (q_stride_head * STRIDE_UNIT) + q_row * q_token
    grad_out += batch * (grad_out_stride_batch * STRIDE_UNIT) + head * (grad_out_stride_head * STRIDE_UNIT)
    grad_out += q_row * grad_out_token
    kv_head = head // group_size
    k += batch * (k_stride_batch * STRIDE_UNIT) + kv_head * (k_stride_head * STRIDE_UNIT) + k_row * k_token
    v += batch * (v_stride_batch * STRIDE_UNIT) + kv_head * (v_stride_head * STRIDE_UNIT) + k_row * v_token
    q_tile = load_rows(q, first, q_token, 0, sq, HEAD_DIM, HEAD_DIM_PADDED, BLOCK_M, True, INTERPRETED)
    grad_tile = load_rows(
        grad_out, first, grad_out_token, 0, sq, HEAD_DIM_V, HEAD_DIM_V_PADDED, BLOCK_M, True, INTERPRETED
    )
    row = batch * lse_stride_batch + head * lse_stride_head + q_start
    row_lse = tl.load(lse + row + tokens, mask=tokens < sq, other=0.0) * LOG2_E
    row_delta = tl.load(delta + row + tokens, mask=tokens < sq, other=0.0)
    DTYPE: tl.constexpr = q.dtype.element_ty
    acc = tl.zeros((BLOCK_M, HEAD_DIM_PADDED), tl.float32)
    acc = add_keys(
        acc, q_tile, grad_tile, row_lse, row_delta, k, v,
        tile_begin, full_begin - tile_begin + tile_end - full_end, full_begin - tile_begin, full_end - full_begin,
        first_key, end_key, seen_begin, seen_end, k_token, v_token, softmax_scale, softcap,
        HEAD_DIM, HEAD_DIM_V, HEAD_DIM_PADDED, HEAD_DIM_V_PADDED, BLOCK_N, SOFTCAP, DTYPE, True, INTERPRETED,
    )  # fmt: skip
    acc = add_keys(
        acc, q_tile, grad_tile, row_lse, row_delta, k, v,
        full_begin, full_end - full_begin, 0, 0,
        first_key, end_key, seen_begin, seen_end, k_token, v_token, softmax_scale, softcap,
        HEAD_DIM, HEAD_DIM_V, HEAD_DIM_PADDED, HEAD_DIM_V_PADDED, BLOCK_N, SOFTCAP, DTYPE, False, INTERPRETED,
    )  # fmt: skip
    store_rows(grad_q, first, grad_q_token, sq, acc * softmax_scale, HEAD_DIM, HEAD_DIM_PADDED, BLOCK_M)

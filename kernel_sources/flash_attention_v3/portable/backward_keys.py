"""The gradients of keys and values: one tile of keys against the rows of its group's query heads that see it.

Scores are computed transposed, so that the weights are the register operand of the products that they take part in.
Nothing is added across programs: the result is the same from run to run.
"""

import triton
import triton.language as tl
from flash_attention_v3.portable.backward_common import (
    load_numbers,
    load_rows,
    rounded,
    seeing_rows,
    store_rows,
    weights_of,
    zero_rest,
)
from flash_attention_v3.portable.mainloop import LOG2_E
from flash_attention_v3.portable.sequence import (
    HAS_CU_SEQLENS_K,
    HAS_CU_SEQLENS_Q,
    HAS_SEQUSED_K,
    HAS_SEQUSED_Q,
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
    "grad_k": "*element",
    "grad_v": "*element",
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
    "grad_k_stride_batch": "i64",
    "grad_k_stride_token": "i64",
    "grad_k_stride_head": "i64",
    "grad_v_stride_batch": "i64",
    "grad_v_stride_token": "i64",
    "grad_v_stride_head": "i64",
    "lse_stride_batch": "i64",
    "lse_stride_head": "i64",
    "seqlen_q": "i32",
    "seqlen_k": "i32",
    "batches": "i32",
    "num_heads_k": "i32",
    "group_size": "i32",
    "key_tiles": "i32",
    "window_left": "i32",
    "window_right": "i32",
    "attention_chunk": "i32",
    "flags": "i32",
    "softmax_scale": "fp32",
    "softcap": "fp32",
}
ALIGNED_POINTERS = ("q", "k", "v", "grad_out", "grad_k", "grad_v")


@triton.jit
def add_rows(
    grad_k,
    grad_v,
    k_tile,
    v_tile,
    q,
    grad_out,
    lse,
    delta,
    first_tile,
    tiles,
    jump_at,
    jump,
    first_row,
    end_row,
    begin,
    end,
    q_stride_token,
    grad_out_stride_token,
    softmax_scale,
    softcap,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    HEAD_DIM_V_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WITH_K: tl.constexpr,
    WITH_V: tl.constexpr,
    DTYPE: tl.constexpr,
    MASKED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """What `tiles` tiles of a head's rows add to the gradients; from the tile jump_at on, `jump` tiles are left out."""
    for step in range(tiles):
        tile = first_tile + step
        if MASKED:
            tile += tl.where(step >= jump_at, jump, 0)
        first = tile * BLOCK_M
        tokens = first + tl.arange(0, BLOCK_M)
        q_tile = load_rows(
            q, first, q_stride_token, begin, end, HEAD_DIM, HEAD_DIM_PADDED, BLOCK_M, MASKED, INTERPRETED
        )
        inside = (tokens >= begin) & (tokens < end)
        row_lse = load_numbers(lse + tokens, inside, MASKED) * LOG2_E
        scores = tl.dot(k_tile, tl.trans(q_tile))
        grad_tile = load_rows(
            grad_out, first, grad_out_stride_token, begin, end, HEAD_DIM_V, HEAD_DIM_V_PADDED, BLOCK_M, MASKED,
            INTERPRETED,
        )  # fmt: skip
        if WITH_K:
            grad_weights = tl.dot(v_tile, tl.trans(grad_tile))
            row_delta = load_numbers(delta + tokens, inside, MASKED)
        weights, slope = weights_of(scores, row_lse[None, :], softmax_scale, softcap, SOFTCAP)
        if MASKED:
            visible = (tokens[None, :] >= first_row[:, None]) & (tokens[None, :] < end_row[:, None])
            weights = tl.where(visible, weights, 0.0)
        if WITH_V:
            grad_v = tl.dot(rounded(weights, DTYPE, INTERPRETED), grad_tile, grad_v)
        if WITH_K:
            grad_scores = weights * (grad_weights - row_delta[None, :])
            if SOFTCAP:
                grad_scores = grad_scores * slope
            if MASKED:
                # Not 0 times what a hidden key or value makes of it.
                grad_scores = tl.where(visible, grad_scores, 0.0)
            grad_k = tl.dot(rounded(grad_scores, DTYPE, INTERPRETED), q_tile, grad_k)
    return grad_k, grad_v


@triton.jit
def backward_keys(
    q,
    k,
    v,
    grad_out,
    lse,
    delta,
    grad_k,
    grad_v,
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
    grad_k_stride_batch,
    grad_k_stride_token,
    grad_k_stride_head,
    grad_v_stride_batch,
    grad_v_stride_token,
    grad_v_stride_head,
    lse_stride_batch,
    lse_stride_head,
    seqlen_q,
    seqlen_k,
    batches,
    num_heads_k,
    group_size,
    key_tiles,
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
    WITH_K: tl.constexpr,
    WITH_V: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Grid: key tiles x key heads x batch. Of a causal mask the first tile has the most rows, and is the first.

    WITH_K, WITH_V: which gradients it makes; where the registers do not hold both, two launches make them.
    """
    program = tl.program_id(0)
    tile = program % key_tiles
    head = program // key_tiles % num_heads_k
    batch_index = program // key_tiles // num_heads_k
    q_start, sq = token_range(batch_index, cu_seqlens_q, HAS_CU_SEQLENS_Q, seqused_q, HAS_SEQUSED_Q, flags, seqlen_q)
    k_start, sk = token_range(batch_index, cu_seqlens_k, HAS_CU_SEQLENS_K, seqused_k, HAS_SEQUSED_K, flags, seqlen_k)
    batch = batch_index.to(tl.int64)
    k_row, q_row = k_start.to(tl.int64), q_start.to(tl.int64)
    q_token, grad_out_token = q_stride_token * STRIDE_UNIT, grad_out_stride_token * STRIDE_UNIT
    k_token, v_token = k_stride_token * STRIDE_UNIT, v_stride_token * STRIDE_UNIT
    grad_k_token, grad_v_token = grad_k_stride_token * STRIDE_UNIT, grad_v_stride_token * STRIDE_UNIT
    if WITH_K:
        grad_k += batch * (grad_k_stride_batch * STRIDE_UNIT) + head * (grad_k_stride_head * STRIDE_UNIT)
        grad_k += k_row * grad_k_token
        zero_rest(
            grad_k, sk, grad_k_token, cu_seqlens_k, HAS_CU_SEQLENS_K, batch_index, batches, seqlen_k, tile, key_tiles,
            flags, HEAD_DIM, HEAD_DIM_PADDED, BLOCK_N,
        )  # fmt: skip
    if WITH_V:
        grad_v += batch * (grad_v_stride_batch * STRIDE_UNIT) + head * (grad_v_stride_head * STRIDE_UNIT)
        grad_v += k_row * grad_v_token
        zero_rest(
            grad_v, sk, grad_v_token, cu_seqlens_k, HAS_CU_SEQLENS_K, batch_index, batches, seqlen_k, tile, key_tiles,
            flags, HEAD_DIM_V, HEAD_DIM_V_PADDED, BLOCK_N,
        )  # fmt: skip
    first = tile * BLOCK_N
    if first >= sk:
        return

    end = tl.minimum(first + BLOCK_N, sk)
    begin, stop, full_begin, full_stop = seeing_rows(first, end, sq, sk, window_left, window_right, attention_chunk)
    tile_begin, tile_end = begin // BLOCK_M, tl.cdiv(stop, BLOCK_M)
    full_tile = tl.minimum(tl.maximum(tl.cdiv(full_begin, BLOCK_M), tile_begin), tl.maximum(tile_end, tile_begin))
    full_end = tl.minimum(tl.maximum(full_stop // BLOCK_M, full_tile), tl.maximum(tile_end, full_tile))
    masked = tl.maximum(full_tile - tile_begin + tile_end - full_end, 0)

    k += batch * (k_stride_batch * STRIDE_UNIT) + head * (k_stride_head * STRIDE_UNIT) + k_row * k_token
    v += batch * (v_stride_batch * STRIDE_UNIT) + head * (v_stride_head * STRIDE_UNIT) + k_row * v_token
    k_tile = load_rows(k, first, k_token, 0, sk, HEAD_DIM, HEAD_DIM_PADDED, BLOCK_N, True, INTERPRETED)
    v_tile = k_tile  # without keys nothing reads it
    if WITH_K:
        v_tile = load_rows(v, first, v_token, 0, sk, HEAD_DIM_V, HEAD_DIM_V_PADDED, BLOCK_N, True, INTERPRETED)
    keys = first + tl.arange(0, BLOCK_N)
    # Two numbers of a key, not of each row: a thread has two keys and 16 rows of a tile.
    first_row, end_row, _, _ = seeing_rows(keys, keys + 1, sq, sk, window_left, window_right, attention_chunk)
    DTYPE: tl.constexpr = k.dtype.element_ty
    sum_k = tl.zeros((BLOCK_N, HEAD_DIM_PADDED), tl.float32)
    sum_v = tl.zeros((BLOCK_N, HEAD_DIM_V_PADDED), tl.float32)
    for member in range(group_size):
        q_head = head * group_size + member
        q_base = q + batch * (q_stride_batch * STRIDE_UNIT) + q_head * (q_stride_head * STRIDE_UNIT) + q_row * q_token
        grad_base = grad_out + batch * (grad_out_stride_batch * STRIDE_UNIT) + q_row * grad_out_token
        grad_base += q_head * (grad_out_stride_head * STRIDE_UNIT)
        row = batch * lse_stride_batch + q_head * lse_stride_head + q_start
        sum_k, sum_v = add_rows(
            sum_k, sum_v, k_tile, v_tile, q_base, grad_base, lse + row, delta + row,
            tile_begin, masked, full_tile - tile_begin, full_end - full_tile, first_row, end_row, begin, stop,
            q_token, grad_out_token, softmax_scale, softcap, HEAD_DIM, HEAD_DIM_V, HEAD_DIM_PADDED, HEAD_DIM_V_PADDED,
            BLOCK_M, SOFTCAP, WITH_K, WITH_V, DTYPE, True, INTERPRETED,
        )  # fmt: skip
        sum_k, sum_v = add_rows(
            sum_k, sum_v, k_tile, v_tile, q_base, grad_base, lse + row, delta + row,
            full_tile, full_end - full_tile, 0, 0, first_row, end_row, begin, stop,
            q_token, grad_out_token, softmax_scale, softcap, HEAD_DIM, HEAD_DIM_V, HEAD_DIM_PADDED, HEAD_DIM_V_PADDED,
            BLOCK_M, SOFTCAP, WITH_K, WITH_V, DTYPE, False, INTERPRETED,
        )  # fmt: skip
    if WITH_K:
        store_rows(grad_k, first, grad_k_token, sk, sum_k * softmax_scale, HEAD_DIM, HEAD_DIM_PADDED, BLOCK_N)
    if WITH_V:
        store_rows(grad_v, first, grad_v_token, sk, sum_v, HEAD_DIM_V, HEAD_DIM_V_PADDED, BLOCK_N)

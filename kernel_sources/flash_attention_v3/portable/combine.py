"""Joins partial results over splits of the keys: out = sum of out_s * exp(lse_s - lse).

Serves the forward kernel's splits, flash_attn_combine and merge_state, which are the same sum over
differently strided partials.
"""

import triton
import triton.language as tl
from flash_attention_v3.portable.epilogue import add_sink, half_power, normalized
from flash_attention_v3.portable.mainloop import LOG2_E
from flash_attention_v3.portable.sequence import (
    HAS_CU_SEQLENS_Q,
    HAS_LSE,
    HAS_SEQUSED_Q,
    HAS_SINKS,
    token_range,
)

# As forward.SIGNATURE: types of the run-time arguments in the launcher's order, strides in elements.
SIGNATURE = {
    "out_partial": "*partial",
    "lse_partial": "*fp32",
    "out": "*element",
    "lse": "*fp32",
    "cu_seqlens_q": "*i32",
    "seqused_q": "*i32",
    "sinks": "*sinks",
    "partial_stride_split": "i64",
    "partial_stride_batch": "i64",
    "partial_stride_token": "i64",
    "partial_stride_head": "i64",
    "lse_partial_stride_split": "i64",
    "lse_partial_stride_batch": "i64",
    "lse_partial_stride_token": "i64",
    "lse_partial_stride_head": "i64",
    "out_stride_batch": "i64",
    "out_stride_token": "i64",
    "out_stride_head": "i64",
    "lse_stride_batch": "i64",
    "lse_stride_token": "i64",
    "lse_stride_head": "i64",
    "seqlen_q": "i32",
    "num_heads": "i32",
    "item_tiles": "i32",
    "num_splits": "i32",
    "flags": "i32",
}
ALIGNED_POINTERS = ("out_partial", "out")


@triton.jit
def combine(
    out_partial,
    lse_partial,
    out,
    lse,
    cu_seqlens_q,
    seqused_q,
    sinks,
    partial_stride_split,
    partial_stride_batch,
    partial_stride_token,
    partial_stride_head,
    lse_partial_stride_split,
    lse_partial_stride_batch,
    lse_partial_stride_token,
    lse_partial_stride_head,
    out_stride_batch,
    out_stride_token,
    out_stride_head,
    lse_stride_batch,
    lse_stride_token,
    lse_stride_head,
    seqlen_q,
    num_heads,
    item_tiles,
    num_splits,
    flags,
    HEAD_DIM_V: tl.constexpr,
    HEAD_DIM_V_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
):
    """Grid: tiles of BLOCK_M (token, head) items x batch; BLOCK_SPLITS partials are in flight at once."""
    program = tl.program_id(0)
    batch = program // item_tiles
    start, length = token_range(batch, cu_seqlens_q, HAS_CU_SEQLENS_Q, seqused_q, HAS_SEQUSED_Q, flags, seqlen_q)
    items = (program % item_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    if (program % item_tiles) * BLOCK_M >= length * num_heads:
        return
    valid = items < length * num_heads
    tokens = start.to(tl.int64) + items // num_heads
    heads = items % num_heads
    columns = tl.arange(0, HEAD_DIM_V_PADDED)
    in_row = columns < HEAD_DIM_V

    out_rows = (
        batch * (partial_stride_batch * STRIDE_UNIT)
        + tokens * (partial_stride_token * STRIDE_UNIT)
        + heads * (partial_stride_head * STRIDE_UNIT)
    )
    lse_rows = batch * lse_partial_stride_batch + tokens * lse_partial_stride_token + heads * lse_partial_stride_head
    # Halves of exponents of 2, as add_sink and normalized take them.
    total_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, HEAD_DIM_V_PADDED), tl.float32)
    for first in range(0, num_splits, BLOCK_SPLITS):
        splits = (first + tl.arange(0, BLOCK_SPLITS)).to(tl.int64)
        present = (splits < num_splits)[:, None] & valid[None, :]
        part_lse = tl.load(
            lse_partial + (splits * lse_partial_stride_split)[:, None] + lse_rows[None, :],
            mask=present,
            other=float("-inf"),
        )
        # A split that saw nothing has lse -inf, or +inf as FlashAttention-2 marks it, and its partial may hold
        # anything; NaN goes on into the sum.
        part_lse = tl.where(part_lse == float("inf"), float("-inf"), part_lse * (0.5 * LOG2_E))
        seen = part_lse != float("-inf")
        pointers = (
            out_partial
            + (splits * (partial_stride_split * STRIDE_UNIT))[:, None, None]
            + out_rows[None, :, None]
            + columns[None, None, :]
        )
        part = tl.load(pointers, mask=seen[:, :, None] & in_row[None, None, :], other=0.0)
        new_max = tl.maximum(total_max, tl.max(part_lse, 0))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = half_power(part_lse, shift[None, :])
        rescale = half_power(total_max, shift)
        total = total * rescale + tl.sum(weights, 0)
        acc = acc * rescale[:, None] + tl.sum(weights[:, :, None] * part.to(tl.float32), 0)
        total_max = new_max

    if (flags & HAS_SINKS) != 0:
        acc, total, total_max = add_sink(acc, total, total_max, sinks, heads, flags)
    acc, row_lse = normalized(acc, total, total_max)

    out_base = out + batch * (out_stride_batch * STRIDE_UNIT)
    rows = tokens * (out_stride_token * STRIDE_UNIT) + heads * (out_stride_head * STRIDE_UNIT)
    out_mask = valid[:, None] & in_row[None, :]
    tl.store(out_base + rows[:, None] + columns[None, :], acc.to(out.dtype.element_ty), mask=out_mask)
    lse_rows = batch * lse_stride_batch + tokens * lse_stride_token + heads * lse_stride_head
    tl.store(lse + lse_rows, row_lse, mask=valid & ((flags & HAS_LSE) != 0))

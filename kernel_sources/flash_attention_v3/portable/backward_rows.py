"""delta = rowsum(grad_out * out) - grad_lse of each query row, and the sinks' gradient in parts.

A sink's gradient is the sum over its head's rows of -exp(sink - lse) delta: each program leaves the sum of its rows.
"""

import triton
import triton.language as tl
from flash_attention_v3.portable.backward_common import load_rows
from flash_attention_v3.portable.epilogue import load_sink
from flash_attention_v3.portable.mainloop import LOG2_E
from flash_attention_v3.portable.sequence import (
    HAS_CU_SEQLENS_Q,
    HAS_LSE,
    HAS_SEQUSED_Q,
    HAS_SINKS,
    token_range,
)

# As arguments.SIGNATURE: types of the run-time arguments in the launcher's order, strides in elements.
SIGNATURE = {
    "out": "*element",
    "grad_out": "*element",
    "lse": "*fp32",
    "grad_lse": "*fp32",
    "delta": "*fp32",
    "sinks": "*element",
    "grad_sinks": "*fp32",
    "cu_seqlens_q": "*i32",
    "seqused_q": "*i32",
    "out_stride_batch": "i64",
    "out_stride_token": "i64",
    "out_stride_head": "i64",
    "grad_out_stride_batch": "i64",
    "grad_out_stride_token": "i64",
    "grad_out_stride_head": "i64",
    "lse_stride_batch": "i64",
    "lse_stride_head": "i64",
    "seqlen_q": "i32",
    "num_heads": "i32",
    "row_tiles": "i32",
    "flags": "i32",
}
ALIGNED_POINTERS = ("out", "grad_out")


@triton.jit
def backward_rows(
    out,
    grad_out,
    lse,
    grad_lse,
    delta,
    sinks,
    grad_sinks,
    cu_seqlens_q,
    seqused_q,
    out_stride_batch,
    out_stride_token,
    out_stride_head,
    grad_out_stride_batch,
    grad_out_stride_token,
    grad_out_stride_head,
    lse_stride_batch,
    lse_stride_head,
    seqlen_q,
    num_heads,
    row_tiles,
    flags,
    HEAD_DIM_V: tl.constexpr,
    HEAD_DIM_V_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
):
    """Grid: heads x tiles of BLOCK_M rows x batch. grad_sinks: (batch x tiles, heads); HAS_LSE: grad_lse is there."""
    program = tl.program_id(0)
    head = program % num_heads
    tile = program // num_heads % row_tiles
    batch = program // num_heads // row_tiles
    start, length = token_range(batch, cu_seqlens_q, HAS_CU_SEQLENS_Q, seqused_q, HAS_SEQUSED_Q, flags, seqlen_q)
    tokens = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = tokens < length
    first = tile * BLOCK_M

    batch = batch.to(tl.int64)
    out_base = out + batch * (out_stride_batch * STRIDE_UNIT) + head * (out_stride_head * STRIDE_UNIT)
    out_base += start.to(tl.int64) * (out_stride_token * STRIDE_UNIT)
    grad_base = grad_out + batch * (grad_out_stride_batch * STRIDE_UNIT) + head * (grad_out_stride_head * STRIDE_UNIT)
    grad_base += start.to(tl.int64) * (grad_out_stride_token * STRIDE_UNIT)
    out_rows = load_rows(
        out_base, first, out_stride_token * STRIDE_UNIT, 0, length, HEAD_DIM_V, HEAD_DIM_V_PADDED, BLOCK_M, True, False
    )
    grad_rows = load_rows(
        grad_base, first, grad_out_stride_token * STRIDE_UNIT, 0, length, HEAD_DIM_V, HEAD_DIM_V_PADDED, BLOCK_M, True,
        False,
    )  # fmt: skip
    row_delta = tl.sum(out_rows.to(tl.float32) * grad_rows.to(tl.float32), 1)
    places = batch * lse_stride_batch + head * lse_stride_head + start + tokens
    row_delta -= tl.load(grad_lse + places, mask=valid & ((flags & HAS_LSE) != 0), other=0.0)
    tl.store(delta + places, row_delta, mask=valid)
    if (flags & HAS_SINKS) != 0:
        sink = load_sink(sinks, head, flags)
        row_lse = tl.load(lse + places, mask=valid, other=float("inf"))
        # A sink of -inf is none, and lse is -inf with it in a row that sees no key.
        weight = tl.where(sink != float("-inf"), tl.exp2(2.0 * sink - row_lse * LOG2_E), 0.0)
        tl.store(grad_sinks + program, -tl.sum(tl.where(valid, weight * row_delta, 0.0), 0))

"""What happens to a row behind its last key: the sink, the division, and rows that no query fills.

Maxima and sinks are halves of exponents of 2: a logit that float32 holds is an exponent that it may not hold.
"""

import triton
import triton.language as tl
from flash_attention_v3.portable.e4m3 import widened
from flash_attention_v3.portable.mainloop import LARGEST_FLOAT, LN_2, LOG2_E
from flash_attention_v3.portable.sequence import (
    HAS_CU_SEQLENS_Q,
    HAS_LSE,
    SINKS_ARE_FLOAT32,
    ZERO_REST,
    load_index,
)


@triton.jit
def load_sink(sinks, heads, flags):
    """Sink logits as halves of exponents of 2; the tensor is float32 or of the queries' type."""
    as_float32 = (flags & SINKS_ARE_FLOAT32) != 0
    wide = tl.load(sinks.to(tl.pointer_type(tl.float32)) + heads, mask=as_float32, other=0.0)
    narrow = tl.load(sinks + heads, mask=as_float32 == 0, other=0.0)
    return tl.where(as_float32, wide, widened(narrow, tl.float32)) * (0.5 * LOG2_E)


@triton.jit
def half_exponents(row_max, softmax_scale, SOFTCAP: tl.constexpr):
    """Maxima of scores as halves of exponents of 2, finite for rows that see a key."""
    # Capped scores are scaled already.
    scale = 0.5 * LOG2_E if SOFTCAP else softmax_scale * (0.5 * LOG2_E)
    half = tl.maximum(tl.minimum(row_max * scale, LARGEST_FLOAT), -LARGEST_FLOAT)
    return tl.where(row_max == float("-inf"), row_max, half)


@triton.jit
def half_power(half, shift):
    """2 to the power of 2 (half - shift), 1 where they are equal.

    Where `half` is a product, the compiler makes one FMA of it and the difference: what rounding the product took away
    is then left of a difference of 0, and is no small number for a large one.
    """
    return tl.exp2(2.0 * tl.where(half == shift, 0.0, half - shift))


@triton.jit
def add_sink(acc, row_sum, half_max, sinks, heads, flags):
    """One more logit a row, which has no value: it takes part in the sum alone."""
    sink = load_sink(sinks, heads, flags)
    with_sink = tl.maximum(half_max, sink)
    shift = tl.where(with_sink == float("-inf"), 0.0, with_sink)
    rescale = half_power(half_max, shift)
    row_sum = row_sum * rescale + half_power(sink, shift)
    acc = acc * rescale[:, None]
    return acc, row_sum, with_sink


@triton.jit
def normalized(acc, row_sum, half_max):
    """out and natural lse of rows; a row that sees nothing has a sum of 0: out 0 and lse -inf. A sum of NaN stays."""
    nothing = row_sum == 0.0
    out = acc * tl.where(nothing, 0.0, 1.0 / row_sum)[:, None]
    lse = half_max * (2.0 * LN_2) + tl.log2(row_sum) * LN_2
    return out, tl.where(nothing, float("-inf"), lse)


@triton.jit
def fill_rest(
    out_base,
    lse_base,
    out_stride_token,
    out_stride_head,
    lse_stride_head,
    cu_seqlens_q,
    q_start,
    sq,
    seqlen_q,
    batch,
    is_last,
    row_tile,
    row_tiles,
    head_tile,
    heads_per_tile,
    flags,
    HEAD_DIM_V: tl.constexpr,
    HEAD_DIM_V_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """0 in out, where ZERO_REST asks for it, and -inf in lse behind a sequence's queries.

    What lies behind the last sequence of a ragged tensor belongs to that one's programs.
    """
    owned = load_index(cu_seqlens_q, batch + 1, flags, HAS_CU_SEQLENS_Q, seqlen_q)
    owned = tl.where(is_last, seqlen_q, owned) - q_start - sq
    for begin in range(row_tile * BLOCK_M, owned * heads_per_tile, row_tiles * BLOCK_M):
        rest = begin + tl.arange(0, BLOCK_M)
        tokens = q_start.to(tl.int64) + sq + rest // heads_per_tile
        heads = head_tile * heads_per_tile + rest % heads_per_tile
        is_rest = rest < owned * heads_per_tile
        nothing = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        lse_pointers = lse_base + heads * lse_stride_head + tokens
        tl.store(lse_pointers, nothing, mask=is_rest & ((flags & HAS_LSE) != 0))
        columns = tl.arange(0, HEAD_DIM_V_PADDED)
        pointers = out_base + (tokens * out_stride_token + heads * out_stride_head)[:, None]
        mask = (is_rest & ((flags & ZERO_REST) != 0))[:, None] & (columns < HEAD_DIM_V)[None, :]
        zeros = tl.zeros((BLOCK_M, HEAD_DIM_V_PADDED), out_base.dtype.element_ty)
        tl.store(pointers + columns[None, :], zeros, mask=mask)

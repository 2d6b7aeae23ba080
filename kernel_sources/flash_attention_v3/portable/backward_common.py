"""What the kernels of the backward pass share: tiles of rows, masks by keys, weights from scores, and zeros."""

import triton
import triton.language as tl
from flash_attention_v3.portable.mainloop import LOG2_E
from flash_attention_v3.portable.sequence import load_index


@triton.jit
def load_rows(
    base,
    first,
    stride_token,
    begin,
    end,
    SIZE: tl.constexpr,
    SIZE_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """(BLOCK, SIZE_PADDED) rows from row `first` on; zero past SIZE, with MASKED also outside of begin to end.

    Those rows may hold anything, and a weight of 0 times NaN is NaN.
    """
    columns = tl.arange(0, SIZE_PADDED)
    places = tl.arange(0, BLOCK)
    pointers = base + first * stride_token
    pointers = pointers + (places * stride_token.to(tl.int32))[:, None] + columns[None, :]
    if MASKED:
        mask = ((first + places >= begin) & (first + places < end))[:, None]
        if SIZE != SIZE_PADDED:
            mask = mask & (columns < SIZE)[None, :]
        rows = tl.load(pointers, mask=mask, other=0.0)
    elif SIZE != SIZE_PADDED:
        rows = tl.load(pointers, mask=(columns < SIZE)[None, :], other=0.0)
    else:
        rows = tl.load(pointers)
    if INTERPRETED:  # which multiplies float32
        rows = rows.to(tl.float32)
    return rows


@triton.jit
def load_numbers(pointers, inside, MASKED: tl.constexpr):
    """A number of each row; with MASKED 0 in those that are not inside."""
    if MASKED:
        return tl.load(pointers, mask=inside, other=0.0)
    return tl.load(pointers)


@triton.jit
def rounded(x, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """float32 as an operand of the matrix unit."""
    x = x.to(DTYPE)
    if INTERPRETED:
        x = x.to(tl.float32)
    return x


@triton.jit
def store_rows(
    base,
    first,
    stride_token,
    end,
    rows,
    SIZE: tl.constexpr,
    SIZE_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows from row `first` on, those behind `end` left out."""
    columns = tl.arange(0, SIZE_PADDED)
    places = tl.arange(0, BLOCK)
    pointers = base + first * stride_token
    pointers = pointers + (places * stride_token.to(tl.int32))[:, None] + columns[None, :]
    mask = (first + places < end)[:, None] & (columns < SIZE)[None, :]
    tl.store(pointers, rows.to(base.dtype.element_ty), mask=mask)


@triton.jit
def zero_rest(
    base,
    length,
    stride_token,
    cu_seqlens,
    cu_bit,
    batch,
    batches,
    dense_length,
    tile,
    tiles,
    flags,
    SIZE: tl.constexpr,
    SIZE_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Zeros behind the `length` rows of a sequence that starts at `base`, up to the next one.

    What lies behind the last sequence of a ragged tensor, which has dense_length rows, belongs to that one's programs.
    """
    start = load_index(cu_seqlens, batch, flags, cu_bit, 0)
    end = load_index(cu_seqlens, batch + 1, flags, cu_bit, dense_length)
    owned = tl.where(batch == batches - 1, dense_length, end) - start
    for first in range(length + tile * BLOCK, owned, tiles * BLOCK):
        zeros = tl.zeros((BLOCK, SIZE_PADDED), tl.float32)
        store_rows(base, first, stride_token, owned, zeros, SIZE, SIZE_PADDED, BLOCK)


@triton.jit
def seeing_rows(first, end, seqlen_q, seqlen_k, window_left, window_right, attention_chunk):
    """Query rows from begin to end, those that see a key from `first` to `end`; and those that see all of them."""
    shift = seqlen_k - seqlen_q
    # Bounds past the lengths mean the same as the lengths and keep differences inside 32 bits.
    right = tl.minimum(window_right, seqlen_q)
    left = tl.minimum(window_left, seqlen_k)
    bounded = window_right >= 0
    begin = tl.where(bounded, first - right - shift, 0)
    full_begin = tl.where(bounded, end - 1 - right - shift, 0)
    bounded = window_left >= 0
    stop = tl.where(bounded, end + left - shift, seqlen_q)
    full_stop = tl.where(bounded, first + left + 1 - shift, seqlen_q)
    chunked = attention_chunk > 0
    chunk = tl.maximum(attention_chunk, 1)
    low, high = first // chunk * chunk, (end - 1) // chunk * chunk
    begin = tl.where(chunked, tl.maximum(begin, low - shift), begin)
    stop = tl.where(chunked, tl.minimum(stop, high + tl.minimum(chunk, seqlen_k) - shift), stop)
    full_begin = tl.where(chunked, tl.maximum(full_begin, high - shift), full_begin)
    full_stop = tl.where(chunked, tl.minimum(full_stop, low + tl.minimum(chunk, seqlen_k) - shift), full_stop)
    begin, full_begin = tl.maximum(begin, 0), tl.maximum(full_begin, 0)
    return begin, tl.minimum(stop, seqlen_q), full_begin, tl.minimum(full_stop, seqlen_q)


@triton.jit
def weights_of(scores, row_lse, softmax_scale, softcap, SOFTCAP: tl.constexpr):
    """exp(score - lse) of products q k^T, and the derivative of the cap; row_lse is in exponents of 2."""
    if SOFTCAP:
        # A finite factor: 0 times infinity would be NaN.
        to_exponent = tl.minimum(softmax_scale * (2.0 * LOG2_E) / softcap, 1e30)
        # tanh(x) = 1 - 2 u and 1 - tanh(x)^2 = 4 u (1 - u) with u = 1 / (exp(2x) + 1): nothing cancels at both ends.
        u = 1.0 / (tl.exp2(scores * to_exponent) + 1.0)
        return tl.exp2((1.0 - 2.0 * u) * (softcap * LOG2_E) - row_lse), 4.0 * u * (1.0 - u)
    return tl.exp2(scores * (softmax_scale * LOG2_E) - row_lse), scores

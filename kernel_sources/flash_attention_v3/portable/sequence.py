"""Where a sequence's tokens lie, and which keys a query token sees.

Optional tensors are null pointers whose bit in `flags` is clear; jit_kernel/fa3/portable/planning.py sets the bits.
"""

import triton
import triton.language as tl

HAS_CU_SEQLENS_Q = tl.constexpr(1)
HAS_CU_SEQLENS_K = tl.constexpr(2)
HAS_CU_SEQLENS_K_NEW = tl.constexpr(4)
HAS_SEQUSED_Q = tl.constexpr(8)
HAS_SEQUSED_K = tl.constexpr(16)
HAS_CACHE_BATCH_IDX = tl.constexpr(32)
HAS_CACHE_LEFTPAD = tl.constexpr(64)
HAS_LSE = tl.constexpr(128)
HAS_SINKS = tl.constexpr(256)
SINKS_ARE_FLOAT32 = tl.constexpr(512)
HAS_PAGE_TABLE = tl.constexpr(1024)
HAS_ROTARY = tl.constexpr(2048)
ROTARY_INTERLEAVED = tl.constexpr(4096)
HAS_ROTARY_SEQLENS = tl.constexpr(8192)
ROTATE_QUERY_BY_TOKEN = tl.constexpr(16384)
ZERO_REST = tl.constexpr(32768)
HAS_Q_DESCALE = tl.constexpr(65536)
HAS_K_DESCALE = tl.constexpr(131072)
HAS_V_DESCALE = tl.constexpr(262144)
HAS_K_SCALE = tl.constexpr(524288)
HAS_V_SCALE = tl.constexpr(1048576)


@triton.jit
def load_index(pointer, index, flags, bit, default):
    """pointer[index] where the tensor is present, else default."""
    return tl.load(pointer + index, mask=(flags & bit) != 0, other=default)


@triton.jit
def token_range(batch, cu_seqlens, cu_bit, used, used_bit, flags, dense_length):
    """First row in the tensor, and number of tokens, of a ragged or dense sequence.

    A dense sequence starts at row 0 of its own batch entry.
    """
    start = load_index(cu_seqlens, batch, flags, cu_bit, 0)
    end = load_index(cu_seqlens, batch + 1, flags, cu_bit, dense_length)
    length = load_index(used, batch, flags, used_bit, end - start)
    return start, tl.minimum(length, end - start)


@triton.jit
def call_row(batch, start, dense_length, flags):
    """The first query row of a sequence among all rows of the call."""
    dense = (flags & HAS_CU_SEQLENS_Q) == 0
    return tl.where(dense, batch.to(tl.int64) * dense_length, start)


@triton.jit
def first_visible_key(token, seqlen_q, seqlen_k, window_left, attention_chunk):
    """First key that a query token sees; never negative."""
    position = token + (seqlen_k - seqlen_q)
    # The smaller bound means the same and keeps the difference inside 32 bits.
    first = tl.where(window_left >= 0, position - tl.minimum(window_left, seqlen_k), 0)
    # A negative position has no chunk with keys in it: end_visible_key answers 0 there.
    chunk = tl.maximum(attention_chunk, 1)
    chunk_first = (tl.maximum(position, 0) // chunk) * chunk
    first = tl.where(attention_chunk > 0, tl.maximum(first, chunk_first), first)
    return tl.maximum(first, 0)


@triton.jit
def end_visible_key(token, seqlen_q, seqlen_k, window_right, attention_chunk):
    """One past the last key that a query token sees; at most seqlen_k, never negative."""
    position = token + (seqlen_k - seqlen_q)
    bounded_end = position + tl.minimum(window_right, seqlen_q) + 1
    end = tl.where(window_right >= 0, bounded_end, seqlen_k)
    chunk = tl.maximum(attention_chunk, 1)
    chunk_end = tl.where(position < 0, 0, (tl.maximum(position, 0) // chunk) * chunk + chunk)
    end = tl.where(attention_chunk > 0, tl.minimum(end, chunk_end), end)
    return tl.maximum(tl.minimum(end, seqlen_k), 0)


@triton.jit
def is_drafted(row, begin, words, keys):
    """(rows, keys): whether the bit of a draft mask is set that a key has; keys without one are seen.

    row: (rows,) pointers to each query token's words; begin: the first key with a bit, which may be negative.
    """
    bits = keys - begin
    has_bit = (bits >= 0) & (bits < 32 * words)
    pointers = row[:, None] + (bits // 32)[None, :]
    found = tl.load(pointers, mask=has_bit[None, :], other=-1)
    return (found >> (bits & 31)[None, :]) & 1 != 0

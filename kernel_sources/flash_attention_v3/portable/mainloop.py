"""The loop over key tiles: loads, scores, online softmax and the sum over values."""

import triton
import triton.language as tl
from flash_attention_v3.portable.sequence import is_drafted

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LARGEST_FLOAT = tl.constexpr(3.4028234663852886e38)
LARGEST_SCALE = tl.constexpr(2.358e38)  # whose product with LOG2_E is finite


@triton.jit
def load_pages(
    table_row, first, seen_begin, seen_end, leftpad, page_size, BLOCK_N: tl.constexpr, INTERPRETED: tl.constexpr
):
    """(BLOCK_N,) page numbers of the keys from `first` on, and their places inside these pages."""
    # Table entries of keys that no row sees may hold anything: those lanes take the first or last key's that is seen.
    keys = tl.maximum(tl.minimum(first + tl.arange(0, BLOCK_N), seen_end - 1), seen_begin)
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
    seen_begin,
    seen_end,
    drafted,
    stride_batch,
    stride_token,
    SIZE: tl.constexpr,
    SIZE_PADDED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGED: tl.constexpr,
    NARROW: tl.constexpr,
    MASKED: tl.constexpr,
    LEFT_EDGE: tl.constexpr,
    DRAFT: tl.constexpr,
):
    """(BLOCK_N, SIZE_PADDED) keys or values from key `first` on; zero where no row sees the key, and past SIZE."""
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
        # What no row sees may hold anything, and a weight of 0 times NaN is NaN.
        seen = first + offsets < seen_end
        if LEFT_EDGE:
            seen = seen & (first + offsets >= seen_begin)
        if DRAFT:
            seen = seen & drafted
        mask = seen[:, None]
        if SIZE != SIZE_PADDED:
            mask = mask & (columns < SIZE)[None, :]
        return tl.load(pointers, mask=mask, other=0.0)
    if SIZE != SIZE_PADDED:
        return tl.load(pointers, mask=(columns < SIZE)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def is_within(first_key, end_key, keys):
    """(rows, keys): whether a key lies between those that each row sees."""
    return (keys[None, :] >= first_key[:, None]) & (keys[None, :] < end_key[:, None])


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
    seen_begin,
    seen_end,
    draft_row,
    draft_begin,
    draft_words,
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
    DRAFT: tl.constexpr,
    NARROW: tl.constexpr,
    MASKED: tl.constexpr,
    LEFT_EDGE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Online softmax over the key tiles tile_begin <= tile < tile_end; maxima in units of scores.

    Keys from seen_begin to seen_end are seen by some row of the tile, and no others are read; without LEFT_EDGE every
    key of these tiles is behind seen_begin. DRAFT, which MASKED goes with, means that a draft mask may hide some of the
    keys: draft_row holds a pointer to each row's words, draft_begin is the first key with a bit.

    The maximum is taken before scaling, one multiplication less per score: the scale is positive.
    """
    if SOFTCAP:
        # A finite factor: 0 times infinity would be NaN.
        to_exponent = tl.minimum(2.0 * LOG2_E * softmax_scale / softcap, 1e30)
        scale = LOG2_E
    else:
        scale = tl.minimum(softmax_scale, LARGEST_SCALE) * LOG2_E
    pages, slots = tile_begin, tile_begin  # without pages nothing reads them
    if PAGED:
        pages, slots = load_pages(
            table_row, tile_begin * BLOCK_N, seen_begin, seen_end, leftpad, page_size, BLOCK_N, INTERPRETED
        )
    for tile in range(tile_begin, tile_end):
        first = tile * BLOCK_N
        drafted = tile  # without a draft mask nothing reads it
        if DRAFT:
            keys = first + tl.arange(0, BLOCK_N)
            visible = is_within(first_key, end_key, keys) & is_drafted(draft_row, draft_begin, draft_words, keys)
            drafted = tl.max(visible.to(tl.int32), 0) > 0
        k_tile = load_keys(
            k, pages, slots, first, seen_begin, seen_end, drafted, k_stride_batch, k_stride_token,
            HEAD_DIM, HEAD_DIM_PADDED, BLOCK_N, PAGED, NARROW, MASKED, LEFT_EDGE, DRAFT,
        )  # fmt: skip
        v_tile = load_keys(
            v, pages, slots, first, seen_begin, seen_end, drafted, v_stride_batch, v_stride_token,
            HEAD_DIM_V, HEAD_DIM_V_PADDED, BLOCK_N, PAGED, NARROW, MASKED, LEFT_EDGE, DRAFT,
        )  # fmt: skip
        if PAGED:
            # A tile ahead: decoding over pages of 64 takes 4240 GB/s so, 3690 with the lookup in front.
            pages, slots = load_pages(
                table_row, first + BLOCK_N, seen_begin, seen_end, leftpad, page_size, BLOCK_N, INTERPRETED
            )
        if INTERPRETED:
            k_tile = k_tile.to(tl.float32)
        scores = tl.dot(q_tile, tl.trans(k_tile))
        if SOFTCAP:
            # tanh(x) = 1 - 2 / (exp(2x) + 1): exact to 1e-7 at both ends, unlike tanh.approx.
            exponent = tl.exp2(scores * to_exponent)
            scores = softcap * (1.0 - 2.0 / (exponent + 1.0))
        if MASKED:
            if not DRAFT:
                visible = is_within(first_key, end_key, first + tl.arange(0, BLOCK_N))
            scores = tl.where(visible, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        top = new_max
        if MASKED:
            top = tl.where(new_max == float("-inf"), 0.0, new_max)
        # The difference comes first, so that the exponent of the maximum is 0 however large the product with the scale.
        weights = tl.exp2((scores - top[:, None]) * scale)
        rescale = tl.exp2((row_max - top) * scale)
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        acc = acc * rescale[:, None]
        weights = weights.to(v_tile.dtype)
        if INTERPRETED:
            weights = weights.to(tl.float32)
            v_tile = v_tile.to(tl.float32)
        acc = tl.dot(weights, v_tile, acc)
        row_max = new_max
    return acc, row_sum, row_max

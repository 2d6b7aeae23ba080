"""The loop over key tiles: loads, scores, online softmax and the sum over values."""

import triton
import triton.language as tl
from flash_attention_v3.portable.e4m3 import widened, widened_by_fours
from flash_attention_v3.portable.loads import are_seen, load_factors, load_keys, load_pages, moved
from flash_attention_v3.portable.sequence import HAS_K_SCALE, HAS_V_SCALE, is_drafted

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LARGEST_FLOAT = tl.constexpr(3.4028234663852886e38)
LARGEST_SCALE = tl.constexpr(2.358e38)  # whose product with LOG2_E is finite


@triton.jit
def is_within(first_key, end_key, keys):
    """(rows, keys): whether a key lies between those that each row sees."""
    return (keys[None, :] >= first_key[:, None]) & (keys[None, :] < end_key[:, None])


@triton.jit
def operand(x, CONVERT: tl.constexpr, PURE: tl.constexpr, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """A tile of queries, keys or values as the matrix unit takes it; the interpreter multiplies float32."""
    if INTERPRETED:
        x = widened(x, tl.float32)
    elif CONVERT:
        x = widened(x, DTYPE) if x.dtype == tl.uint8 else widened_by_fours(x, DTYPE, PURE)
    return x


@triton.jit
def score(
    q_tile,
    qv_tile,
    k_tile,
    v_tile,
    k_factors,
    v_factors,
    QV: tl.constexpr,
    SCALED: tl.constexpr,
):
    """(rows, keys): q k^T, qv v^T or both; with SCALED each product times its keys' factors, one or (1, keys)."""
    if QV > 0:
        scores = tl.dot(qv_tile, tl.trans(v_tile))
        if SCALED:
            scores = scores * v_factors
            if QV == 1:
                scores += tl.dot(q_tile, tl.trans(k_tile)) * k_factors
        elif QV == 1:
            scores = tl.dot(q_tile, tl.trans(k_tile), scores)
    else:
        scores = tl.dot(q_tile, tl.trans(k_tile))
        if SCALED:
            scores = scores * k_factors
    return scores


@triton.jit
def attend(
    acc,
    row_sum,
    row_max,
    v_top,
    q_tile,
    qv_tile,
    k,
    v,
    k_scale,
    v_scale,
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
    k_scale_stride_batch,
    k_scale_stride_token,
    v_scale_stride_batch,
    v_scale_stride_token,
    k_factor,
    v_factor,
    flags,
    softmax_scale,
    softcap,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    HEAD_DIM_V_PADDED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGED: tl.constexpr,
    LEAD: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DRAFT: tl.constexpr,
    NARROW: tl.constexpr,
    QV: tl.constexpr,
    CACHE_E4M3: tl.constexpr,
    TOKEN_SCALES: tl.constexpr,
    CONVERT: tl.constexpr,
    STAGED: tl.constexpr,
    WIDE: tl.constexpr,
    MASKED: tl.constexpr,
    LEFT_EDGE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Online softmax over the key tiles tile_begin <= tile < tile_end; maxima in units of scores.

    Keys from seen_begin to seen_end are seen by some row of the tile, and no others are read; without LEFT_EDGE every
    key of these tiles is behind seen_begin. DRAFT, which MASKED goes with, means that a draft mask may hide some of the
    keys: draft_row holds a pointer to each row's words, draft_begin is the first key with a bit.

    The maximum is taken before scaling, one multiplication less per score: the scale is positive.

    PAGED: 0 without pages, 1 with, 2 where a page holds a whole number of tiles: a tile's keys lie in one page then.

    CACHE_E4M3: keys and values are e4m3. With CONVERT they become WIDE, of 16 bits, before they meet the queries; else
    the queries are e4m3 too. The values become WIDE before they meet the weights, with STAGED before they change their
    layout for it. k_factor and v_factor are those of
    products q k^T and qv v^T where softmax_scale has them not: with QV or TOKEN_SCALES.
    TOKEN_SCALES: one factor more of each key and value. Those of values are taken as shares of the largest so far,
    v_top, so that weights times shares are not too small for 16 bits; acc is in units of v_top.
    """
    SCALED: tl.constexpr = TOKEN_SCALES or (CACHE_E4M3 and QV > 0)
    if SOFTCAP:
        # A finite factor: 0 times infinity would be NaN.
        to_exponent = tl.minimum(softmax_scale * (2.0 * LOG2_E) / softcap, 1e30)
        scale = LOG2_E
    else:
        scale = tl.minimum(softmax_scale, LARGEST_SCALE) * LOG2_E
    pages, slots = tile_begin, tile_begin  # without pages nothing reads them
    begin = tile_begin * BLOCK_N
    if PAGED == 1:
        pages, slots = load_pages(
            table_row, begin, seen_begin, seen_end, leftpad, page_size, BLOCK_N, False, INTERPRETED
        )
        if LEAD == 4:
            pages_1, slots_1 = load_pages(
                table_row, begin + BLOCK_N, seen_begin, seen_end, leftpad, page_size, BLOCK_N, False, INTERPRETED
            )
            pages_2, slots_2 = load_pages(
                table_row,
                begin + 2 * BLOCK_N,
                seen_begin,
                seen_end,
                leftpad,
                page_size,
                BLOCK_N,
                PAGED == 2,
                INTERPRETED,
            )
            pages_3, slots_3 = load_pages(
                table_row,
                begin + 3 * BLOCK_N,
                seen_begin,
                seen_end,
                leftpad,
                page_size,
                BLOCK_N,
                PAGED == 2,
                INTERPRETED,
            )
    for tile in range(tile_begin, tile_end):
        first = tile * BLOCK_N
        drafted, seen = tile, tile  # without a mask nothing reads them
        if DRAFT:
            keys = first + tl.arange(0, BLOCK_N)
            visible = is_within(first_key, end_key, keys) & is_drafted(draft_row, draft_begin, draft_words, keys)
            drafted = tl.max(visible.to(tl.int32), 0) > 0
        if MASKED:
            seen = are_seen(first, seen_begin, seen_end, drafted, BLOCK_N, LEFT_EDGE, DRAFT)
        if PAGED == 2:
            pages, slots = load_pages(
                table_row, first, seen_begin, seen_end, leftpad, page_size, BLOCK_N, True, INTERPRETED
            )
        k_operand, k_factors, v_factors = tile, k_factor, v_factor
        if QV < 2:
            k_tile = load_keys(
                k, pages, slots, first, seen, k_stride_batch, k_stride_token,
                HEAD_DIM, HEAD_DIM_PADDED, BLOCK_N, PAGED, NARROW, MASKED,
            )  # fmt: skip
        v_tile = load_keys(
            v, pages, slots, first, seen, v_stride_batch, v_stride_token,
            HEAD_DIM_V, HEAD_DIM_V_PADDED, BLOCK_N, PAGED, NARROW, MASKED,
        )  # fmt: skip
        if TOKEN_SCALES:
            k_scales = load_factors(
                k_scale, pages, slots, first, seen, (flags & HAS_K_SCALE) != 0,
                k_scale_stride_batch, k_scale_stride_token, BLOCK_N, PAGED, MASKED,
            )  # fmt: skip
            v_scales = load_factors(
                v_scale, pages, slots, first, seen, (flags & HAS_V_SCALE) != 0,
                v_scale_stride_batch, v_scale_stride_token, BLOCK_N, PAGED, MASKED,
            )  # fmt: skip
            k_factors, v_factors = (k_scales * k_factor)[None, :], (v_scales * v_factor)[None, :]
        if PAGED == 1:
            # Ahead, or the next keys wait for it: 4 tiles ahead decoding over pages of 1 reads 4061 GB/s, 1 tile 2764.
            if LEAD == 4:
                pages, slots = moved(pages_1, INTERPRETED), moved(slots_1, INTERPRETED)
                pages_1, slots_1 = moved(pages_2, INTERPRETED), moved(slots_2, INTERPRETED)
                pages_2, slots_2 = moved(pages_3, INTERPRETED), moved(slots_3, INTERPRETED)
                pages_3, slots_3 = load_pages(
                    table_row,
                    first + 4 * BLOCK_N,
                    seen_begin,
                    seen_end,
                    leftpad,
                    page_size,
                    BLOCK_N,
                    PAGED == 2,
                    INTERPRETED,
                )
            else:
                pages, slots = load_pages(
                    table_row,
                    first + BLOCK_N,
                    seen_begin,
                    seen_end,
                    leftpad,
                    page_size,
                    BLOCK_N,
                    PAGED == 2,
                    INTERPRETED,
                )
        if QV < 2:
            k_operand = operand(k_tile, CONVERT, True, WIDE, INTERPRETED)
        values = operand(v_tile, CACHE_E4M3, not STAGED, WIDE, INTERPRETED)
        # What meets qv: values as they are where both are e4m3.
        v_operand = values if CONVERT or not CACHE_E4M3 else operand(v_tile, False, True, WIDE, INTERPRETED)
        scores = score(q_tile, qv_tile, k_operand, v_operand, k_factors, v_factors, QV, SCALED)
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
        if TOKEN_SCALES:
            new_top = tl.maximum(v_top, tl.max(tl.abs(v_scales), 0))
            to_share = tl.where(new_top > 0.0, 1.0 / new_top, 0.0)
            weights = weights * (v_scales * to_share)[None, :]
            rescale = rescale * (v_top * to_share)
            v_top = new_top
        acc = acc * rescale[:, None]
        weights = weights.to(WIDE)
        if INTERPRETED:
            weights = weights.to(tl.float32)
        acc = tl.dot(weights, values, acc)
        row_max = new_max
    return acc, row_sum, row_max, v_top

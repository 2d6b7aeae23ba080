"""Loads of a tile of keys: page numbers, rows of keys and values, and one factor of each row."""

import triton
import triton.language as tl


@triton.jit
def load_pages(
    table_row,
    first,
    seen_begin,
    seen_end,
    leftpad,
    page_size,
    BLOCK_N: tl.constexpr,
    WHOLE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """(BLOCK_N,) page numbers of the keys from `first` on, and their places in these pages; with WHOLE one for all."""
    # Table entries of keys that no row sees may hold anything: those lanes take the first or last key's that is seen.
    if WHOLE:
        positions = first
        entries = tl.maximum(tl.minimum(first, seen_end - 1), 0) // page_size
    else:
        keys = tl.maximum(tl.minimum(first + tl.arange(0, BLOCK_N), seen_end - 1), seen_begin)
        # Where there is no key at all, the lookup in front of the loop must not lead out of the table.
        positions = tl.where(seen_end > 0, leftpad, 0) + keys
        entries = positions // page_size
    if INTERPRETED:
        pages = tl.load(table_row + entries)
    else:
        # Not tl.load: the software pipeline would spend its stages on the table, not on the keys.
        pages = tl.inline_asm_elementwise(
            "ld.global.nc.b32 $0, [$1];", "=r,l", [(table_row + entries).to(tl.int64)], tl.int32, True, 1
        )
    return pages, positions % page_size


@triton.jit
def moved(x, INTERPRETED: tl.constexpr):
    """int32 x, by an instruction: the software pipeline takes no loop that hands a variable on as it came."""
    if INTERPRETED:
        return x
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], tl.int32, True, 1)


@triton.jit
def are_seen(first, seen_begin, seen_end, drafted, BLOCK_N: tl.constexpr, LEFT_EDGE: tl.constexpr, DRAFT: tl.constexpr):
    """(BLOCK_N,): which keys from `first` on some row sees. The others' memory may hold anything."""
    keys = first + tl.arange(0, BLOCK_N)
    seen = keys < seen_end
    if LEFT_EDGE:
        seen = seen & (keys >= seen_begin)
    if DRAFT:
        seen = seen & drafted
    return seen


@triton.jit
def load_keys(
    base,
    pages,
    slots,
    first,
    seen,
    stride_batch,
    stride_token,
    SIZE: tl.constexpr,
    SIZE_PADDED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGED: tl.constexpr,
    NARROW: tl.constexpr,
    MASKED: tl.constexpr,
):
    """(BLOCK_N, SIZE_PADDED) keys or values from key `first` on; zero where no row sees the key, and past SIZE."""
    columns = tl.arange(0, SIZE_PADDED)
    if PAGED == 1:
        rows = pages.to(tl.int64) * stride_batch + slots * stride_token
        pointers = base + rows[:, None] + columns[None, :]
    else:
        if PAGED == 2:
            tile = base + pages.to(tl.int64) * stride_batch + slots * stride_token
        else:
            tile = base + first.to(tl.int64) * stride_token
        if NARROW:
            stride_token = stride_token.to(tl.int32)
        pointers = tile + (tl.arange(0, BLOCK_N) * stride_token)[:, None] + columns[None, :]
    if MASKED:
        # What no row sees may hold anything, and a weight of 0 times NaN is NaN.
        mask = seen[:, None]
        if SIZE != SIZE_PADDED:
            mask = mask & (columns < SIZE)[None, :]
        return tl.load(pointers, mask=mask, other=0.0)
    if SIZE != SIZE_PADDED:
        return tl.load(pointers, mask=(columns < SIZE)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def load_factors(
    base,
    pages,
    slots,
    first,
    seen,
    present,
    stride_batch,
    stride_token,
    BLOCK_N: tl.constexpr,
    PAGED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """(BLOCK_N,) one float32 factor of each key from `first` on: 1 without the tensor, 0 where no row sees the key."""
    if PAGED == 1:
        places = pages.to(tl.int64) * stride_batch + slots * stride_token
    elif PAGED == 2:
        places = pages.to(tl.int64) * stride_batch + (slots + tl.arange(0, BLOCK_N)) * stride_token
    else:
        places = (first + tl.arange(0, BLOCK_N)).to(tl.int64) * stride_token
    if MASKED:
        return tl.where(seen, tl.load(base + places, mask=seen & present, other=1.0), 0.0)
    return tl.load(base + places, mask=(places >= 0) & present, other=1.0)

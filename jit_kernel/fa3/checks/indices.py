"""The checks of an attention call that read index tensors: lengths, offsets, page tables.

On a GPU reading them costs a synchronisation, so there they run under JIT_KERNEL_CHECK_INDICES=1 alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from jit_kernel.fa3.call import KVCACHE, Call
from jit_kernel.fa3.checks.shapes import Facts

_SMALL_TABLE = 256  # entries up to which a plain loop is faster than four torch operators


def check(call: Call, facts: Facts) -> tuple[int, int]:
    """Check the values of every index tensor of a call whose shapes were checked.

    Returns the longest query and the longest key length. Raises ValueError.
    """
    q_lengths = _lengths(call, "cu_seqlens_q", "seqused_q", facts.q_rows, facts.batch)
    if call.function != KVCACHE:
        if call.page_table is not None:
            k_lengths = _values(call.seqused_k)
            none = [0] * facts.batch
            _need_room("seqused_k", k_lengths, none, facts)
            _check_pages(call, k_lengths, q_lengths, none, none, None, facts)
        else:
            k_lengths = _lengths(call, "cu_seqlens_k", "seqused_k", facts.k_rows, facts.batch)
        return max(q_lengths, default=0), max(k_lengths, default=0)
    new_lengths = [0] * facts.batch
    if call.k_new is not None:
        new_lengths = _lengths(call, "cu_seqlens_k_new", "", facts.new_rows, facts.batch)
    k_lengths = _check_cache(call, q_lengths, new_lengths, facts)
    if call.rotary_cos is not None:
        _check_rotary(call, q_lengths, new_lengths, facts)
    return max(q_lengths, default=0), max(k_lengths, default=0)


def _values(tensor: Any) -> list[int]:
    values: list[int] = tensor.tolist()
    return values


def _lengths(call: Call, offsets: str, used: str, rows: int, batch: int) -> list[int]:
    """The length of each sequence, from offsets into `rows` rows, from `rows` itself, cut by `used`."""
    given: Tensor | None = getattr(call, offsets)
    if given is None:
        lengths = [rows] * batch
    else:
        numbers = _values(given)
        if numbers[0] != 0:
            raise ValueError(f"{offsets}[0] is {numbers[0]}; it must be 0")
        lengths = [end - start for start, end in itertools.pairwise(numbers)]
        if lengths and min(lengths) < 0:
            at = next(i for i, length in enumerate(lengths) if length < 0)
            raise ValueError(
                f"{offsets} decreases from {numbers[at]} to {numbers[at + 1]} at [{at + 1}]; it must never decrease"
            )
        if numbers[-1] > rows:
            raise ValueError(f"{offsets}[-1] is {numbers[-1]}; it must be at most {rows}, the rows that there are")
    limits: Tensor | None = getattr(call, used) if used else None
    if limits is None:
        return lengths
    counts = _values(limits)
    for at, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        if not 0 <= count <= length:
            raise ValueError(f"{used}[{at}] is {count}; it must be between 0 and {length}, the sequence's rows")
    return counts


def _need_room(name: str, lengths: Sequence[int], new_lengths: Sequence[int], facts: Facts) -> None:
    """Room in the cache, or in the pages of the page table, for the old keys and for the new ones."""
    for at, (length, new) in enumerate(zip(lengths, new_lengths, strict=True)):
        if not 0 <= length <= facts.k_rows:
            where = f"page_table is too narrow: it has room for {facts.k_rows}" if facts.page_size else "the cache"
            raise ValueError(f"{name}[{at}] is {length}; it must be between 0 and {facts.k_rows} ({where})")
        if length + new > facts.k_rows:
            where = "page_table is too narrow" if facts.page_size else "k_cache is too short"
            raise ValueError(
                f"k appends {new} keys to sequence {at} at {name}[{at}] = {length}; "
                f"{where}: there must be room for {length + new} keys and there is for {facts.k_rows}"
            )


def _check_cache(call: Call, q_lengths: list[int], new_lengths: list[int], facts: Facts) -> list[int]:
    """cache_seqlens, cache_leftpad, cache_batch_idx and page_table; returns the lengths with the new keys."""
    batch = facts.batch
    old = [facts.k_rows] * batch if call.seqused_k is None else _values(call.seqused_k)
    _need_room("cache_seqlens", old, new_lengths, facts)
    leftpad = [0] * batch
    if call.cache_leftpad is not None:
        leftpad = _values(call.cache_leftpad)
        for at, (pad, length) in enumerate(zip(leftpad, old, strict=True)):
            if not 0 <= pad <= length:
                raise ValueError(
                    f"cache_leftpad[{at}] is {pad}; it must be between 0 and {length}, the sequence's length"
                )
    batch_idx = None
    if call.cache_batch_idx is not None:
        batch_idx = _values(call.cache_batch_idx)
        for at, row in enumerate(batch_idx):
            if not 0 <= row < facts.cache_rows:
                what = "page_table" if facts.page_size else "k_cache"
                raise ValueError(
                    f"cache_batch_idx[{at}] is {row}; it must be between 0 and {facts.cache_rows - 1}, a row of {what}"
                )
        if call.k_new is not None and len(set(batch_idx)) < batch:
            raise ValueError(f"cache_batch_idx is {batch_idx}; with k its rows must differ: each is appended to once")
    lengths = [length + new for length, new in zip(old, new_lengths, strict=True)]
    if call.page_table is not None:
        _check_pages(call, lengths, q_lengths, new_lengths, leftpad, batch_idx, facts)
    return [length - pad for length, pad in zip(lengths, leftpad, strict=True)]


def _first_seen(call: Call, queries: int, keys: int) -> int:
    """The first of a sequence's keys that some query sees, or `keys` where none does."""
    if not queries:
        return keys
    left, position, chunk = call.window_size[0], keys - queries, call.attention_chunk or 0
    first = position - left if left >= 0 else 0
    if chunk:
        first = max(first, position // chunk * chunk)
    return min(max(first, 0), keys)


def _check_pages(
    call: Call,
    lengths: Sequence[int],
    q_lengths: Sequence[int],
    new_lengths: Sequence[int],
    leftpad: Sequence[int],
    batch_idx: Sequence[int] | None,
    facts: Facts,
) -> None:
    """Every entry that is read names a page: those with a key that some query sees, or with a new one.

    The others may hold anything. On the CPU the kernel looks for itself and raises the same error text
    (cpu/entry/forward.h).
    """
    table = call.page_table
    if facts.on_host or table is None:
        return
    size, pages = facts.page_size, facts.pages
    used = [-(-length // size) for length in lengths]
    widest = max(used, default=0)
    if widest == 0:
        return
    read = table[:, :widest]
    if read.numel() > _SMALL_TABLE:
        low, high = torch.aminmax(read)
        if int(low) >= 0 and int(high) < pages:
            return
    rows = read.tolist()
    for at, count in enumerate(used):
        row = at if batch_idx is None else batch_idx[at]
        keys, pad = lengths[at] - leftpad[at], leftpad[at]
        first = min(_first_seen(call, q_lengths[at], keys), keys - new_lengths[at])
        if call.q.device.type == "musa":
            first = 0  # MATE does not say which entries its kernels read
        if first == keys:
            continue
        for column in range((pad + first) // size, count):
            page = rows[row][column]
            if not 0 <= page < pages:
                raise ValueError(
                    f"page_table[{row}, {column}] is {page}; it must be between 0 and {pages - 1}: "
                    f"sequence {at} has {lengths[at]} keys in pages of {size}"
                )


def _check_rotary(call: Call, q_lengths: Sequence[int], new_lengths: Sequence[int], facts: Facts) -> None:
    """Every position that is rotated stands in the tables."""
    starts = call.seqused_k if call.rotary_seqlens is None else call.rotary_seqlens
    name = "cache_seqlens" if call.rotary_seqlens is None else "rotary_seqlens"
    left, right = call.window_size
    advances = call.causal or left >= 0 or right >= 0 or bool(call.attention_chunk)
    for at, start in enumerate(_values(starts)):
        if start < 0:
            raise ValueError(f"{name}[{at}] is {start}; it must be at least 0, a position in the rotary tables")
        queries = q_lengths[at] if advances else min(q_lengths[at], 1)
        end = start + max(queries, new_lengths[at])
        if end > facts.rotary_rows:
            raise ValueError(
                f"rotary_cos has {facts.rotary_rows} positions; it must have at least {end}: "
                f"sequence {at} starts at {name}[{at}] = {start}"
            )

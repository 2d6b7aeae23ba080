"""Additive attention masks that say no more than which keys of a sequence count, read as lengths.

transformers, diffusers and torch.nn.MultiheadAttention pass padding as a mask. A mask that hides the same keys from
every query and leaves a run of them is a first and a last key; one that leaves query i the first n + i keys is a
causal mask, aligned to the bottom right. Reading a mask takes a pass over it, where attention takes heads times head
size of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Keys:
    """The keys that count. ends: (b,) int32, the keys before each end count; starts: (b,) int32, but not those before
    it, None for 0; causal: whether query i sees those up to ends - queries + i alone."""

    starts: Tensor | None
    ends: Tensor
    causal: bool


def read(mask: Tensor, batch: int, queries: int, keys: int) -> Keys | None:
    """What a mask that broadcasts to (b, heads, queries, keys) leaves, None where these are no runs of keys.

    A key counts where the mask is True or 0, and is hidden where it is False or no more than its dtype's least value.
    Every query must see a key: what torch gives it otherwise depends on the mask's numbers.
    """
    rows = _rows(mask, keys)
    if rows is None or rows.shape[1] not in (1, queries):
        return None
    found = _same_for_all(rows[:, 0]) if rows.shape[1] == 1 else _bottom_right(rows)
    return None if found is None else _of_batch(found, batch)


def _rows(mask: Tensor, keys: int) -> Tensor | None:
    """(b or 1, queries or 1, keys) of a mask that is the same for all heads; 1 where it is for all queries."""
    while mask.dim() < 4:
        mask = mask.unsqueeze(0)
    if mask.dim() > 4 or mask.shape[3] != keys:
        return None
    rows = _first_of_equal(_first_of_equal(mask, 1), 2)
    return rows[:, 0] if rows.shape[1] == 1 else None


def _first_of_equal(mask: Tensor, dim: int) -> Tensor:
    """The mask with the first slice along a dimension alone where the others are equal to it."""
    first = mask.narrow(dim, 0, 1)
    if mask.shape[dim] == 1 or mask.stride(dim) == 0 or torch.equal(mask, first.expand_as(mask)):
        return first
    return mask


def _visible(rows: Tensor) -> Tensor | None:
    """Which keys count; None where a number is neither 0 nor hides its key."""
    if rows.dtype is torch.bool:
        return rows
    visible = rows == 0
    hidden = rows <= torch.finfo(rows.dtype).min
    return visible if bool((visible | hidden).all()) else None


def _same_for_all(row: Tensor) -> Keys | None:
    visible = _visible(row)
    if visible is None:
        return None
    counts = visible.sum(dim=1)
    starts = visible.to(torch.uint8).argmax(dim=1)
    places = torch.arange(row.shape[1], device=row.device)
    run = (places >= starts[:, None]) & (places < (starts + counts)[:, None])
    if not torch.equal(visible, run) or not bool((counts > 0).all()):
        return None
    return Keys(starts if bool(starts.any()) else None, starts + counts, False)


def _bottom_right(rows: Tensor) -> Keys | None:
    visible = _visible(rows)
    if visible is None:
        return None
    queries, keys = rows.shape[1:]
    ends = visible[:, -1].sum(dim=1)
    last = torch.arange(queries, device=rows.device) + (ends[:, None] - queries)
    seen = torch.arange(keys, device=rows.device) <= last[..., None]
    if not torch.equal(visible, seen) or not bool((ends >= queries).all()):
        return None
    return Keys(None, ends, True)


def _of_batch(found: Keys, batch: int) -> Keys | None:
    if found.ends.shape[0] not in (1, batch):
        return None
    starts = None if found.starts is None else _lengths(found.starts, batch)
    return Keys(starts, _lengths(found.ends, batch), found.causal)


def _lengths(numbers: Tensor, batch: int) -> Tensor:
    return numbers.to(torch.int32).expand(batch).contiguous()

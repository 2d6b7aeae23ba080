"""Attention masks that say no more than which keys of a sequence count, read as lengths.

transformers, diffusers and torch.nn.MultiheadAttention pass padding as a mask. A mask that hides the same keys from
every query and leaves a run of them is a first and a last key; one that, of such a run, leaves query i the keys up to
n + i is a causal mask, aligned to the bottom right. Reading a mask takes a few passes over it, where attention takes
heads times head size of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Keys:
    """The keys that count. ends: (b,) int32, the keys before each end count; starts: (b,) int32, but not those before
    it, None for 0; causal: whether query i sees those up to ends - queries + i alone; has_empty_rows: whether a query
    sees none."""

    starts: Tensor | None
    ends: Tensor
    causal: bool
    has_empty_rows: bool


def read(mask: Tensor, batch: int, queries: int, keys: int) -> Keys | None:
    """What a mask that broadcasts to (b, heads, queries, keys) leaves, None where these are no runs of keys.

    A key counts where the mask is True or 0, and is hidden where it is False or no more than its dtype's least value.
    Where a query sees no key, what is hidden must be so by False or -inf: torch's result is 0 there. By other numbers
    it depends on them.
    """
    rows = _rows(mask, keys)
    if rows is None or rows.shape[0] not in (1, batch) or rows.shape[1] not in (1, queries):
        return None
    visible = _visible(rows)
    if visible is None:
        return None
    last = visible[:, -1]
    starts = last.to(torch.uint8).argmax(dim=1)
    ends = starts + last.sum(dim=1)
    places = torch.arange(keys, device=mask.device)
    causal = rows.shape[1] > 1
    bounds = ends[:, None]
    if causal:
        bounds = bounds + (torch.arange(queries, device=mask.device) - (queries - 1))
    run = (places >= starts[:, None, None]) & (places < bounds[..., None])
    if not torch.equal(visible, run):
        return None
    empty = bool((bounds <= starts[:, None]).any())
    if empty and rows.dtype is not torch.bool and not torch.equal(~visible, rows == -math.inf):
        return None
    first = _lengths(starts, batch) if bool(starts.any()) else None
    return Keys(first, _lengths(ends, batch), causal, empty)


def seen_by_all(mask: Tensor, keys: int) -> Tensor | None:
    """(b or 1, keys) bool, the keys that count, of a mask that is the same for all queries and heads, None of others.

    Read as `read` does, but the keys need not be runs, and where the mask is bool a query may see none.
    """
    rows = _rows(mask, keys)
    if rows is None or rows.shape[1] != 1:
        return None
    visible = _visible(rows[:, 0])
    if visible is None or (mask.dtype is not torch.bool and not bool(visible.any(dim=1).all())):
        return None
    return visible


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


def _lengths(numbers: Tensor, batch: int) -> Tensor:
    return numbers.to(torch.int32).expand(batch).contiguous()

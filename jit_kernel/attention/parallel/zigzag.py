"""Zig-zag sharding of causal sequences: each of W ranks holds chunk r and chunk 2W - 1 - r, so that all do equal work.

A sequence of n tokens is cut into 2W chunks whose lengths differ by one at most; a rank's share of it is [prev | next].
Several sequences are packed one after another, each as its own [prev | next].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


def chunk_bounds(length: int, world_size: int) -> list[int]:
    """The 2 * world_size + 1 bounds of a sequence's chunks; the first ones are longer where it does not divide."""
    count = 2 * world_size
    whole, rest = divmod(length, count)
    return [0, *accumulate(whole + (i < rest) for i in range(count))]


@dataclass(frozen=True)
class Share:
    """One rank's part of packed sequences. prev and next: (start, end) within each sequence."""

    prev: tuple[tuple[int, int], ...]
    next: tuple[tuple[int, int], ...]

    @property
    def prev_lengths(self) -> list[int]:
        return [end - start for start, end in self.prev]

    @property
    def next_lengths(self) -> list[int]:
        return [end - start for start, end in self.next]

    @property
    def lengths(self) -> list[int]:
        return [p + n for p, n in zip(self.prev_lengths, self.next_lengths, strict=True)]

    @property
    def total(self) -> int:
        return sum(self.lengths)


def share_of(lengths: Sequence[int], rank: int, world_size: int) -> Share:
    """What `rank` holds of sequences of these lengths."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank}; it must be in 0 .. {world_size - 1}")
    bounds = [chunk_bounds(length, world_size) for length in lengths]
    last = 2 * world_size - 1 - rank
    return Share(
        tuple((b[rank], b[rank + 1]) for b in bounds),
        tuple((b[last], b[last + 1]) for b in bounds),
    )


def token_indices(lengths: Sequence[int], rank: int, world_size: int, device: torch.device | None = None) -> Tensor:
    """int64 (share.total,): where a rank's tokens lie in the packed whole, in the order in which it holds them."""
    share, pieces = share_of(lengths, rank, world_size), []
    for start, prev, next_ in zip(accumulate(lengths, initial=0), share.prev, share.next, strict=False):
        pieces += [torch.arange(start + a, start + b) for a, b in (prev, next_)]
    return (torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.int64)).to(device)


def shard(x: Tensor, lengths: Sequence[int], rank: int, world_size: int) -> Tensor:
    """A rank's tokens of packed x (total, ...)."""
    return x[token_indices(lengths, rank, world_size, x.device)]


def unshard(parts: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
    """The packed whole from every rank's tokens, in rank order."""
    order = torch.cat([token_indices(lengths, r, len(parts), parts[0].device) for r in range(len(parts))])
    joined = torch.cat(list(parts))
    whole = torch.empty_like(joined)
    whole[order] = joined
    return whole


def offsets(lengths: Sequence[int], device: torch.device) -> Tensor:
    """cu_seqlens (b + 1,) int32."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)

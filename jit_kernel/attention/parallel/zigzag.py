"""Which rank holds which tokens: zig-zag shares of causal sequences, so that all ranks do equal work.

A sequence is cut into 2W chunks whose lengths differ by one at most; ring rank r of W holds chunks r and 2W - 1 - r,
its share [prev | next]. Several sequences are packed one after another, each as its own [prev | next]; the tokens that
do not divide go to the ranks that hold fewest so far, so that totals differ by one at most, however many sequences.

With `inner` ranks to a ring rank (all-to-all inside, ring outside) rank w is ring rank w // inner, and holds piece
w % inner of its packed share. With as many inner ranks as ranks, that is a run of the packed whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor


def chunk_bounds(lengths: Sequence[int], world_size: int) -> list[list[int]]:
    """For each sequence the 2 * world_size + 1 bounds of its chunks."""
    count, held = 2 * world_size, [0] * world_size  # tokens beyond the even part that each rank holds
    bounds = []
    for length in lengths:
        whole, rest = divmod(length, count)
        longer = [0] * count
        while sum(longer) < rest:
            rank = min(range(world_size), key=lambda r: (held[r], longer[r], r))
            at = rank if not longer[rank] else count - 1 - rank
            longer[at] = 1
            held[rank] += 1
        bounds.append([0, *accumulate(whole + more for more in longer)])
    return bounds


@dataclass(frozen=True)
class Share:
    """One ring rank's part of packed sequences. prev and next: (start, end) within each sequence."""

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


def shares_of(lengths: Sequence[int], world_size: int) -> list[Share]:
    """What each ring rank holds of sequences of these lengths."""
    if world_size < 1:
        raise ValueError(f"world_size is {world_size}; it must be at least 1")
    if any(length < 0 for length in lengths):
        raise ValueError(f"lengths is {list(lengths)}; each must be at least 0")
    bounds = chunk_bounds(lengths, world_size)
    return [
        Share(
            tuple((b[rank], b[rank + 1]) for b in bounds),
            tuple((b[2 * world_size - 1 - rank], b[2 * world_size - rank]) for b in bounds),
        )
        for rank in range(world_size)
    ]


def share_of(lengths: Sequence[int], rank: int, world_size: int) -> Share:
    """What ring rank `rank` of `world_size` holds."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank}; it must be in 0 .. {world_size - 1}")
    return shares_of(lengths, world_size)[rank]


def piece_bounds(total: int, inner: int) -> list[int]:
    """The inner + 1 bounds of a packed share's pieces, whose lengths differ by one at most."""
    whole, rest = divmod(total, inner)
    return [0, *accumulate(whole + (i < rest) for i in range(inner))]


def piece_starts(rows: Sequence[int]) -> list[int]:
    """Where each rank's rows begin, one rank after another, and where the last end."""
    return [0, *accumulate(rows)]


def rows_of(lengths: Sequence[int], world_size: int, inner: int = 1) -> list[int]:
    """How many tokens each rank holds."""
    _need_inner(world_size, inner)
    rows = []
    for share in shares_of(lengths, world_size // inner):
        bounds = piece_bounds(share.total, inner)
        rows += [end - start for start, end in pairwise(bounds)]
    return rows


def token_indices(
    lengths: Sequence[int], rank: int, world_size: int, device: torch.device | None = None, inner: int = 1
) -> Tensor:
    """int64 (tokens,): where a rank's tokens lie in the packed whole, in the order in which it holds them."""
    _need_inner(world_size, inner)
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank}; it must be in 0 .. {world_size - 1}")
    share, pieces = share_of(lengths, rank // inner, world_size // inner), []
    for start, prev, next_ in zip(accumulate(lengths, initial=0), share.prev, share.next, strict=False):
        pieces += [torch.arange(start + a, start + b) for a, b in (prev, next_)]
    held = torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.int64)
    bounds = piece_bounds(share.total, inner)
    return held[bounds[rank % inner] : bounds[rank % inner + 1]].to(device)


def shard(x: Tensor, lengths: Sequence[int], rank: int, world_size: int, inner: int = 1) -> Tensor:
    """A rank's tokens of packed x (total, ...)."""
    return x[token_indices(lengths, rank, world_size, x.device, inner)]


def unshard(parts: Sequence[Tensor], lengths: Sequence[int], inner: int = 1) -> Tensor:
    """The packed whole from every rank's tokens, in rank order."""
    joined = torch.cat(list(parts))
    whole = torch.empty_like(joined)
    whole[order_of(lengths, len(parts), joined.device, inner)] = joined
    return whole


def order_of(lengths: Sequence[int], world_size: int, device: torch.device, inner: int = 1) -> Tensor:
    """int64 (total,): where the tokens of all ranks, one rank after another, lie in the packed whole."""
    return torch.cat([token_indices(lengths, r, world_size, None, inner) for r in range(world_size)]).to(device)


def offsets(lengths: Sequence[int], device: torch.device) -> Tensor:
    """cu_seqlens (b + 1,) int32."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def half_rows(share: Share, name: str, device: torch.device) -> slice | Tensor:
    """Where a half's tokens lie in a rank's share: a slice for one sequence, else indices."""
    if len(share.prev) == 1:
        cut = share.prev_lengths[0]
        return slice(0, cut) if name == "prev" else slice(cut, share.total)
    pieces, start = [], 0
    for p, n in zip(share.prev_lengths, share.next_lengths, strict=True):
        first = start if name == "prev" else start + p
        pieces.append(torch.arange(first, first + (p if name == "prev" else n)))
        start += p + n
    return (torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.int64)).to(device)


def _need_inner(world_size: int, inner: int) -> None:
    if inner < 1 or world_size % inner:
        raise ValueError(f"inner is {inner}; it must divide the {world_size} ranks")

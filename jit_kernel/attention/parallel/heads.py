"""Tokens of all heads for all tokens of some heads, and back: the two exchanges of all-to-all attention.

Each is the other's gradient, but that a key head which several ranks attend to has the sum of theirs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from jit_kernel.attention.parallel import exchange as communication
from jit_kernel.attention.parallel import zigzag


@dataclass(frozen=True)
class HeadShare:
    """Which heads each of `size` ranks attends to: equal numbers of query heads, and the key heads that these have."""

    hq: int
    hk: int
    size: int

    def __post_init__(self) -> None:
        reason = why_not(self.hq, self.hk, self.size)
        if reason is not None:
            raise NotImplementedError(f"all-to-all attention over {self.size} ranks: {reason}")

    def queries(self, rank: int) -> slice:
        """A rank's query heads."""
        count = self.hq // self.size
        return slice(rank * count, (rank + 1) * count)

    def keys(self, rank: int) -> slice:
        """A rank's own key heads, or the one that it shares with its neighbours."""
        count = max(1, self.hk // self.size)
        first = rank * self.hk // self.size
        return slice(first, first + count)

    def of(self, heads: int, rank: int) -> slice:
        """A rank's part of a tensor that has the query heads, or the key heads."""
        return self.queries(rank) if heads == self.hq else self.keys(rank)


def why_not(hq: int, hk: int, size: int) -> str | None:
    """Why heads cannot be shared out to so many ranks, None where they can."""
    if hq % size:
        return f"q has {hq} heads, which {size} does not divide"
    if hk % size and size % hk:
        return f"k has {hk} heads, which neither divide {size} nor are divided by it"
    return None


@dataclass(frozen=True)
class Swap:
    """The ranks of one exchange: rows[r] tokens lie on rank r, one rank's after another in what has all tokens."""

    heads: HeadShare
    rows: tuple[int, ...]
    group: dist.ProcessGroup | None

    def tokens_for_heads(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """(tokens, heads, size) each, of one dtype, to (all tokens, this rank's heads, size), slices of one buffer."""
        return tuple(_ForHeads.apply(self, *tensors))  # type: ignore[no-untyped-call]

    def heads_for_tokens(self, count: int, tensor: Tensor) -> Tensor:
        """The other way for one tensor: (all tokens, this rank's heads, size) to (tokens, count, size)."""
        found: Tensor = _ForTokens.apply(self, count, tensor)  # type: ignore[no-untyped-call]
        return found

    def scattered(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        rank, size = dist.get_rank(self.group), dist.get_world_size(self.group)
        sent = [
            torch.cat([x[:, self.heads.of(x.shape[1], to)].flatten(1) for x in tensors], dim=1) for to in range(size)
        ]
        widths = [x.shape[2] * (x.shape[1] // size or 1) for x in tensors]
        bounds = zigzag.piece_starts(self.rows)
        whole = sent[0].new_empty((bounds[-1], sum(widths)))
        row = whole.shape[1] * whole.element_size()
        communication.swap_all(
            communication.transport_of(self.group, whole.device), self.group, sent,
            [rank * count * row for count in self.rows], [whole[a:b] for a, b in itertools.pairwise(bounds)],
            size * max(self.rows) * row,
        )  # fmt: skip
        ends = itertools.accumulate(widths)
        return [
            whole[:, end - width : end].view(-1, width // x.shape[2], x.shape[2])
            for end, width, x in zip(ends, widths, tensors, strict=True)
        ]

    def gathered(self, counts: Sequence[int], tensors: Sequence[Tensor]) -> list[Tensor]:
        """counts: the heads of each tensor on all ranks together, those that ranks share once, as a sum."""
        rank, size = dist.get_rank(self.group), dist.get_world_size(self.group)
        packed = torch.cat([x.flatten(1) for x in tensors], dim=1)
        bounds = zigzag.piece_starts(self.rows)
        row = packed.shape[1] * packed.element_size()
        back = packed.new_empty((size, self.rows[rank], packed.shape[1]))
        communication.swap_all(
            communication.transport_of(self.group, packed.device), self.group,
            [packed[a:b] for a, b in itertools.pairwise(bounds)], [bounds[rank] * row] * size, list(back),
            bounds[-1] * row,
        )  # fmt: skip
        found, at = [], 0
        for count, x in zip(counts, tensors, strict=True):
            width = x.shape[1] * x.shape[2]
            parts = back[:, :, at : at + width].unflatten(2, x.shape[1:])  # type: ignore[no-untyped-call]
            found.append(self._joined(count, parts))
            at += width
        return found

    def _joined(self, count: int, parts: Tensor) -> Tensor:
        """(ranks, tokens, a rank's heads, size) to (tokens, count, size)."""
        size, tokens, own = parts.shape[:3]
        if own * size == count:
            return parts.transpose(0, 1).reshape(tokens, count, parts.shape[3])
        whole = torch.zeros((tokens, count, parts.shape[3]), dtype=torch.float32, device=parts.device)
        for rank, part in enumerate(parts):
            whole[:, self.heads.of(count, rank)] += part
        return whole.to(parts.dtype)


class _ForHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, swap: Swap, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.swap, ctx.counts = swap, [x.shape[1] for x in tensors]
        return tuple(swap.scattered(tensors))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return (None, *ctx.swap.gathered(ctx.counts, grads))


class _ForTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, swap: Swap, count: int, tensor: Tensor) -> Tensor:
        ctx.swap = swap
        return swap.gathered([count], [tensor])[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return (None, None, *ctx.swap.scattered(grads))

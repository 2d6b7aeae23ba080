"""All-to-all attention (Ulysses): ranks give tokens of all heads for all tokens of some heads, attend, and give back.

Each rank then has whole sequences, so everything that one device serves is served: windows, chunks, sinks, softcap.
Source: DeepSpeed Ulysses (arXiv:2309.14509); inside a ring, USP (arXiv:2405.07719).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from jit_kernel import flash_attention_v3
from jit_kernel.attention.metadata import AttentionLayer, ForwardMetadata
from jit_kernel.attention.parallel import exchange as communication
from jit_kernel.attention.parallel import zigzag
from jit_kernel.attention.parallel.prefix import Parts, Prefix, need_no_window
from jit_kernel.attention.parallel.ring import RingPlan, ring_attention

Result = Tensor | tuple[Tensor, Tensor]
Attend = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


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
        count = self.hq // self.size
        return slice(rank * count, (rank + 1) * count)

    def keys(self, rank: int) -> slice:
        """Its own key heads, or the one that it shares with its neighbours."""
        count = max(1, self.hk // self.size)
        first = rank * self.hk // self.size
        return slice(first, first + count)


def why_not(hq: int, hk: int, size: int) -> str | None:
    """Why heads cannot be shared out to so many ranks, None where they can."""
    if hq % size:
        return f"q has {hq} heads, which {size} does not divide"
    if hk % size and size % hk:
        return f"k has {hk} heads, which neither divide {size} nor are divided by it"
    return None


def exchange_heads(
    tensors: tuple[Tensor, Tensor, Tensor], rows: Sequence[int], attend: Attend, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """(out, lse) of this rank's q, k, v (tokens, heads, size); `attend` sees all tokens of this rank's heads.

    rows: the tokens of every rank of the group, which lie one after another in what attend sees.
    """
    q, _, v = tensors
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    heads = HeadShare(q.shape[1], v.shape[1], size)
    if size == 1:
        return attend(*tensors)
    way = communication.transport_of(group, q.device)
    joined = _tokens_for_heads(way, tensors, heads, rows, group)
    out, lse = attend(*joined)
    bounds = zigzag.piece_starts(rows)
    width = out.shape[1] * out.shape[2]
    # A row of the result and its lse go together, as bytes.
    packed = torch.cat([_row_bytes(out), _row_bytes(lse.t())], dim=1)
    sent = [packed[a:b] for a, b in itertools.pairwise(bounds)]
    back = packed.new_empty((size, rows[rank], packed.shape[1]))
    offsets = [bounds[rank] * packed.shape[1]] * size
    communication.swap_all(way, group, sent, offsets, list(back), packed.numel())
    cut = width * out.element_size()
    outs = back[:, :, :cut].contiguous().view(out.dtype).view(size, rows[rank], *out.shape[1:])
    lses = back[:, :, cut:].contiguous().view(torch.float32).view(size, rows[rank], out.shape[1])
    return outs.transpose(0, 1).flatten(1, 2), lses.permute(0, 2, 1).flatten(0, 1)


def _row_bytes(x: Tensor) -> Tensor:
    width = math.prod(x.shape[1:]) * x.element_size()
    return communication.as_bytes(x.contiguous()).view(x.shape[0], width)


def _tokens_for_heads(
    way: communication.Transport, tensors: tuple[Tensor, Tensor, Tensor], heads: HeadShare, rows: Sequence[int],
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """All tokens of this rank's heads: q, k, v as slices of one buffer, whose rows hold a token's three."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    slices = [(heads.queries(r), heads.keys(r), heads.keys(r)) for r in range(size)]
    of = [[x[:, each].flatten(1) for x, each in zip(tensors, some, strict=True)] for some in slices]
    widths = [x.shape[1] for x in of[0]]
    sent = [torch.cat(parts, dim=1) for parts in of]
    bounds = zigzag.piece_starts(rows)
    whole = sent[0].new_empty((bounds[-1], sum(widths)))
    into = [whole[a:b] for a, b in itertools.pairwise(bounds)]
    row = whole.shape[1] * whole.element_size()
    offsets = [rank * n * row for n in rows]
    communication.swap_all(way, group, sent, offsets, into, size * max(rows) * row)
    ends = itertools.accumulate(widths)
    q, k, v = (
        whole[:, end - width : end].view(-1, width // x.shape[2], x.shape[2])
        for end, width, x in zip(ends, widths, tensors, strict=True)
    )
    return q, k, v


def all_to_all_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    layer: AttentionLayer | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    prefix: Prefix | None = None,
    return_softmax_lse: bool = False,
) -> Result:
    """Attention of this rank's queries over every rank's keys, each rank on its share of the heads.

    q (tokens, hq, d), k (tokens, hk, d), v (tokens, hk, dv): this rank's run of packed sequences of `lengths`
    (`shard(..., inner=world_size)`). The ranks must divide hq, and divide or be divided by hk. Every mask of `layer` is
    served; a prefix with a window or a chunk is not. Returns this rank's out (tokens, hq, dv), with return_softmax_lse
    also lse (hq, tokens). Raises ValueError, NotImplementedError, and RankError where a rank does not come.
    """
    layer = layer or AttentionLayer()
    need_no_window(prefix, layer)
    size = dist.get_world_size(group)
    rows = zigzag.rows_of(lengths, size, inner=size)
    need_rows(q, k, rows[dist.get_rank(group)], lengths, group)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        own = layer_of_heads(layer, q.shape[1], group)
        whole = ForwardMetadata(zigzag.offsets(lengths, q.device), max(lengths, default=0))
        out, lse = flash_attention_v3.flash_attn_varlen_func(q, k, v, **whole.raw_arguments(), **own.with_lse())
        if prefix is None:
            return out, lse
        parts = Parts(q, v.shape[2], 2)
        parts.add(out, lse, None)
        before, before_lse = prefix_of_heads(prefix, group, hq).attend(q, lengths, own)
        parts.add(before, before_lse, None)
        return parts.merged()

    hq = q.shape[1]
    out, lse = exchange_heads((q, k, v), rows, attend, group)
    return (out, lse) if return_softmax_lse else out


def two_level_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    layer: AttentionLayer | None = None,
    *,
    inner: dist.ProcessGroup,
    ring: dist.ProcessGroup,
    plan: RingPlan | None = None,
    prefix: Prefix | None = None,
    return_softmax_lse: bool = False,
) -> Result:
    """All-to-all inside a group of ranks, a ring over such groups.

    q, k, v: this rank's share of packed sequences of `lengths`, `shard(..., inner=size of the inner group)`. inner: the
    ranks that share heads, neighbours of one host; ring: the ranks with the same place in their inner group. plan:
    `plan_ring(lengths, causal, device, ring)`. Masks are the ring's. Returns and raises as `all_to_all_attention`.
    """
    layer = layer or AttentionLayer()
    size, place = dist.get_world_size(inner), dist.get_rank(ring)
    every = zigzag.rows_of(lengths, size * dist.get_world_size(ring), size)
    rows = every[place * size : (place + 1) * size]
    need_rows(q, k, rows[dist.get_rank(inner)], lengths, inner)
    hq = q.shape[1]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        own = layer_of_heads(layer, q.shape[1], inner)
        before = None if prefix is None else prefix_of_heads(prefix, inner, hq)
        found = ring_attention(
            q, k, v, lengths, own, group=ring, plan=plan, prefix=before, return_softmax_lse=True
        )  # fmt: skip
        return found[0], found[1]

    out, lse = exchange_heads((q, k, v), rows, attend, inner)
    return (out, lse) if return_softmax_lse else out


def layer_of_heads(layer: AttentionLayer, count: int, group: dist.ProcessGroup | None) -> AttentionLayer:
    """The layer of this rank's query heads, `count` of them."""
    if layer.sinks is None:
        return layer
    first = dist.get_rank(group) * count
    return replace(layer, sinks=layer.sinks[first : first + count])


def prefix_of_heads(prefix: Prefix, group: dist.ProcessGroup | None, hq: int) -> Prefix:
    """The prefix's key heads that this rank's query heads see."""
    size = dist.get_world_size(group)
    return prefix.of_heads(HeadShare(hq, prefix.k_cache.shape[2], size).keys(dist.get_rank(group)))


def need_rows(q: Tensor, k: Tensor, rows: int, lengths: Sequence[int], group: dist.ProcessGroup | None) -> None:
    """Raise ValueError where q or k is not this rank's share."""
    for name, tensor in (("q", q), ("k", k)):
        if tensor.shape[0] != rows:
            raise ValueError(
                f"{name} has {tensor.shape[0]} tokens; rank {dist.get_rank(group)} holds {rows} "
                f"of sequences of {list(lengths)}"
            )

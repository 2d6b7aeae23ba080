"""Ring attention: keys and values travel round the ranks of a group while the kernel runs.

Source of the schedule: with chunks 0 .. 2W - 1 and rank r holding [r | 2W - 1 - r], the first chunk of rank j < r is
seen by all of r's queries and the second by none; both chunks of j > r are seen by r's second chunk and by it alone.
So every step is one dense call, of equal work on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from jit_kernel import flash_attention_v3
from jit_kernel.attention.metadata import AttentionLayer
from jit_kernel.attention.parallel import exchange as communication
from jit_kernel.attention.parallel import zigzag
from jit_kernel.attention.parallel.all_gather import half_rows, need_plain, need_share
from jit_kernel.attention.parallel.zigzag import Share


@dataclass(frozen=True)
class Block:
    """One call of the ring: which queries, which keys, and the mask. rows None is all of q."""

    rows: slice | Tensor | None
    keys: slice
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    seqused_k: Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    causal: bool


@dataclass(frozen=True)
class RingPlan:
    """A rank's calls, and how many rows arrive after each. Its index tensors are made before anything is launched,
    because a copy from the host would wait for the kernel that runs; every layer of a step can use it."""

    lengths: tuple[int, ...]
    causal: bool
    blocks: tuple[Block, ...]
    coming: tuple[int, ...]


def plan_ring(
    lengths: Sequence[int], causal: bool, device: torch.device, group: dist.ProcessGroup | None = None
) -> RingPlan:
    """The plan for packed sequences of `lengths` (of the whole, not of a rank's share)."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    shares = [zigzag.share_of(lengths, r, size) for r in range(size)]
    sources = [(rank - step) % size for step in range(size)]
    blocks = [_block(shares[rank], shares[source], rank, source, causal, device) for source in sources]
    coming = [shares[source].total for source in sources[1:]]
    return RingPlan(tuple(lengths), causal, tuple(blocks), tuple(coming))


def _block(mine: Share, theirs: Share, rank: int, source: int, causal: bool, device: torch.device) -> Block:
    rows: slice | Tensor | None = None
    keys, used, queries, visible = slice(None), None, mine.lengths, theirs.lengths
    if causal and source < rank:
        visible = theirs.prev_lengths
        if len(visible) == 1:
            keys = slice(0, visible[0])
        else:
            used = torch.tensor(visible, dtype=torch.int32, device=device)
    elif causal and source > rank:
        rows, queries = half_rows(mine, "next", device), mine.next_lengths
    packed = theirs.lengths if used is not None else visible
    return Block(
        rows,
        keys,
        zigzag.offsets(queries, device),
        zigzag.offsets(packed, device),
        used,
        max(queries, default=0),
        max(packed, default=0),
        causal and source == rank,
    )


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    layer: AttentionLayer | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    plan: RingPlan | None = None,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of this rank's queries over every rank's keys, one rank's at a time, the next ones under way meanwhile.

    Arguments and result as `all_gather_attention`; `plan` (`plan_ring`) saves its making in every layer. Partial
    results are merged in float32, so that the number of ranks does not add roundings; sinks enter once, with this
    rank's own keys.
    """
    layer = layer or AttentionLayer()
    need_plain(layer)
    need_share(q, k, lengths, group)
    causal = layer.causal or layer.window_size[1] == 0
    plan = plan or plan_ring(lengths, causal, q.device, group)
    if plan.lengths != tuple(lengths) or plan.causal != causal:
        raise ValueError(f"plan was made for lengths {plan.lengths} and causal {plan.causal}, not for this call")
    keys = [k, v]
    exchange = communication.Exchange(keys, plan.coming[0], group) if plan.coming else None
    out, lse = _attend(q, keys, plan.blocks[0], layer)
    if exchange is None:
        return (out, lse) if return_softmax_lse else out
    # One merge rounds once whatever its width; more of them do so in float32.
    out, layer = (out if len(plan.blocks) == 2 else out.float()), replace(layer, sinks=None)
    for step, block in enumerate(plan.blocks[1:], start=1):
        keys = exchange.wait()
        if step < len(plan.coming):
            exchange = communication.Exchange(keys, plan.coming[step], group)
        out, lse = _merged(out, lse, *_attend(q, keys, block, layer), block.rows)
    out = out.to(q.dtype)
    return (out, lse) if return_softmax_lse else out


def _attend(q: Tensor, keys: list[Tensor], block: Block, layer: AttentionLayer) -> tuple[Tensor, Tensor]:
    out, lse = flash_attention_v3.flash_attn_varlen_func(
        q=q if block.rows is None else q[block.rows],
        k=keys[0][block.keys],
        v=keys[1][block.keys],
        cu_seqlens_q=block.cu_seqlens_q,
        cu_seqlens_k=block.cu_seqlens_k,
        max_seqlen_q=block.max_seqlen_q,
        max_seqlen_k=block.max_seqlen_k,
        seqused_k=block.seqused_k,
        **layer.part_arguments(block.causal),
    )
    return out, lse


def _merged(
    out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, rows: slice | Tensor | None
) -> tuple[Tensor, Tensor]:
    """The accumulator with a block's result, which may have some of the queries alone."""
    part = part.to(out.dtype)
    if rows is None:
        return flash_attention_v3.merge_state(out, lse, part, part_lse)
    merged, merged_lse = flash_attention_v3.merge_state(out[rows], lse[:, rows].contiguous(), part, part_lse)
    out[rows], lse[:, rows] = merged, merged_lse
    return out, lse

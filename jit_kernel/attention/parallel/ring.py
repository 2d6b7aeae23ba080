"""Ring attention: other ranks' keys and values come, one rank's after another, while the kernel runs.

Source of the schedule: with chunks 0 .. 2W - 1 and rank r holding [r | 2W - 1 - r], the first chunk of rank j < r is
seen by all of r's queries and the second by none; both chunks of j > r are seen by r's second chunk and by it alone.
So every step is one dense call, of equal work on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from jit_kernel import flash_attention_v3
from jit_kernel.attention.metadata import AttentionLayer, ForwardMetadata
from jit_kernel.attention.parallel import exchange as communication
from jit_kernel.attention.parallel import zigzag
from jit_kernel.attention.parallel.checks import need_tensors
from jit_kernel.attention.parallel.failures import RankError
from jit_kernel.attention.parallel.prefix import Parts, Prefix, are_wanted, is_windowed
from jit_kernel.attention.parallel.zigzag import Share

# So many ranks' keys are under way while a call runs.
_AHEAD = 2


@dataclass(frozen=True)
class Block:
    """One call of the ring: which queries, which keys, and the mask. rows None is all of q."""

    rows: slice | Tensor | None
    keys: slice
    lengths: ForwardMetadata
    seqused_k: Tensor | None
    causal: bool


@dataclass(frozen=True)
class RingPlan:
    """A rank's calls, how many rows arrive after each, the most rows that any rank holds, and for whom it was made.

    Its index tensors are made before anything is launched, because a copy from the host would wait for the kernel that
    runs; every layer of a step can use it.
    """

    lengths: tuple[int, ...]
    causal: bool
    blocks: tuple[Block, ...]
    coming: tuple[int, ...]
    most: int
    rank: int
    size: int
    device: torch.device


def need_plain(layer: AttentionLayer) -> None:
    """Raise NotImplementedError for a mask that a ring's blocks do not have."""
    if is_windowed(layer):
        raise NotImplementedError(
            f"ring attention with window_size {layer.window_size} and attention_chunk {layer.attention_chunk}: a "
            "rank's keys are not one run of the sequence; all_to_all_attention serves it, with a causal mask "
            "all_gather_attention too"
        )


def plan_ring(
    lengths: Sequence[int], causal: bool, device: torch.device, group: dist.ProcessGroup | None = None
) -> RingPlan:
    """The plan for packed sequences of `lengths` (of the whole, not of a rank's share)."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    shares = zigzag.shares_of(lengths, size)
    sources = [(rank - step) % size for step in range(size)]
    blocks = [_block(shares[rank], shares[source], rank, source, causal, device) for source in sources]
    coming = [shares[source].total for source in sources[1:]]
    return RingPlan(
        tuple(lengths), causal, tuple(blocks), tuple(coming), max(share.total for share in shares), rank, size, device
    )


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
        rows, queries = zigzag.half_rows(mine, "next", device), mine.next_lengths
    packed = theirs.lengths if used is not None else visible
    of_rows = ForwardMetadata(
        zigzag.offsets(queries, device),
        max(queries, default=0),
        cu_seqlens_k=zigzag.offsets(packed, device),
        max_seqlen_k=max(packed, default=0),
    )
    return Block(rows, keys, of_rows, used, causal and source == rank)


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    layer: AttentionLayer | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    plan: RingPlan | None = None,
    prefix: Prefix | None = None,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of this rank's queries over every rank's keys, one rank's at a time, two ranks' under way meanwhile.

    Arguments, result and errors as `all_gather_attention`, but no window; `plan` (`plan_ring`) saves its making in
    every layer. Partial results are merged once, in float32; sinks enter once, with this rank's own keys. Without a
    prefix it can be differentiated after q, k, v and sinks.
    """
    layer = layer or AttentionLayer()
    need_plain(layer)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    need_tensors(q, k, v, zigzag.share_of(lengths, rank, size).total, layer, prefix, len(lengths), group)
    causal = layer.causal or layer.window_size[1] == 0
    plan = plan or plan_ring(lengths, causal, q.device, group)
    of_plan = plan.lengths, plan.causal, plan.rank, plan.size, plan.device.type
    if of_plan != (tuple(lengths), causal, rank, size, q.device.type):
        raise ValueError(
            f"plan was made for lengths {plan.lengths}, causal {plan.causal}, rank {plan.rank} of {plan.size} on "
            f"{plan.device}; the call has {tuple(lengths)}, {causal}, rank {rank} of {size} on {q.device}"
        )
    if are_wanted(q, k, v, layer.sinks):
        out, lse = _Ring.apply(q, k, v, layer.sinks, layer, plan, group)  # type: ignore[no-untyped-call]
    else:
        out, lse = _forward(q, k, v, layer, plan, group, prefix)
    return (out, lse) if return_softmax_lse else out


def _forward(
    q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer, plan: RingPlan, group: dist.ProcessGroup | None,
    prefix: Prefix | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    way = communication.transport_of(group, q.device) if plan.coming else None
    exchange = _Arrivals(way, k, v, plan, group) if way is not None else None
    parts = Parts(q, v.shape[2], len(plan.blocks) + (prefix is not None))
    try:
        _attend(q, [k, v], plan.blocks[0], layer, parts, way)
        layer = replace(layer, sinks=None)
        if prefix is not None:
            share = zigzag.share_of(plan.lengths, plan.rank, plan.size)
            parts.add(*prefix.attend(q, share.lengths, layer), None)
        for step, block in enumerate(plan.blocks[1:], start=1):
            assert exchange is not None
            _attend(q, exchange.take(step), block, layer, parts, way)
            exchange.ask(step + _AHEAD)
    except RankError:
        raise
    except Exception:  # of this rank alone: the others send, and wait
        if exchange is not None:
            exchange.close()
        raise
    return parts.merged()


class _Ring(torch.autograd.Function):
    """The ring's gradients: each block's by the whole's lse, so that blocks add up; its keys' go back to their rank."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, layer: AttentionLayer, plan: RingPlan,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        out, lse = _forward(q, k, v, layer, plan, group, None)
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.layer, ctx.plan, ctx.group = replace(layer, sinks=None), plan, group
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        q, k, v, sinks, out, lse = ctx.saved_tensors
        plan, group = ctx.plan, ctx.group
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        results = (grad_out, out, lse, grad_lse)
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        exchange = None
        if plan.coming:
            exchange = _Arrivals(communication.transport_of(group, q.device), k, v, plan, group)
        grad_q = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        of_keys: list[tuple[Tensor, Tensor]] = [(k, v)] * size
        grad_sinks = None
        for step, block in enumerate(plan.blocks):
            keys = [k, v] if exchange is None or step == 0 else exchange.take(step)
            found = _gradients(results, q, keys, block, ctx.layer, sinks if step == 0 else None)
            if step == 0:
                grad_sinks = found[3]
            if block.rows is None:
                grad_q += found[0]
            else:
                grad_q[block.rows] += found[0]
            of_keys[(rank - step) % size] = _whole(found[1], keys[0], block), _whole(found[2], keys[1], block)
            if exchange is not None and step:
                exchange.ask(step + _AHEAD)
        rows = [grads[0].shape[0] for grads in of_keys]
        grad_k, grad_v = of_keys[0] if size == 1 else (
            communication.returned([grads[i] for grads in of_keys], rows, group) for i in range(2)
        )  # fmt: skip
        of_sinks = None if grad_sinks is None or sinks is None else grad_sinks.to(sinks.dtype)
        return grad_q.to(q.dtype), grad_k, grad_v, of_sinks, None, None, None


def _gradients(
    results: tuple[Tensor, Tensor, Tensor, Tensor | None], q: Tensor, keys: list[Tensor], block: Block,
    layer: AttentionLayer, sinks: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Of q's rows, the keys, the values and the sinks of one block, by the whole's result."""
    grad_out, out, lse, grad_lse = results
    if block.rows is not None:
        q, grad_out, out, lse = q[block.rows], grad_out[block.rows], out[block.rows], lse[:, block.rows]
        grad_lse = None if grad_lse is None else grad_lse[:, block.rows]
    found: tuple[Tensor, ...] = torch.ops.jit_kernel.backward(
        grad_out, q, keys[0][block.keys], keys[1][block.keys], out, lse.contiguous(), layer.softmax_scale,
        -1, 0 if block.causal else -1, grad_lse, softcap=layer.softcap, sinks=sinks, seqused_k=block.seqused_k,
        **block.lengths.raw_arguments(),
    )  # fmt: skip
    return found


def _whole(grad: Tensor, of: Tensor, block: Block) -> Tensor:
    """A block's gradient as one of all rows of its rank, zeros in those that it did not see."""
    if grad.shape[0] == of.shape[0]:
        return grad
    whole = torch.zeros_like(of)
    whole[block.keys] = grad
    return whole


class _Arrivals:
    """Other ranks' keys and values, asked for two steps before they are needed."""

    def __init__(
        self, way: communication.Transport, k: Tensor, v: Tensor, plan: RingPlan, group: dist.ProcessGroup | None
    ) -> None:
        self._own, self._coming = [k.contiguous(), v.contiguous()], plan.coming
        self._rank, self._size = dist.get_rank(group), dist.get_world_size(group)
        row = sum(math.prod(x.shape[1:]) for x in self._own) * k.element_size()
        self._published = way.publish(self._own, plan.most * row)
        self._under_way: dict[int, tuple[communication.Pending, list[Tensor]]] = {}
        for step in range(1, 1 + _AHEAD):
            self.ask(step)

    def ask(self, step: int) -> None:
        """Ask for the keys of a step, if there is one."""
        if step > len(self._coming):
            return
        into = [x.new_empty((self._coming[step - 1], *x.shape[1:])) for x in self._own]
        to, of = (self._rank + step) % self._size, (self._rank - step) % self._size
        self._under_way[step] = self._published.ask(to, self._own, of, 0, into), into

    def close(self) -> None:
        """Take what the others still send, and let them have theirs, so that the group stays usable."""
        for step in range(1, 1 + len(self._coming)):
            if step in self._under_way:
                self.take(step)
                self.ask(step + _AHEAD)

    def take(self, step: int) -> list[Tensor]:
        """The keys and values of a step, for the current stream."""
        pending, into = self._under_way.pop(step)
        pending.wait()
        return into


def _attend(
    q: Tensor, keys: list[Tensor], block: Block, layer: AttentionLayer, parts: Parts,
    way: communication.Transport | None,
) -> None:  # fmt: skip
    """One block's result into the parts."""
    own_place = block.rows is None or isinstance(block.rows, slice)
    place = parts.place(block.rows if isinstance(block.rows, slice) else None)
    out, lse = flash_attention_v3.flash_attn_varlen_func(
        q if block.rows is None else q[block.rows],
        keys[0][block.keys],
        keys[1][block.keys],
        seqused_k=block.seqused_k,
        out=place if own_place else None,
        sm_margin=0 if way is None else way.sm_margin,
        **block.lengths.raw_arguments(),
        **layer.part_arguments(block.causal),
    )
    parts.add(None if own_place else out, lse, block.rows)

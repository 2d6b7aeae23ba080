"""All-to-all attention (Ulysses): ranks give tokens of all heads for all tokens of some heads, attend, and give back.

Each rank then has whole sequences, so everything that one device serves is served: windows, chunks, sinks, softcap.
Source: DeepSpeed Ulysses (arXiv:2309.14509); inside a ring, USP (arXiv:2405.07719).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch.distributed as dist
from torch import Tensor

from jit_kernel import flash_attention_v3
from jit_kernel.attention.metadata import AttentionLayer, ForwardMetadata
from jit_kernel.attention.parallel import zigzag
from jit_kernel.attention.parallel.checks import need_tensors
from jit_kernel.attention.parallel.heads import HeadShare, Swap
from jit_kernel.attention.parallel.prefix import Parts, Prefix, need_no_window
from jit_kernel.attention.parallel.ring import RingPlan, need_plain, ring_attention

Result = Tensor | tuple[Tensor, Tensor]
Attend = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def _exchanged(
    tensors: tuple[Tensor, Tensor, Tensor], rows: Sequence[int], attend: Attend, group: dist.ProcessGroup | None,
    *, return_softmax_lse: bool,
) -> Result:  # fmt: skip
    """The result of this rank's q, k, v (tokens, heads, size); `attend` sees all tokens of this rank's heads.

    rows: the tokens of every rank of the group, which lie one after another in what attend sees.
    """
    q, k, _ = tensors
    if dist.get_world_size(group) == 1:
        out, lse = attend(*tensors)
        return (out, lse) if return_softmax_lse else out
    swap = Swap(HeadShare(q.shape[1], k.shape[1], dist.get_world_size(group)), tuple(rows), group)
    out, lse = attend(*swap.tokens_for_heads(*tensors))
    out = swap.heads_for_tokens(q.shape[1], out)
    if not return_softmax_lse:
        return out
    return out, swap.heads_for_tokens(q.shape[1], lse.t().unsqueeze(2)).squeeze(2).t()


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
    also lse (hq, tokens); they can be differentiated after q, k, v and sinks, without a prefix. Raises ValueError,
    NotImplementedError, and RankError where a rank does not come.
    """
    layer = layer or AttentionLayer()
    need_no_window(prefix, layer)
    size = dist.get_world_size(group)
    rows = zigzag.rows_of(lengths, size, inner=size)
    need_tensors(q, k, v, rows[dist.get_rank(group)], layer, prefix, len(lengths), group)

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
    return _exchanged((q, k, v), rows, attend, group, return_softmax_lse=return_softmax_lse)


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
    need_plain(layer)
    need_tensors(q, k, v, rows[dist.get_rank(inner)], layer, prefix, len(lengths), inner)
    hq = q.shape[1]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        own = layer_of_heads(layer, q.shape[1], inner)
        before = None if prefix is None else prefix_of_heads(prefix, inner, hq)
        found = ring_attention(
            q, k, v, lengths, own, group=ring, plan=plan, prefix=before, return_softmax_lse=True
        )  # fmt: skip
        return found[0], found[1]

    return _exchanged((q, k, v), rows, attend, inner, return_softmax_lse=return_softmax_lse)


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

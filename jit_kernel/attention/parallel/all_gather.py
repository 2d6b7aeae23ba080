"""Context parallelism: the zig-zag halves of one rank, and attention over keys that every rank gathers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from jit_kernel import flash_attention_v3
from jit_kernel.attention.backend import FlashAttentionBackend
from jit_kernel.attention.metadata import AttentionLayer, ForwardMetadata
from jit_kernel.attention.parallel import exchange as communication
from jit_kernel.attention.parallel import zigzag
from jit_kernel.attention.parallel.checks import need_tensors
from jit_kernel.attention.parallel.prefix import Parts, Prefix, is_windowed, need_no_window
from jit_kernel.attention.parallel.zigzag import Share
from jit_kernel.attention.plan import retagged

Result = Tensor | tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Half:
    """One of the two halves of a rank's queries: its own lengths, maximum and tag; `prefix` makes it a cascade."""

    metadata: ForwardMetadata
    tokens: int
    prefix: ForwardMetadata | None = None


def forward_zigzag(
    backend: FlashAttentionBackend,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    prev: Half,
    next_: Half,
    layer: AttentionLayer | None = None,
    *,
    return_softmax_lse: bool = False,
) -> Result:
    """Attention of q = [prev | next] (total_q, hq, d) over the cache, each half with its own lengths.

    The halves may differ in length. Returns out (total_q, hq, dv), with return_softmax_lse also lse (hq, total_q). A
    half with a `prefix` runs as a cascade.
    """
    if prev.tokens + next_.tokens != q.shape[0]:
        raise ValueError(
            f"q has {q.shape[0]} tokens; it must have prev.tokens + next.tokens = {prev.tokens} + {next_.tokens}"
        )
    layer, results = layer or AttentionLayer(), []
    for name, half, rows in (("prev", prev, q[: prev.tokens]), ("next", next_, q[prev.tokens :])):
        own = retagged(half.metadata, name)
        if half.prefix is not None:
            shared = retagged(half.prefix, name)
            results.append(backend.forward_cascade(rows, k_cache, v_cache, shared, own, layer, return_softmax_lse=True))
        else:
            results.append(backend.forward_decode(rows, k_cache, v_cache, own, layer, return_softmax_lse=True))
    out = torch.cat([out for out, _ in results])
    lse = torch.cat([lse for _, lse in results], dim=1)
    return (out, lse) if return_softmax_lse else out


def all_gather_attention(
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
    """Attention of this rank's queries over every rank's keys, which are gathered first.

    q (tokens, hq, d), k (tokens, hk, d), v (tokens, hk, dv): this rank's zig-zag share of packed sequences of `lengths`
    (`shard`). prefix: keys before them that every rank holds. Windows and chunks are served with a causal mask.
    Returns this rank's out, with return_softmax_lse also lse (hq, tokens). It needs memory for all keys;
    `ring_attention` needs it for three ranks' shares. Raises ValueError, NotImplementedError, and RankError where a
    rank does not come.
    """
    layer = layer or AttentionLayer()
    need_no_window(prefix, layer)
    causal = layer.causal or layer.window_size[1] == 0
    if not causal and is_windowed(layer):
        raise NotImplementedError(
            f"all_gather_attention with window_size {layer.window_size}, attention_chunk {layer.attention_chunk} "
            "and no causal mask: the keys of a half of a rank's queries end where the half ends; "
            "all_to_all_attention serves it"
        )
    share = zigzag.share_of(lengths, dist.get_rank(group), dist.get_world_size(group))
    need_tensors(q, k, v, share.total, layer, prefix, len(lengths), group)
    rows = zigzag.rows_of(lengths, dist.get_world_size(group))
    whole_k, whole_v = (zigzag.unshard(_Gather.apply(x, rows, group), lengths) for x in (k, v))  # type: ignore[no-untyped-call]
    out, lse = _over_all(q, whole_k, whole_v, lengths, share, layer)
    if prefix is not None:
        parts = Parts(q, v.shape[2], 2)
        parts.add(out, lse, None)
        parts.add(*prefix.attend(q, share.lengths, layer), None)
        out, lse = parts.merged()
    return (out, lse) if return_softmax_lse else out


def _over_all(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], share: Share, layer: AttentionLayer
) -> tuple[Tensor, Tensor]:
    """This rank's two halves over the packed whole."""
    cu_k = zigzag.offsets(lengths, q.device)
    causal = layer.causal or layer.window_size[1] == 0  # a half's queries are then the last of the keys up to its end
    out = q.new_empty((q.shape[0], q.shape[1], v.shape[-1]))
    lse = torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32, device=q.device)
    for name in ("prev", "next"):
        where = zigzag.half_rows(share, name, q.device)
        ends = [end for _, end in getattr(share, name)] if causal else list(lengths)
        half = share.prev_lengths if name == "prev" else share.next_lengths
        used = torch.tensor(ends, dtype=torch.int32, device=q.device)
        rows = ForwardMetadata(
            zigzag.offsets(half, q.device),
            max(half, default=0),
            cu_seqlens_k=cu_k,
            max_seqlen_k=max(lengths, default=0),
        )
        part, part_lse = flash_attention_v3.flash_attn_varlen_func(
            q[where], k, v, seqused_k=used, **rows.raw_arguments(), **layer.with_lse()
        )
        out[where], lse[:, where] = part, part_lse
    return out, lse


class _Gather(torch.autograd.Function):
    """Every rank's rows; their gradients go back to their ranks, whose sum is in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: list[int], group: dist.ProcessGroup | None) -> tuple[Tensor, ...]:
        ctx.rows, ctx.group = rows, group
        return tuple(communication.gather(x, rows, group))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return communication.returned([grad.contiguous() for grad in grads], ctx.rows, ctx.group), None, None

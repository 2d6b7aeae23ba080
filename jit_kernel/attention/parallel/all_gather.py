"""Context parallelism: the zig-zag halves of one rank, and attention over keys that every rank gathers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from jit_kernel import flash_attention_v3
from jit_kernel.attention.backend import FlashAttentionBackend
from jit_kernel.attention.metadata import AttentionLayer, ForwardMetadata
from jit_kernel.attention.parallel import exchange as communication
from jit_kernel.attention.parallel import zigzag
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


def need_plain(layer: AttentionLayer) -> None:
    if layer.window_size[0] >= 0 or layer.window_size[1] > 0 or layer.attention_chunk > 0:
        raise NotImplementedError(
            f"context parallelism with window_size {layer.window_size} and attention_chunk {layer.attention_chunk}: a "
            "rank's keys are not one run of the sequence; causal and full attention are served"
        )


def need_share(q: Tensor, k: Tensor, lengths: Sequence[int], group: dist.ProcessGroup | None) -> Share:
    share = zigzag.share_of(lengths, dist.get_rank(group), dist.get_world_size(group))
    for name, tensor in (("q", q), ("k", k)):
        if tensor.shape[0] != share.total:
            raise ValueError(
                f"{name} has {tensor.shape[0]} tokens; rank {dist.get_rank(group)} holds {share.total} "
                f"of sequences of {list(lengths)}"
            )
    return share


def all_gather_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    layer: AttentionLayer | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    return_softmax_lse: bool = False,
) -> Result:
    """Attention of this rank's queries over every rank's keys, which are gathered first.

    q (tokens, hq, d), k (tokens, hk, d), v (tokens, hk, dv): this rank's zig-zag share of packed sequences of `lengths`
    (`zigzag.shard`). Returns this rank's out, with return_softmax_lse also lse (hq, tokens). It needs memory for all
    keys; `ring_attention` needs it for two ranks' shares.
    """
    layer = layer or AttentionLayer()
    need_plain(layer)
    share = need_share(q, k, lengths, group)
    shares = [zigzag.share_of(lengths, r, dist.get_world_size(group)) for r in range(dist.get_world_size(group))]
    rows = [s.total for s in shares]
    whole_k, whole_v = (zigzag.unshard(communication.gather(x, rows, group), lengths) for x in (k, v))
    cu_k = zigzag.offsets(lengths, q.device)
    causal = layer.causal or layer.window_size[1] == 0
    out = q.new_empty((q.shape[0], q.shape[1], v.shape[-1]))
    lse = torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32, device=q.device)
    for name in ("prev", "next"):
        where = half_rows(share, name, q.device)
        ends = [end for _, end in getattr(share, name)] if causal else list(lengths)
        half = share.prev_lengths if name == "prev" else share.next_lengths
        # A half's queries are the last of the keys up to its end: causal's bottom right corner.
        part, part_lse = flash_attention_v3.flash_attn_varlen_func(
            q=q[where],
            k=whole_k,
            v=whole_v,
            cu_seqlens_q=zigzag.offsets(half, q.device),
            cu_seqlens_k=cu_k,
            max_seqlen_q=max(half, default=0),
            max_seqlen_k=max(lengths, default=0),
            seqused_k=torch.tensor(ends, dtype=torch.int32, device=q.device),
            **layer.part_arguments(causal),
        )
        out[where], lse[:, where] = part, part_lse
    return (out, lse) if return_softmax_lse else out


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

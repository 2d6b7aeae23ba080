"""What every form of context parallelism asks of its tensors, before a rank sends or waits for anything.

An error after that would leave the other ranks waiting, and the group with messages that nobody takes.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from jit_kernel.attention.metadata import AttentionLayer
from jit_kernel.attention.parallel.prefix import Prefix, need_no_gradient

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def need_tensors(
    q: Tensor, k: Tensor, v: Tensor, rows: int, layer: AttentionLayer, prefix: Prefix | None, sequences: int,
    group: dist.ProcessGroup | None,
) -> None:  # fmt: skip
    """Raise TypeError, ValueError or NotImplementedError, by name, where q, k, v, layer.sinks or prefix do not fit.

    rows: the tokens that this rank holds; sequences: how many there are in the whole.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 3:
            raise ValueError(f"{name} has {x.dim()} dimensions; it must have 3: tokens, heads and the head size")
        if x.shape[0] != rows:
            rank, size = dist.get_rank(group), dist.get_world_size(group)
            raise ValueError(f"{name} has {x.shape[0]} tokens; rank {rank} of {size} holds {rows}")
        if x.dtype not in _DTYPES:
            raise TypeError(f"{name} has dtype {x.dtype}; context parallelism serves float32, bfloat16 and float16")
        if (x.dtype, x.device) != (q.dtype, q.device):
            raise TypeError(f"{name} is {x.dtype} on {x.device}; it must be {q.dtype} on {q.device}, as q is")
    heads, of_keys = q.shape[1], k.shape[1]
    if k.shape[2] != q.shape[2]:
        raise ValueError(f"k has a head size of {k.shape[2]}; it must be q's, {q.shape[2]}")
    if v.shape[1] != of_keys:
        raise ValueError(f"v has {v.shape[1]} heads; it must have k's, {of_keys}")
    if of_keys < 1 or heads % of_keys:
        raise ValueError(f"k has {of_keys} heads; their number must divide q's, {heads}")
    if layer.sinks is not None and tuple(layer.sinks.shape) != (heads,):
        raise ValueError(f"sinks has shape {tuple(layer.sinks.shape)}; it must be ({heads},), one number a query head")
    if prefix is not None:
        prefix.need_sequences(sequences)
        if prefix.k_cache.shape[2] != of_keys:
            raise ValueError(f"prefix.k_cache has {prefix.k_cache.shape[2]} heads; it must have k's, {of_keys}")
    need_no_gradient(prefix, q, k, v, layer.sinks)

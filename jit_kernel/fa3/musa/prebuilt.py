"""MATE's prebuilt kernels: which calls it gives them, what they read wrongly, and how such a call is corrected."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jit_kernel.fa3.call import Call
from jit_kernel.fa3.musa import metadata

_INT32_ELEMENTS = 2**31 - 1  # they hold sizes and strides in int32


def takes_prebuilt(call: Call) -> bool:
    """Whether MATE would choose a prebuilt kernel for a checked varlen call that it serves."""
    q, k, mask = call.q, call.k, metadata.mask(call.causal, call.window_size)
    d, dv = q.shape[-1], call.v.shape[-1]
    plain = call.page_table is None and call.seqused_q is None and call.seqused_k is None
    plain = plain and call.softcap == 0.0 and call.attention_chunk == 0
    return (
        plain
        and q.dim() == k.dim()
        and mask["window_size"] == (-1, -1)
        and ((d == dv and d <= 128) or (d, dv) == (192, 128))
    )


def destination(call: Call) -> Tensor | None:
    """The buffer for a varlen call: the caller's where MATE can write it, zeros where it leaves rows as they were."""
    q, out = call.q, call.out
    if out is not None:  # the prebuilt path neither checks it nor takes strides
        return out if out.is_contiguous() else None
    if call.cu_seqlens_q is None and call.seqused_q is None:
        return None
    return q.new_zeros((*q.shape[:-1], call.v.shape[-1]))


def corrected(q: Tensor, k: Tensor, cu_seqlens_k: Tensor | None) -> dict[str, Any]:
    """The arguments with which a prebuilt kernel is right, or which lead the call to another.

    It bounds its reads of k by k.numel(), so that the end of a strided k reads as zero; it takes a single sequence as
    dense, whatever cu_seqlens says; and its sizes are int32. Lengths of the keys lead MATE to a compiled kernel.
    """
    if cu_seqlens_k is not None and cu_seqlens_k.shape[0] == 2:
        return {"seqused_k": cu_seqlens_k[1:]}  # it starts with 0, so the end is the length
    if max(q.numel(), k.numel()) > _INT32_ELEMENTS:
        if cu_seqlens_k is not None:
            return {"seqused_k": cu_seqlens_k[1:] - cu_seqlens_k[:-1]}
        return {"seqused_k": torch.full((k.shape[0],), k.shape[1], dtype=torch.int32, device=k.device)}
    return {} if k.is_contiguous() else {"k": k.contiguous()}

"""Plain calls on the CPU: the library checks what it is given, and what it declines goes the long way.

The checks in Python take 4 of 9 us of the smallest call; after a call that has driven Python from the caches 22 (3 to
4 % of 512 tokens and 8 heads), and 60 to 150 of a decode of 130 MB (1 to 2 %). Here few objects are touched: what must
be None or a number of one type; the rest is the library's (kernel_sources/flash_attention_v3/cpu/plain_call.h).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from jit_kernel.fa3.combine_arguments import lse_shape
from jit_kernel.fa3.scheduler_header import checked_window, is_unbounded

Result = Tensor | tuple[Tensor, Tensor]

# By the inputs' dtype: plain_forward of a library that was loaded, and the dtype of out.
_libraries: dict[torch.dtype, tuple[Callable[..., bool], torch.dtype]] = {}


def serve(dtype: torch.dtype, library: Any) -> None:
    """Plain calls of this dtype go to a forward library that was loaded."""
    out_dtype = torch.bfloat16 if dtype == torch.float8_e4m3fn else dtype
    _libraries[dtype] = (library.plain_forward, out_dtype)


def flash_attn_varlen_func(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    page_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    only_qv: bool = False,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
) -> Result | None:
    """`jit_kernel.flash_attention_v3.flash_attn_varlen_func` with unchecked arguments, or None if it declines."""
    if (
        (seqused_q is not None or qv is not None or q_descale is not None)
        or (k_descale is not None or v_descale is not None or sinks is not None)
        or (only_qv is not False or pack_gqa is not None or sm_margin.__class__ is not int or sm_margin != 0)
    ):
        return None
    return _attend(
        q,
        k,
        v,
        page_table,
        cu_seqlens_q,
        cu_seqlens_k,
        seqused_k,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale,
        causal,
        window_size,
        attention_chunk,
        softcap,
        num_splits,
        return_softmax_lse,
        out,
    )


def flash_attn_with_kvcache(
    *,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: Tensor | int | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    only_qv: bool = False,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
) -> Result | None:
    """`jit_kernel.flash_attention_v3.flash_attn_with_kvcache` with unchecked arguments, or None if it declines."""
    if (
        (k is not None or v is not None or cu_seqlens_k_new is not None or cache_batch_idx is not None)
        or (rotary_cos is not None or rotary_sin is not None or rotary_seqlens is not None or qv is not None)
        or (cache_leftpad is not None or q_descale is not None or k_descale is not None or v_descale is not None)
        or (scheduler_metadata is not None or sinks is not None or rotary_interleaved.__class__ is not bool)
        or (only_qv is not False or pack_gqa is not None or sm_margin.__class__ is not int or sm_margin != 0)
        or cache_seqlens.__class__ is int
    ):
        return None
    return _attend(
        q,
        k_cache,
        v_cache,
        page_table,
        cu_seqlens_q,
        None,
        cache_seqlens,
        max_seqlen_q,
        None,
        softmax_scale,
        causal,
        window_size,
        attention_chunk,
        softcap,
        num_splits,
        return_softmax_lse,
        out,
    )


def flash_attn_func(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
) -> Result | None:
    """`jit_kernel.flash_attention_v3.flash_attn_func` with unchecked arguments, or None if it declines."""
    if (
        (qv is not None or q_descale is not None or k_descale is not None or v_descale is not None)
        or (sinks is not None or pack_gqa is not None or deterministic.__class__ is not bool)
        or (sm_margin.__class__ is not int or sm_margin != 0)
    ):
        return None
    return _attend(
        q,
        k,
        v,
        None,
        None,
        None,
        None,
        None,
        None,
        softmax_scale,
        causal,
        window_size,
        attention_chunk,
        softcap,
        num_splits,
        return_softmax_lse,
        out,
    )


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    page_table: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seqused_k: Tensor | int | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    attention_chunk: int,
    softcap: float,
    num_splits: int,
    return_softmax_lse: bool,
    out: Tensor | None,
) -> Result | None:
    library = _libraries.get(q.dtype) if q.__class__ is Tensor and q.is_cpu else None
    if (
        (library is None or k.__class__ is not Tensor or v.__class__ is not Tensor)
        or (page_table is not None and page_table.__class__ is not Tensor)
        or (cu_seqlens_q is not None and cu_seqlens_q.__class__ is not Tensor)
        or (cu_seqlens_k is not None and cu_seqlens_k.__class__ is not Tensor)
        or (seqused_k is not None and seqused_k.__class__ is not Tensor)
        or (out is not None and out.__class__ is not Tensor)
        or (causal.__class__ is not bool or return_softmax_lse.__class__ is not bool)
        or (attention_chunk.__class__ is not int or softcap.__class__ is not float or num_splits.__class__ is not int)
        or (softmax_scale is not None and softmax_scale.__class__ is not float)
        or (max_seqlen_q is not None and max_seqlen_q.__class__ is not int)
        or (max_seqlen_k is not None and max_seqlen_k.__class__ is not int)
        or (return_softmax_lse and q.dim() < 3)
    ):
        return None
    if torch.is_grad_enabled() and (
        (q.requires_grad or k.requires_grad or v.requires_grad) or (out is not None and out.requires_grad)
    ):
        return None
    left, right = window_size if is_unbounded(window_size) else checked_window(window_size)
    forward, out_dtype = library
    if out is None:  # of q's head size: another one is declined
        out = torch.empty(q.shape, dtype=out_dtype, device="cpu")
    lse = torch.empty(lse_shape(q), dtype=torch.float32, device="cpu") if return_softmax_lse else None
    tensors = (q, k, v, out, lse, page_table, cu_seqlens_q, cu_seqlens_k, seqused_k)
    lengths = (max_seqlen_q, max_seqlen_k)
    numbers = (softmax_scale, causal, left, right, attention_chunk, softcap, num_splits, torch.get_num_threads())
    try:
        served = forward(*tensors, *lengths, *numbers)
    except (RuntimeError, TypeError):  # no DLPack tensor (sparse, quantized) or no int64: the checks know its name
        return None
    if not served:
        return None
    return out if lse is None else (out, lse)


PLAIN: Mapping[str, Callable[..., Result | None]] = MappingProxyType(
    {
        "flash_attn_varlen_func": flash_attn_varlen_func,
        "flash_attn_with_kvcache": flash_attn_with_kvcache,
        "flash_attn_func": flash_attn_func,
    }
)

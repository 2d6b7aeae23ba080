"""Plain calls on the CPU: the library checks what it is given, and what it declines goes the long way.

The checks in Python take 4 of 8 us of the smallest call. After a call that has driven Python from the caches, each
object that the next one touches is a wait for memory, so few are touched on the way here, and no dict is made. Before
a call of 512 tokens and 8 heads computes (0.55 ms), Python takes 46 us with the checks, 24 with these few on a dict of
all arguments, 15 so; before a decode of 130 MB (5.5 ms) 60 where a dict takes 90.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, empty, get_num_threads, is_grad_enabled

from jit_kernel.fa3.checks.combine import lse_shape
from jit_kernel.fa3.checks.metadata import checked_window, is_unbounded

Result = Tensor | tuple[Tensor, Tensor]

# By the inputs' dtype: plain_forward of a library that was loaded, and the dtype of out.
_libraries: dict[torch.dtype, tuple[Callable[..., bool], torch.dtype]] = {}


def serve(dtype: torch.dtype, library: Any) -> None:
    """Plain calls of this dtype go to a forward library that was loaded."""
    out_dtype = torch.bfloat16 if dtype == torch.float8_e4m3fn else dtype
    _libraries[dtype] = (library.plain_forward, out_dtype)


def attend(
    *,
    q: Any,
    k: Any,
    v: Any,
    softmax_scale: Any,
    causal: Any,
    window_size: Any,
    attention_chunk: Any,
    softcap: Any,
    num_splits: Any,
    return_softmax_lse: Any,
    out: Any,
    page_table: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    seqused_k: Any = None,
    max_seqlen_q: Any = None,
    max_seqlen_k: Any = None,
) -> Result | None:
    """The result of a call of a public function without its rare arguments, none of these checked; None if it declines.

    It declines what has a mistake or asks for more than plain_forward serves. A page or a window_size that is none
    raises ValueError or TypeError in the words of the checks.
    """
    if q.__class__ is not Tensor or k.__class__ is not Tensor or v.__class__ is not Tensor or not q.is_cpu:
        return None
    library = _libraries.get(q.dtype)
    if library is None or not (
        causal.__class__ is return_softmax_lse.__class__ is bool
        and attention_chunk.__class__ is num_splits.__class__ is int
        and softcap.__class__ is float
        and (softmax_scale is None or softmax_scale.__class__ is float)
        and (out is None or out.__class__ is Tensor)
    ):
        return None
    layout = (page_table, cu_seqlens_q, cu_seqlens_k, seqused_k, max_seqlen_q, max_seqlen_k)
    is_dense = page_table is cu_seqlens_q is cu_seqlens_k is seqused_k is max_seqlen_q is max_seqlen_k is None
    if not is_dense and not _has_plain_types(*layout):
        return None
    if is_grad_enabled() and (
        q.requires_grad or k.requires_grad or v.requires_grad or (out is not None and out.requires_grad)
    ):
        return None
    left, right = window_size if is_unbounded(window_size) else checked_window(window_size)
    forward, out_dtype = library
    lse = None
    if return_softmax_lse:
        if q.dim() < 3:
            return None
        lse = empty(lse_shape(q), dtype=torch.float32, device="cpu")
    if out is None:  # of q's head size: another one is declined
        out = empty(q.shape, dtype=out_dtype, device="cpu")
    numbers = (softmax_scale, causal, left, right, attention_chunk, softcap, num_splits, get_num_threads())
    try:
        served = forward(q, k, v, out, lse, *layout, *numbers)
    except (RuntimeError, TypeError):  # no DLPack tensor (sparse, quantized) or no int64: the checks know its name
        return None
    if not served:
        return None
    return out if lse is None else (out, lse)


def _has_plain_types(*layout: Any) -> bool:
    """None or tensors, then two times None or an int."""
    tensors = all(value is None or value.__class__ is Tensor for value in layout[:4])
    return tensors and all(value is None or value.__class__ is int for value in layout[4:])

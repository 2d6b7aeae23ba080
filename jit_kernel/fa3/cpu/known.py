"""Plain calls on the CPU: the library checks the arguments itself; Python checks the calls that it declines.

The checks in Python take 4 of 8 us of the smallest call. After a call that has driven Python from the caches, each
object that the next one touches is a wait for memory, so few are touched on the way here. Before a call of 512 tokens
and 8 heads computes (0.55 ms), Python took 46 us with the checks and 15 so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, contiguous_format, empty, empty_like, get_num_threads, is_grad_enabled

from jit_kernel.fa3.call import DEFAULTS, FIELDS, OF_DENSE, UNBOUNDED, Arguments, Result, lse_shape, result_dtype
from jit_kernel.fa3.checks.values import need_window
from jit_kernel.fa3.features import fields_ask_for_more

# What plain_forward serves (kernel_sources/flash_attention_v3/cpu/entry/plain_call.h), by the names of
# features.ARGUMENTS.
CLAIMED = frozenset(
    ("ragged_q", "ragged_k", "page_size", "seqused_k", "causal", "window", "chunk", "softcap", "lse", "split")
)

# By the inputs' dtype: plain_forward of a library that was loaded, and the dtype of out.
_libraries: dict[torch.dtype, tuple[Callable[..., bool], torch.dtype]] = {}


# page_table, cu_seqlens_q, cu_seqlens_k, seqused_k, max_seqlen_q and max_seqlen_k of flash_attn_func.
_DENSE_LAYOUT = (None,) * 6

# Whether a call asks for more than that: of flash_attn_func, and of the others.
_dense_asks_for_more = fields_ask_for_more(CLAIMED, OF_DENSE)
_asks_for_more = fields_ask_for_more(CLAIMED, len(FIELDS))


def serve(dtype: torch.dtype, library: Any) -> None:
    """Plain calls of this dtype go to a forward library that was loaded."""
    global _dense_asks_for_more, _asks_for_more
    _dense_asks_for_more = fields_ask_for_more(CLAIMED, OF_DENSE)
    _asks_for_more = fields_ask_for_more(CLAIMED, len(FIELDS))
    _libraries[dtype] = (library.plain_forward, result_dtype(dtype))


def try_unchecked(arguments: Arguments) -> Result | None:
    """The result of an unchecked plain call; None where it has a mistake or asks for more.

    A page or a window_size that is none raises the ValueError or TypeError of the checks.
    """
    layout = _DENSE_LAYOUT
    if len(arguments) == OF_DENSE:
        (
            _, q, k, v, scale, causal, window, chunk, softcap, num_splits, with_lse,
            out, _, _, _, _, _, pack_gqa, sm_margin, deterministic,
        ) = arguments  # fmt: skip
        declined = _dense_asks_for_more(arguments) or deterministic.__class__ is not bool
    else:
        arguments += DEFAULTS[len(arguments) :]
        (
            _, q, k, v, scale, causal, window, chunk, softcap, num_splits, with_lse,
            out, _, _, _, _, _, pack_gqa, sm_margin, _, _,
            cu_seqlens_q, longest_q, seqused_k, page_table, cu_seqlens_k, longest_k, _,
            _, _, _, _, _, _, _, _, rotary_interleaved, _,
        ) = arguments  # fmt: skip
        layout = (page_table, cu_seqlens_q, cu_seqlens_k, seqused_k, longest_q, longest_k)
        declined = (
            _asks_for_more(arguments) or rotary_interleaved.__class__ is not bool or not _has_plain_types(*layout)
        )
    if declined or not (
        q.__class__ is k.__class__ is v.__class__ is Tensor
        and q.is_cpu
        and (library := _libraries.get(q.dtype)) is not None
        and causal.__class__ is with_lse.__class__ is bool
        and chunk.__class__ is num_splits.__class__ is int
        and softcap.__class__ is float
        and (scale is None or scale.__class__ is float)
        and (out is None or out.__class__ is Tensor)
        and pack_gqa is None
        and sm_margin.__class__ is int
        and sm_margin == 0
    ):
        return None
    if is_grad_enabled() and (
        q.requires_grad or k.requires_grad or v.requires_grad or (out is not None and out.requires_grad)
    ):
        return None
    left, right = window if window is UNBOUNDED else need_window(window)
    forward, out_dtype = library
    if with_lse and q.dim() < 3:
        return None
    lse = empty(lse_shape(q), dtype=torch.float32, device="cpu") if with_lse else None
    numbers = (scale, causal, left, right, chunk, softcap, num_splits, get_num_threads())
    try:
        if out is None:  # of q's head size: another one is declined
            out = empty_like(q, dtype=out_dtype, memory_format=contiguous_format)  # 1 us, where `empty` takes 2.2
        if not forward(q, k, v, out, lse, *layout, *numbers):
            return None
    except (RuntimeError, TypeError):  # no DLPack tensor (sparse, quantized) or no int64: the checks know its name
        return None
    return out if lse is None else (out, lse)


def _has_plain_types(
    page_table: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, seqused_k: Any, longest_q: Any, longest_k: Any
) -> bool:
    """None or tensors, then two times None or an int."""
    return (
        (page_table is None or page_table.__class__ is Tensor)
        and (cu_seqlens_q is None or cu_seqlens_q.__class__ is Tensor)
        and (cu_seqlens_k is None or cu_seqlens_k.__class__ is Tensor)
        and (seqused_k is None or seqused_k.__class__ is Tensor)
        and (longest_q is None or longest_q.__class__ is int)
        and (longest_k is None or longest_k.__class__ is int)
    )

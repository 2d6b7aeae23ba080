"""Plain calls on the CPU: the library checks what it is given, and what it declines goes the long way.

The checks in Python take 4 of 9 us of the smallest call; after a call that has driven Python from the caches 22 (3 to
4 % of 512 tokens and 8 heads), and 60 to 150 of a decode of 130 MB (1 to 2 %). Here few objects are touched: what must
be None or a number of one type; the rest is the library's (kernel_sources/flash_attention_v3/cpu/plain_call.h).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from jit_kernel.fa3.combine_arguments import lse_shape
from jit_kernel.fa3.scheduler_header import checked_window, is_unbounded

Result = Tensor | tuple[Tensor, Tensor]

# What a plain call leaves out.
_RARE = ("qv", "q_descale", "k_descale", "v_descale", "sinks", "pack_gqa")
_RARE_BY_FUNCTION = {
    "flash_attn_func": _RARE,
    "flash_attn_varlen_func": (*_RARE, "seqused_q"),
    "flash_attn_with_kvcache": (
        *(*_RARE, "k", "v", "cu_seqlens_k_new", "cache_batch_idx", "cache_leftpad", "scheduler_metadata"),
        *("rotary_cos", "rotary_sin", "rotary_seqlens"),
    ),
}

# By the inputs' dtype: plain_forward of a library that was loaded, and the dtype of out.
_libraries: dict[torch.dtype, tuple[Callable[..., bool], torch.dtype]] = {}


def serve(dtype: torch.dtype, library: Any) -> None:
    """Plain calls of this dtype go to a forward library that was loaded."""
    out_dtype = torch.bfloat16 if dtype == torch.float8_e4m3fn else dtype
    _libraries[dtype] = (library.plain_forward, out_dtype)


def attend(function: str, call: Mapping[str, Any]) -> Result | None:
    """The result of a call of a public function, every argument by name and none of them checked; None if it declines.

    It declines what has a mistake or asks for more than plain_forward serves. A page or a window_size that is none
    raises ValueError or TypeError in the words of the checks.
    """
    q, out = call["q"], call["out"]
    k, v = (call["k_cache"], call["v_cache"]) if "k_cache" in call else (call["k"], call["v"])
    library = _libraries.get(q.dtype) if q.__class__ is Tensor and q.is_cpu else None
    if library is None or k.__class__ is not Tensor or v.__class__ is not Tensor:
        return None
    if not _has_plain_types(function, call):
        return None
    if torch.is_grad_enabled() and (
        (q.requires_grad or k.requires_grad or v.requires_grad) or (out is not None and out.requires_grad)
    ):
        return None
    window, with_lse = call["window_size"], call["return_softmax_lse"]
    if with_lse and q.dim() < 3:
        return None
    left, right = window if is_unbounded(window) else checked_window(window)
    forward, out_dtype = library
    if out is None:  # of q's head size: another one is declined
        out = torch.empty(q.shape, dtype=out_dtype, device="cpu")
    lse = torch.empty(lse_shape(q), dtype=torch.float32, device="cpu") if with_lse else None
    layout = (call.get("page_table"), call.get("cu_seqlens_q"), call.get("cu_seqlens_k"), _lengths(call))
    numbers = (call["attention_chunk"], call["softcap"], call["num_splits"], torch.get_num_threads())
    longest = (call.get("max_seqlen_q"), call.get("max_seqlen_k"))
    try:
        served = forward(
            q, k, v, out, lse, *layout, *longest, call["softmax_scale"], call["causal"], left, right, *numbers
        )
    except (RuntimeError, TypeError):  # no DLPack tensor (sparse, quantized) or no int64: the checks know its name
        return None
    if not served:
        return None
    return out if lse is None else (out, lse)


def _lengths(call: Mapping[str, Any]) -> Any:
    """The keys of each sequence, under either of its names."""
    return call["cache_seqlens"] if "k_cache" in call else call.get("seqused_k")


def _has_plain_types(function: str, call: Mapping[str, Any]) -> bool:
    """Nothing but None where a plain call has nothing; else tensors, and numbers of the type that is documented."""
    for name in _RARE_BY_FUNCTION[function]:
        if call[name] is not None:
            return False
    offsets = (call.get("cu_seqlens_q"), call.get("cu_seqlens_k"))
    for value in (call["out"], call.get("page_table"), _lengths(call), *offsets):
        if value is not None and value.__class__ is not Tensor:
            return False
    for value in (call.get("max_seqlen_q"), call.get("max_seqlen_k")):
        if value is not None and value.__class__ is not int:
            return False
    for value in (call["causal"], call["return_softmax_lse"], call.get("deterministic", False)):
        if value.__class__ is not bool:
            return False
    if call.get("only_qv", False) is not False or call.get("rotary_interleaved", True).__class__ is not bool:
        return False
    scale, margin = call["softmax_scale"], call["sm_margin"]
    if (scale is not None and scale.__class__ is not float) or margin.__class__ is not int or margin != 0:
        return False
    chunk, softcap, splits = call["attention_chunk"], call["softcap"], call["num_splits"]
    return chunk.__class__ is int and softcap.__class__ is float and splits.__class__ is int

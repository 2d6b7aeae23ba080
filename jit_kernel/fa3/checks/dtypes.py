"""The dtypes of a call's tensors, and the factors of float8_e4m3fn ones.

q, k and v have one dtype, but beside a q of 16 bits k and v may be float8_e4m3fn: a cache of half the bytes. A
float8_e4m3fn tensor may have factors: a descale for each sequence and head, and k and v another for each token and
head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jit_kernel.fa3.call import Call
from jit_kernel.fa3.checks.values import need_device, need_dtype, need_shape, need_tensor

E4M3 = torch.float8_e4m3fn
_HALF = (torch.bfloat16, torch.float16)


def check_keys(q: Tensor, k: Tensor, v: Tensor, k_name: str, v_name: str) -> None:
    """k has q's dtype, or is float8_e4m3fn beside a q of 16 bits; v has k's."""
    if q.dtype in _HALF:
        need_dtype(k_name, k, (q.dtype, E4M3), ", the dtype of q or the one of an FP8 cache")
    else:
        need_dtype(k_name, k, (q.dtype,), ", the dtype of q")
    why = f", the dtype of {k_name}" if is_mixed(q, k) else f", the dtype of q and {k_name}"
    need_dtype(v_name, v, (k.dtype,), why)


def is_mixed(q: Tensor, k: Tensor) -> bool:
    """Whether q has 16 bits and k and v have 8, of checked dtypes."""
    return k.dtype is not q.dtype


def check_new(q: Tensor, k_cache: Tensor, k: Tensor, v: Tensor) -> None:
    """New keys have q's dtype; those that come in the cache's are stored as they are. New values have their dtype."""
    if is_mixed(q, k_cache):
        need_dtype("k", k, (q.dtype, E4M3), ", the dtype of q or of k_cache")
        need_dtype("v", v, (k.dtype,), ", the dtype of k")
    else:
        need_dtype("k", k, (q.dtype,), ", the dtype of q")
        need_dtype("v", v, (q.dtype,), ", the dtype of q")


def unread_descales(call: Call) -> tuple[str, ...]:
    """The descales of what is not float8_e4m3fn: they have no effect, as in FlashAttention-3."""
    of_keys = () if call.k.dtype is E4M3 else ("k_descale", "v_descale")
    return of_keys if call.q.dtype is E4M3 else ("q_descale", *of_keys)


def check_scales(call: Call, q: Tensor, k: Tensor, batch: int) -> None:
    """Descales, (b, hk), and token scales, k's shape without its last dimension and with any strides."""
    unread = unread_descales(call)
    for name in ("q_descale", "k_descale", "v_descale"):
        scale = getattr(call, name)
        if scale is not None and not (isinstance(scale, Tensor) and name in unread):
            descale = need_tensor(name, scale)
            need_dtype(name, descale, (torch.float32,))
            need_device(name, descale, q.device)
            need_shape(name, descale, (batch, k.shape[-2]), "(b, hk)")
    for name in ("k_scale", "v_scale"):
        if getattr(call, name) is None:
            continue
        scale = need_tensor(name, getattr(call, name))
        if k.dtype is not E4M3:
            raise ValueError(
                f"{name} is given beside keys and values in {str(k.dtype)[6:]}; "
                "it must be None unless they are float8_e4m3fn"
            )
        need_dtype(name, scale, (torch.float32,))
        need_device(name, scale, q.device)
        need_shape(name, scale, k.shape[:-1], _form(call))


def _form(call: Call) -> str:
    """The shape of token scales, in letters."""
    if call.page_table is not None:
        return "(pages, page_size, hk)"
    if call.cu_seqlens_k is not None:
        return "(total_k, hk)"
    return "(b, sk, hk)" if call.cache_batch_idx is None else "(b_cache, sk, hk)"

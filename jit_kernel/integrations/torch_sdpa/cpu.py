"""Behind `aten::_scaled_dot_product_flash_attention_for_cpu`, which SDPA calls on the CPU.

torch's own backward operator goes with the result and the lse, whoever made them. Grouped heads reach the operator
as they are: no key is copied.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from jit_kernel.flash_attention_v3 import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from jit_kernel.integrations.torch_sdpa import masks
from jit_kernel.integrations.torch_sdpa.behind import Passed

_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
_PLAIN = frozenset((Tensor, Parameter))
_MAX_HEAD_DIM = 512
_MAX_SCALE = torch.finfo(torch.float32).max


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor] | Passed:
    """torch's operator: query (b, hq, sq, d), key and value (b, hk, sk, d) to (out, lse), or why it is passed on."""
    reason = _not_served(query, key, value, dropout_p, scale)
    if reason is not None:
        return reason
    counted = None
    settings: dict[str, Any] = {"softmax_scale": scale, "num_splits": 0, "return_softmax_lse": True}
    if attn_mask is not None and attn_mask.numel() > 0:
        if is_causal:
            return Passed("a mask beside is_causal")
        if attn_mask.requires_grad:
            return Passed("a mask that requires grad")
        counted = masks.read(attn_mask, query.shape[0], query.shape[2], key.shape[2])
        if counted is None:
            return Passed("a mask that is no lengths")
    elif is_causal:
        key, value = _settle_causal(query, key, value, settings)
    out = torch.empty_like(query)
    settings["out"] = out.transpose(1, 2)
    rows = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    try:
        if query.requires_grad or key.requires_grad or value.requires_grad:  # torch has recorded the operator already
            with torch.no_grad():
                lse = _lse(*rows, counted, settings)
        else:
            lse = _lse(*rows, counted, settings)
    except NotImplementedError:  # before anything is written: JIT_KERNEL_IMPLEMENTATION names one for GPUs
        return Passed("no implementation serves it")
    if lse.shape[1] > 1 and lse.shape[2] > 1:
        # torch's lse has the queries before the heads in memory, and compiled programs rely on it.
        lse = lse.mT.contiguous().mT
    return out, lse


def _not_served(query: Tensor, key: Tensor, value: Tensor, dropout_p: float, scale: float | None) -> Passed | None:
    if dropout_p != 0.0:
        return Passed("dropout")
    dtype, shape, of_keys = query.dtype, query.shape, key.shape
    if dtype not in _DTYPES:
        return Passed(f"dtype {dtype}".replace("torch.", ""))
    if not (query.__class__ in _PLAIN and key.__class__ in _PLAIN and value.__class__ in _PLAIN):
        return Passed("a tensor subclass")
    if scale is not None and not 0.0 < scale <= _MAX_SCALE:
        return Passed("a scale that is not positive and finite")
    # SDPA has looked at shapes; whoever calls the operator itself gets torch's own errors.
    if not (
        len(shape) == len(of_keys) == 4
        and of_keys == value.shape
        and dtype == key.dtype == value.dtype
        and shape[0] == of_keys[0]
        and shape[3] == of_keys[3]
        and query.stride(3) == key.stride(3) == value.stride(3) == 1
    ):
        return Passed("shapes, dtypes or strides that differ")
    if 0 in shape or 0 in of_keys:
        return Passed("an empty tensor")
    if shape[3] > _MAX_HEAD_DIM:
        return Passed(f"a head size above {_MAX_HEAD_DIM}")
    if shape[1] % of_keys[1]:
        return Passed("heads that are no multiple of the keys' heads")
    return None


def _settle_causal(query: Tensor, key: Tensor, value: Tensor, settings: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """torch's causal mask is aligned to the top left: query i sees the keys up to i. The keys that any query sees."""
    queries, keys = query.shape[2], key.shape[2]
    if queries > keys:  # aligned to the bottom right, query i sees those up to i + keys - queries
        settings["window_size"] = (-1, queries - keys)
        return key, value
    settings["causal"] = True
    return (key, value) if queries == keys else (key[:, :, :queries], value[:, :, :queries])


def _lse(q: Tensor, k: Tensor, v: Tensor, counted: masks.Keys | None, settings: dict[str, Any]) -> Tensor:
    """The lse (b, hq, sq) of q (b, sq, hq, d), k and v (b, sk, hk, d); the result goes to settings' out."""
    if counted is None:
        _, lse = flash_attn_func(q, k, v, **settings)
    elif counted.starts is None:
        used, causal = counted.ends, counted.causal
        _, lse = flash_attn_varlen_func(q, k, v, None, None, seqused_k=used, causal=causal, **settings)
    else:
        used, padding = counted.ends, counted.starts
        settings["causal"] = counted.causal
        _, lse = flash_attn_with_kvcache(q, k, v, cache_seqlens=used, cache_leftpad=padding, **settings)
    assert isinstance(lse, Tensor)
    if counted is not None and counted.has_empty_rows:
        lse.masked_fill_(lse == -math.inf, 0.0)  # torch's mark for a row that sees no key; its backward takes it so
    return lse

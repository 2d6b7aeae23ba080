"""The backend that diffusers' dispatcher calls: its arguments as FlashAttention's, and what goes on to torch's SDPA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jit_kernel.fa3.call import UNBOUNDED
from jit_kernel.fa3.checks import plain
from jit_kernel.fa3.checks.values import described
from jit_kernel.flash_attention_v3 import flash_attn_func
from jit_kernel.integrations import told
from jit_kernel.integrations.diffusers import padding, parallel
from jit_kernel.integrations.torch_sdpa import masks

HOST = "diffusers"
_DTYPES_ON_CPU = frozenset((torch.float32, torch.bfloat16, torch.float16))
_DTYPES = frozenset((torch.bfloat16, torch.float16))
_MAX_HEAD_DIM_ON_CPU, _MAX_HEAD_DIM = 512, 256
_OTHER_MASK = "a mask that hides other keys from each query, or adds numbers"


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    window_size: tuple[int, int] = UNBOUNDED,
    _parallel_config: Any = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """query (b, sq, hq, d), key (b, sk, hk, d) and value (b, sk, hk, dv) to (b, sq, hq, dv); lse (b, sq, hq) float32.

    attn_mask: (b, sk), or what broadcasts to (b, hq, sq, sk), as torch's SDPA takes it. One that hides the same keys
    from every query is served: these keys are left out, wherever they lie. is_causal is aligned to the top left, as in
    SDPA; window_size, which comes by attention_kwargs, to the bottom right, as in FlashAttention. Heads may be grouped,
    whatever enable_gqa is.

    Other masks, dropout, and dtypes and head sizes that no kernel has go on to SDPA, counted, and told once. With
    return_lse, window_size or context parallelism, which SDPA has not, they raise NotImplementedError.
    """
    if attn_mask is not None and is_causal:
        raise ValueError(f"attn_mask is {described(attn_mask)} beside is_causal=True; give one of them")
    seen, reason = None, _without_kernel(query, attn_mask, dropout_p)
    if attn_mask is not None and not reason:
        seen = _keys_seen(attn_mask, query.shape[0], key.shape[1])
        reason = _OTHER_MASK if seen is None else ""
    if reason:
        _need_none_of(reason, return_lse=return_lse, window_size=window_size != UNBOUNDED, parallel=_parallel_config)
        told.passed_on(HOST, reason)
        return _by_sdpa((query, key, value), attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if _parallel_config is not None:
        _need_none_of("context parallelism", window_size=window_size != UNBOUNDED)
        found = parallel.attend((query, key, value), seen, is_causal, scale, enable_gqa, return_lse, _parallel_config)
        told.served(HOST)
        return found  # type: ignore[no-any-return]
    if seen is not None:
        _need_none_of("a mask", window_size=window_size != UNBOUNDED)
        out, lse = padding.attend(query, key, value, seen, scale)
    else:
        out, lse = _without_mask(query, key, value, is_causal, scale, window_size)
    told.served(HOST)
    return (out, lse.transpose(1, 2)) if return_lse else out


def need_alike(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> None:
    """The dispatcher's check, under DIFFUSERS_ATTN_CHECKS: query, key and value have one device and one dtype."""
    for name, each in (("key", key), ("value", value)):
        if each.device != query.device or each.dtype != query.dtype:
            raise ValueError(f"{name} is {described(each)}; it must be as query is, {described(query)}")


def _without_kernel(query: Tensor, mask: Tensor | None, dropout_p: float) -> str:
    """Why no kernel serves the call, empty where one may."""
    if dropout_p:
        return "dropout"
    if mask is not None and mask.requires_grad:
        return "a mask that requires grad"
    if query.dtype not in (_DTYPES_ON_CPU if query.is_cpu else _DTYPES):
        return f"dtype {query.dtype} on {query.device.type}".replace("torch.", "")
    most = _MAX_HEAD_DIM_ON_CPU if query.is_cpu else _MAX_HEAD_DIM
    return f"a head size above {most} on {query.device.type}" if query.shape[-1] > most else ""


def _need_none_of(other: str, **asked: Any) -> None:
    for name, given in asked.items():
        if given:
            raise NotImplementedError(f"{name.replace('parallel', 'context parallelism')} is asked for beside {other}")


def _keys_seen(mask: Tensor, batch: int, keys: int) -> Tensor | None:
    """(b, sk) bool, the keys that every query of every head sees; None for a mask that says more than that.

    While a program is traced no value can be read, and the mask's shape and dtype must tell.
    """
    if mask.dim() == 2 and mask.shape == (batch, keys):  # as diffusers' own backend reads it
        mask = mask[:, None, None, :]
    if torch.compiler.is_compiling() or plain.is_traced():
        whole = mask.dtype is torch.bool and mask.dim() == 4 and mask.shape[1:3] == (1, 1) and mask.shape[3] == keys
        seen = mask[:, 0, 0] if whole else None
    else:
        seen = masks.seen_by_all(mask, keys)
    if seen is None or seen.shape[0] not in (1, batch):
        return None
    return seen.expand(batch, keys)


def _without_mask(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None, window: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """(out, lse (b, hq, sq)); causal masks are aligned to the top left: query i sees the keys up to i."""
    queries, keys = query.shape[1], key.shape[1]
    if is_causal and queries != keys:
        _need_none_of("is_causal and other numbers of queries and keys", window_size=window != UNBOUNDED)
    if is_causal and queries < keys:
        key, value = key[:, :queries], value[:, :queries]
    elif is_causal and queries > keys:  # aligned to the bottom right, query i sees those up to i + keys - queries
        window, is_causal = (-1, queries - keys), False
    found = flash_attn_func(query, key, value, scale, is_causal, window_size=window, return_softmax_lse=True)
    return found[0], found[1]


def _by_sdpa(
    tensors: tuple[Tensor, Tensor, Tensor], mask: Tensor | None, dropout_p: float, is_causal: bool,
    scale: float | None, enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """The call as diffusers' own backend, "native", makes it."""
    query, key, value = (each.transpose(1, 2) for each in tensors)
    if mask is not None and mask.dim() == 2 and mask.shape == (query.shape[0], key.shape[2]):
        mask = mask[:, None, None, :]
    found = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
    )
    return found.transpose(1, 2)

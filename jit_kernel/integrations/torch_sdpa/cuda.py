"""Behind torch's flash operators on CUDA, which SDPA and `torch.nn.attention.varlen` call.

torch's own backward operators (FlashAttention 2's) go with the result and the lse, whoever made them. Rows that see
no key have an lse of +inf there, where ours have -inf. Philox's seed and offset belong to dropout, which is passed on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from jit_kernel.flash_attention_v3 import flash_attn_func, flash_attn_varlen_func
from jit_kernel.integrations.torch_sdpa.behind import Passed

_DTYPES = frozenset((torch.bfloat16, torch.float16))
_PLAIN = frozenset((Tensor, Parameter))
_MAX_SCALE = torch.finfo(torch.float32).max


def dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...] | Passed:
    """`_scaled_dot_product_flash_attention`: query (b, hq, sq, d), key and value (b, hk, sk, d)."""
    reason = _not_served(query, key, value, dropout_p, return_debug_mask, scale)
    if reason is not None:
        return reason
    if not (query.dim() == key.dim() == value.dim() == 4):
        return Passed("shapes that differ")
    out = torch.empty_like(query)
    lse = _attend(
        flash_attn_func,
        (query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)),
        {"softmax_scale": scale, "causal": is_causal, "out": out.transpose(1, 2)},
        all_see_keys=key.shape[2] > 0 and not (is_causal and query.shape[2] > key.shape[2]),
    )
    if isinstance(lse, Passed):
        return lse
    return (out, lse, None, None, query.shape[2], key.shape[2], *_of_dropout(query))


def forward(*arguments: Any, **named: Any) -> tuple[Any, ...] | Passed:
    """`_flash_attention_forward`: dense as (b, s, h, d), ragged as (total, h, d), over pages with block_table."""
    query = arguments[0]
    out = torch.empty_like(query)
    lse = _write(out, *arguments, **named)
    return lse if isinstance(lse, Passed) else (out, lse, *_of_dropout(query))


def forward_into(out: Tensor, *arguments: Any, **named: Any) -> Tensor | Passed:
    """`_flash_attention_forward_no_dropout_inplace`: the same into memory of the caller's; the lse alone."""
    return _write(out, *arguments, **named)


OPERATORS: Mapping[str, Callable[..., Any]] = {
    "_scaled_dot_product_flash_attention": dense,
    "_flash_attention_forward": forward,
    "_flash_attention_forward_no_dropout_inplace": forward_into,
}


def _write(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor | Passed:
    """The lse of `_flash_attention_forward`'s arguments; the result goes to out."""
    reason = _not_served(query, key, value, dropout_p, return_debug_mask, scale)
    if reason is not None:
        return reason
    if alibi_slopes is not None:
        return Passed("alibi_slopes")
    window = tuple(-1 if bound is None else bound for bound in (window_size_left, window_size_right))
    settings: dict[str, Any] = {"softmax_scale": scale, "causal": is_causal, "window_size": window, "out": out}
    if cum_seq_q is None:
        if cum_seq_k is not None or seqused_k is not None or block_table is not None:
            return Passed("lengths of keys beside dense queries")
        square = query.shape[1] <= key.shape[1] and window == (-1, -1)
        return _attend(flash_attn_func, (query, key, value), settings, all_see_keys=square and key.shape[1] > 0)
    if block_table is not None and seqused_k is None:
        return Passed("block_table without seqused_k")
    cached = block_table is not None
    settings |= {"page_table": block_table, "seqused_k": seqused_k, "max_seqlen_q": max_q, "max_seqlen_k": max_k}
    # Without pages splits are no one's claim on Hopper; over them they are chosen, unless the caller says how many.
    settings["num_splits"] = (num_splits or 0) if cached else 1
    starts = None if cached else cum_seq_k
    same = starts is not None and seqused_k is None and starts.data_ptr() == cum_seq_q.data_ptr()
    return _attend(flash_attn_varlen_func, (query, key, value, cum_seq_q, starts), settings, all_see_keys=same)


def _not_served(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float, return_debug_mask: bool, scale: float | None
) -> Passed | None:
    if dropout_p != 0.0:
        return Passed("dropout")
    if return_debug_mask:
        return Passed("return_debug_mask")
    if query.dtype not in _DTYPES or not query.dtype == key.dtype == value.dtype:
        return Passed(f"dtype {query.dtype}".replace("torch.", ""))
    if not (query.__class__ in _PLAIN and key.__class__ in _PLAIN and value.__class__ in _PLAIN):
        return Passed("a tensor subclass")
    if scale is not None and not 0.0 < scale <= _MAX_SCALE:
        return Passed("a scale that is not positive and finite")
    if not query.stride(-1) == key.stride(-1) == value.stride(-1) == 1:
        return Passed("head sizes whose elements do not lie side by side")
    if query.numel() == 0 or key.numel() == 0:
        return Passed("an empty tensor")
    return None


def _attend(
    function: Callable[..., Any], tensors: tuple[Any, ...], settings: dict[str, Any], *, all_see_keys: bool
) -> Tensor | Passed:
    """The lse as torch's backward operators take it; all_see_keys: no row can be without a key."""
    wants_grad = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in tensors)
    try:
        with torch.no_grad() if wants_grad else nullcontext():
            _, lse = function(*tensors, return_softmax_lse=True, **settings)
    except NotImplementedError:  # raised before anything is launched: no implementation serves such a call
        return Passed("no implementation serves it")
    assert isinstance(lse, Tensor)
    return lse if all_see_keys else lse.masked_fill_(lse == -math.inf, math.inf)


def _of_dropout(query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Philox's seed and offset and the mask to look at, which nothing reads without dropout."""
    seed = torch.empty(2, dtype=torch.uint64, device=query.device)
    offset = torch.empty((), dtype=torch.uint64, device=query.device)
    return seed, offset, torch.empty(0, dtype=query.dtype, device=query.device)

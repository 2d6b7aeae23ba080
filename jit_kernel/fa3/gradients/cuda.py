"""Gradients on CUDA, by `aten::_flash_attention_backward`: FlashAttention 2's, which takes the calls as they are.

torch's "FA3" stands before that operator and calls `flash_attn_3::bwd`. Where that is ours it would come back here
without an end, so whoever defines it has torch's own kernel held first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Gradients = tuple[Tensor, Tensor, Tensor]

_OPERATOR = "aten::_flash_attention_backward"
_held: list[tuple[Any, Any]] = []  # torch's own kernel and the key set that it is called with, while it is held


def hold_own_kernel(key: str = "CUDA") -> None:
    """Call the kernel that stands under a dispatch key now, whatever stands before it later; before torch 2.10 nothing.

    torch cannot put anything before it there, nor hand it out.
    """
    get_kernel = getattr(torch.library, "get_kernel", None)
    if get_kernel is not None:
        dispatch_key = getattr(torch._C.DispatchKey, key)
        _held[:] = [(get_kernel(_OPERATOR, key), torch._C.DispatchKeySet(dispatch_key))]


def release_own_kernel() -> None:
    """Call the operator again."""
    _held.clear()


def flash(
    tensors: tuple[Tensor, ...],
    lse: Tensor,
    offsets: tuple[Tensor, Tensor] | None,
    longest: tuple[int, int],
    scale: float,
    left: int,
    right: int,
) -> Gradients:
    """Gradients of q, k and v; tensors: grad_out, out, q, k, v, (b, s, h, d) or (total, h, d) with offsets.

    A row that sees no key has an lse of +inf. longest: at least the longest sequences' lengths. Rows outside of every
    sequence get zeros.
    """
    grad_out, out, q, k, v = tensors
    starts: tuple[Tensor | None, Tensor | None] = (None, None)
    if offsets is not None:
        starts_q, starts_k = (each.to(torch.int32).contiguous() for each in offsets)
        starts = starts_q, starts_k
        if starts_q.numel() == 1 or 0 in longest:  # no sequence, or none with rows: the operator takes neither
            return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    of_dropout = q.new_empty(2, dtype=torch.uint64), q.new_empty((), dtype=torch.uint64)
    found = _backward(
        grad_out, q, k, v, out, lse.contiguous(), *starts, *longest, 0.0, right == 0, *of_dropout,
        scale=scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip
    grad_q, grad_k, grad_v = (grad.contiguous() for grad in found)
    if offsets is not None:  # the operator writes the rows of sequences alone, and its memory may hold anything
        grad_q.masked_fill_(_outside(starts_q, q), 0)
        outside = _outside(starts_k, k)
        grad_k.masked_fill_(outside, 0)
        grad_v.masked_fill_(outside, 0)
    return grad_q, grad_k, grad_v


def _outside(starts: Tensor, rows: Tensor) -> Tensor:
    """(total, 1, 1): whether a row belongs to no sequence; nothing is read on the host."""
    index = torch.arange(rows.shape[0], device=rows.device)
    return ((index < starts[0]) | (index >= starts[-1]))[:, None, None]


def _backward(*arguments: Any, **named: Any) -> tuple[Tensor, ...]:
    """`aten::_flash_attention_backward`, or the kernel that is held of it."""
    found: tuple[Tensor, ...]
    if _held:
        kernel, keys = _held[0]
        found = kernel.call_boxed(keys, *arguments, **named)
    else:
        found = torch.ops.aten._flash_attention_backward(*arguments, **named)
    return found

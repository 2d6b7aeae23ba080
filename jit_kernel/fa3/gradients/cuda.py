"""Gradients on CUDA, by `aten::_flash_attention_backward`: FlashAttention 2's, which takes the calls as they are."""

from __future__ import annotations

import torch
from torch import Tensor

Gradients = tuple[Tensor, Tensor, Tensor]


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
    found = torch.ops.aten._flash_attention_backward(
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

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

    A row that sees no key has an lse of +inf. longest: at least the longest sequences' lengths.
    """
    grad_out, out, q, k, v = tensors
    starts = (None, None) if offsets is None else tuple(each.to(torch.int32) for each in offsets)
    of_dropout = q.new_empty(2, dtype=torch.uint64), q.new_empty((), dtype=torch.uint64)
    found = torch.ops.aten._flash_attention_backward(
        grad_out, q, k, v, out, lse.contiguous(), *starts, *longest, 0.0, right == 0, *of_dropout,
        scale=scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip
    grad_q, grad_k, grad_v = (grad.contiguous() for grad in found)
    return grad_q, grad_k, grad_v

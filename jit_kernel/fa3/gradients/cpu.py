"""Gradients on the CPU, by `aten::_scaled_dot_product_flash_attention_for_cpu_backward`.

The operator takes (b, h, s, d), one length for all sequences and causal masks aligned to the top left: ragged batches
go sequence by sequence, other masks in pieces. Grouped heads it takes as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jit_kernel.fa3.gradients import pieces

Gradients = tuple[Tensor, Tensor, Tensor]


def dense(tensors: tuple[Tensor, ...], lse: Tensor, scale: float, left: int, right: int) -> Gradients:
    """Gradients of q, k and v (b, s, h, d); tensors: grad_out, out, q, k, v of that layout; lse (b, h, sq).

    A row that sees no key has an lse of +inf.
    """
    grad_out, out, q, k, v = (each.transpose(1, 2) for each in tensors)
    sq, sk = q.shape[2], k.shape[2]
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    cut = pieces.cut(sq, sk, left, right)
    if cut == [(0, sq, 0, sk, "all")] or cut == [(0, sq, 0, sk, "causal")]:
        is_causal = cut[0].kind == "causal"
        found = backward(grad_out, q, k, v, out, lse, 0.0, is_causal, scale=scale)
        return _by_tokens(found)
    # Several pieces of a 16-bit gradient are added in float32.
    grads = [torch.zeros(each.shape, dtype=torch.float32, device="cpu") for each in (q, k, v)]
    for piece in cut:
        rows, keys = slice(piece.q0, piece.q1), slice(piece.k0, piece.k1)
        mask = pieces.mask_of(piece, sq, sk, left, right, q.dtype)
        found = backward(
            grad_out[:, :, rows], q[:, :, rows], k[:, :, keys], v[:, :, keys], out[:, :, rows], lse[:, :, rows],
            0.0, piece.kind == "causal", attn_mask=mask, scale=scale,
        )  # fmt: skip
        for grad, part, where in zip(grads, found, (rows, keys, keys), strict=True):
            grad[:, :, where] += part
    return _by_tokens(tuple(grad.to(q.dtype) for grad in grads))


def _by_tokens(grads: tuple[Tensor, ...]) -> Gradients:
    q, k, v = (grad.transpose(1, 2).contiguous() for grad in grads)
    return q, k, v


def ragged(
    tensors: tuple[Tensor, ...], lse: Tensor, offsets: tuple[Tensor, Tensor], scale: float, left: int, right: int
) -> Gradients:
    """The same of tensors (total, h, d) with lse (h, total_q); offsets: cu_seqlens_q and cu_seqlens_k."""
    grads = tuple(each.new_zeros(each.shape) for each in tensors[2:])
    starts_q, starts_k = (each.tolist() for each in offsets)
    for at in range(len(starts_q) - 1):
        rows, keys = slice(starts_q[at], starts_q[at + 1]), slice(starts_k[at], starts_k[at + 1])
        one = tuple(each[None, where] for each, where in zip(tensors, (rows, rows, rows, keys, keys), strict=True))
        if one[2].numel() == 0 or one[3].numel() == 0:
            continue
        found = dense(one, lse[None, :, rows], scale, left, right)
        for grad, part, where in zip(grads, found, (rows, keys, keys), strict=True):
            grad[where] = part[0]
    return grads[0], grads[1], grads[2]

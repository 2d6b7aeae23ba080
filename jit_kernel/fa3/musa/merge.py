"""Combining partial results on a MUSA device, in torch: MATE's wrapper exports neither function.

Both compute in float32. With lse_i the log of each part's denominator, lse = log sum_i exp(lse_i) and
out = sum_i exp(lse_i - lse) * out_i; where every lse_i is -inf, out is 0 and lse -inf.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _weights(lse_parts: Tensor) -> tuple[Tensor, Tensor]:
    """Over dim 0: the share of each part, 0 where it has no key, and the lse of the whole.

    A part without keys has an lse of -inf, or of +inf as FlashAttention-2 marks it.
    """
    lse_parts = lse_parts.masked_fill(lse_parts == math.inf, -math.inf)
    lse = torch.logsumexp(lse_parts, dim=0)
    return torch.exp(lse_parts - lse).nan_to_num(nan=0.0), lse


def combine(out_partial: Tensor, lse_partial: Tensor, out: Tensor, lse: Tensor) -> None:
    """Combine checked parts into out and lse."""
    weights, total_lse = _weights(lse_partial.to(torch.float32))
    # A part without keys may hold anything: 0 * NaN would be NaN.
    parts = torch.where(weights[..., None] > 0, out_partial.to(torch.float32), 0.0)
    out.copy_((parts * weights[..., None]).sum(dim=0))
    lse.copy_(total_lse)


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor, lse: Tensor) -> None:
    """Merge two checked states into out and lse; lse is (hq, total_q) or (b, hq, sq), out has tokens first."""
    weights, total_lse = _weights(torch.stack([lse_a, lse_b]).to(torch.float32))
    shares = weights.transpose(-1, -2).unsqueeze(-1)
    parts = torch.stack([out_a, out_b]).to(torch.float32)
    out.copy_((torch.where(shares > 0, parts, 0.0) * shares).sum(dim=0))
    lse.copy_(total_lse)

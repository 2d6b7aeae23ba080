"""Attention over the keys that every query sees, wherever they lie: laid end to end, they are a ragged call.

QwenImage's prompts are padded in front of the image, so that what counts is no run of keys. Attention without a causal
mask does not depend on the order of its keys. Nothing here reads a value, so that a program can be traced.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from jit_kernel.flash_attention_v3 import flash_attn_varlen_func


@dataclass(frozen=True)
class Layout:
    """Rows of (b * tokens). order: the keys that count, sequence by sequence, then the others; starts: cu_seqlens."""

    order: Tensor
    starts_q: Tensor
    starts_k: Tensor

    def of_keys(self, each: Tensor) -> Tensor:
        """(b, sk, h, d) as rows (b * sk, h, d) in this order; no gradient comes back from rows that do not count.

        They are zeros: torch's ragged backward operator leaves its gradients of rows past the last sequence unwritten.
        """
        rows = each.flatten(0, 1).index_select(0, self.order)
        return self.counting(rows) if torch.is_grad_enabled() and each.requires_grad else rows

    def counting(self, rows: Tensor) -> Tensor:
        """`rows` with zeros in those that do not count."""
        count = torch.arange(rows.shape[0], device=rows.device) < self.starts_k[-1]
        return torch.where(count[:, None, None], rows, rows.new_zeros(()))


def layout(seen: Tensor, queries: int) -> Layout:
    """The layout for `queries` queries a sequence. seen: (b, sk) bool, the keys that count."""
    lengths = seen.sum(dim=1, dtype=torch.int32)
    ends = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    order = (~seen).to(torch.uint8).flatten().argsort(stable=True)
    every = torch.arange(seen.shape[0] + 1, dtype=torch.int32, device=seen.device) * queries
    return Layout(order, every, ends)


def attend(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """(out (b, sq, hq, dv), lse (b, hq, sq)); a sequence without a key that counts gets 0 and -inf."""
    batch, queries = query.shape[:2]
    rows = layout(seen, queries)
    out, lse = flash_attn_varlen_func(
        query.flatten(0, 1), rows.of_keys(key), rows.of_keys(value), rows.starts_q, rows.starts_k, queries,
        key.shape[1], softmax_scale=scale, return_softmax_lse=True,
    )  # fmt: skip
    return out.unflatten(0, (batch, queries)), lse.unflatten(1, (batch, queries)).transpose(0, 1)

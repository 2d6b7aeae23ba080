"""Corrections after a call of MATE's: its tuples, sinks, a caller's out, rows that do not count."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from jit_kernel.fa3.call import Call, lse_shape


def unpacked(result: Any) -> tuple[Tensor, Tensor | None]:
    """(out, lse) of what MATE returned: a tensor, a pair, or four of which two are partial results."""
    if isinstance(result, Tensor):
        return result, None
    out, lse, *_ = result
    return out, lse


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor, *, ragged_q: bool) -> tuple[Tensor, Tensor]:
    """Add one logit per head to the softmax's denominator: out * sigmoid(lse - sink), logaddexp(lse, sink).

    MATE itself takes sinks in bf16 only and then drops metadata and splits. lse is (hq, total_q) or (b, hq, sq).
    A row without keys has lse = -inf and becomes 0 and the sink.
    """
    sink = sinks.to(torch.float32)[:, None]
    share = torch.sigmoid(lse - sink)
    # The head is the next to last axis of out, the last but one of lse: move it behind the tokens.
    share = (share.t() if ragged_q else share.transpose(1, 2)).unsqueeze(-1)
    return (out.to(torch.float32) * share).to(out.dtype), torch.logaddexp(lse, sink)


def rows_that_count(seqused_q: Tensor | None, cu_seqlens_q: Tensor | None, rows: int) -> Tensor:
    """Boolean: the rows of q below seqused_q and cu_seqlens_q's end, (total_q,) or (b, sq); no synchronisation."""
    given = seqused_q if cu_seqlens_q is None else cu_seqlens_q
    if given is None:
        raise ValueError("rows are counted by seqused_q or by cu_seqlens_q; both are None")
    row = torch.arange(rows, device=given.device)
    if cu_seqlens_q is None:
        return row < given[:, None]
    if seqused_q is None:
        return row < cu_seqlens_q[-1]
    sequence = torch.bucketize(row, cu_seqlens_q[1:], right=True).clamp(max=seqused_q.shape[0] - 1)
    return row - cu_seqlens_q[:-1][sequence] < seqused_q[sequence]


def in_place_of(out: Tensor, given: Tensor | None, counts: Tensor | None) -> Tensor:
    """The result in the caller's `given`, if there is one; rows that do not count stay as they were, or are zero."""
    if given is not None and given.data_ptr() == out.data_ptr():
        return given
    if counts is not None:
        # MATE leaves these rows of a buffer that it allocates as it found them.
        rest = given if given is not None else torch.zeros((), dtype=out.dtype, device=out.device)
        out = torch.where(counts[..., None, None], out, rest)
    return out if given is None else given.copy_(out)


def without_keys(call: Call) -> tuple[Tensor, Tensor]:
    """The result of a call that has no key at all: MATE's prebuilt kernels refuse such a call."""
    q = call.q
    out = q.new_zeros((*q.shape[:-1], call.v.shape[-1]))
    return out, torch.full(lse_shape(q), -math.inf, dtype=torch.float32, device=q.device)

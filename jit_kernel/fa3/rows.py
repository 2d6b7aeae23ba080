"""How many query rows a call over a cache has, and what that means for a cache in e4m3."""

from __future__ import annotations

import torch

from jit_kernel.fa3.call import KVCACHE, VARLEN, Call, batch_of, is_deterministic

# So many packed query rows, tokens x query heads of a key head, are few.
FEW_ROWS = 64
# Rows of an e4m3 cache become 16 bits ahead of the attention kernel where a sequence has so many query rows on the
# average, and in no more memory than this.
WIDE_ROWS = 512
WIDE_BYTES = 2 << 30
_MOST_WIDE_BATCH = 65535  # of the kernel's grid


def has_many_rows(call: Call) -> bool:
    """Whether a sequence of a call over an e4m3 cache may have more than FEW_ROWS packed query rows.

    Never with num_splits=1, where a sequence's bits must not depend on its neighbours, nor with a plan, which is for
    one implementation.
    """
    if call.k.dtype is not torch.float8_e4m3fn or call.num_splits == 1 or call.scheduler_metadata is not None:
        return False
    rows = (call.max_seqlen_q or 0) * (call.q.shape[-2] // call.k.shape[-2])
    return has_cache(call) and call.qv is None and rows > FEW_ROWS


def widens(call: Call) -> bool:
    """Whether a call over an e4m3 cache has many rows, and its cache can become 16 bits ahead of the attention kernel.

    By shapes alone. Not where a sequence must not depend on its neighbours, nor with factors of tokens, which a row of
    16 bits would round.
    """
    if not has_many_rows(call) or is_deterministic(call) or call.k_scale is not None or call.v_scale is not None:
        return False
    heads_k = call.k.shape[-2]
    batch = batch_of(call)
    tokens = call.q.shape[0] if call.cu_seqlens_q is not None else batch * call.q.shape[1]
    if tokens * (call.q.shape[-2] // heads_k) < WIDE_ROWS * batch or batch > _MOST_WIDE_BATCH:
        return False
    return 2 * batch * wide_rows(call) * heads_k * (call.q.shape[-1] + call.v.shape[-1]) <= WIDE_BYTES


def wide_rows(call: Call) -> int:
    """For how many rows of a cache a sequence needs room where they become 16 bits."""
    rows: int = call.k.shape[1] * (1 if call.page_table is None else call.page_table.shape[1])
    if call.function == VARLEN and call.max_seqlen_k is not None:  # a cache of VARLEN has neither padding nor new keys
        return min(rows, call.max_seqlen_k)
    return rows


def has_cache(call: Call) -> bool:
    """Whether a call's keys lie in a cache, a dense one or one of pages."""
    return call.function == KVCACHE or call.page_table is not None

"""Scheduler metadata for MATE: the common header, then MATE's own int32 table of 4 numbers a sequence.

MATE slices its table by the batch of the call that uses it, without a check: a table for 4 sequences used with 2 is
misread without an error. So its length must be exactly what the batch of the call makes it, which costs nothing to see.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from jit_kernel import config
from jit_kernel.fa3 import header
from jit_kernel.fa3.call import Call, MetadataParameters, batch_of
from jit_kernel.fa3.features import Features, planned_features
from jit_kernel.fa3.musa import mate as mates
from jit_kernel.fa3.musa import rules

# The kernels ask for 32 bytes a multiprocessor and 4 a sequence; this is room for 32,000 multiprocessors.
MLA_WORKSPACE = 1 << 20


def mask(causal: bool, window_size: tuple[int, int]) -> dict[str, Any]:
    """The mask as MATE wants it: its prebuilt path asserts on a window of (-1, 0), which means causal."""
    left, right = window_size
    if left < 0 and (causal or right == 0):
        return {"causal": True, "window_size": (-1, -1)}
    return {"causal": causal, "window_size": (left, right)}


def plan(parameters: MetadataParameters) -> Tensor:
    """Scheduler metadata for checked parameters.

    MLA decode (head sizes 64/512) keeps its schedule in a workspace of its own: here it gets the header alone. So does
    a window before MATE 0.2.1, whose metadata knows of none: such a call runs without splits.
    """
    mate = mates.load()
    head_dim_v = parameters.headdim if parameters.headdim_v is None else parameters.headdim_v
    mla = (parameters.headdim, head_dim_v) == rules.MLA_PAIR
    reason = rules.rejection(mate.version, _features(parameters, mla))
    if reason is not None:
        raise NotImplementedError(f"get_scheduler_metadata on musa ({mate.name}): {reason}")
    mates.need_splits(parameters.num_splits)
    metadata = header.make("musa", parameters)
    if parameters.batch_size == 0 or mla:
        return metadata
    if _is_local(parameters) and not rules.plans_windows(mate.version):
        return metadata
    arguments = {
        **parameters.arguments(),
        **mask(parameters.causal, parameters.window_size),
        "headdim_v": head_dim_v,
        # MATE adds it to the lengths whether or not there are new keys.
        "cu_seqlens_k_new": parameters.cu_seqlens_k_new if parameters.max_seqlen_k_new > 0 else None,
    }
    made = mates.call(mate, mate.get_scheduler_metadata, parameters.cache_seqlens.device, arguments)
    table_of(metadata, parameters.batch_size).copy_(made)
    return metadata


def _is_local(call: Call | MetadataParameters) -> bool:
    left, right = call.window_size
    return left >= 0 or (right > 0 and not call.causal)


def table_of(metadata: Tensor, batch_size: int) -> Tensor:
    """MATE's own part, (4 * batch_size,). Raises ValueError for metadata that was made for another batch."""
    expected = header.length(batch_size, "musa")
    if metadata.shape != (expected,):
        raise ValueError(
            f"scheduler_metadata has shape {tuple(metadata.shape)}; on musa it must be ({expected},) for "
            f"{batch_size} sequences, because MATE slices it by the batch of the call"
        )
    start = header.MUSA_TABLE
    return metadata[start : start + 4 * batch_size]


def for_call(call: Call) -> Tensor | tuple[Tensor, bool] | None:
    """What MATE gets as scheduler_metadata of a kvcache call; for MLA decode a fresh workspace that it fills itself.

    Never a workspace that is marked as filled: that would be right for equal lengths, batch and heads alone.
    """
    metadata, batch = call.scheduler_metadata, batch_of(call)
    table = None if metadata is None else table_of(metadata, batch)
    if metadata is not None and config.check_indices():
        longest = header.verify("musa", call, exact=True)["max_seqlen_k"]
        capacity = call.k.shape[1] * (1 if call.page_table is None else call.page_table.shape[1])
        if longest > capacity:  # MATE's table reaches as far
            raise ValueError(
                f"scheduler_metadata was made with max_seqlen_k = {longest}; "
                f"it must be at most {capacity}, what the cache has room for"
            )
    if call.qv is None:
        return None if _is_local(call) and not rules.plans_windows(mates.version()) else table
    size = MLA_WORKSPACE + 4 * (batch + 1)
    return torch.empty(size, dtype=torch.uint8, device=call.q.device), False


def _features(parameters: MetadataParameters, mla: bool) -> Features:
    """The features of the calls that the metadata is for."""
    page_size = (parameters.page_size or rules.MLA_PAGE_SIZE) if mla else 0
    return replace(planned_features(parameters), page_size=page_size, qv=mla)

"""Scheduler metadata for MATE: the common header, then MATE's own int32 table of 4 numbers a sequence.

MATE slices its table by the batch of the call that uses it, without a check: a table for 4 sequences used with 2 is
misread without an error. So its length must be exactly what the batch of the call makes it, which costs nothing to see.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jit_kernel import config
from jit_kernel.fa3.checks import metadata as scheduler_header
from jit_kernel.fa3.features import DTYPE_NAMES, Features
from jit_kernel.fa3.musa import mate as musa_mate
from jit_kernel.fa3.musa import rules as musa_rules

# The kernels ask for 32 bytes a multiprocessor and 4 a sequence; this is room for 32,000 multiprocessors.
MLA_WORKSPACE = 1 << 20


def mask(causal: bool, window_size: tuple[int, int]) -> dict[str, Any]:
    """The mask as MATE wants it: its prebuilt path asserts on a window of (-1, 0), which is causal by another name."""
    left, right = window_size
    if left < 0 and (causal or right == 0):
        return {"causal": True, "window_size": (-1, -1)}
    return {"causal": causal, "window_size": (left, right)}


def get_scheduler_metadata(
    *,
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    headdim: int,
    cache_seqlens: Tensor,
    qkv_dtype: torch.dtype = torch.bfloat16,
    headdim_v: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_size: int | None = None,
    max_seqlen_k_new: int = 0,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> Tensor:
    """See `jit_kernel.flash_attention_v3.get_scheduler_metadata`.

    MLA decode (head sizes 64/512) keeps its schedule in a workspace of its own: here it gets the header alone. So does
    a window before MATE 0.2.1, whose metadata knows of none: such a call runs without splits.
    """
    call = locals()
    mate, head_dim_v = musa_mate.load(), headdim if headdim_v is None else headdim_v
    reason = musa_rules.rejection(mate.version, _features(call, head_dim_v))
    if reason is not None:
        raise NotImplementedError(f"get_scheduler_metadata on musa ({mate.name}): {reason}")
    musa_mate.need_splits(num_splits)
    metadata = scheduler_header.make("musa", call)
    local = window_size[0] >= 0 or (window_size[1] > 0 and not causal)
    if batch_size == 0 or (headdim, head_dim_v) == musa_rules.MLA_PAIR:
        return metadata
    if local and not musa_rules.plans_windows(mate.version):
        return metadata
    replaced = ("causal", "window_size", "headdim_v", "cu_seqlens_k_new")
    arguments = {
        **{name: value for name, value in call.items() if name not in replaced},
        **mask(causal, window_size),
        "headdim_v": head_dim_v,
        # MATE adds it to the lengths whether or not there are new keys.
        "cu_seqlens_k_new": cu_seqlens_k_new if max_seqlen_k_new > 0 else None,
    }
    made = musa_mate.call(mate, mate.get_scheduler_metadata, cache_seqlens.device, arguments)
    table_of(metadata, batch_size).copy_(made)
    return metadata


def table_of(metadata: Tensor, batch_size: int) -> Tensor:
    """MATE's own part, (4 * batch_size,). Raises ValueError for metadata that was made for another batch."""
    expected = scheduler_header.length(batch_size)
    if metadata.shape != (expected,):
        raise ValueError(
            f"scheduler_metadata has shape {tuple(metadata.shape)}; on musa it must be ({expected},) for "
            f"{batch_size} sequences, because MATE slices it by the batch of the call"
        )
    start = scheduler_header.HEADER_LENGTH
    return metadata[start : start + 4 * batch_size]


def for_call(call: dict[str, Any], batch_size: int) -> Tensor | tuple[Tensor, bool] | None:
    """What MATE gets as scheduler_metadata of a kvcache call; for MLA decode a fresh workspace that it fills itself.

    Never a workspace that is said to be filled: that would be right for equal lengths, batch and heads alone.
    """
    metadata, (left, right) = call["scheduler_metadata"], call["window_size"]
    table = None if metadata is None else table_of(metadata, batch_size)
    if metadata is not None and config.check_indices():
        scheduler_header.verify("musa", call)
    if call["qv"] is None:
        local = left >= 0 or (right > 0 and not call["causal"])
        return None if local and not musa_rules.plans_windows(musa_mate.version()) else table
    size = MLA_WORKSPACE + 4 * (batch_size + 1)
    return torch.empty(size, dtype=torch.uint8, device=call["q"].device), False


def _features(call: dict[str, Any], head_dim_v: int) -> Features:
    """The features of the calls that the metadata is for."""
    left, right = call["window_size"]
    mla = (call["headdim"], head_dim_v) == musa_rules.MLA_PAIR
    return Features(
        dtype=DTYPE_NAMES.get(call["qkv_dtype"], str(call["qkv_dtype"])),
        head_dim=call["headdim"],
        head_dim_v=head_dim_v,
        group=call["num_heads_q"] // call["num_heads_kv"],
        aligned=True,
        ragged_q=call["cu_seqlens_q"] is not None,
        ragged_k=False,
        page_size=(call["page_size"] or musa_rules.MLA_PAGE_SIZE) if mla else 0,
        seqused_q=False,
        seqused_k=True,
        append=call["max_seqlen_k_new"] > 0,
        ragged_append=call["cu_seqlens_k_new"] is not None and call["max_seqlen_k_new"] > 0,
        rotary=False,
        cache_batch_idx=False,
        cache_leftpad=call["cache_leftpad"] is not None,
        causal=call["causal"] or right == 0,
        window=left >= 0 or (right > 0 and not call["causal"]),
        chunk=call["attention_chunk"] > 0,
        softcap=call["has_softcap"],
        qv=mla,
        only_qv=False,
        descale=False,
        sinks=False,
        lse=False,
        split=call["num_splits"] != 1,
        metadata=True,
    )

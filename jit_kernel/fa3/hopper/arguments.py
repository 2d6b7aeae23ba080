"""What the launcher's functions take of a call, in the order that all of them share: launch/*_launch.h have it, too."""

from __future__ import annotations

import math

from torch import Tensor

from jit_kernel.fa3 import call as calls
from jit_kernel.fa3.call import Call


def tensors(call: Call, result: Tensor, lse: Tensor | None) -> tuple[object, ...]:
    """The tensors of a call without a cache."""
    return (
        call.q, call.k, call.v, result, lse, call.cu_seqlens_q, call.cu_seqlens_k, call.seqused_q, call.seqused_k,
        call.sinks,
    )  # fmt: skip


def cache_tensors(call: Call, result: Tensor, lse: Tensor | None) -> tuple[object, ...]:
    """The tensors of a call over a cache; its new keys lie there, so that their lengths alone count."""
    return (
        call.q, call.k, call.v, result, lse, call.cu_seqlens_q, call.seqused_q, call.seqused_k,
        None if call.k_new is None else call.cu_seqlens_k_new, call.page_table, call.cache_batch_idx,
        call.cache_leftpad, call.sinks, call.draft_mask,
    )  # fmt: skip


def scales(call: Call) -> tuple[Tensor | None, ...]:
    """The factors of what is in e4m3; the checks have taken those away that 16 bits have no use for."""
    return call.q_descale, call.k_descale, call.v_descale, call.k_scale, call.v_scale


def new_rows(call: Call) -> int:
    """Of each sequence, where cu_seqlens_k_new does not say how many."""
    return 0 if call.k_new is None or call.cu_seqlens_k_new is not None else call.k_new.shape[1]


def has_other_rows(call: Call) -> bool:
    """Whether there may be rows that hold no query of any sequence."""
    return call.cu_seqlens_q is not None or call.seqused_q is not None


def new_lse(call: Call) -> Tensor | None:
    """Memory for the lse of a call; the kernels make rows that hold no query -inf beside an out of ours alone."""
    lse = calls.new_lse(call)
    if lse is not None and call.out is not None and has_other_rows(call):
        lse.fill_(-math.inf)
    return lse


def scalars(call: Call, left: int, right: int) -> tuple[float, float, int, int, int, int, bool]:
    """How scores are made and masked, the blocks, and whether rows of no query are cleared.

    left, right: what calls.mask_bounds gives.
    """
    clear_rest = call.out is None and has_other_rows(call)
    scale: float = call.softmax_scale  # type: ignore[assignment]  # the checks resolved it
    return scale, float(call.softcap), left, right, call.attention_chunk or 0, call.sm_margin, clear_rest

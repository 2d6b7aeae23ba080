"""The implementation for Moore Threads GPUs: the public functions over MATE's (mp_31 and newer).

Every argument goes by keyword to the installed version of MATE. What MATE does not serve is refused first
(musa_rules.py), what it gets wrong and can be put right is put right here or after the call (musa_results.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from jit_kernel import moore_threads as musa
from jit_kernel.device import Target
from jit_kernel.fa3.features import Accepted, Decision, Features, Rejected, plain_features
from jit_kernel.fa3.musa import mate as musa_mate
from jit_kernel.fa3.musa import metadata as musa_metadata
from jit_kernel.fa3.musa import prebuilt as musa_prebuilt
from jit_kernel.fa3.musa import results as musa_results
from jit_kernel.fa3.musa import rules as musa_rules
from jit_kernel.fa3.musa.merge import flash_attn_combine, merge_state
from jit_kernel.fa3.musa.metadata import get_scheduler_metadata
from jit_kernel.fa3.musa.prebuild import prewarm
from jit_kernel.jit import KernelSpec

__all__ = ["KERNELS", "NAME", "all_variants", "canonical", "decide", "prepare", "prewarm", "supports"]

NAME = "musa"
Result = Tensor | tuple[Tensor, Tensor]

_reasons: dict[tuple[object, ...], str | None] = {}


def supports(target: Target) -> Decision:
    """Accepted on mp_31 and newer with every part of the stack that MATE needs; the reason names what is missing."""
    if target.vendor != "musa":
        return Rejected(f"{target} is no Moore Threads GPU", claimed=False)
    major, minor = int(target.architecture[3]), int(target.architecture[4])
    if (major, minor) < musa.MINIMUM_CAPABILITY:
        return Rejected(f"{target.architecture} is older than mp_31, which MATE needs")
    missing = musa.probe().missing
    if missing:
        return Rejected("; ".join(str(part) for part in missing))
    return Accepted()


def decide(target: Target, features: Features) -> Decision:
    """Accepted where the installed version of MATE honours every argument of such a call."""
    reason = musa_rules.rejection(musa_mate.version(), features)
    return Accepted() if reason is None else Rejected(reason)


def prepare(device: str) -> None:
    """Import MATE. Raises NotImplementedError that names the missing parts."""
    musa_mate.load()


def all_variants(target: Target) -> list[KernelSpec]:
    """None: MATE compiles and keeps its own modules; `prewarm` has them built."""
    return []


def canonical(field: str, value: str) -> str:
    """The value itself, as there are no variants of ours."""
    return value


def _refuse_unserved(mate: musa_mate.Mate, function: str, call: dict[str, Any]) -> None:
    plain = (mate.version, *plain_features(call))
    if plain not in _reasons:
        _reasons[plain] = musa_rules.rejection(mate.version, Features(*plain[1:]))  # type: ignore[arg-type]
    reason = _reasons[plain]
    if reason is not None:
        raise NotImplementedError(f"{function} on musa ({mate.name}): {reason}")
    musa_mate.need_splits(call["num_splits"])


def _refuse_unserved_varlen(mate: musa_mate.Mate, call: dict[str, Any]) -> None:
    if call["qv"] is not None:
        raise NotImplementedError("flash_attn_varlen_func on musa: qv is served by flash_attn_with_kvcache only")
    if call["page_table"] is not None and mate.version < (0, 2):
        raise NotImplementedError(
            f"flash_attn_varlen_func on musa ({mate.name}): page_table is there since 0.2.0; "
            "flash_attn_with_kvcache takes one in every version"
        )


def flash_attn_varlen_func(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    page_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    only_qv: bool = False,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
) -> Result:
    """See `jit_kernel.flash_attention_v3.flash_attn_varlen_func`."""
    call = locals()
    mate = musa_mate.load()
    _refuse_unserved(mate, "flash_attn_varlen_func", call)
    _refuse_unserved_varlen(mate, call)
    ragged_q = cu_seqlens_q is not None
    if q.numel() == 0 or (page_table is None and k.shape[-3] == 0):
        made, lse = musa_results.without_keys(q, v.shape[-1], ragged_q=ragged_q)
        return _finished(made, lse, call)
    arguments = {
        **{name: call[name] for name in ("q", "v", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k")},
        "k": k,
        "max_seqlen_q": q.shape[0] if ragged_q and max_seqlen_q is None else max_seqlen_q,
        "max_seqlen_k": k.shape[0] if cu_seqlens_k is not None and max_seqlen_k is None else max_seqlen_k,
        **musa_metadata.mask(causal, window_size),
        **{name: call[name] for name in ("softmax_scale", "softcap", "num_splits", "pack_gqa", "sm_margin")},
        "attention_chunk": attention_chunk,
        "return_softmax_lse": return_softmax_lse or sinks is not None,
    }
    if page_table is not None:
        arguments["page_table"] = page_table
    if musa_prebuilt.takes_prebuilt(call):
        arguments |= musa_prebuilt.kept_right(q, k, cu_seqlens_k)
    if mate.version >= (0, 2):
        arguments["out"] = musa_prebuilt.destination(call)
    made, lse_or_none = musa_results.unpacked(musa_mate.call(mate, mate.flash_attn_varlen_func, q.device, arguments))
    return _finished(made, lse_or_none, call)


def flash_attn_with_kvcache(
    *,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    only_qv: bool = False,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
) -> Result:
    """See `jit_kernel.flash_attention_v3.flash_attn_with_kvcache`."""
    call = locals()
    mate = musa_mate.load()
    _refuse_unserved(mate, "flash_attn_with_kvcache", call)
    ragged_q = cu_seqlens_q is not None
    if q.numel() == 0 and k is None:
        made, lse = musa_results.without_keys(q, v_cache.shape[-1], ragged_q=ragged_q)
        return _finished(made, lse, call)
    arguments = _kvcache_arguments(call)
    made, lse_or_none = musa_results.unpacked(musa_mate.call(mate, mate.flash_attn_with_kvcache, q.device, arguments))
    if qv is not None and not ragged_q and lse_or_none is not None:
        lse_or_none = lse_or_none.transpose(1, 2).contiguous()  # MLA decode gives (b, sq, hq)
    return _finished(made, lse_or_none, call)


# MATE has neither only_qv nor out here, its sinks drop metadata and splits, and it ignores descales.
_OURS = ("only_qv", "out", "sinks", "q_descale", "k_descale", "v_descale")


def _kvcache_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """What MATE's flash_attn_with_kvcache gets. Raises NotImplementedError for what a capture cannot hold."""
    q, k_cache, page_table, cu_seqlens_q = (call[name] for name in ("q", "k_cache", "page_table", "cu_seqlens_q"))
    ragged_q, new = cu_seqlens_q is not None, call["cu_seqlens_k_new"]
    batch = int(cu_seqlens_q.shape[0] - 1 if ragged_q else q.shape[0])
    if call["k"] is not None and new is not None and musa_mate.is_capturing(q.device):
        raise NotImplementedError(
            "flash_attn_with_kvcache on musa: cu_seqlens_k_new is read by the host inside MATE, which cannot be "
            "captured into a graph; pass k and v as (b, s_new, hk, d)"
        )
    if call["max_seqlen_q"] is None:
        call["max_seqlen_q"] = q.shape[0] if ragged_q else q.shape[1]
    if isinstance(call["cache_seqlens"], int):  # MATE would expand it to the number of pages
        call["cache_seqlens"] = torch.full((batch,), call["cache_seqlens"], dtype=torch.int32, device=q.device)
    return {
        **{name: value for name, value in call.items() if name not in _OURS},
        **_new_keys(call["k"], call["v"], new),
        "rotary_cos": _as_long_as_pages(call["rotary_cos"], k_cache, page_table),
        "rotary_sin": _as_long_as_pages(call["rotary_sin"], k_cache, page_table),
        **musa_metadata.mask(call["causal"], call["window_size"]),
        "scheduler_metadata": musa_metadata.for_call(call, batch),
        "return_softmax_lse": call["return_softmax_lse"] or call["sinks"] is not None,
    }


def _new_keys(k: Tensor | None, v: Tensor | None, cu_seqlens_k_new: Tensor | None) -> dict[str, Any]:
    """New keys for MATE, which asserts that packed ones end where cu_seqlens_k_new ends, and reads that itself."""
    if k is None or v is None:
        return {"cu_seqlens_k_new": None}  # without new keys its metadata would still add it to the lengths
    if cu_seqlens_k_new is None:
        return {}
    total = int(cu_seqlens_k_new[-1])
    return {"k": k[:total], "v": v[:total]}


def _as_long_as_pages(table: Tensor | None, k_cache: Tensor, page_table: Tensor | None) -> Tensor | None:
    """A rotary table with a row for every key that page_table can hold, which MATE asserts; the rest goes unread."""
    if table is None or page_table is None:
        return table
    lacking = page_table.shape[1] * k_cache.shape[1] - table.shape[0]
    return torch.nn.functional.pad(table, (0, 0, 0, lacking)) if lacking > 0 else table


def flash_attn_func(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
) -> Result:
    """See `jit_kernel.flash_attention_v3.flash_attn_func`; `deterministic` speaks of a backward that is not here."""
    call = locals()
    del call["deterministic"]
    return flash_attn_varlen_func(cu_seqlens_q=None, cu_seqlens_k=None, **call)


def _finished(made: Tensor, lse: Tensor | None, call: dict[str, Any]) -> Result:
    """The public function's result from MATE's: sinks, rows that do not count, the caller's out."""
    ragged_q, sinks, seqused_q = call["cu_seqlens_q"] is not None, call["sinks"], call.get("seqused_q")
    if sinks is not None and lse is not None:
        made, lse = musa_results.with_sinks(made, lse, sinks, ragged_q=ragged_q)
    counts, out = None, call["out"]
    copied = out is not None and made.data_ptr() != out.data_ptr()
    if seqused_q is not None or (copied and ragged_q):
        rows = made.shape[0] if ragged_q else made.shape[1]
        counts = musa_results.rows_that_count(seqused_q, call["cu_seqlens_q"], rows)
        if lse is not None:
            lse = lse.masked_fill(~(counts if ragged_q else counts[:, None]), -math.inf)
    result = musa_results.delivered(made, out, counts)
    if not call["return_softmax_lse"]:
        return result
    assert lse is not None  # it was asked for
    return result, lse


KERNELS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "flash_attn_varlen_func": flash_attn_varlen_func,
        "flash_attn_with_kvcache": flash_attn_with_kvcache,
        "flash_attn_func": flash_attn_func,
        "get_scheduler_metadata": get_scheduler_metadata,
        "flash_attn_combine": flash_attn_combine,
        "merge_state": merge_state,
    }
)

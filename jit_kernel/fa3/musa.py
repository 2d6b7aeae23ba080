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

from jit_kernel import musa
from jit_kernel.device import Target
from jit_kernel.fa3 import musa_mate, musa_metadata, musa_results, musa_rules
from jit_kernel.fa3.musa_merge import flash_attn_combine, merge_state
from jit_kernel.fa3.musa_metadata import get_scheduler_metadata
from jit_kernel.fa3.musa_prewarm import prewarm
from jit_kernel.fa3.variants import Accepted, Decision, Features, Rejected, plain_features
from jit_kernel.jit import KernelSpec

__all__ = ["KERNELS", "NAME", "all_variants", "canonical", "decide", "prepare", "prewarm", "supports"]

NAME = "musa"
Result = Tensor | tuple[Tensor, Tensor]

_INT32_ELEMENTS = 2**31 - 1  # the prebuilt kernels hold sizes and strides in int32
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


def _takes_prebuilt(call: dict[str, Any]) -> bool:
    """Whether MATE would choose a prebuilt kernel for a checked varlen call that it serves."""
    q, k, v, mask = call["q"], call["k"], call["v"], musa_metadata.mask(call["causal"], call["window_size"])
    d, dv = q.shape[-1], v.shape[-1]
    plain = all(call[name] is None for name in ("page_table", "seqused_q", "seqused_k"))
    plain = plain and call["softcap"] == 0.0 and call["attention_chunk"] == 0
    return (
        plain
        and q.dim() == k.dim()
        and mask["window_size"] == (-1, -1)
        and ((d == dv and d <= 128) or (d, dv) == (192, 128))
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
    if qv is not None:
        raise NotImplementedError("flash_attn_varlen_func on musa: qv is served by flash_attn_with_kvcache only")
    if page_table is not None and mate.version < (0, 2):
        raise NotImplementedError(
            f"flash_attn_varlen_func on musa ({mate.name}): page_table is there since 0.2.0; "
            "flash_attn_with_kvcache takes one in every version"
        )
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
    if _takes_prebuilt(call):
        arguments |= _for_prebuilt(q, k, cu_seqlens_k)
    if mate.version >= (0, 2):
        arguments["out"] = _destination(call)
    made, lse_or_none = musa_results.unpacked(musa_mate.call(mate, mate.flash_attn_varlen_func, q.device, arguments))
    return _finished(made, lse_or_none, call)


def _destination(call: dict[str, Any]) -> Tensor | None:
    """The buffer for a varlen call: the caller's where MATE can write it, zeros where it leaves rows as they were."""
    q, out = call["q"], call["out"]
    if out is not None:  # the prebuilt path neither checks it nor takes strides
        return out if out.is_contiguous() else None
    if call["cu_seqlens_q"] is None and call["seqused_q"] is None:
        return None
    return q.new_zeros((*q.shape[:-1], call["v"].shape[-1]))


def _for_prebuilt(q: Tensor, k: Tensor, cu_seqlens_k: Tensor | None) -> dict[str, Any]:
    """What keeps a prebuilt kernel right, or the call away from it.

    It bounds its reads of k by k.numel(), so that the end of a strided k reads as zero; it takes a single sequence as
    dense, whatever cu_seqlens says; and its sizes are int32. Lengths of the keys lead MATE to a compiled kernel.
    """
    if cu_seqlens_k is not None and cu_seqlens_k.shape[0] == 2:
        return {"seqused_k": cu_seqlens_k[1:]}  # it starts with 0, so the end is the length
    if max(q.numel(), k.numel()) > _INT32_ELEMENTS:
        if cu_seqlens_k is not None:
            return {"seqused_k": cu_seqlens_k[1:] - cu_seqlens_k[:-1]}
        return {"seqused_k": torch.full((k.shape[0],), k.shape[1], dtype=torch.int32, device=k.device)}
    return {} if k.is_contiguous() else {"k": k.contiguous()}


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
    ragged_q, batch = cu_seqlens_q is not None, _batch(q, cu_seqlens_q)
    if k is not None and cu_seqlens_k_new is not None and musa_mate.is_capturing(q.device):
        raise NotImplementedError(
            "flash_attn_with_kvcache on musa: cu_seqlens_k_new is read by the host inside MATE, which cannot be "
            "captured into a graph; pass k and v as (b, s_new, hk, d)"
        )
    if q.numel() == 0 and k is None:
        made, lse = musa_results.without_keys(q, v_cache.shape[-1], ragged_q=ragged_q)
        return _finished(made, lse, call)
    if max_seqlen_q is None:
        call["max_seqlen_q"] = q.shape[0] if ragged_q else q.shape[1]
    if isinstance(cache_seqlens, int):  # MATE would expand it to the number of pages
        call["cache_seqlens"] = torch.full((batch,), cache_seqlens, dtype=torch.int32, device=q.device)
    # MATE has neither only_qv nor out here, its sinks drop metadata and splits, and it ignores descales.
    ours = ("only_qv", "out", "sinks", "q_descale", "k_descale", "v_descale")
    arguments = {
        **{name: value for name, value in call.items() if name not in ours},
        **_new_keys(k, v, cu_seqlens_k_new),
        "rotary_cos": _as_long_as_pages(rotary_cos, k_cache, page_table),
        "rotary_sin": _as_long_as_pages(rotary_sin, k_cache, page_table),
        **musa_metadata.mask(causal, window_size),
        "scheduler_metadata": musa_metadata.for_call(call, batch),
        "return_softmax_lse": return_softmax_lse or sinks is not None,
    }
    made, lse_or_none = musa_results.unpacked(musa_mate.call(mate, mate.flash_attn_with_kvcache, q.device, arguments))
    if qv is not None and not ragged_q and lse_or_none is not None:
        lse_or_none = lse_or_none.transpose(1, 2).contiguous()  # MLA decode gives (b, sq, hq)
    return _finished(made, lse_or_none, call)


def _new_keys(k: Tensor | None, v: Tensor | None, cu_seqlens_k_new: Tensor | None) -> dict[str, Any]:
    """New keys for MATE, which asserts that packed ones end where cu_seqlens_k_new ends, and reads that itself."""
    if k is None or v is None:
        return {"cu_seqlens_k_new": None}  # without new keys its metadata would still add it to the lengths
    if cu_seqlens_k_new is None:
        return {}
    total = int(cu_seqlens_k_new[-1])
    return {"k": k[:total], "v": v[:total]}


def _batch(q: Tensor, cu_seqlens_q: Tensor | None) -> int:
    return int(q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1)


def _as_long_as_pages(table: Tensor | None, k_cache: Tensor, page_table: Tensor | None) -> Tensor | None:
    """A rotary table with a row for every key that page_table can hold, which MATE asserts; what is added goes unread."""
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
    counts = None
    if seqused_q is not None or (call["out"] is not None and ragged_q):
        rows = made.shape[0] if ragged_q else made.shape[1]
        counts = musa_results.rows_that_count(seqused_q, call["cu_seqlens_q"], rows)
        if lse is not None:
            lse = lse.masked_fill(~(counts if ragged_q else counts[:, None]), -math.inf)
    result = musa_results.delivered(made, call["out"], counts)
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

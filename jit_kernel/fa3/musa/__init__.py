"""The implementation for Moore Threads GPUs: the public functions over MATE's (mp_31 and newer).

Every argument goes by keyword to the installed version of MATE. What MATE does not serve is refused first (rules.py);
what it gets wrong and can be corrected is corrected here or after the call (results.py).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from jit_kernel import moore_threads
from jit_kernel.device import Target, is_capturing
from jit_kernel.fa3 import call as calls
from jit_kernel.fa3.call import Call, Result
from jit_kernel.fa3.decision import Accepted, Decision, Rejected
from jit_kernel.fa3.features import ARGUMENTS, Features, plain_features
from jit_kernel.fa3.musa import mate as mates
from jit_kernel.fa3.musa import metadata, prebuilt, results, rules
from jit_kernel.fa3.musa.merge import combine, merge
from jit_kernel.fa3.musa.metadata import plan
from jit_kernel.fa3.musa.prebuild import prewarm
from jit_kernel.jit import KernelSpec

__all__ = ["FUNCTIONS", "NAME", "attend", "combine", "merge", "plan", "prewarm"]

NAME = "musa"
FUNCTIONS = (calls.VARLEN, calls.KVCACHE, calls.DENSE)
REFUSES = True

_reasons: dict[tuple[object, ...], str | None] = {}


def supports(target: Target) -> Decision:
    """Accepted on mp_31 and newer with every part of the stack that MATE needs; the reason names what is missing."""
    if target.vendor != "musa":
        return Rejected(f"{target} is no Moore Threads GPU", claimed=False)
    major, minor = int(target.architecture[3]), int(target.architecture[4])
    if (major, minor) < moore_threads.MINIMUM_CAPABILITY:
        return Rejected(f"{target.architecture} is older than mp_31, which MATE needs")
    missing = moore_threads.probe().missing
    if missing:
        return Rejected("; ".join(str(part) for part in missing))
    return Accepted()


def decide(target: Target, features: Features) -> Decision:
    """Accepted where the installed version of MATE honours every argument of such a call."""
    reason = rules.rejection(mates.version(), features)
    return Accepted() if reason is None else Rejected(reason)


def prepare(device: str) -> None:
    """Import MATE. Raises NotImplementedError that names the missing parts."""
    mates.load()


def all_variants(target: Target) -> list[KernelSpec]:
    """None: MATE compiles and keeps its own modules; `prewarm` has them built."""
    return []


def canonical(spec: KernelSpec, field: str, value: str) -> str:
    """The value itself, as there are no variants of ours."""
    return value


def attend(call: Call) -> Result:
    """Attention of a checked call. Raises NotImplementedError for one that MATE does not serve."""
    mate = mates.load()
    if call.function == calls.KVCACHE:
        _refuse_unserved(mate, calls.KVCACHE, call)
        return _attend_to_cache(mate, call)
    _refuse_unserved(mate, calls.VARLEN, call)
    _refuse_unserved_varlen(mate, call)
    return _attend(mate, call)


def _refuse_unserved(mate: mates.Mate, function: str, call: Call) -> None:
    plain = (mate.version, *plain_features(call))
    if plain not in _reasons:
        _reasons[plain] = rules.rejection(mate.version, Features(*plain[1:]))  # type: ignore[arg-type]
    reason = _reasons[plain]
    if reason is not None:
        raise NotImplementedError(f"{function} on musa ({mate.name}): {reason}")
    mates.need_splits(call.num_splits)


def _refuse_unserved_varlen(mate: mates.Mate, call: Call) -> None:
    if call.qv is not None:
        raise NotImplementedError("flash_attn_varlen_func on musa: qv is served by flash_attn_with_kvcache only")
    if call.page_table is not None and mate.version < (0, 2):
        raise NotImplementedError(
            f"flash_attn_varlen_func on musa ({mate.name}): page_table is there since 0.2.0; "
            "flash_attn_with_kvcache takes one in every version"
        )


# What goes to either of MATE's functions under the name that it has here.
_COMMON = ("softmax_scale", "softcap", "attention_chunk", "num_splits", "pack_gqa", "sm_margin")
_VARLEN = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k")
# The same of kvcache, under MATE's names, which are the public ones: these, and what asks for a feature that is claimed
# but for what is not its function's, and for sinks, which would drop metadata and splits.
_KVCACHE = ("q", "k", "v", "max_seqlen_q", "rotary_interleaved", *_COMMON)
_NOT_OF_KVCACHE = ("cu_seqlens_k", "seqused_q", "sinks")


def _kvcache_fields() -> tuple[str, ...]:
    claimed = (name for feature, names in ARGUMENTS.items() if feature in rules.CLAIMED for name in names)
    return tuple(name for name in dict.fromkeys((*_KVCACHE, *claimed)) if name not in _NOT_OF_KVCACHE)


_KVCACHE_FIELDS = _kvcache_fields()


def _attend(mate: mates.Mate, call: Call) -> Result:
    """A varlen call, or a dense one: MATE's varlen function without offsets."""
    q, k, page_table = call.q, call.k, call.page_table
    if q.numel() == 0 or (page_table is None and k.shape[-3] == 0):
        return _finished(*results.without_keys(call), call)
    arguments = {
        **{name: getattr(call, name) for name in (*_VARLEN, *_COMMON)},
        "max_seqlen_q": None if call.function == calls.DENSE else call.max_seqlen_q,
        "max_seqlen_k": None if call.function == calls.DENSE else call.max_seqlen_k,
        **metadata.mask(call.causal, call.window_size),
        "return_softmax_lse": call.return_softmax_lse or call.sinks is not None,
    }
    if page_table is not None:
        arguments["page_table"] = page_table
    if prebuilt.takes_prebuilt(call):
        arguments |= prebuilt.corrected(q, k, call.cu_seqlens_k)
    if mate.version >= (0, 2):
        arguments["out"] = prebuilt.destination(call)
    made = mates.call(mate, mate.flash_attn_varlen_func, q.device, arguments)
    return _finished(*results.unpacked(made), call)


def _attend_to_cache(mate: mates.Mate, call: Call) -> Result:
    q = call.q
    if q.numel() == 0 and call.k_new is None:
        return _finished(*results.without_keys(call), call)
    made = mates.call(mate, mate.flash_attn_with_kvcache, q.device, _kvcache_arguments(call))
    out, lse = results.unpacked(made)
    if call.qv is not None and call.cu_seqlens_q is None and lse is not None:
        lse = lse.transpose(1, 2).contiguous()  # MLA decode gives (b, sq, hq)
    return _finished(out, lse, call)


def _kvcache_arguments(call: Call) -> dict[str, Any]:
    """What MATE's flash_attn_with_kvcache gets. Raises NotImplementedError for what a capture cannot hold."""
    new = call.cu_seqlens_k_new
    if call.k_new is not None and new is not None and is_capturing(call.q.device):
        raise NotImplementedError(
            "flash_attn_with_kvcache on musa: cu_seqlens_k_new is read by the host inside MATE, which cannot be "
            "captured into a graph; pass k and v as (b, s_new, hk, d)"
        )
    names = calls.NAME_OF[calls.KVCACHE]
    return {
        **{names.get(name, name): getattr(call, name) for name in _KVCACHE_FIELDS},
        **_new_keys(call.k_new, call.v_new, new),
        "rotary_cos": _as_long_as_pages(call.rotary_cos, call.k, call.page_table),
        "rotary_sin": _as_long_as_pages(call.rotary_sin, call.k, call.page_table),
        **metadata.mask(call.causal, call.window_size),
        "scheduler_metadata": metadata.for_call(call),
        "return_softmax_lse": call.return_softmax_lse or call.sinks is not None,
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


def _finished(made: Tensor, lse: Tensor | None, call: Call) -> Result:
    """The public function's result from MATE's: sinks, rows that do not count, the caller's out."""
    offsets, sinks, seqused_q, out = call.cu_seqlens_q, call.sinks, call.seqused_q, call.out
    ragged_q = offsets is not None
    if sinks is not None and lse is not None:
        made, lse = results.with_sinks(made, lse, sinks, ragged_q=ragged_q)
    counts = None
    copied = out is not None and made.data_ptr() != out.data_ptr()
    if seqused_q is not None or (copied and ragged_q):
        rows = made.shape[0] if ragged_q else made.shape[1]
        counts = results.rows_that_count(seqused_q, offsets, rows)
        if lse is not None:
            lse = lse.masked_fill(~(counts if ragged_q else counts[:, None]), -math.inf)
    result = results.in_place_of(made, out, counts)
    if not call.return_softmax_lse:
        return result
    if lse is None:
        raise RuntimeError("MATE returned no lse for a call that asked for it")
    return result, lse

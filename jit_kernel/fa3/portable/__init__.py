"""The portable implementation: Triton kernels for every NVIDIA GPU from compute capability 8.0 on.

Everything in the public contract but qv and fp8. Triton compiles in a process of its own into the cache; a warmed
machine needs neither Triton nor a compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from jit_kernel import config
from jit_kernel.device import Target
from jit_kernel.engine import triton_compiler
from jit_kernel.fa3.checks import metadata as scheduler_header
from jit_kernel.fa3.checks.combine import lse_shape
from jit_kernel.fa3.checks.shapes import default_scale
from jit_kernel.fa3.features import Accepted, Decision, Features, Rejected, refusal
from jit_kernel.fa3.portable import append as portable_append
from jit_kernel.fa3.portable import forward as portable_forward
from jit_kernel.fa3.portable import kernels as portable_kernels
from jit_kernel.fa3.portable import planning as portable_plan
from jit_kernel.jit import KernelSpec

NAME = "portable"
LEAST_CAPABILITY = 80

_NO_QV = "qv: it has no second product for scores"
_NO_FP8 = "q_descale, k_descale and v_descale: it has no fp8"

Result = Tensor | tuple[Tensor, Tensor]


def supports(target: Target) -> Decision:
    """NVIDIA GPUs of compute capability 8.0 and newer."""
    if target.vendor != "cuda":
        return Rejected(f"it serves NVIDIA GPUs, not {target}", claimed=False)
    if triton_compiler.capability(target.architecture) < LEAST_CAPABILITY:
        return Rejected(f"{target.architecture}: it serves sm_80 and newer", claimed=False)
    return Accepted()


def decide(target: Target, features: Features) -> Decision:
    """bf16 and fp16 with head sizes up to 256, without qv and descales."""
    reason = portable_kernels.unserved(features.dtype, features.head_dim, features.head_dim_v)
    if features.qv:
        reason = _NO_QV
    if features.descale:
        reason = _NO_FP8
    return Accepted() if reason is None else Rejected(reason, claimed=False)


def _refuse(qv: Tensor | None, *descales: Tensor | None) -> None:
    """Arguments that these kernels have no place for are an error also where no dispatcher stands in between."""
    given = _NO_QV if qv is not None else _NO_FP8 if any(scale is not None for scale in descales) else None
    if given is not None:
        raise refusal("this call", [(NAME, Rejected(given, claimed=False))])


def prepare(device: str) -> None:
    """Compile or load the launcher."""
    portable_forward.kernels_of(torch.device(device))


def all_variants(target: Target) -> list[KernelSpec]:
    """What warm-up compiles for a target."""
    if not isinstance(supports(target), Accepted):
        return []
    return list(portable_kernels.all_specs(target))


def variant(target: Target, features: Features, call: Mapping[str, Any]) -> KernelSpec:
    """The attention kernel that serves a call that `decide` accepts; split keys may need a combine kernel too."""
    q = call["q"]
    longest = q.shape[1] if q.ndim == 4 else call.get("max_seqlen_q") or q.shape[0]
    kind = portable_plan.tile_kind(call["num_splits"], longest * features.group, features.aligned)
    local = call["window_size"][0] >= 0 or features.chunk
    return portable_kernels.forward_spec(
        target.architecture,
        features.dtype,
        features.head_dim,
        features.head_dim_v,
        kind,
        features.page_size > 0,
        local,
        features.softcap,
        features.aligned,
    )


def canonical(field: str, value: str) -> str:
    """The value of a variant's field that serves a user's value: each has a kernel of its own."""
    return value


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
    if qv is not None or q_descale is not None or k_descale is not None or v_descale is not None:
        _refuse(qv, q_descale, k_descale, v_descale)
    return portable_forward.attend(
        q,
        k,
        v,
        softmax_scale=default_scale(q, None, only_qv=False) if softmax_scale is None else softmax_scale,
        causal=causal,
        window_size=window_size,
        attention_chunk=attention_chunk,
        softcap=softcap,
        num_splits=num_splits,
        pack_gqa=pack_gqa,
        return_softmax_lse=return_softmax_lse,
        sinks=sinks,
        out=out,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seqused_q=seqused_q,
        seqused_k=seqused_k,
        page_table=page_table,
        sm_margin=sm_margin,
    )


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
    if qv is not None or q_descale is not None or k_descale is not None or v_descale is not None:
        _refuse(qv, q_descale, k_descale, v_descale)
    if scheduler_metadata is not None and config.check_indices():
        scheduler_header.verify(NAME, locals())
    seqlen_k_new = 0
    if k is not None:
        q = portable_append.append(locals())
        seqlen_k_new = k.shape[1] if cu_seqlens_k_new is None else 0
    return portable_forward.attend(
        q,
        k_cache,
        v_cache,
        softmax_scale=default_scale(q, None, only_qv=False) if softmax_scale is None else softmax_scale,
        causal=causal,
        window_size=window_size,
        attention_chunk=attention_chunk,
        softcap=softcap,
        num_splits=num_splits,
        pack_gqa=pack_gqa,
        return_softmax_lse=return_softmax_lse,
        sinks=sinks,
        out=out,
        max_seqlen_q=max_seqlen_q,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k_new=cu_seqlens_k_new,
        seqused_k=cache_seqlens,
        page_table=page_table,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        seqlen_k_new=seqlen_k_new,
        sm_margin=sm_margin,
    )


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
    """See `jit_kernel.flash_attention_v3.flash_attn_func`. Every call is deterministic."""
    if qv is not None or q_descale is not None or k_descale is not None or v_descale is not None:
        _refuse(qv, q_descale, k_descale, v_descale)
    return portable_forward.attend(
        q,
        k,
        v,
        softmax_scale=default_scale(q, None, only_qv=False) if softmax_scale is None else softmax_scale,
        causal=causal,
        window_size=window_size,
        attention_chunk=attention_chunk,
        softcap=softcap,
        num_splits=num_splits,
        pack_gqa=pack_gqa,
        return_softmax_lse=return_softmax_lse,
        sinks=sinks,
        out=out,
        sm_margin=sm_margin,
    )


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
    """See `jit_kernel.flash_attention_v3.get_scheduler_metadata`. Splits are chosen on the host: a header alone."""
    return scheduler_header.make(NAME, locals())


def flash_attn_combine(
    *, out_partial: Tensor, lse_partial: Tensor, out: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """See `jit_kernel.flash_attention_v3.flash_attn_combine`."""
    device = out_partial.device
    if out is None:
        out = torch.empty(out_partial.shape[1:], dtype=out_dtype or out_partial.dtype, device=device)
    lse = torch.empty(out_partial.shape[1:-1], dtype=torch.float32, device=device)
    portable_forward.combine(out_partial, lse_partial, out, lse)
    return out, lse


def merge_state(*, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """See `jit_kernel.flash_attention_v3.merge_state`."""
    out = torch.empty(out_a.shape, dtype=out_a.dtype, device=out_a.device)
    lse = torch.empty(lse_shape(out_a), dtype=torch.float32, device=out_a.device)
    by_token = [x.transpose(-1, -2) for x in (lse_a, lse_b, lse)]
    portable_forward.merge(out_a, by_token[0], out_b, by_token[1], out, by_token[2])
    return out, lse


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

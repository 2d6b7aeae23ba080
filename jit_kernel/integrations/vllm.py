"""vLLM's FlashAttention functions on jit_kernel, and the plug-in that makes vLLM 0.33.0 call them.

Replaced, while `activate()` holds, in this process alone, in `vllm.vllm_flash_attn.flash_attn_interface` and wherever a
module has imported them by name before:
- `flash_attn_varlen_func`, for `fa_version` 2 and 3; calls with 4 go on to vLLM's own function;
- `get_scheduler_metadata`;
- `is_fa_version_supported` and `fa_version_unsupported_reason`, for 2 and 3, and `_is_fa3_supported`.
Read from vLLM 0.33.0. vLLM loads the plug-in in each of its processes by the entry point `vllm.general_plugins`;
without JIT_KERNEL_PLUGINS=vllm it does nothing. To undo: `deactivate()`, or start vLLM without the variable. A
`functools.partial` that was made before `activate()` or `deactivate()` keeps the function that it has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from jit_kernel import config
from jit_kernel import flash_attention_v3 as public
from jit_kernel.device import detect_device, device_target
from jit_kernel.fa3.call import UNBOUNDED, Result
from jit_kernel.fa3.checks.values import described, need_absent, need_bool, need_present
from jit_kernel.fa3.decision import Rejected
from jit_kernel.integrations.counters import count
from jit_kernel.integrations.peers import note_served, refuse_given, refuse_other_than, with_unit_stride
from jit_kernel.integrations.replacing import Replacements, always

HOST = "vllm"
_MODULE = "vllm.vllm_flash_attn.flash_attn_interface"
_ATTENTION = "flash_attn_varlen_func"
_VERSIONS = (2, 3)  # FlashAttention 2's and 3's functions mean the same


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, max_seqlen_q: int, cu_seqlens_q: Tensor, max_seqlen_k: int,
    cu_seqlens_k: Tensor | None = None, seqused_k: Tensor | None = None, q_v: Tensor | None = None,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False, window_size: Any = None,
    softcap: float = 0.0, alibi_slopes: None = None, deterministic: bool = False, return_attn_probs: bool = False,
    block_table: Tensor | None = None, return_softmax_lse: bool = False, out: Tensor | None = None,
    scheduler_metadata: Tensor | None = None, q_descale: Tensor | None = None, k_descale: Tensor | None = None,
    v_descale: Tensor | None = None, num_splits: int = 0, output_scale: None = None, fa_version: int = 2,
    s_aux: Tensor | None = None, cp_world_size: int = 1, cp_rank: int = 0, cp_tot_seqused_k: None = None,
    mask_mod: None = None, block_sparse_tensors: None = None, aux_tensors: None = None,
    aux_tensor_leading_dims: None = None, dynamic_causal: None = None, gather_kv_indices: None = None,
    gather_kv_valid_length: None = None,
) -> Result:  # fmt: skip
    """vLLM's function, in its order, with its names and defaults; shapes and results are those of jit_kernel's.

    With block_table (b, max_blocks) and seqused_k (b,), k and v are pages: `jit_kernel.flash_attn_with_kvcache`. Else
    k and v are ragged with cu_seqlens_k (b + 1,): `jit_kernel.flash_attn_varlen_func`. q, k and v whose last stride is
    not 1 are copied. q_v and s_aux are `qv` and `sinks` there; softmax_scale is 1/sqrt(d) by default, with q_v too.
    deterministic concerns a backward pass: any bool.

    fa_version must be 2 or 3. NotImplementedError, by name, for a value that asks for what jit_kernel has not, of
    dropout_p, alibi_slopes, return_attn_probs, output_scale, mask_mod and the arguments behind it, and of the
    arguments of context parallelism.
    """
    if fa_version not in _VERSIONS:
        raise NotImplementedError(f"fa_version is {described(fa_version)}; it must be 2 or 3")
    refuse_given(
        _ATTENTION, alibi_slopes=alibi_slopes, output_scale=output_scale, cp_tot_seqused_k=cp_tot_seqused_k,
        mask_mod=mask_mod, block_sparse_tensors=block_sparse_tensors, aux_tensors=aux_tensors,
        aux_tensor_leading_dims=aux_tensor_leading_dims, dynamic_causal=dynamic_causal,
        gather_kv_indices=gather_kv_indices, gather_kv_valid_length=gather_kv_valid_length,
    )  # fmt: skip
    refuse_other_than(_ATTENTION, 0, dropout_p=dropout_p, cp_rank=cp_rank, return_attn_probs=return_attn_probs)
    refuse_other_than(_ATTENTION, 1, cp_world_size=cp_world_size)
    need_bool("deterministic", deterministic)
    q, k, v = with_unit_stride(q), with_unit_stride(k), with_unit_stride(v)
    if softmax_scale is None and isinstance(q_v, Tensor) and isinstance(q, Tensor) and q.dim():
        softmax_scale = q.shape[-1] ** -0.5  # vLLM's default, with q_v too
    if block_table is not None:
        need_present("seqused_k", seqused_k, "with block_table")
        need_absent("cu_seqlens_k", cu_seqlens_k, "with block_table: pages have lengths in seqused_k")
        result = public.flash_attn_with_kvcache(
            q, k, v, qv=q_v, cache_seqlens=seqused_k, page_table=block_table, cu_seqlens_q=cu_seqlens_q,
            max_seqlen_q=max_seqlen_q, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale,
            softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap,
            scheduler_metadata=scheduler_metadata, num_splits=num_splits, return_softmax_lse=return_softmax_lse,
            sinks=s_aux, out=out,
        )  # fmt: skip
    else:
        need_absent("scheduler_metadata", scheduler_metadata, "without block_table")
        if cu_seqlens_k is None:
            need_present("seqused_k", seqused_k, "without cu_seqlens_k")
        result = public.flash_attn_varlen_func(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k=seqused_k, qv=q_v,
            q_descale=q_descale, k_descale=k_descale, v_descale=v_descale, softmax_scale=softmax_scale, causal=causal,
            window_size=window_size, softcap=softcap, num_splits=num_splits, return_softmax_lse=return_softmax_lse,
            sinks=s_aux, out=out,
        )  # fmt: skip
    note_served(HOST)
    return result


def get_scheduler_metadata(
    batch_size: int, max_seqlen_q: int, max_seqlen_k: int, num_heads_q: int, num_heads_kv: int, headdim: int,
    cache_seqlens: Tensor, qkv_dtype: torch.dtype = torch.bfloat16, headdim_v: int | None = None,
    cu_seqlens_q: Tensor | None = None, cu_seqlens_k_new: Tensor | None = None, cache_leftpad: Tensor | None = None,
    page_size: int | None = None, max_seqlen_k_new: int = 0, causal: bool = False,
    window_size: tuple[int, int] = UNBOUNDED, has_softcap: bool = False, num_splits: int = 0,
    pack_gqa: bool | None = None, sm_margin: int = 0,
) -> Tensor:  # fmt: skip
    """`jit_kernel.get_scheduler_metadata` in vLLM's order, which has no attention_chunk."""
    return public.get_scheduler_metadata(
        batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, with_unit_stride(cache_seqlens),
        qkv_dtype, headdim_v, cu_seqlens_q, cu_seqlens_k_new, cache_leftpad, page_size, max_seqlen_k_new, causal,
        window_size, 0, has_softcap, num_splits, pack_gqa, sm_margin,
    )  # fmt: skip


def _is_fa3_supported() -> tuple[bool, str | None]:
    """Whether some implementation serves the detected device, and why not."""
    if public._is_fa3_supported():
        return True, None
    from jit_kernel.fa3 import dispatch

    target = device_target(detect_device())
    reasons = [
        f"{name}: {decision.reason}" for name, decision in dispatch.supporting(target) if isinstance(decision, Rejected)
    ]
    return False, f"jit_kernel does not serve {target}: {'; '.join(reasons)}"


def is_fa_version_supported(fa_version: int) -> bool:
    """Whether jit_kernel has a version's functions for the detected device. Raises ValueError for no version at all."""
    return fa_version_unsupported_reason(fa_version) is None


def fa_version_unsupported_reason(fa_version: int) -> str | None:
    """Why it has not, None where it has. Raises ValueError for what is none of the versions 2, 3 and 4."""
    if fa_version in _VERSIONS:
        return _is_fa3_supported()[1]
    if fa_version == 4:
        return "jit_kernel has the functions of FlashAttention 2 and 3, not those of 4"
    raise ValueError(f"fa_version is {described(fa_version)}; it must be 2, 3 or 4")


def _for_versions(ours: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """What replaces a function that is asked about a version: ours for 2 and 3, vLLM's own for another."""

    def replacement_of(original: Callable[..., Any]) -> Callable[..., Any]:
        def replacement(fa_version: int) -> Any:
            return (ours if fa_version in _VERSIONS else original)(fa_version)

        return replacement

    return replacement_of


def _attention_of(original: Callable[..., Any]) -> Callable[..., Any]:
    ours: Callable[..., Any] = flash_attn_varlen_func

    def replacement(*arguments: Any, fa_version: int = 2, **named: Any) -> Any:
        if fa_version in _VERSIONS:
            return ours(*arguments, fa_version=fa_version, **named)
        count(HOST, "passed on", f"fa_version={fa_version}")
        return original(*arguments, fa_version=fa_version, **named)

    return replacement


def _wanted() -> Mapping[tuple[str, str], Callable[[Callable[..., Any]], Callable[..., Any]]]:
    """By module and name of a function of vLLM's: what makes its replacement."""
    return {
        (_MODULE, _ATTENTION): _attention_of,
        (_MODULE, "get_scheduler_metadata"): always(get_scheduler_metadata),
        (_MODULE, "is_fa_version_supported"): _for_versions(is_fa_version_supported),
        (_MODULE, "fa_version_unsupported_reason"): _for_versions(fa_version_unsupported_reason),
        (_MODULE, "_is_fa3_supported"): always(_is_fa3_supported),
    }


_replacements = Replacements("vllm", _wanted)


def activate() -> None:
    """Replace vLLM's functions in this process; a second call changes nothing.

    Raises RuntimeError, with what is missing, where vLLM has no such module or function, as on a build without CUDA.
    """
    _replacements.make()


def deactivate() -> None:
    """Put vLLM's own functions back."""
    _replacements.undo()


def is_active() -> bool:
    """Whether jit_kernel stands behind vLLM's functions now."""
    return _replacements.are_made()


def plugin() -> None:
    """The entry point that vLLM calls in each of its processes: `activate()` under JIT_KERNEL_PLUGINS=vllm."""
    if HOST in config.plugins():
        activate()

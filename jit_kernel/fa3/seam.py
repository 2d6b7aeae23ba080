"""What stands behind `_load_fa3_kernels`: the public functions with keyword-only arguments, for every device the same.

A call arrives here in its canonical order, is checked once and goes to the implementation that the device of its
tensors has for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from jit_kernel.fa3 import call as calls
from jit_kernel.fa3.call import Arguments, Call, MetadataParameters, Result, lse_shape
from jit_kernel.fa3.checks.plain import refuse_traced

if TYPE_CHECKING:
    from jit_kernel.fa3.dispatch import Dispatcher


def _import_checks(arguments: Arguments) -> Call:
    """Import the checks and the dispatch with the first call: 18 ms, which an import of the package does not pay."""
    global _checked, _dispatcher
    from jit_kernel.fa3.checks.call import checked
    from jit_kernel.fa3.dispatch import dispatcher

    _checked, _dispatcher = checked, dispatcher
    return checked(arguments)


_checked: Callable[[Arguments], Call] = _import_checks
_dispatcher: Callable[[torch.device], Dispatcher]


def attend(arguments: Arguments) -> Result:
    """Attention of an unchecked call."""
    if (try_known := calls.try_unchecked) is not None and (result := try_known(arguments)) is not None:
        return result
    return attend_checked(arguments)


def attend_checked(arguments: Arguments) -> Result:
    """The same of a call that no faster way serves."""
    call = _checked(arguments)
    return _dispatcher(call.q.device).attend(call)


def _attend_directly(function: str, arguments: Mapping[str, object]) -> Result:
    refuse_traced(function)
    return attend(calls.of(function, arguments))


def plan(parameters: MetadataParameters) -> Tensor:
    """Scheduler metadata for parameters that nobody has checked."""
    from jit_kernel.fa3.checks.metadata import check_parameters
    from jit_kernel.fa3.dispatch import dispatcher

    parameters = check_parameters(parameters)
    return dispatcher(parameters.cache_seqlens.device).plan(parameters)


def combine(
    out_partial: Tensor, lse_partial: Tensor, out: Tensor | None, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """`flash_attn_combine` of arguments that nobody has checked."""
    from jit_kernel.fa3.checks.combine import check_combine
    from jit_kernel.fa3.dispatch import dispatcher

    parts, sums, dtype = check_combine(out_partial, lse_partial, out, out_dtype)
    combine = dispatcher(parts.device).first_with("flash_attn_combine")
    if out is None:
        out = parts.new_empty(parts.shape[1:], dtype=dtype)
    lse = sums.new_empty(parts.shape[1:-1])
    combine(parts, sums, out, lse)
    return out, lse


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """`merge_state` of arguments that nobody has checked."""
    from jit_kernel.fa3.checks.combine import check_merge
    from jit_kernel.fa3.dispatch import dispatcher

    parts = check_merge(out_a, lse_a, out_b, lse_b)
    merge = dispatcher(parts[0].device).first_with("merge_state")
    out, lse = parts[0].new_empty(parts[0].shape), parts[1].new_empty(lse_shape(parts[0]))
    merge(*parts, out, lse)
    return out, lse


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
    attention_chunk: int | None = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    only_qv: bool = False,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
    draft_mask: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Result:
    """See `jit_kernel.flash_attention_v3.flash_attn_varlen_func`."""
    return _attend_directly(calls.VARLEN, locals())


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
    cache_seqlens: Tensor | int | None = None,
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
    attention_chunk: int | None = 0,
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
    draft_mask: Tensor | None = None,
    deterministic: bool = False,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Result:
    """See `jit_kernel.flash_attention_v3.flash_attn_with_kvcache`."""
    return _attend_directly(calls.KVCACHE, locals())


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
    attention_chunk: int | None = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
) -> Result:
    """See `jit_kernel.flash_attention_v3.flash_attn_func`."""
    return _attend_directly(calls.DENSE, locals())


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
    attention_chunk: int | None = 0,
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> Tensor:
    """See `jit_kernel.flash_attention_v3.get_scheduler_metadata`."""
    parameters = MetadataParameters(**locals())
    refuse_traced("get_scheduler_metadata")
    return plan(parameters)


def flash_attn_combine(
    *, out_partial: Tensor, lse_partial: Tensor, out: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """See `jit_kernel.flash_attention_v3.flash_attn_combine`."""
    refuse_traced("flash_attn_combine")
    return combine(out_partial, lse_partial, out, out_dtype)


def merge_state(*, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """See `jit_kernel.flash_attention_v3.merge_state`."""
    refuse_traced("merge_state")
    return merge(out_a, lse_a, out_b, lse_b)


FUNCTIONS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        function.__name__: function
        for function in (
            flash_attn_varlen_func,
            flash_attn_with_kvcache,
            flash_attn_func,
            get_scheduler_metadata,
            flash_attn_combine,
            merge_state,
        )
    }
)

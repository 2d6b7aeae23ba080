"""sglang's attention functions on jit_kernel, and the plug-in that makes sglang 0.5.23 call them.

Replaced, while `activate()` holds, in this process alone:
- `flash_attn_varlen_func` and `flash_attn_with_kvcache` of `sglang.kernels.ops.attention.flash_attention`, for `ver=3`;
  calls with `ver=4` go on to sglang's own function;
- these two and `get_scheduler_metadata` of `sgl_kernel.flash_attn`, which the FlashAttention backend takes for itself;
- the same functions wherever a module has imported them by name before.
Read from sglang 0.5.23 and sglang-kernel 0.4.10. sglang loads the plug-in in each of its processes by the entry point
`sglang.srt.plugins`; without JIT_KERNEL_PLUGINS=sglang it does nothing. To undo: `deactivate()`, or start sglang
without the variable. A backend that was made before `activate()` or `deactivate()` keeps the functions that it has.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from jit_kernel import config
from jit_kernel import flash_attention_v3 as public
from jit_kernel.fa3.call import UNBOUNDED, Result
from jit_kernel.fa3.checks.values import described, need_integer
from jit_kernel.integrations.counters import count
from jit_kernel.integrations.fa3_attention import are_gradients_wanted, differentiable
from jit_kernel.integrations.peers import note_served, refuse_given, with_unit_stride
from jit_kernel.integrations.replacing import Replacements, always

HOST = "sglang"
_OF_BOTH = "sglang.kernels.ops.attention.flash_attention"
_OF_BACKEND = "sgl_kernel.flash_attn"
_UNCHANGED = nullcontext()


def flash_attn_with_kvcache(
    q: Any, k_cache: Any, v_cache: Tensor, k: Tensor | None = None, v: Tensor | None = None, qv: Tensor | None = None,
    rotary_cos: Tensor | None = None, rotary_sin: Tensor | None = None, cache_seqlens: Tensor | int | None = None,
    cache_batch_idx: Tensor | None = None, cache_leftpad: Tensor | None = None, page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None, cu_seqlens_k_new: Tensor | None = None, max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None, q_descale: Tensor | None = None, k_descale: Tensor | None = None,
    v_descale: Tensor | None = None, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = UNBOUNDED, attention_chunk: int | None = None, softcap: float = 0.0,
    rotary_interleaved: bool = True, scheduler_metadata: Tensor | None = None, num_splits: int = 0,
    pack_gqa: bool | None = None, only_qv: bool = False, sm_margin: int = 0, return_softmax_lse: bool = False,
    sinks: Tensor | None = None, score_mod: None = None, aux_tensors: None = None, sfq: None = None, sfk: None = None,
    sfv: None = None, rel_bias: None = None, rel_bias_prep_cache: None = None, ver: int = 3, out: Tensor | None = None,
    max_seqlen_k: int | None = None, mask_mod: None = None,
) -> Result:  # fmt: skip
    """`jit_kernel.flash_attn_with_kvcache` in sglang's order, with its names and defaults.

    Inputs may require grad, the result does not, as sglang's own never does.
    q and k_cache may be None with only_qv: they are not read then. max_seqlen_k, a bound of the keys' count, is not
    needed. ver must be 3. From score_mod to mask_mod, but for ver, out and max_seqlen_k: None, else NotImplementedError
    by name.
    """
    _need_version(ver)
    refuse_given(
        "flash_attn_with_kvcache", score_mod=score_mod, aux_tensors=aux_tensors, sfq=sfq, sfk=sfk, sfv=sfv,
        rel_bias=rel_bias, rel_bias_prep_cache=rel_bias_prep_cache, mask_mod=mask_mod,
    )  # fmt: skip
    if max_seqlen_k is not None:
        need_integer("max_seqlen_k", max_seqlen_k)
    if q is None and only_qv is True and isinstance(qv, Tensor) and qv.dim():
        q = qv[..., :64]  # its numbers are not read; 64 is the head size that goes with qv
    with _without_gradients(q, k, v, qv, sinks):
        result = public.flash_attn_with_kvcache(
            q, k_cache, v_cache, k, v, qv, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, cache_leftpad,
            page_table, cu_seqlens_q, cu_seqlens_k_new, max_seqlen_q, rotary_seqlens, q_descale, k_descale, v_descale,
            softmax_scale, causal, window_size, attention_chunk, softcap, rotary_interleaved, scheduler_metadata,
            num_splits, pack_gqa, only_qv, sm_margin, return_softmax_lse, sinks, out,
        )  # fmt: skip
    note_served(HOST)
    return result


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None = None, max_seqlen_k: int | None = None, seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None, page_table: Tensor | None = None, softmax_scale: float | None = None,
    causal: bool = False, qv: Tensor | None = None, q_descale: Tensor | None = None, k_descale: Tensor | None = None,
    v_descale: Tensor | None = None, window_size: tuple[int, int] = UNBOUNDED, attention_chunk: int | None = 0,
    softcap: float = 0.0, num_splits: int = 1, pack_gqa: bool | None = None, only_qv: bool = False, sm_margin: int = 0,
    return_softmax_lse: bool = False, sinks: Tensor | None = None, score_mod: None = None, aux_tensors: None = None,
    sfq: None = None, sfk: None = None, sfv: None = None, rel_bias: None = None, rel_bias_prep_cache: None = None,
    ver: int = 3, out: Tensor | None = None, mask_mod: None = None,
) -> Result:  # fmt: skip
    """`jit_kernel.flash_attn_varlen_func` in sglang's order, with its names and defaults.

    ver must be 3. From score_mod to mask_mod, but for ver and out: None, else NotImplementedError by name. Inputs may
    require grad; beside sinks or out the result does not, as sglang's own never does.
    """
    _need_version(ver)
    refuse_given(
        "flash_attn_varlen_func", score_mod=score_mod, aux_tensors=aux_tensors, sfq=sfq, sfk=sfk, sfv=sfv,
        rel_bias=rel_bias, rel_bias_prep_cache=rel_bias_prep_cache, mask_mod=mask_mod,
    )  # fmt: skip
    if sinks is None and out is None and are_gradients_wanted((q, k, v, qv)):
        return _with_gradients(locals())
    with _without_gradients(q, k, v, qv, sinks):
        result = public.flash_attn_varlen_func(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k, page_table,
            softmax_scale, causal, qv, q_descale, k_descale, v_descale, window_size, attention_chunk, softcap,
            num_splits, pack_gqa, only_qv, sm_margin, return_softmax_lse, sinks, out,
        )  # fmt: skip
    note_served(HOST)
    return result


def _without_gradients(*inputs: Any) -> AbstractContextManager[Any]:
    """Where an input requires grad, a context in which none is asked for; else one that costs nothing."""
    return torch.no_grad() if are_gradients_wanted(inputs) else _UNCHANGED


def _with_gradients(arguments: Mapping[str, Any]) -> Result:
    """flash_attn_varlen_func of inputs that require grad, as sglang's own tests pass them: the backward pass says
    by name what it does not serve."""
    taken = inspect.signature(public.flash_attn_varlen_func).parameters.keys() & arguments.keys()
    given = {name: arguments[name] for name in taken - {"sinks", "out", "return_softmax_lse"}}
    result = differentiable(public.flash_attn_varlen_func, given)
    note_served(HOST)
    return result if arguments["return_softmax_lse"] else result[0]


def get_scheduler_metadata(
    batch_size: int, max_seqlen_q: int, max_seqlen_k: int, num_heads: int, num_heads_k: int, headdim: int,
    cache_seqlens: Tensor, qkv_dtype: torch.dtype = torch.bfloat16, headdim_v: int | None = None,
    cu_seqlens_q: Tensor | None = None, cu_seqlens_k: None = None, cu_seqlens_k_new: Tensor | None = None,
    seqused_q: None = None, leftpad_k: Tensor | None = None, page_size: int | None = None, max_seqlen_k_new: int = 0,
    causal: bool = False, window_size: tuple[int, int] = UNBOUNDED, attention_chunk: int | None = 0,
    has_softcap: bool = False, num_splits: int = 0, pack_gqa: bool | None = None, sm_margin: int = 0,
) -> Tensor:  # fmt: skip
    """`jit_kernel.get_scheduler_metadata` in sglang-kernel's order, with its names and defaults.

    cu_seqlens_k and seqused_q must be None: plans are for calls over a cache.
    """
    refuse_given("get_scheduler_metadata", cu_seqlens_k=cu_seqlens_k, seqused_q=seqused_q)
    return public.get_scheduler_metadata(
        batch_size, max_seqlen_q, max_seqlen_k, num_heads, num_heads_k, headdim, with_unit_stride(cache_seqlens),
        qkv_dtype, headdim_v, cu_seqlens_q, cu_seqlens_k_new, leftpad_k, page_size, max_seqlen_k_new, causal,
        window_size, attention_chunk, has_softcap, num_splits, pack_gqa, sm_margin,
    )  # fmt: skip


def _need_version(ver: int) -> None:
    if ver != 3:
        raise NotImplementedError(f"ver is {described(ver)}; it must be 3, for FlashAttention-3's functions")


def _for_version_3(ours: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """What replaces a function of sglang's: ours for ver=3, its own for another."""

    def replacement_of(original: Callable[..., Any]) -> Callable[..., Any]:
        def replacement(*arguments: Any, ver: int = 3, **named: Any) -> Any:
            if ver == 3:
                return ours(*arguments, **named)
            count(HOST, "passed on", f"ver={ver}")
            return original(*arguments, ver=ver, **named)

        return replacement

    return replacement_of


def _wanted() -> Mapping[tuple[str, str], Callable[[Callable[..., Any]], Callable[..., Any]]]:
    """By module and name of a function of sglang's: what makes its replacement."""
    attention = (flash_attn_varlen_func, flash_attn_with_kvcache)
    both = {(module, ours.__name__): _for_version_3(ours) for module in (_OF_BOTH, _OF_BACKEND) for ours in attention}
    return both | {(_OF_BACKEND, "get_scheduler_metadata"): always(get_scheduler_metadata)}


_replacements = Replacements("sglang", _wanted)


def activate() -> None:
    """Replace sglang's functions in this process; a second call changes nothing.

    Raises RuntimeError, with what is missing, where sglang has no such module or function.
    """
    _replacements.make()


def deactivate() -> None:
    """Put sglang's own functions back."""
    _replacements.undo()


def is_active() -> bool:
    """Whether jit_kernel stands behind sglang's functions now."""
    return _replacements.are_made()


def plugin() -> None:
    """The entry point that sglang calls in each of its processes: `activate()` under JIT_KERNEL_PLUGINS=sglang."""
    if HOST in config.plugins():
        activate()

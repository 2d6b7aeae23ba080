"""FlashAttention-3's module `flash_attn_interface` on jit_kernel: its functions, in its order, with its names, defaults
and returns.

`install()` makes `import flash_attn_interface` find this module, in this process alone, and registers the operators
`torch.ops.flash_attn_3.fwd`, `bwd`, `fwd_combine` and `get_scheduler_metadata` on CPU and CUDA, which
`torch.nn.attention.activate_flash_attention_impl("FA3")` asks for. To undo: `uninstall()`. The wheel of jit_kernel has
no top-level module of that name. Read from FlashAttention at 0251105a, hopper/.

Shapes, meaning and errors are those of `jit_kernel.flash_attention_v3`. An input may require grad in every call but
`flash_attn_with_kvcache`; the backward pass raises NotImplementedError by name for page_table, qv and e4m3.
deterministic: gradients have the same bits from run to run; on a CPU they always have. lse, the result beside out, is
float32 and not differentiable.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from jit_kernel import flash_attention_v3 as public
from jit_kernel.fa3.call import UNBOUNDED
from jit_kernel.fa3.checks.values import described, need_bool, need_integer, need_tensor
from jit_kernel.flash_attention_v3 import flash_attn_combine as flash_attn_combine
from jit_kernel.integrations import fa3_attention as passes
from jit_kernel.integrations.peers import with_unit_stride as maybe_contiguous

_NAME = "flash_attn_interface"
_before: list[ModuleType | None] = []  # what stood in sys.modules before install(), where it did


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False, qv: Tensor | None = None,
    q_descale: Tensor | None = None, k_descale: Tensor | None = None, v_descale: Tensor | None = None,
    window_size: Any = UNBOUNDED, attention_chunk: int = 0, softcap: float = 0.0, num_splits: int = 1,
    pack_gqa: bool | None = None, deterministic: bool = False, sm_margin: int = 0, return_attn_probs: bool = False,
) -> Any:  # fmt: skip
    """Attention of q (b, sq, hq, d) over k and v (b, sk, hk, d or dv). Returns out, or (out, lse (b, hq, sq))."""
    need_bool("return_attn_probs", return_attn_probs)
    named = {
        "q": q, "k": k, "v": v, "softmax_scale": softmax_scale, "causal": causal, "qv": qv, "q_descale": q_descale,
        "k_descale": k_descale, "v_descale": v_descale, "window_size": window_size, "attention_chunk": attention_chunk,
        "softcap": softcap, "num_splits": num_splits, "pack_gqa": pack_gqa, "deterministic": deterministic,
        "sm_margin": sm_margin,
    }  # fmt: skip
    result = passes.attend(public.flash_attn_func, named)
    return result if return_attn_probs else result[0]


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    seqused_q: Tensor | None = None, seqused_k: Tensor | None = None, softmax_scale: float | None = None,
    causal: bool = False, qv: Tensor | None = None, q_descale: Tensor | None = None, k_descale: Tensor | None = None,
    v_descale: Tensor | None = None, window_size: Any = UNBOUNDED, attention_chunk: int = 0, softcap: float = 0.0,
    num_splits: int = 1, pack_gqa: bool | None = None, deterministic: bool = False, sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:  # fmt: skip
    """Attention of q (total_q, hq, d) over k and v (total_k, hk, d or dv). Returns out, or (out, lse (hq, total_q))."""
    need_bool("deterministic", deterministic)
    need_bool("return_attn_probs", return_attn_probs)
    named = {
        "q": q, "k": k, "v": v, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k,
        "max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k, "seqused_q": seqused_q, "seqused_k": seqused_k,
        "softmax_scale": softmax_scale, "causal": causal, "qv": qv, "q_descale": q_descale, "k_descale": k_descale,
        "v_descale": v_descale, "window_size": window_size, "attention_chunk": attention_chunk, "softcap": softcap,
        "num_splits": num_splits, "pack_gqa": pack_gqa, "deterministic": deterministic, "sm_margin": sm_margin,
    }  # fmt: skip
    result = passes.attend(public.flash_attn_varlen_func, named)
    return result if return_attn_probs else result[0]


def flash_attn_qkvpacked_func(
    qkv: Tensor, softmax_scale: float | None = None, causal: bool = False, q_descale: Tensor | None = None,
    k_descale: Tensor | None = None, v_descale: Tensor | None = None, window_size: Any = UNBOUNDED,
    attention_chunk: int = 0, softcap: float = 0.0, deterministic: bool = False, num_heads_q: int | None = None,
    sm_margin: int = 0, return_attn_probs: bool = False,
) -> Any:  # fmt: skip
    """The same of qkv (b, s, 3, h, d), or of (b, s, hq + 2 hk, d) with num_heads_q, the heads of q, k and v in turn."""
    need_tensor("qkv", qkv)
    if qkv.dim() == 5 and qkv.shape[2] == 3:
        q, k, v = qkv.unbind(dim=2)
    elif qkv.dim() == 4 and num_heads_q is not None:
        heads = need_integer("num_heads_q", num_heads_q)
        rest = qkv.shape[2] - heads
        if heads < 1 or rest < 2 or rest % 2:
            raise ValueError(
                f"num_heads_q is {heads}; it must be at least 1 and leave an even number of qkv's {qkv.shape[2]} heads"
            )
        q, k, v = torch.split(qkv, [heads, rest // 2, rest // 2], dim=2)
    else:
        raise ValueError(
            f"qkv is {described(qkv)}, num_heads_q {described(num_heads_q)}; "
            "qkv must be (b, s, 3, h, d), or (b, s, hq + 2 hk, d) with num_heads_q"
        )
    return flash_attn_func(
        q, k, v, softmax_scale, causal, None, q_descale, k_descale, v_descale, window_size, attention_chunk, softcap,
        deterministic=deterministic, sm_margin=sm_margin, return_attn_probs=return_attn_probs,
    )  # fmt: skip


def flash_attn_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None = None, v: Tensor | None = None,
    qv: Tensor | None = None, rotary_cos: Tensor | None = None, rotary_sin: Tensor | None = None,
    cache_seqlens: Tensor | int | None = None, cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None, page_table: Tensor | None = None, cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None, max_seqlen_q: int | None = None, rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None, k_descale: Tensor | None = None, v_descale: Tensor | None = None,
    softmax_scale: float | None = None, causal: bool = False, window_size: Any = UNBOUNDED, attention_chunk: int = 0,
    softcap: float = 0.0, rotary_interleaved: bool = True, scheduler_metadata: Tensor | None = None,
    num_splits: int = 0, pack_gqa: bool | None = None, sm_margin: int = 0, return_softmax_lse: bool = False,
) -> Any:  # fmt: skip
    """Attention over a cache, to which new k and v are appended first, as `jit_kernel.flash_attn_with_kvcache`.

    Returns out, or (out, lse, out_accum, lse_accum): the last two, which hold the parts of split keys there, are empty.
    """
    need_bool("return_softmax_lse", return_softmax_lse)
    named = {
        "q": q, "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v, "qv": qv, "rotary_cos": rotary_cos,
        "rotary_sin": rotary_sin, "cache_seqlens": cache_seqlens, "cache_batch_idx": cache_batch_idx,
        "cache_leftpad": cache_leftpad, "page_table": page_table, "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k_new": cu_seqlens_k_new, "max_seqlen_q": max_seqlen_q, "rotary_seqlens": rotary_seqlens,
        "q_descale": q_descale, "k_descale": k_descale, "v_descale": v_descale, "softmax_scale": softmax_scale,
        "causal": causal, "window_size": window_size, "attention_chunk": attention_chunk, "softcap": softcap,
        "rotary_interleaved": rotary_interleaved, "scheduler_metadata": scheduler_metadata, "num_splits": num_splits,
        "pack_gqa": pack_gqa, "sm_margin": sm_margin,
    }  # fmt: skip
    out, lse = passes.attend_cache(named)
    return (out, lse, *_no_parts(out)) if return_softmax_lse else out


def get_scheduler_metadata(
    batch_size: int, max_seqlen_q: int, max_seqlen_k: int, num_heads_q: int, num_heads_kv: int, headdim: int,
    cache_seqlens: Tensor, qkv_dtype: torch.dtype = torch.bfloat16, headdim_v: int | None = None,
    cu_seqlens_q: Tensor | None = None, cu_seqlens_k_new: Tensor | None = None, cache_leftpad: Tensor | None = None,
    page_size: int | None = None, max_seqlen_k_new: int = 0, causal: bool = False, window_size: Any = UNBOUNDED,
    attention_chunk: int = 0, has_softcap: bool = False, num_splits: int = 0, pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> Tensor:  # fmt: skip
    """As `jit_kernel.get_scheduler_metadata`; a cache_seqlens whose stride is not 1 is copied."""
    return public.get_scheduler_metadata(
        batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, maybe_contiguous(cache_seqlens),
        qkv_dtype, headdim_v, cu_seqlens_q, cu_seqlens_k_new, cache_leftpad, page_size, max_seqlen_k_new, causal,
        window_size, attention_chunk, has_softcap, num_splits, pack_gqa, sm_margin,
    )  # fmt: skip


def _flash_attn_forward(
    q: Tensor, k: Tensor, v: Tensor, k_new: Tensor | None = None, v_new: Tensor | None = None,
    qv: Tensor | None = None, out_: Tensor | None = None, cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None, cu_seqlens_k_new: Tensor | None = None, seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None, max_seqlen_q: int | None = None, max_seqlen_k: int | None = None,
    page_table: Tensor | None = None, kv_batch_idx: Tensor | None = None, leftpad_k: Tensor | None = None,
    rotary_cos: Tensor | None = None, rotary_sin: Tensor | None = None, seqlens_rotary: Tensor | None = None,
    q_descale: Tensor | None = None, k_descale: Tensor | None = None, v_descale: Tensor | None = None,
    softmax_scale: float | None = None, causal: bool = False, window_size_left: int = -1, window_size_right: int = -1,
    attention_chunk: int = 0, softcap: float = 0.0, rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None, num_splits: int = 1, pack_gqa: bool | None = None, sm_margin: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Every forward pass by one list of arguments: (out, lse, out_accum, lse_accum), the last two empty."""
    named = {
        "q": q, "k": k, "v": v, "k_new": k_new, "v_new": v_new, "q_v": qv, "out": out_, "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k, "cu_seqlens_k_new": cu_seqlens_k_new, "seqused_q": seqused_q,
        "seqused_k": seqused_k, "max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k, "page_table": page_table,
        "kv_batch_idx": kv_batch_idx, "leftpad_k": leftpad_k, "rotary_cos": rotary_cos, "rotary_sin": rotary_sin,
        "seqlens_rotary": seqlens_rotary, "q_descale": q_descale, "k_descale": k_descale, "v_descale": v_descale,
        "softmax_scale": softmax_scale, "is_causal": causal, "window_size_left": window_size_left,
        "window_size_right": window_size_right, "attention_chunk": attention_chunk, "softcap": softcap,
        "is_rotary_interleaved": rotary_interleaved, "scheduler_metadata": scheduler_metadata,
        "num_splits": num_splits, "pack_gqa": pack_gqa, "sm_margin": sm_margin,
    }  # fmt: skip
    out, lse = passes.forward(named)
    return (out, lse, *_no_parts(out))


def _flash_attn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor,
    cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None, sequed_q: Tensor | None = None,
    sequed_k: Tensor | None = None, max_seqlen_q: int | None = None, max_seqlen_k: int | None = None,
    dq: Tensor | None = None, dk: Tensor | None = None, dv: Tensor | None = None, softmax_scale: float | None = None,
    is_causal: bool = False, window_size_left: int = -1, window_size_right: int = -1, softcap: float = 0.0,
    deterministic: bool = False, sm_margin: int = 0,
) -> Tensor:  # fmt: skip
    """Write the gradients into those of dq, dk and dv that are given; returns sum(dout * out), as softmax_lse lies."""
    need_bool("deterministic", deterministic)
    found = passes.gradients(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, seqused_q=sequed_q,
        seqused_k=sequed_k, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, softmax_scale=softmax_scale,
        causal=is_causal, window_size_left=window_size_left, window_size_right=window_size_right, softcap=softcap,
        deterministic=deterministic,
    )  # fmt: skip
    for given, made in zip((dq, dk, dv), found, strict=True):
        if given is not None:
            given.copy_(made)
    return passes.row_products(dout, out)


def _no_parts(out: Tensor) -> tuple[Tensor, Tensor]:
    return out.new_empty(0, dtype=torch.float32), out.new_empty(0, dtype=torch.float32)


def install() -> None:
    """Make `import flash_attn_interface` find this module in this process; a second call changes nothing.

    Raises RuntimeError where FlashAttention-3's own operators are loaded: two libraries cannot define the same names.
    """
    from jit_kernel.integrations import fa3_operators

    if _before:
        return
    fa3_operators.register()
    _before.append(sys.modules.get(_NAME))
    sys.modules[_NAME] = sys.modules[__name__]


def uninstall() -> None:
    """Undo `install()`: the module that stood there before, or none, and no operators.

    Raises RuntimeError while torch's "FA3" is active, which would call operators that are gone:
    `torch.nn.attention.restore_flash_attention_impl()` comes first.
    """
    from jit_kernel.integrations import fa3_operators

    if not _before:
        return
    fa3_operators.remove()
    (before,) = _before
    _before.clear()
    if before is None:
        sys.modules.pop(_NAME, None)
    else:
        sys.modules[_NAME] = before


def is_active() -> bool:
    """Whether `import flash_attn_interface` finds this module."""
    return bool(_before)

"""Valid calls of every public function, small enough to make thousands of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import jit_kernel

Call = dict[str, Any]


def ints(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def dense() -> Call:
    q, k, v = torch.randn(2, 5, 4, 32), torch.randn(2, 7, 2, 32), torch.randn(2, 7, 2, 16)
    return {"q": q, "k": k, "v": v, "sinks": torch.randn(4), "out": torch.randn(2, 5, 4, 16)}


def varlen() -> Call:
    q, k, v = torch.randn(9, 4, 32), torch.randn(12, 2, 32), torch.randn(12, 2, 16)
    offsets = {"cu_seqlens_q": ints(0, 4, 9), "cu_seqlens_k": ints(0, 5, 12)}
    used = {"seqused_q": ints(3, 5), "seqused_k": ints(5, 6)}
    return {"q": q, "k": k, "v": v, **offsets, **used, "out": torch.randn(9, 4, 16)}


def paged() -> Call:
    q, k, v = torch.randn(2, 3, 4, 32), torch.randn(6, 4, 2, 32), torch.randn(6, 4, 2, 32)
    table = ints(0, 1, 2, 3, 4, 99).reshape(2, 3)
    none = {"cu_seqlens_q": None, "cu_seqlens_k": None}
    return {
        "q": q,
        "k": k,
        "v": v,
        **none,
        "seqused_k": ints(12, 8),
        "page_table": table,
        "out": torch.randn(2, 3, 4, 32),
    }


def wide() -> Call:
    """Pages enough for the check of a whole table at once."""
    table = torch.arange(600, dtype=torch.int32).reshape(2, 300)
    pages = torch.randn(600, 1, 1, 16)
    none = {"cu_seqlens_q": None, "cu_seqlens_k": None}
    return {"q": torch.randn(2, 1, 1, 16), "k": pages, "v": pages.clone(), **none, "seqused_k": ints(300, 299)} | {
        "page_table": table
    }


def cache() -> Call:
    """Every argument that a dense cache takes: append, rotary, batch index and left padding."""
    call = {"q": torch.randn(2, 2, 4, 32), "k_cache": torch.randn(3, 16, 2, 32), "v_cache": torch.randn(3, 16, 2, 32)}
    call |= {"k": torch.randn(2, 3, 2, 32), "v": torch.randn(2, 3, 2, 32), "cache_seqlens": ints(4, 13)}
    call |= {"rotary_cos": torch.randn(20, 8), "rotary_sin": torch.randn(20, 8), "rotary_seqlens": ints(5, 17)}
    call |= {"cache_batch_idx": ints(2, 0), "cache_leftpad": ints(1, 2), "causal": True, "num_splits": 0}
    return call | {
        "out": torch.randn(2, 2, 4, 32),
        "sinks": torch.randn(4),
        "draft_mask": ints(1, 2, 3, -1, 5, 6, 7, -8).reshape(4, 2),
    }


def paged_cache() -> Call:
    """Ragged queries and new keys over pages."""
    call = {"q": torch.randn(3, 4, 32), "k_cache": torch.randn(8, 4, 2, 32), "v_cache": torch.randn(8, 4, 2, 32)}
    call |= {"k": torch.randn(4, 2, 32), "v": torch.randn(4, 2, 32), "cu_seqlens_k_new": ints(0, 1, 4)}
    call |= {"cu_seqlens_q": ints(0, 1, 3), "max_seqlen_q": 2, "cache_seqlens": ints(7, 5)}
    return call | {"page_table": ints(1, 2, 3, 4).reshape(2, 2), "draft_mask": ints(*range(6)).reshape(3, 2)}


def planned() -> Call:
    """A cache with scheduler_metadata."""
    call = {"q": torch.randn(2, 2, 4, 32), "k_cache": torch.randn(2, 16, 2, 32), "v_cache": torch.randn(2, 16, 2, 32)}
    call |= {"cache_seqlens": ints(4, 13), "causal": True, "num_splits": 2, "out": torch.randn(2, 2, 4, 32)}
    made = jit_kernel.get_scheduler_metadata(**metadata() | {"num_splits": 2})
    return call | {"scheduler_metadata": made}


def fp8() -> Call:
    q, k, v = (torch.randn(2, 4, heads, 32).to(torch.float8_e4m3fn) for heads in (4, 2, 2))
    scales = {f"{name}_descale": torch.rand(2, 2) for name in "qkv"}
    return {"q": q, "k": k, "v": v, **scales, "out": torch.randn(2, 4, 4, 32).bfloat16()}


def fp8_cache() -> Call:
    """q in 16 bit over e4m3 pages with both kinds of factors, new keys quantised."""
    q, k, v = torch.randn(2, 3, 4, 32).bfloat16(), *(torch.randn(2, 2, 2, 32).bfloat16() for _ in "kv")
    pages = {f"{name}_cache": torch.randn(6, 4, 2, 32).to(torch.float8_e4m3fn) for name in "kv"}
    scales = {f"{name}_descale": 0.5 + torch.rand(2, 2) for name in "kv"}
    scales |= {f"{name}_scale": 0.5 + torch.rand(6, 4, 2) for name in "kv"}
    where = {"cache_seqlens": ints(7, 5), "page_table": ints(1, 2, 5, 3, 4, 0).reshape(2, 3)}
    return {"q": q, "k": k, "v": v, **pages, **scales, **where, "out": torch.randn(2, 3, 4, 32).bfloat16()}


def mla() -> Call:
    q, qv = torch.randn(1, 2, 4, 64).bfloat16(), torch.randn(1, 2, 4, 256).bfloat16()
    k, v = torch.randn(1, 8, 1, 64).bfloat16(), torch.randn(1, 8, 1, 256).bfloat16()
    return {"q": q, "k": k, "v": v, "qv": qv, "cu_seqlens_q": None, "cu_seqlens_k": None, "only_qv": True}


def metadata() -> Call:
    sizes = {"batch_size": 2, "max_seqlen_q": 2, "max_seqlen_k": 16, "num_heads_q": 4, "num_heads_kv": 2, "headdim": 32}
    return sizes | {"cache_seqlens": ints(4, 13), "qkv_dtype": torch.float32, "causal": True}


def combine() -> Call:
    return {"out_partial": torch.randn(3, 2, 5, 4, 16), "lse_partial": torch.randn(3, 2, 5, 4)} | {
        "out": torch.randn(2, 5, 4, 16)
    }


def merge() -> Call:
    a, b = torch.randn(6, 4, 16), torch.randn(6, 4, 16)
    return {"out_a": a, "lse_a": torch.randn(4, 6), "out_b": b, "lse_b": torch.randn(4, 6)}


def plain_dense() -> Call:
    """What the CPU library checks for itself: the calls above ask for more (sinks, seqused_q, new keys)."""
    return {name: value for name, value in dense().items() if name != "sinks"}


def plain_varlen() -> Call:
    return {name: value for name, value in varlen().items() if name != "seqused_q"}


def plain_cache() -> Call:
    call = {"q": torch.randn(2, 2, 4, 32), "k_cache": torch.randn(2, 16, 2, 32), "v_cache": torch.randn(2, 16, 2, 32)}
    return call | {"cache_seqlens": ints(4, 13), "causal": True, "out": torch.randn(2, 2, 4, 32)}


def plain_paged_cache() -> Call:
    call = {"q": torch.randn(3, 4, 32), "k_cache": torch.randn(8, 4, 2, 32), "v_cache": torch.randn(8, 4, 2, 32)}
    call |= {"cu_seqlens_q": ints(0, 1, 3), "max_seqlen_q": 2, "cache_seqlens": ints(7, 5)}
    return call | {"page_table": ints(1, 2, 3, 4).reshape(2, 2)}


FUNCTIONS: dict[Callable[[], Call], Callable[..., Any]] = {
    dense: jit_kernel.flash_attn_func,
    varlen: jit_kernel.flash_attn_varlen_func,
    paged: jit_kernel.flash_attn_varlen_func,
    wide: jit_kernel.flash_attn_varlen_func,
    cache: jit_kernel.flash_attn_with_kvcache,
    paged_cache: jit_kernel.flash_attn_with_kvcache,
    planned: jit_kernel.flash_attn_with_kvcache,
    fp8: jit_kernel.flash_attn_func,
    mla: jit_kernel.flash_attn_varlen_func,
    metadata: jit_kernel.get_scheduler_metadata,
    combine: jit_kernel.flash_attn_combine,
    merge: jit_kernel.merge_state,
    plain_dense: jit_kernel.flash_attn_func,
    plain_varlen: jit_kernel.flash_attn_varlen_func,
    plain_cache: jit_kernel.flash_attn_with_kvcache,
    plain_paged_cache: jit_kernel.flash_attn_with_kvcache,
    fp8_cache: jit_kernel.flash_attn_with_kvcache,
}

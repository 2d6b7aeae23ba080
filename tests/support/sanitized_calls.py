"""Calls of every family of the Hopper kernels, small, for compute-sanitizer: `make sanitize-gpu`."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JIT_KERNEL_IMPLEMENTATION", "hopper")

import torch
from torch import Tensor

from jit_kernel.fa3.hopper import kernels as hopper_kernels
from jit_kernel.flash_attention_v3 import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

MANY_TILES_A_BLOCK = 130  # multiprocessors left free: 2 of 132 blocks take all tiles
DTYPES = (torch.bfloat16, torch.float16)
LENGTHS = (300, 0, 130, 411)


def normal(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, device="cuda", dtype=torch.int32)


def prefill() -> int:
    """Every head size with and without mask and softcap, both dtypes, dense and ragged, one and many tiles a block."""
    count = 0
    starts, used = ints(0, 100, 100, 390, 420), ints(100, 0, 200, 30)
    for dtype in DTYPES:
        for head_dim, head_dim_v in hopper_kernels.HEAD_DIMS:
            for masked in (False, True):
                for softcap in (0.0, 5.0):
                    q = normal(1, 420, 2, head_dim, dtype=dtype)
                    k, v = normal(1, 420, 1, head_dim, dtype=dtype), normal(1, 420, 1, head_dim_v, dtype=dtype)
                    flash_attn_func(q, k, v, causal=masked, softcap=softcap, sm_margin=MANY_TILES_A_BLOCK)
                    flash_attn_varlen_func(
                        q[0], k[0], v[0], starts, starts, seqused_q=used, seqused_k=used, causal=masked,
                        window_size=(70, 0) if masked else (-1, -1), softcap=softcap, sinks=normal(2, dtype=dtype),
                        return_softmax_lse=True,
                    )  # fmt: skip
                    count += 2
    return count


def cache(page_size: int, heads: int, sizes: tuple[int, int], dtype: torch.dtype) -> dict[str, Any]:
    """Keys and values of four sequences: pages in an order of chance, or entries of a dense cache."""
    longest = 512
    if page_size == 0:
        k, v = (normal(4, longest, heads, size, dtype=dtype) for size in sizes)
        return {"k_cache": k, "v_cache": v, "cache_seqlens": ints(*LENGTHS)}
    pages = -(-longest // page_size)
    k, v = (normal(4 * pages, page_size, heads, size, dtype=dtype) for size in sizes)
    table = torch.randperm(4 * pages, device="cuda").int().view(4, pages)
    return {"k_cache": k, "v_cache": v, "cache_seqlens": ints(*LENGTHS), "page_table": table}


def cached(tokens: int, group: int, sizes: tuple[int, int], page_size: int, dtype: torch.dtype) -> int:
    """Calls over one cache: in parts and in one, alone in clusters, of few blocks, appending, with a draft mask."""
    heads = 2
    q = normal(4, tokens, heads * group, sizes[0], dtype=dtype)
    of = cache(page_size, heads, sizes, dtype)
    new = {"k": normal(4, tokens, heads, sizes[0], dtype=dtype), "v": normal(4, tokens, heads, sizes[1], dtype=dtype)}
    tables = {
        "rotary_cos": normal(600, sizes[0] // 4, dtype=dtype),
        "rotary_sin": normal(600, sizes[0] // 4, dtype=dtype),
    }
    drafts = torch.randint(-(2**31), 2**31 - 1, (4 * tokens, 1), device="cuda", dtype=torch.int32)
    alone = {name: x[:2] if name in ("cache_seqlens", "page_table") else x for name, x in of.items()}
    if page_size == 0:
        alone = {name: x[:2] for name, x in of.items()}
    calls: list[dict[str, Any]] = [
        {"causal": True, "return_softmax_lse": True, "sinks": normal(heads * group, dtype=dtype)},
        {"num_splits": 1, "softcap": 5.0},
        {"sm_margin": MANY_TILES_A_BLOCK, "window_size": (70, 0)},
        {"draft_mask": drafts, "causal": True},
        {"causal": True, "rotary_interleaved": False, **new, **tables},
    ]
    for call in calls:
        flash_attn_with_kvcache(q, **of, **call)
    flash_attn_with_kvcache(q[:2], **alone)
    return len(calls) + 1


def serving(head_dim: int) -> int:
    """Few query rows and many, every page's way of loading."""
    count = 0
    for dtype in DTYPES:
        for page_size in (0, 1, 16, 64):
            for tokens, group in ((1, 8), (5, 4), (9, 7), (70, 2)):
                count += cached(tokens, group, (head_dim, head_dim), page_size, dtype)
    return count


FAMILIES: dict[str, Callable[[], int]] = {
    "prefill": prefill,
    **{f"serving {head_dim}": functools.partial(serving, head_dim) for head_dim in (64, 128, 256)},
}


def main() -> None:
    """The families that are named, or all."""
    torch.manual_seed(0)
    for name in sys.argv[1:] or FAMILIES:
        count = FAMILIES[name]()
        torch.cuda.synchronize()
        print(f"{name}: {count} calls done", flush=True)


if __name__ == "__main__":
    main()

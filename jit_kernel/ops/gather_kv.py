"""Keys and values of sequences out of a paged cache (kernel_sources/ops/gather_kv.h)."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from jit_kernel import jit
from jit_kernel.ops import checks, launch


def gather_kv(
    k_cache: Tensor, v_cache: Tensor, page_table: Tensor, cu_seqlens: Tensor, *, total: int | None = None,
    dtype: torch.dtype | None = None, k_scale: Tensor | None = None, v_scale: Tensor | None = None,
    k_out: Tensor | None = None, v_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The keys and values of sequences, one behind the other: (total, heads, d) and (total, heads, dv).

    k_cache: (pages, page_size, heads, d), v_cache: (..., dv): float32, float16, bfloat16 or float8_e4m3fn, any strides
    with a unit last one. page_table: (batch, n) int32; cu_seqlens: (batch + 1,) int32 from 0 on. total: how many rows
    the results have, cu_seqlens[-1] if left out, which waits for a GPU; rows past the last sequence are left alone.
    dtype: of the results, the cache's if left out; a wider one than e4m3 holds it times k_scale and v_scale, float32,
    one number or one a head. k_out, v_out: where the results go. A page that is needed and not of the cache raises
    IndexError on a CPU and gives NaN on a GPU. Raises TypeError and ValueError by an argument's name.
    """
    for name, value in (("k_cache", k_cache), ("v_cache", v_cache)):
        checks.dims(name, checks.tensor(name, value), 4, 4)
    if k_out is None or v_out is None:
        total = checks.total(total, cu_seqlens)
    k_out = checks.result(k_out, k_cache, (total or 0, *k_cache.shape[2:]), dtype or k_cache.dtype)
    v_out = checks.result(v_out, v_cache, (total or 0, *v_cache.shape[2:]), dtype or v_cache.dtype)
    _write(k_cache, v_cache, page_table, cu_seqlens, k_out, v_out, k_scale, v_scale)
    return k_out, v_out


def _gather_kv(
    k_cache: Tensor, v_cache: Tensor, page_table: Tensor, cu_seqlens: Tensor, k_out: Tensor, v_out: Tensor,
    k_scale: Tensor | None, v_scale: Tensor | None,
) -> None:  # fmt: skip
    tensors = (k_cache, v_cache, page_table, cu_seqlens, k_out, v_out, k_scale, v_scale)
    _plans.of(*tensors)(*tensors)


def _plan(k_cache: Tensor, v_cache: Tensor, page_table: Tensor, cu_seqlens: Tensor, k_out: Tensor, v_out: Tensor,
          k_scale: Tensor | None, v_scale: Tensor | None) -> launch.Plan:  # fmt: skip
    named = {"k_cache": k_cache, "v_cache": v_cache, "page_table": page_table, "cu_seqlens": cu_seqlens}
    named |= {"k_out": k_out, "v_out": v_out}
    checks.memory({**named, "k_scale": k_scale, "v_scale": v_scale}, ("k_out", "v_out"))
    checks.keys_and_values(k_out, v_out, (*checks.FLOATS, checks.E4M3), ("k_out", "v_out"))
    checks.caches(k_cache, v_cache, k_out, v_out)
    checks.pages(page_table, cu_seqlens)
    (tokens, heads), (pages, page_size), batch = k_out.shape[:2], k_cache.shape[:2], len(page_table)
    sizes = k_out.shape[2], v_out.shape[2]
    step = checks.scales(k_scale, v_scale, k_cache.dtype != k_out.dtype, heads)
    if not tokens * heads * max(sizes) * batch:
        return launch.Plan(None)
    places = (
        page_table.stride(0),
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        *k_out.stride()[:2],
        *v_out.stride()[:2],
    )
    numbers = (tokens, batch, heads, *sizes, page_size, pages, page_table.shape[1], *places, step)
    if k_cache.is_cpu:
        return launch.on_cpu("gather_kv", "gather_kv", numbers)
    whole = launch.wide(16 // k_out.element_size(), k_cache, v_cache, k_out, v_out)
    name = launch.entry("gather_kv", k_cache.dtype, k_out.dtype, whole)
    turns = -(-heads * -(-max(sizes) * k_out.element_size() // 16) // 64)  # of a warp that takes a token
    columns = launch.warps_each(turns, tokens)
    return launch.on_gpu("gather_kv", name, k_cache.device, tokens, (32, 4), numbers, columns)


_plans = launch.Plans(_plan)
_write = jit.operator("jit_kernel::gather_kv", _gather_kv, fake=lambda *_: None, mutates=("k_out", "v_out"))
for _type, _cached in itertools.product((torch.bfloat16, torch.float16), (None, checks.E4M3)):
    launch.declare("gather_kv", launch.entry("gather_kv", _cached or _type, _type, True))

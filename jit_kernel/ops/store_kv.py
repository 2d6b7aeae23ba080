"""Keys and values of new tokens into a paged cache (kernel_sources/ops/store_kv.h)."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from jit_kernel import jit
from jit_kernel.ops import checks, launch


def store_kv(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, *,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """Store each token's keys and values in its slot of a paged cache: slot = page * page_size + place in the page.

    k: (tokens, heads, d), v: (tokens, heads, dv): float32, float16 or bfloat16, any strides with a unit last one.
    k_cache: (pages, page_size, heads, d), v_cache: (..., dv), of k's dtype or float8_e4m3fn, any strides with a unit
    last one and any page size. slots: (tokens,) int32 or int64; a negative one stores nothing; one past the cache
    raises IndexError on a CPU and stores nothing on a GPU; two tokens must not have the same. k_scale, v_scale:
    float32, one number or one a head: an e4m3 cache holds k / k_scale. Raises TypeError and ValueError by a name.
    """
    for name, value in (("k", k), ("k_cache", k_cache)):
        checks.tensor(name, value)
    _write(k, v, k_cache, v_cache, slots, k_scale, v_scale)


def _store_kv(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor,
    k_scale: Tensor | None, v_scale: Tensor | None,
) -> None:  # fmt: skip
    tensors = (k, v, k_cache, v_cache, slots, k_scale, v_scale)
    _plans.of(*tensors)(*tensors, then=(slots.dtype == torch.int64,))


def _plan(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor,
          k_scale: Tensor | None, v_scale: Tensor | None) -> launch.Plan:  # fmt: skip
    named = {"k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache, "slots": slots}
    checks.memory({**named, "k_scale": k_scale, "v_scale": v_scale}, ("k_cache", "v_cache"))
    checks.keys_and_values(k, v, checks.FLOATS)
    checks.caches(k_cache, v_cache, k, v)
    (tokens, heads), (pages, page_size) = k.shape[:2], k_cache.shape[:2]
    checks.integers("slots", slots, tokens)
    step = checks.scales(k_scale, v_scale, k_cache.dtype == checks.E4M3, heads)
    most = max(k.shape[2], v.shape[2])
    if not tokens * heads * most:
        return launch.Plan(None)
    places = (*k.stride()[:2], *v.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3])
    numbers = (tokens, heads, k.shape[2], v.shape[2], page_size, pages * page_size, *places, step)
    if k.is_cpu:
        return launch.on_cpu("store_kv", "store_kv", numbers)
    piece = 16 // k.element_size()
    block = launch.head_block(min(32, -(-most // piece)))
    name = launch.entry("store_kv", k.dtype, k_cache.dtype, launch.wide(piece, k, v, k_cache, v_cache))
    return launch.on_gpu("store_kv", name, k.device, tokens * heads, block, numbers)


_plans = launch.Plans(_plan)
_write = jit.operator("jit_kernel::store_kv", _store_kv, fake=lambda *_: None, mutates=("k_cache", "v_cache"))
for _type, _cached in itertools.product((torch.bfloat16, torch.float16), (None, checks.E4M3)):
    launch.declare("store_kv", launch.entry("store_kv", _type, _cached or _type, True))

"""Prefill on cached keys, in pages or dense: calls of flash_attn_with_kvcache, and of varlen with a page table.

New keys lie in the cache already, and queries are rotated, when a call comes here.
"""

from __future__ import annotations

import math

from torch import Tensor

from jit_kernel.fa3 import call as calls
from jit_kernel.fa3.call import Call, Result
from jit_kernel.fa3.features import DTYPE_NAMES
from jit_kernel.fa3.hopper import kernels
from jit_kernel.fa3.hopper.kernels import DeviceKernels


def attend(call: Call) -> Result:
    """Attention of a checked call on a cache that the kernels can reach. Nothing here synchronises."""
    result = try_attend(call, only_known=False)
    if result is None:
        raise RuntimeError("the Hopper launcher did not launch a call that was accepted")
    return result


def try_attend(call: Call, *, only_known: bool) -> Result | None:
    """The same; with only_known None, and nothing is launched, for a kernel not loaded yet or a row not aligned."""
    q, v, offsets = call.q, call.v, call.cu_seqlens_q
    device = kernels.kernels_of(q.device)
    key = (kernels.CACHED, q.dtype, q.shape[-1], v.shape[-1])
    handle = device.handles.get(key)
    if handle is None and only_known:
        return None
    result: Tensor = calls.new_result(call) if call.out is None else call.out
    lse = calls.new_lse(call)
    if result.numel() == 0 or (offsets is not None and offsets.shape[0] == 1):
        if call.out is None:
            result.zero_()
        return result if lse is None else (result, lse.fill_(-math.inf))
    if handle is None:
        handle = _load(device, key)
    left, right = calls.mask_bounds(call)
    fresh = call.k_new.shape[1] if call.k_new is not None and call.cu_seqlens_k_new is None else 0
    clear_rest = call.out is None and (offsets is not None or call.seqused_q is not None)
    launched = device.forward_cached(
        handle, q, call.k, v, result, lse, call.page_table, offsets, call.seqused_q, call.seqused_k,
        call.cu_seqlens_k_new, call.cache_batch_idx, call.cache_leftpad, call.sinks, fresh, call.softmax_scale,
        float(call.softcap), left, right, call.attention_chunk or 0, call.sm_margin, clear_rest, only_known,
    )  # fmt: skip
    if not launched:
        return None
    return result if lse is None else (result, lse)


def _load(device: DeviceKernels, key: tuple[object, ...]) -> int:
    _, dtype, head_dim, head_dim_v = key
    sizes = kernels.padded(head_dim, head_dim_v)  # type: ignore[arg-type]
    if sizes is None:
        raise ValueError(f"no kernel has head sizes {head_dim}/{head_dim_v}")
    return device.load(key, kernels.cached_spec(DTYPE_NAMES[dtype], *sizes))  # type: ignore[index]

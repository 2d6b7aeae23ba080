"""New keys and values into the cache and queries rotated, in one launch before the attention kernel's."""

from __future__ import annotations

import torch
from torch import Tensor

from jit_kernel.fa3.call import Call, result_dtype
from jit_kernel.fa3.features import DTYPE_NAMES
from jit_kernel.fa3.hopper.kernels import append_spec
from jit_kernel.fa3.hopper.loaded import DeviceKernels


def append(
    device: DeviceKernels, call: Call, rotated: Tensor | None = None, *, only_known: bool = False
) -> Tensor | None:
    """Put the new keys and values of a checked kvcache call into the cache; returns q, rotated where it says so.

    rotated: memory for the rotated q, of q's shape and with rows at multiples of 16 bytes; made here where it is
    needed and absent. The queries of no sequence, behind cu_seqlens_q[-1], are not written there.
    None, and nothing is written, where a row of the caches or of `rotated` does not begin at a multiple of 16 bytes,
    and with only_known where the kernel is not loaded yet.
    """
    q, k_new, v_new, cos = call.q, call.k_new, call.v_new, call.rotary_cos
    if k_new is None or v_new is None:
        return q
    k, v = call.k, call.v
    quantises = k.dtype is not k_new.dtype
    dtype = q.dtype
    if k_new.element_size() == 1 and cos is None:  # they are the cache's bytes already, which move two by two
        if not (_is_aligned(k) and _is_aligned(v)):
            return None
        k_new, v_new, k, v = (x.view(torch.int16) for x in (_aligned(k_new), _aligned(v_new), k, v))
        dtype = result_dtype(dtype)  # any kernel of 16 bits
    key = ("append", dtype, quantises)
    handle = device.handles.get(key)
    if handle is None:
        if only_known:
            return None
        handle = device.load(key, append_spec(DTYPE_NAMES[dtype], quantises))
    if cos is None:
        rotated = None
    elif rotated is None:
        rotated = torch.empty_like(q, memory_format=torch.contiguous_format)
    # Without a mask that follows positions, all query tokens turn by the first one's angle.
    by_token = call.causal or max(call.window_size) >= 0 or bool(call.attention_chunk)
    launched = device.append(
        handle, q, rotated, k_new, v_new, k, v, cos, call.rotary_sin, call.cu_seqlens_q,
        call.cu_seqlens_k_new, call.seqused_k, call.rotary_seqlens, call.cache_batch_idx, call.page_table,
        call.k_descale, call.v_descale, call.k_scale, call.v_scale, call.rotary_interleaved, by_token,
    )  # fmt: skip
    if not launched:
        return None
    return q if rotated is None else rotated


def _is_aligned(x: Tensor) -> bool:
    """Whether every row of a tensor in e4m3 begins at a multiple of 16 bytes."""
    bits = x.data_ptr()
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        bits |= stride if size > 1 else 0
    return bits % 16 == 0


def _aligned(x: Tensor) -> Tensor:
    """New keys in e4m3 whose rows begin so, as a copy where they do not."""
    return x if _is_aligned(x) else x.clone(memory_format=torch.contiguous_format)

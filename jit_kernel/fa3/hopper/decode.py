"""Few query rows over a cache: the host side of the decode kernels. Nothing here synchronises."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from jit_kernel.fa3 import call as calls
from jit_kernel.fa3.call import Call, Result
from jit_kernel.fa3.features import DTYPE_NAMES
from jit_kernel.fa3.hopper import kernels
from jit_kernel.fa3.hopper.kernels import DECODE_HEAD_DIMS, DECODE_MOST_ROWS, DECODE_ROWS, DeviceKernels
from jit_kernel.jit import KernelSpec

Key = tuple[torch.dtype, int, int]  # dtype, head size, rows


def key_of(call: Call) -> Key | None:
    """The variant that serves a call's shapes; None where it has more query rows than any serves."""
    q, v = call.q, call.v
    rows = (call.max_seqlen_q or 0) * (q.shape[-2] // v.shape[-2])
    size = max(q.shape[-1], v.shape[-1])
    head_dim = next(each for each in DECODE_HEAD_DIMS if size <= each)
    if rows > DECODE_MOST_ROWS[head_dim]:
        return None
    return q.dtype, head_dim, next(each for each in DECODE_ROWS if rows <= each)


def spec_of(key: Key) -> KernelSpec:
    """What to compile for a variant."""
    return kernels.decode_spec(DTYPE_NAMES[key[0]], *key[1:])


def attend(call: Call, key: Key, q: Tensor) -> Result:
    """Attention of a checked call over a cache; q is already rotated, new keys are in the cache."""
    device = kernels.kernels_of(q.device)
    offsets = call.cu_seqlens_q
    result: Tensor = calls.new_result(call) if call.out is None else call.out
    lse = calls.new_lse(call)
    if result.numel() == 0 or calls.batch_of(call) == 0:
        if call.out is None:
            result.zero_()
        return result if lse is None else (result, lse.fill_(-math.inf))
    handle = device.handles.get(key)
    if handle is None:
        handle = device.load(key, spec_of(key))
    new = 0 if call.k_new is None or call.cu_seqlens_k_new is not None else call.k_new.shape[1]
    left, right = calls.mask_bounds(call)
    clear_rest = call.out is None and (offsets is not None or call.seqused_q is not None)
    if not _launch(device, handle, call, q, result, lse, None, new, left, right, clear_rest):
        # The stream is being captured: room comes from torch's allocator, which knows.
        table, k = call.page_table, call.k
        rows_k = k.shape[1] * (1 if table is None else table.shape[1])
        room = device.partial_floats(handle, k.shape[-2], calls.batch_of(call), rows_k, call.sm_margin)
        partials = torch.empty(room, dtype=torch.float32, device=q.device)
        _launch(device, handle, call, q, result, lse, partials, new, left, right, clear_rest)
    return result if lse is None else (result, lse)


def _launch(
    device: DeviceKernels, handle: int, call: Call, q: Tensor, result: Tensor, lse: Tensor | None,
    partials: Tensor | None, new: int, left: int, right: int, clear_rest: bool,
) -> bool:  # fmt: skip
    return device.decode(
        handle, q, call.k, call.v, result, lse, call.cu_seqlens_q, call.seqused_q, call.seqused_k,
        call.cu_seqlens_k_new if call.k_new is not None else None, call.page_table, call.cache_batch_idx,
        call.cache_leftpad, None, call.sinks, partials, new, call.softmax_scale, float(call.softcap), left, right,
        call.attention_chunk or 0, call.sm_margin, clear_rest,
    )  # fmt: skip

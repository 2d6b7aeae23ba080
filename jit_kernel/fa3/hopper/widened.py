"""Many query rows over a cache in e4m3: its rows become 16 bits first, then prefill on cached keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from jit_kernel.fa3 import call as calls
from jit_kernel.fa3.call import Call, Result
from jit_kernel.fa3.hopper import arguments, cached, kernels
from jit_kernel.fa3.rows import wide_rows

# float32 numbers of TileFactors of common/params.h.
_FACTORS = 3


def attend(call: Call, *, only_known: bool) -> Result | None:
    """Attention of a checked call that features.widens() tells of. Nothing here synchronises.

    Memory for the rows is asked of torch's allocator, which knows streams and graphs. only_known: None, and nothing is
    launched, where a kernel is not loaded yet or a row is not aligned.
    """
    q, v, offsets = call.q, call.v, call.cu_seqlens_q
    device = kernels.kernels_of(q.device)
    dtype = calls.result_dtype(q.dtype)
    key, widen_key = (kernels.CACHED, dtype, q.shape[-1], v.shape[-1]), (kernels.WIDEN,)
    handle, widen = device.handles.get(key), device.handles.get(widen_key)
    if only_known and (handle is None or widen is None):
        return None
    result: Tensor = calls.new_result(call) if call.out is None else call.out
    lse = arguments.new_lse(call)
    if result.numel() == 0 or (offsets is not None and offsets.shape[0] == 1):
        if call.out is None:
            result.zero_()
        return result if lse is None else (result, lse.fill_(-math.inf))
    if handle is None:
        handle = device.load(key, cached.spec_of(call))
    if widen is None:
        widen = device.load(widen_key, kernels.widen_spec())
    splits = calls.splits_of(call)
    scratch = None if splits == 1 else cached.scratch_of(call, device.multiprocessors)
    if dtype is not q.dtype:  # exact, as are the cache's rows
        call.q, call.layouts = q.to(dtype), 0
        if call.sinks is not None and call.sinks.dtype is q.dtype:
            call.sinks = call.sinks.float()
    tensors = arguments.cache_tensors(call, result, lse)
    launched = device.forward_widened(
        handle, widen, *tensors, call.q_descale, call.k_descale, call.v_descale, *_room(call, dtype), scratch, splits,
        arguments.new_rows(call), *arguments.scalars(call, *calls.mask_bounds(call)), only_known,
    )  # fmt: skip
    if not launched:
        return None
    return result if lse is None else (result, lse)


def _room(call: Call, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for keys, for values, and for the factors of their sequences and heads."""
    batch, rows, heads = calls.batch_of(call), wide_rows(call), call.k.shape[-2]
    place = call.q.device
    keys = torch.empty((batch, rows, heads, call.k.shape[-1]), dtype=dtype, device=place)
    values = torch.empty((batch, rows, heads, call.v.shape[-1]), dtype=dtype, device=place)
    return keys, values, torch.empty((batch, heads, _FACTORS), dtype=torch.float32, device=place)

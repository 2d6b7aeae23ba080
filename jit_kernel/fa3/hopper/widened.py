"""Many query rows over a cache in e4m3: its rows become 16 bits first, then prefill on cached keys."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from jit_kernel.fa3 import call as calls
from jit_kernel.fa3.call import Call, Result
from jit_kernel.fa3.hopper import arguments, cached, kernels

# float32 numbers of TileFactors of common/params.h.
_FACTORS = 3


def attend(call: Call, *, only_known: bool) -> Result | None:
    """Attention of a checked call that call.widens() tells of. Nothing here synchronises.

    Memory for the rows is asked of torch's allocator, which knows streams and graphs. only_known: None, and nothing is
    launched, where a kernel is not loaded yet or a row is not aligned.
    """
    q, v, offsets = call.q, call.v, call.cu_seqlens_q
    device = kernels.kernels_of(q.device)
    dtype = calls.result_dtype(q.dtype)
    key, widen_key = (kernels.CACHED, dtype, q.shape[-1], v.shape[-1]), (kernels.WIDEN,)
    handle, widen_handle = device.handles.get(key), device.handles.get(widen_key)
    if only_known and (handle is None or widen_handle is None):
        return None
    result: Tensor = calls.new_result(call) if call.out is None else call.out
    lse = arguments.new_lse(call)
    if result.numel() == 0 or (offsets is not None and offsets.shape[0] == 1):
        if call.out is None:
            result.zero_()
        return result if lse is None else (result, lse.fill_(-math.inf))
    if handle is None:
        handle = device.load(key, cached.spec_of(call))
    if widen_handle is None:
        widen_handle = device.load(widen_key, kernels.widen_spec())
    splits = calls.splits_of(call)
    scratch = None if splits == 1 else cached.scratch_of(call, device.multiprocessors)
    if dtype is not q.dtype:
        call = _in_16_bits(call, dtype)
    wide_k, wide_v, table = _room(call)
    launched = device.forward_widened(
        handle, widen_handle, *arguments.cache_tensors(call, result, lse), call.q_descale, call.k_descale,
        call.v_descale, wide_k, wide_v, table, scratch, splits, arguments.new_rows(call),
        *arguments.scalars(call, *calls.mask_bounds(call)), only_known,
    )  # fmt: skip
    if not launched:
        return None
    return result if lse is None else (result, lse)


def _in_16_bits(call: Call, dtype: torch.dtype) -> Call:
    """The call with its queries in e4m3 in another type, which holds them; its sinks may be in e4m3, too."""
    sinks = call.sinks
    if sinks is not None and sinks.dtype is call.q.dtype:
        sinks = sinks.float()  # the kernels read the result's type or float32
    return dataclasses.replace(call, q=call.q.to(dtype), sinks=sinks)


def _room(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for keys, for values, and for the factors of their sequences and heads."""
    q, heads = call.q, call.k.shape[-2]
    batch, rows = calls.batch_of(call), calls.wide_rows(call)
    keys = torch.empty((batch, rows, heads, q.shape[-1]), dtype=q.dtype, device=q.device)
    values = torch.empty((batch, rows, heads, call.v.shape[-1]), dtype=q.dtype, device=q.device)
    return keys, values, torch.empty((batch, heads, _FACTORS), dtype=torch.float32, device=q.device)

"""The host side of the portable kernels: one call in, launches out. Nothing here synchronises."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from jit_kernel.device import device_target
from jit_kernel.fa3 import call as calls
from jit_kernel.fa3.call import Call, Result
from jit_kernel.fa3.features import DTYPE_NAMES
from jit_kernel.fa3.portable import factors, planning
from jit_kernel.fa3.portable.kernels import DeviceKernels
from jit_kernel.fa3.portable.planning import Layout, Plan

_MOST_PLANS = 4096  # a ragged server never stops making new shapes; the memory of them must not grow without end


_devices: dict[int, DeviceKernels] = {}


def kernels_of(device: torch.device) -> DeviceKernels:
    """The kernels of a tensor's device."""
    index: int = device.index
    found = _devices.get(index)
    if found is None:
        found = _devices[index] = DeviceKernels(index, device_target(device))
    return found


def attend(call: Call) -> Result:
    """Attention of a checked call, q already rotated."""
    q, k, v, qv, sinks = call.q, call.k, call.v, call.qv, call.sinks
    device = kernels_of(q.device)
    result = calls.new_result(call) if call.out is None else call.out
    lse = calls.new_lse(call) if call.return_softmax_lse else None
    pointers = q.data_ptr() | k.data_ptr() | v.data_ptr() | result.data_ptr()
    if qv is not None:
        pointers |= qv.data_ptr()
    aligned = pointers & 15 == 0
    key, made = None, None
    if call.layouts:  # shapes, strides and dtypes in one number: 3 us less than to ask every tensor
        key = (
            call.layouts, aligned, call.max_seqlen_q, call.max_seqlen_k, calls.mask_bounds(call), call.attention_chunk,
            call.softcap > 0, calls.splits_of(call), call.pack_gqa, call.sm_margin, call.only_qv, lse is None,
        )  # fmt: skip
        made = device.plans.get(key)
    if made is None:
        if q.numel() == 0 or call.max_seqlen_q == 0 or calls.batch_of(call) == 0:
            return _nothing_to_do(result, lse, call.out is None)
        made = _plan_of(device, call, result, aligned)
        if key is not None:
            _remember(device, key, made)
    out_partial = lse_partial = None
    if made.combine is not None:
        out_partial = torch.empty(made.partial_shape, dtype=torch.float32, device=q.device)
        lse_partial = torch.empty(made.partial_shape[:3], dtype=torch.float32, device=q.device)
    device.launch(
        made.forward.handle, made.forward.grid, q, k, v, qv, result, lse, out_partial, lse_partial,
        call.cu_seqlens_q, call.cu_seqlens_k, call.cu_seqlens_k_new, call.seqused_q, call.seqused_k,
        call.page_table, call.cache_batch_idx, call.cache_leftpad, sinks, call.draft_mask,
        call.q_descale, call.k_descale, call.v_descale, call.k_scale, call.v_scale,
        *made.forward.scalars, call.softmax_scale, float(call.softcap),
    )  # fmt: skip
    if made.combine is not None:
        device.launch(
            made.combine.handle, made.combine.grid, out_partial, lse_partial, result, lse,
            call.cu_seqlens_q, call.seqused_q, sinks, *made.combine.scalars,
        )  # fmt: skip
    return result if lse is None else (result, lse)


def _nothing_to_do(out: Tensor, lse: Tensor | None, owned: bool) -> Result:
    """No query row in any sequence: what we allocated is 0 and -inf."""
    if owned:
        out.zero_()
    return out if lse is None else (out, lse.fill_(-math.inf))


def _plan_of(kernels: DeviceKernels, call: Call, out: Tensor, aligned: bool) -> Plan:
    """The plan of a call, remembered by all that it is made of."""
    q, k, v, draft_mask, page_table = call.q, call.k, call.v, call.draft_mask, call.page_table
    is_e4m3 = k.dtype is torch.float8_e4m3fn
    settings = planning.Settings(
        dtype=DTYPE_NAMES[q.dtype],
        kv_dtype=DTYPE_NAMES[k.dtype],
        qv=0 if call.qv is None else 1 + call.only_qv,
        qv_strides=(0, 0, 0) if call.qv is None else _layout(call.qv).rows,
        factor_strides=factors.strides(call) if is_e4m3 else factors.NONE,
        batch=calls.batch_of(call),
        max_seqlen_q=call.max_seqlen_q or 0,
        max_seqlen_k=call.max_seqlen_k or 0,
        seqlen_k_new=0 if call.k_new is None or call.cu_seqlens_k_new is not None else call.k_new.shape[1],
        table_width=0 if page_table is None else page_table.shape[1],
        window=calls.mask_bounds(call),
        chunk=call.attention_chunk or 0,
        softcap=call.softcap > 0,
        draft=(0, 0) if draft_mask is None else (draft_mask.shape[1], draft_mask.stride(0)),
        num_splits=calls.splits_of(call),
        pack_gqa=call.pack_gqa,
        sm_margin=call.sm_margin,
        flags=planning.flags_of(call) | (factors.flags(call) if is_e4m3 else 0),
        aligned_pointers=aligned,
    )
    key = (q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride(), out.stride(), settings)
    made: Plan | None = kernels.plans.get(key)
    if made is None:
        made = planning.make(kernels, _layout(q), _layout(k), _layout(v), _layout(out), settings)
        _remember(kernels, key, made)
    return made


def _remember(kernels: DeviceKernels, key: object, made: Plan) -> None:
    if len(kernels.plans) >= _MOST_PLANS:
        kernels.plans.clear()
    kernels.plans[key] = made


def _layout(x: Tensor) -> Layout:
    return Layout(tuple(x.shape), x.stride())


def combine(out_partial: Tensor, lse_partial: Tensor, out: Tensor, lse: Tensor) -> None:
    """(splits, b, sq, hq, dv) or (splits, total_q, hq, dv) into out and lse, which have no split dimension."""
    parts, parts_lse = Layout(out.shape, out_partial.stride()[1:]), _lse_rows(lse_partial.stride()[1:])
    _join(
        out_partial, lse_partial, out, lse, out_partial.shape[0],
        (out_partial.stride(0), *parts.rows), (lse_partial.stride(0), *parts_lse), out_partial.data_ptr(),
    )  # fmt: skip


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor, lse: Tensor) -> None:
    """Join two partial results; lse is token-major. Two tensors are two splits, their distance is the stride."""
    if out_a.stride() != out_b.stride() or lse_a.stride() != lse_b.stride():
        out_a, out_b, lse_a, lse_b = (x.contiguous() for x in (out_a, out_b, lse_a, lse_b))
    distance = (out_b.data_ptr() - out_a.data_ptr()) // out_a.element_size()
    lse_distance = (lse_b.data_ptr() - lse_a.data_ptr()) // lse_a.element_size()
    _join(
        out_a, lse_a, out, lse, 2, (distance, *Layout(out.shape, out_a.stride()).rows),
        (lse_distance, *_lse_rows(lse_a.stride())), out_a.data_ptr() | out_b.data_ptr(),
    )  # fmt: skip


def _join(
    parts: Tensor,
    parts_lse: Tensor,
    out: Tensor,
    lse: Tensor,
    num_splits: int,
    strides: tuple[int, ...],
    lse_strides: tuple[int, ...],
    addresses: int,
) -> None:
    if out.numel() == 0:
        return
    ragged = out.dim() == 3
    batch, seqlen = (1, out.shape[0]) if ragged else out.shape[:2]
    kernels = kernels_of(out.device)
    aligned = (addresses | out.data_ptr()) & 15 == 0
    made = planning.combine_launch(
        kernels, DTYPE_NAMES[parts.dtype], DTYPE_NAMES[out.dtype], out.shape, aligned, strides, lse_strides,
        Layout(out.shape, out.stride()).rows, _lse_rows(lse.stride()), batch, seqlen, seqlen, num_splits, planning.LSE,
    )  # fmt: skip
    kernels.launch(made.handle, made.grid, parts, parts_lse, out, lse, None, None, None, *made.scalars)


def _lse_rows(strides: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of (batch, token, head) of a token-major lse."""
    return (0, *strides) if len(strides) == 2 else strides

"""The host side of the portable kernels: one call in, launches out. Nothing here synchronises."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from jit_kernel.device import device_target
from jit_kernel.fa3.features import DTYPE_NAMES
from jit_kernel.fa3.portable import planning as plan
from jit_kernel.fa3.portable.kernels import DeviceKernels
from jit_kernel.fa3.portable.planning import Layout, Plan

_MOST_PLANS = 4096  # a ragged server makes new shapes for ever; the memory of them must not grow so

_devices: dict[int, DeviceKernels] = {}


def kernels_of(device: torch.device) -> DeviceKernels:
    """The kernels of a tensor's device."""
    index: int = device.index
    found = _devices.get(index)
    if found is None:
        found = _devices[index] = DeviceKernels(index, device_target(device))
    return found


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
    attention_chunk: int,
    softcap: float,
    num_splits: int,
    pack_gqa: bool | None,
    return_softmax_lse: bool,
    sinks: Tensor | None,
    out: Tensor | None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    page_table: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    seqlen_k_new: int = 0,
    sm_margin: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of checked tensors; shapes as in the public functions, q already rotated."""
    kernels = kernels_of(q.device)
    flags = (
        (plan.CU_SEQLENS_Q if cu_seqlens_q is not None else 0)
        | (plan.CU_SEQLENS_K if cu_seqlens_k is not None else 0)
        | (plan.CU_SEQLENS_K_NEW if cu_seqlens_k_new is not None else 0)
        | (plan.SEQUSED_Q if seqused_q is not None else 0)
        | (plan.SEQUSED_K if seqused_k is not None else 0)
        | (plan.CACHE_BATCH_IDX if cache_batch_idx is not None else 0)
        | (plan.CACHE_LEFTPAD if cache_leftpad is not None else 0)
        | (plan.LSE if return_softmax_lse else 0)
        | (plan.ZERO_REST if out is None else 0)
    )
    if sinks is not None:
        flags |= plan.SINKS | (plan.SINKS_ARE_FLOAT32 if sinks.dtype is torch.float32 else 0)
    shape = q.shape
    if cu_seqlens_q is None:
        batch = shape[0]
        lse_shape: tuple[int, ...] = (batch, shape[2], shape[1])
    else:
        batch = cu_seqlens_q.shape[0] - 1
        lse_shape = (shape[1], shape[0])
    result = out
    if result is None:
        result = torch.empty((*shape[:-1], v.shape[-1]), dtype=q.dtype, device=q.device)
    lse = torch.empty(lse_shape, dtype=torch.float32, device=q.device) if return_softmax_lse else None
    settings = (
        q.dtype, batch, shape[-3] if max_seqlen_q is None else max_seqlen_q, max_seqlen_k, seqlen_k_new,
        0 if page_table is None else page_table.shape[1],
        (window_size[0], 0) if causal else window_size, attention_chunk, softcap > 0,
        num_splits, pack_gqa, sm_margin, flags,
        (q.data_ptr() | k.data_ptr() | v.data_ptr() | result.data_ptr()) & 15 == 0,
    )  # fmt: skip
    if batch == 0 or settings[2] == 0 or q.numel() == 0:
        return _nothing_to_do(result, lse, out is None)
    key = (shape, q.stride(), k.shape, k.stride(), v.shape, v.stride(), result.stride(), settings)
    made = kernels.plans.get(key)
    if made is None:
        made = _make_plan(kernels, key, q, k, v, result, settings)
    out_partial = lse_partial = None
    if made.combine is not None:
        out_partial = torch.empty(made.partial_shape, dtype=torch.float32, device=q.device)
        lse_partial = torch.empty(made.partial_shape[:3], dtype=torch.float32, device=q.device)
    kernels.launch(
        made.forward.handle, made.forward.grid, q, k, v, result, lse, out_partial, lse_partial,
        cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q, seqused_k,
        page_table, cache_batch_idx, cache_leftpad, sinks,
        *made.forward.scalars, softmax_scale, float(softcap),
    )  # fmt: skip
    if made.combine is not None:
        kernels.launch(
            made.combine.handle, made.combine.grid, out_partial, lse_partial, result, lse,
            cu_seqlens_q, seqused_q, sinks, *made.combine.scalars,
        )  # fmt: skip
    return result if lse is None else (result, lse)


def _nothing_to_do(out: Tensor, lse: Tensor | None, owned: bool) -> Tensor | tuple[Tensor, Tensor]:
    """No query row in any sequence: what we allocated is 0 and -inf."""
    if owned:
        out.zero_()
    return out if lse is None else (out, lse.fill_(-math.inf))


def _make_plan(
    kernels: DeviceKernels, key: object, q: Tensor, k: Tensor, v: Tensor, out: Tensor, settings: tuple[object, ...]
) -> Plan:
    call = plan.Settings(DTYPE_NAMES[q.dtype], *settings[1:])  # type: ignore[arg-type]
    made = plan.make(kernels, _layout(q), _layout(k), _layout(v), _layout(out), call)
    if len(kernels.plans) >= _MOST_PLANS:
        kernels.plans.clear()
    kernels.plans[key] = made
    return made


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
    made = plan.combine_launch(
        kernels, DTYPE_NAMES[parts.dtype], DTYPE_NAMES[out.dtype], out.shape, aligned, strides, lse_strides,
        Layout(out.shape, out.stride()).rows, _lse_rows(lse.stride()), batch, seqlen, seqlen, num_splits, plan.LSE,
    )  # fmt: skip
    kernels.launch(made.handle, made.grid, parts, parts_lse, out, lse, None, None, None, *made.scalars)


def _lse_rows(strides: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of (batch, token, head) of a token-major lse."""
    return (0, *strides) if len(strides) == 2 else strides

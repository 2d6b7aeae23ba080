"""Prefill of dense and ragged calls: the host side of the kernels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from jit_kernel.fa3 import call as calls
from jit_kernel.fa3.call import Call, Result
from jit_kernel.fa3.features import DTYPE_NAMES
from jit_kernel.fa3.hopper import arguments, kernels
from jit_kernel.fa3.hopper.kernels import DeviceKernels
from jit_kernel.jit import KernelSpec

_FP8 = torch.float8_e4m3fn


def spec_of(dtype: str, head_dim: int, head_dim_v: int, masked: bool, softcap: bool) -> KernelSpec:
    """The kernel that serves a call with these; raises ValueError for head sizes that none has."""
    sizes = kernels.padded(head_dim, head_dim_v)
    if sizes is None:
        raise ValueError(f"no kernel has head sizes {head_dim}/{head_dim_v}")
    return kernels.forward_spec(dtype, *sizes, masked, softcap)


def _load(device: DeviceKernels, key: tuple[Any, ...]) -> int:
    dtype, *rest = key
    return device.load(key, kernels.fp8_spec(*rest) if dtype is _FP8 else spec_of(DTYPE_NAMES[dtype], *rest))


def _key_of(call: Call, masked: bool) -> tuple[Any, ...]:
    dtype, head_dim, head_dim_v = call.q.dtype, call.q.shape[-1], call.v.shape[-1]
    if dtype is _FP8:
        return dtype, head_dim, head_dim_v, masked, prepares(call)
    return dtype, head_dim, head_dim_v, masked, call.softcap > 0


def prepares(call: Call) -> bool:
    """Whether values in e4m3 are transposed by a kernel of their own; the result's bits are the same."""
    return True


def _preparer(device: DeviceKernels, size: int, only_known: bool) -> int | None:
    """The handle of the kernel that prepares values for head size `size`; None where it is not loaded and must be."""
    key = (kernels.PREPARE, size)
    handle = device.handles.get(key)
    return handle if handle is not None or only_known else device.load(key, kernels.prepare_spec(size))


def _room(call: Call, size: int) -> Tensor:
    """Memory for the prepared values of a call: `size` columns of whole blocks of keys, each sequence's its own."""
    v, keys = call.v, kernels.PREPARED_KEYS
    if call.cu_seqlens_k is None:
        blocks = v.shape[0] * max(1, -(-v.shape[1] // keys))
    else:
        blocks = v.shape[0] // keys + call.cu_seqlens_k.shape[0] - 1
    return torch.empty(blocks * keys * v.shape[-2] * size, dtype=torch.uint8, device=v.device)


def attend(call: Call, *, only_known: bool) -> Result | None:
    """Attention of a checked call without a cache. Nothing here synchronises.

    only_known: None, and nothing is launched, where the kernel is not loaded yet or a row is not aligned.
    """
    q, offsets = call.q, call.cu_seqlens_q
    device = kernels.kernels_of(q.device)
    left, right = calls.mask_bounds(call)
    key = _key_of(call, left >= 0 or right >= 0 or bool(call.attention_chunk))
    handle = device.handles.get(key)
    if handle is None and only_known:
        return None
    prepared, preparer = None, 0
    if q.dtype is _FP8 and key[-1]:
        size = kernels.padded_fp8(q.shape[-1], call.v.shape[-1])
        found = _preparer(device, size, only_known)
        if found is None:
            return None
        preparer, prepared = found, _room(call, size)
    result: Tensor = calls.new_result(call) if call.out is None else call.out
    lse = arguments.new_lse(call)
    if result.numel() == 0 or (offsets is not None and offsets.shape[0] == 1):
        if call.out is None:
            result.zero_()
        return result if lse is None else (result, lse.fill_(-math.inf))
    if handle is None:
        handle = _load(device, key)
    if q.dtype is _FP8:
        launched = device.forward_fp8(
            handle, preparer, *arguments.tensors(call, result, lse), call.q_descale, call.k_descale, call.v_descale, prepared,
            *arguments.scalars(call, left, right), only_known,
        )  # fmt: skip
    else:
        launched = device.forward(
            handle, *arguments.tensors(call, result, lse), *arguments.scalars(call, left, right), only_known
        )
    if not launched:
        return None
    return result if lse is None else (result, lse)

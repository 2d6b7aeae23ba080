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
from jit_kernel.fa3.hopper.loaded import DeviceKernels
from jit_kernel.jit import KernelSpec

_FP8 = torch.float8_e4m3fn
# Query rows of a key head from which on transposing values first is faster. Of d 256 without a mask 4096 rows are,
# +5 %, with a causal one 16384, +2 %; 4096 are 4 % slower there, as a tile sees half of the keys.
_LEAST_ROWS, _LEAST_MASKED_ROWS = 4096, 16384


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
    """Whether a kernel before the attention kernel transposes values in e4m3; the result's bits are the same.

    It reads and writes all values once, 20 us for 16384 tokens of 2048 columns, and each tile of queries that sees them
    gets back a part: worth it where, on the average, enough tiles see a key.
    """
    q, k = call.q, call.k
    left, right = calls.mask_bounds(call)
    if left >= 0 or call.attention_chunk:
        return False
    if kernels.padded_fp8(q.shape[-1], call.v.shape[-1]) not in kernels.PREPARED_HEAD_DIMS:
        return False
    # Of sequences of different lengths their mean, which is below the mean over keys.
    rows = q.shape[1] if call.cu_seqlens_q is None else q.shape[0] // max(1, call.cu_seqlens_q.shape[0] - 1)
    return rows * (q.shape[-2] // k.shape[-2]) >= (_LEAST_MASKED_ROWS if right >= 0 else _LEAST_ROWS)


def prepared_bytes(call: Call, size: int) -> int:
    """What prepared values take: `size` columns of whole blocks of keys, of which each sequence has its own."""
    v, keys = call.v, kernels.PREPARED_KEYS
    if call.cu_seqlens_k is None:
        blocks = v.shape[0] * max(1, -(-v.shape[1] // keys))
    else:
        blocks = v.shape[0] // keys + call.cu_seqlens_k.shape[0] - 1
    return int(blocks * keys * v.shape[-2] * size)


def _preparation(device: DeviceKernels, call: Call, *, only_known: bool) -> tuple[int, Tensor] | None:
    """The kernel that prepares a call's values and memory for them; None where it is not loaded and must be."""
    size = kernels.fp8_size(call.q.shape[-1], call.v.shape[-1])
    key = (kernels.PREPARE, size)
    handle = device.handles.get(key)
    if handle is None and only_known:
        return None
    if handle is None:
        handle = device.load(key, kernels.prepare_spec(size))
    return handle, torch.empty(prepared_bytes(call, size), dtype=torch.uint8, device=call.v.device)


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
    result: Tensor = calls.new_result(call) if call.out is None else call.out
    lse = arguments.new_lse(call)
    if result.numel() == 0 or (offsets is not None and offsets.shape[0] == 1):
        if call.out is None:
            result.zero_()
        return result if lse is None else (result, lse.fill_(-math.inf))
    if handle is None:
        handle = _load(device, key)
    if q.dtype is _FP8:
        preparation = _preparation(device, call, only_known=only_known) if key[-1] else (0, None)
        if preparation is None:
            return None
        prepare_handle, prepared = preparation
        launched = device.forward_fp8(
            handle, prepare_handle, *arguments.tensors(call, result, lse), call.q_descale, call.k_descale,
            call.v_descale, prepared, *arguments.scalars(call, left, right), only_known,
        )  # fmt: skip
    else:
        launched = device.forward(
            handle, *arguments.tensors(call, result, lse), *arguments.scalars(call, left, right), only_known
        )
    if not launched:
        return None
    return result if lse is None else (result, lse)

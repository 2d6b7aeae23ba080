"""Few query rows over a cache: the host side of the decode kernels. Nothing here synchronises."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from jit_kernel.fa3 import call as calls
from jit_kernel.fa3.call import Call, Result
from jit_kernel.fa3.features import DTYPE_NAMES
from jit_kernel.fa3.hopper import arguments, kernels
from jit_kernel.fa3.hopper.kernels import DECODE_HEAD_DIMS, DECODE_MOST_ROWS, DECODE_ROWS, DeviceKernels
from jit_kernel.jit import KernelSpec

Key = tuple[torch.dtype, int, int]  # dtype, head size, rows
# What the launcher's `decode` answers, as it has them.
_LAUNCHED, _NEEDS_ROOM = 1, 2


def key_of(call: Call) -> Key | None:
    """The variant that serves a call over a cache; None where it has more query rows than any serves.

    Without splits a sequence's bits must not depend on the others' lengths, so it is prefill's whatever they are.
    """
    if call.num_splits == 1:
        return None
    q = call.q
    *_, heads, d = q.shape
    *_, heads_k, dv = call.v.shape
    tile = _tile_of(max(d, dv), (call.max_seqlen_q or 0) * (heads // heads_k))
    return None if tile is None else (q.dtype, *tile)


@functools.lru_cache(maxsize=1024)  # 3 us a call
def _tile_of(size: int, rows: int) -> tuple[int, int] | None:
    head_dim = next(each for each in DECODE_HEAD_DIMS if size <= each)
    if rows > DECODE_MOST_ROWS[head_dim]:
        return None
    return head_dim, next(each for each in DECODE_ROWS if rows <= each)


def spec_of(key: Key) -> KernelSpec:
    """What to compile for a variant."""
    return kernels.decode_spec(DTYPE_NAMES[key[0]], *key[1:])


def attend(call: Call, key: Key, *, only_known: bool) -> Result | None:
    """Attention of a checked call over a cache; new keys are in it, and queries rotated.

    only_known: None, and nothing is launched, where the kernel is not loaded yet or a row is not aligned.
    """
    q, offsets = call.q, call.cu_seqlens_q
    device = kernels.kernels_of(q.device)
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
        handle = device.load(key, spec_of(key))
    launched = _launch(device, handle, call, result, lse, None, only_known)
    if launched == _NEEDS_ROOM:
        # The stream is being captured: room comes from torch's allocator, which knows.
        k, table = call.k, call.page_table
        rows_k = k.shape[1] * (1 if table is None else table.shape[1])
        room = device.partial_floats(
            handle, k.shape[-2], calls.batch_of(call), rows_k, call.sm_margin, calls.is_deterministic(call)
        )
        partials = torch.empty(room, dtype=torch.float32, device=q.device)
        launched = _launch(device, handle, call, result, lse, partials, only_known)
    if launched != _LAUNCHED:
        return None
    return result if lse is None else (result, lse)


def _launch(
    device: DeviceKernels,
    handle: int,
    call: Call,
    result: Tensor,
    lse: Tensor | None,
    partials: Tensor | None,
    if_aligned: bool,
) -> int:
    fixed_ranges = calls.is_deterministic(call)
    return device.decode(
        handle, *arguments.cache_tensors(call, result, lse), partials, arguments.new_rows(call),
        *arguments.scalars(call, *calls.mask_bounds(call)), fixed_ranges, if_aligned,
    )  # fmt: skip

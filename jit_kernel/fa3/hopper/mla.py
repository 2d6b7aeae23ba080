"""A compressed cache (MLA in its absorbed form: qv beside q) of any number of pages: the host side of the kernels.

Scores are q k + qv v, of 64 and 256 or 512 columns. Beside a cache in e4m3 one kernel serves queries of every dtype.
Nothing here synchronises.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from jit_kernel.fa3 import call as calls
from jit_kernel.fa3.call import Call, Result
from jit_kernel.fa3.features import DTYPE_NAMES
from jit_kernel.fa3.hopper import arguments, kernels
from jit_kernel.fa3.hopper.loaded import DeviceKernels
from jit_kernel.jit import KernelSpec

Key = tuple[str, torch.dtype, int, int]  # the cache's dtype, head size of v, rows of a tile
TILE_ROWS = max(kernels.MLA_ROWS)
# What the launcher's `mla` answers, as it has them.
_LAUNCHED, _NEEDS_ROOM = 1, 2


def key_of(call: Call) -> Key:
    """The variant that serves a call with qv.

    Where a sequence's bits must not depend on the others, nor does the kernel depend on how long the longest is.
    """
    rows = packed_rows(call)
    if never_cut(call) or rows > TILE_ROWS:
        rows = TILE_ROWS
    return "mla", call.v.dtype, call.v.shape[-1], next(each for each in kernels.MLA_ROWS if rows <= each)


def never_cut(call: Call) -> bool:
    """Whether no sequence may be cut: without splits, and where its bits must not depend on the others."""
    return calls.splits_of(call) == 1


def packed_rows(call: Call) -> int:
    """Tokens x group of the longest sequence: what a key head's keys are read for."""
    return (call.max_seqlen_q or 0) * (call.q.shape[-2] // call.v.shape[-2])


def spec_of(key: Key) -> KernelSpec:
    """What to compile for a variant."""
    return kernels.mla_spec(DTYPE_NAMES[key[1]], *key[2:])


def attend(call: Call, *, only_known: bool) -> Result | None:
    """Attention of a checked call with qv over a cache; new keys are in it, and queries rotated.

    only_known: None, and nothing is launched, where the kernel is not loaded yet or a row is not aligned.
    """
    q, v, offsets = call.q, call.v, call.cu_seqlens_q
    device = kernels.kernels_of(q.device)
    if call.sinks is not None and call.sinks.dtype is torch.float8_e4m3fn:
        call.sinks = call.sinks.float()  # the kernels read them in float32 or in the result's type
    key = key_of(call)
    handle = device.handles.get(key)
    if only_known and handle is None:
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
        tiles = v.shape[-2] * tiles_of(call)
        room = device.mla_partial_floats(handle, tiles, calls.batch_of(call), call.sm_margin)
        partials = torch.empty(room, dtype=torch.float32, device=q.device)
        launched = _launch(device, handle, call, result, lse, partials, only_known)
    if launched != _LAUNCHED:
        return None
    return result if lse is None else (result, lse)


def tiles_of(call: Call) -> int:
    """Tiles of packed query rows of the longest sequence, for each key head."""
    return max(1, -(-packed_rows(call) // TILE_ROWS))


def _launch(
    device: DeviceKernels,
    handle: int,
    call: Call,
    result: Tensor,
    lse: Tensor | None,
    partials: Tensor | None,
    if_aligned: bool,
) -> int:
    row_tiles, is_whole = tiles_of(call), never_cut(call)
    return device.mla(
        handle, *arguments.cache_tensors(call, result, lse), call.qv, call.q_descale, call.k_descale, call.v_descale,
        partials, arguments.new_rows(call),
        *arguments.scalars(call, *calls.mask_bounds(call)), row_tiles, call.only_qv, is_whole, if_aligned,
    )  # fmt: skip

"""Few query rows over a cache, or any number over one in e4m3: the host side of the decode kernels.

Nothing here synchronises.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from jit_kernel.fa3 import call as calls
from jit_kernel.fa3.call import Call, Result
from jit_kernel.fa3.features import DTYPE_NAMES
from jit_kernel.fa3.hopper import arguments, kernels
from jit_kernel.fa3.hopper.kernels import DECODE_HEAD_DIMS, DECODE_MOST_ROWS, DECODE_ROWS
from jit_kernel.fa3.hopper.loaded import DeviceKernels
from jit_kernel.jit import KernelSpec

Key = tuple[torch.dtype, int, int, bool]  # the result's dtype, head size, rows, whether the cache is in e4m3
# What the launcher's `decode` answers, as it has them.
_LAUNCHED, _NEEDS_ROOM = 1, 2


def key_of(call: Call) -> Key | None:
    """The variant that serves a call over a cache; None where it has more query rows than any serves.

    Without splits a sequence's bits must not depend on the others' lengths, so it is prefill's whatever they are. A
    cache in e4m3 has no other kernels: of more rows than a tile has a sequence is several.
    """
    q = call.q
    mixed = is_mixed(call)
    if call.num_splits == 1 and not mixed:
        return None
    *_, heads, d = q.shape
    *_, heads_k, dv = call.v.shape
    group = heads // heads_k
    tile = _tile_of(max(d, dv), (call.max_seqlen_q or 0) * group, group if mixed else 0)
    return None if tile is None else (calls.result_dtype(q.dtype), *tile, mixed)


def is_mixed(call: Call) -> bool:
    """Whether the cache is in e4m3: its products are made in fp16, whichever dtype q has."""
    return call.k.dtype is torch.float8_e4m3fn


def most_group(head_dim: int, head_dim_v: int) -> int:
    """How many query heads a key head may have: a tile has all of them."""
    size = max(head_dim, head_dim_v)
    return DECODE_MOST_ROWS[next(each for each in DECODE_HEAD_DIMS if size <= each)]


@functools.lru_cache(maxsize=1024)  # 3 us a call
def _tile_of(size: int, rows: int, cut: int) -> tuple[int, int] | None:
    """The padded head size and the rows of a tile. cut: 0, or the query heads that a token's cut must leave together.

    None where a tile does not have all rows, or, where they may be cut, those of one token.
    """
    head_dim = next(each for each in DECODE_HEAD_DIMS if size <= each)
    most = DECODE_MOST_ROWS[head_dim]
    if (cut or rows) > most:
        return None
    return head_dim, next(each for each in DECODE_ROWS if min(rows, most) <= each)


def _tiles_of(call: Call, key: Key) -> int:
    """How many tiles the query tokens of the longest sequence take."""
    if not key[3]:
        return 1
    tokens = key[2] // (call.q.shape[-2] // call.k.shape[-2])
    return max(1, -(-(call.max_seqlen_q or 0) // tokens))


def spec_of(key: Key) -> KernelSpec:
    """What to compile for a variant."""
    dtype, head_dim, rows, mixed = key
    return kernels.decode_spec(DTYPE_NAMES[dtype], head_dim, rows, mixed)


def attend(call: Call, key: Key, *, only_known: bool) -> Result | None:
    """Attention of a checked call over a cache; new keys are in it, and queries rotated.

    only_known: None, and nothing is launched, where the kernel is not loaded yet or a row is not aligned.
    """
    q, offsets = call.q, call.cu_seqlens_q
    device = kernels.kernels_of(q.device)
    handle = device.handles.get(key)
    if handle is None and only_known:
        return None
    if call.sinks is not None and call.sinks.dtype is torch.float8_e4m3fn:
        call.sinks = call.sinks.float()  # as q's dtype allows; the kernels read the result's or float32
    result: Tensor = calls.new_result(call) if call.out is None else call.out
    lse = arguments.new_lse(call)
    if result.numel() == 0 or (offsets is not None and offsets.shape[0] == 1):
        if call.out is None:
            result.zero_()
        return result if lse is None else (result, lse.fill_(-math.inf))
    if handle is None:
        handle = device.load(key, spec_of(key))
    tiles = _tiles_of(call, key)
    launched = _launch(device, handle, call, result, lse, None, tiles, only_known)
    if launched == _NEEDS_ROOM:
        # The stream is being captured: room comes from torch's allocator, which knows.
        k, table = call.k, call.page_table
        rows_k = k.shape[1] * (1 if table is None else table.shape[1])
        room = device.partial_floats(
            handle, k.shape[-2], calls.batch_of(call) * tiles, rows_k, call.sm_margin, _has_fixed_ranges(call)
        )
        partials = torch.empty(room, dtype=torch.float32, device=q.device)
        launched = _launch(device, handle, call, result, lse, partials, tiles, only_known)
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
    tiles: int,
    if_aligned: bool,
) -> int:
    fixed_ranges = _has_fixed_ranges(call)
    return device.decode(
        handle, *arguments.cache_tensors(call, result, lse), *arguments.scales(call), partials,
        arguments.new_rows(call), *arguments.scalars(call, *calls.mask_bounds(call)), fixed_ranges, tiles, if_aligned,
    )  # fmt: skip


def _has_fixed_ranges(call: Call) -> bool:
    """Whether a sequence's keys are cut by itself alone. Without splits they are as well: its bits are the same."""
    return calls.is_deterministic(call) or call.num_splits == 1

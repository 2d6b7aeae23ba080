"""Prefill on cached keys, in pages or dense: calls of flash_attn_with_kvcache, and of varlen with a page table.

New keys lie in the cache already, and queries are rotated, when a call comes here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from jit_kernel.fa3 import call as calls
from jit_kernel.fa3.call import Call, Result
from jit_kernel.fa3.features import DTYPE_NAMES
from jit_kernel.fa3.hopper import arguments, kernels
from jit_kernel.jit import KernelSpec

# As the kernels have them, in prefill/cached_params.h.
STATE_COLUMNS, LEAST_KEYS, MOST_PARTS = 8, 256, 128
# So many parts for each block are enough to fill the last round, and bound the memory: 17 MiB at head size 128.
PARTS_OF_BLOCK = 2


def try_attend(call: Call, *, only_known: bool) -> Result | None:
    """Attention of a checked call on a cache that the kernels can reach. Nothing here synchronises.

    only_known: None, and nothing is launched, where the kernel is not loaded yet or a row is not aligned.
    """
    q, v, offsets = call.q, call.v, call.cu_seqlens_q
    device = kernels.kernels_of(q.device)
    key = (kernels.CACHED, q.dtype, q.shape[-1], v.shape[-1])
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
        handle = device.load(key, spec_of(call))
    splits = calls.splits_of(call)
    scratch = None if splits == 1 else scratch_of(call, device.multiprocessors)
    launched = device.forward_cached(
        handle, *arguments.cache_tensors(call, result, lse), scratch, splits, arguments.new_rows(call),
        *arguments.scalars(call, *calls.mask_bounds(call)), only_known,
    )  # fmt: skip
    if not launched:
        return None
    return result if lse is None else (result, lse)


def scratch_of(call: Call, multiprocessors: int) -> Tensor | None:
    """Memory for the parts that the keys of tiles may be cut into, None where they will not be.

    The kernel finds the number of parts by the lengths, which only the device knows; it cuts no more than fit here.
    """
    columns = kernels.padded(call.q.shape[-1], call.v.shape[-1])
    if columns is None:
        return None
    rows = kernels.TILE_ROWS.get(columns, 128)
    parts = most_parts(call, rows, max(1, multiprocessors - call.sm_margin))
    if parts == 0:
        return None
    size = parts * rows * (columns[1] + STATE_COLUMNS)
    return torch.empty(size, dtype=torch.float32, device=call.q.device)


def most_parts(call: Call, rows: int, blocks: int) -> int:
    """How many parts all tiles of `rows` may have together on so many blocks; 0 where no keys will be cut."""
    q, k, table = call.q, call.k, call.page_table
    group = q.shape[-2] // k.shape[-2]
    pack = group if 64 % group == 0 else 1
    heads, batch = q.shape[-2] // pack, calls.batch_of(call)
    dense = call.cu_seqlens_q is None
    tiles = heads * (batch * -(-q.shape[1] * pack // rows) if dense else q.shape[0] * pack // rows + batch)
    if call.num_splits > 1:
        return tiles * call.num_splits
    of_tile = (k.shape[1] if table is None else k.shape[1] * table.shape[1]) // LEAST_KEYS
    if of_tile <= 1 or (dense and call.seqused_q is None and 10 * tiles >= 8 * blocks):
        return 0
    return min(PARTS_OF_BLOCK * blocks, tiles * min(MOST_PARTS, of_tile))


def spec_of(call: Call) -> KernelSpec:
    """The kernel that serves a call; raises ValueError for head sizes that none has."""
    head_dim, head_dim_v = call.q.shape[-1], call.v.shape[-1]
    sizes = kernels.padded(head_dim, head_dim_v)
    if sizes is None:
        raise ValueError(f"no kernel has head sizes {head_dim}/{head_dim_v}")
    return kernels.cached_spec(DTYPE_NAMES[calls.result_dtype(call.q.dtype)], *sizes)

"""The host side of the portable kernels: one call in, launches out. Nothing here synchronises."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from jit_kernel.device import device_target
from jit_kernel.fa3 import portable_tiles
from jit_kernel.fa3.portable_kernels import APPEND_ROWS, DeviceKernels, combine_rows
from jit_kernel.fa3.variants import DTYPE_NAMES

# Bits of the kernels' `flags`, as in kernel_sources/flash_attention_v3/portable/sequence.py.
CU_SEQLENS_Q, CU_SEQLENS_K, CU_SEQLENS_K_NEW = 1, 2, 4
SEQUSED_Q, SEQUSED_K, CACHE_BATCH_IDX, CACHE_LEFTPAD = 8, 16, 32, 64
LSE, SINKS, SINKS_ARE_FLOAT32, PAGE_TABLE = 128, 256, 512, 1024
ROTARY, ROTARY_INTERLEAVED, ROTARY_SEQLENS, ROTATE_QUERY_BY_TOKEN = 2048, 4096, 8192, 16384
ZERO_REST = 32768

# A wider token stride would overflow the 32-bit offsets inside a tile of at most 128 keys.
_NARROW = 2**31 // 256
_LEAST_TILES_PER_SPLIT = 4

_devices: dict[int, DeviceKernels] = {}


def kernels_of(device: torch.device) -> DeviceKernels:
    """The kernels of a tensor's device."""
    index = device.index
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
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    page_table: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    seqlen_k_new: int = 0,
    max_seqlen_k: int | None = None,
    sm_margin: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of checked tensors; shapes as in the public functions, q already rotated."""
    kernels = kernels_of(q.device)
    ragged = cu_seqlens_q is not None
    q_shape, k_shape = q.shape, k.shape
    heads, head_dim, kv_heads, head_dim_v = q_shape[-2], q_shape[-1], k_shape[-2], v.shape[-1]
    group = heads // kv_heads
    batch = q_shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    if max_seqlen_q is None:
        max_seqlen_q = q_shape[0] if ragged else q_shape[1]
    owned = out is None
    if out is None:
        out = torch.empty((*q_shape[:-1], head_dim_v), dtype=q.dtype, device=q.device)
    total_rows = q_shape[0] if ragged else batch * q_shape[1]
    lse = None
    if return_softmax_lse:
        lse_shape = (heads, total_rows) if ragged else (batch, heads, q_shape[1])
        lse = torch.empty(lse_shape, dtype=torch.float32, device=q.device)
    result = out if lse is None else (out, lse)
    if total_rows == 0 or batch == 0 or max_seqlen_q == 0:
        if owned:
            out.zero_()
        if lse is not None:
            lse.fill_(-math.inf)
        return result

    paged = page_table is not None
    if page_table is not None:
        page_size, table_stride = k_shape[1], page_table.shape[1]
        capacity = page_size * table_stride
    else:
        page_size, table_stride = 1, 0
        capacity = k_shape[0] if cu_seqlens_k is not None else k_shape[1]
    left, right = window_size
    if causal:
        right = 0
    flags = (
        (CU_SEQLENS_Q if ragged else 0)
        | (CU_SEQLENS_K if cu_seqlens_k is not None else 0)
        | (CU_SEQLENS_K_NEW if cu_seqlens_k_new is not None else 0)
        | (SEQUSED_Q if seqused_q is not None else 0)
        | (SEQUSED_K if seqused_k is not None else 0)
        | (CACHE_BATCH_IDX if cache_batch_idx is not None else 0)
        | (CACHE_LEFTPAD if cache_leftpad is not None else 0)
        | (LSE if lse is not None else 0)
        | (ZERO_REST if owned else 0)
    )
    if sinks is not None:
        flags |= SINKS | (SINKS_ARE_FLOAT32 if sinks.dtype == torch.float32 else 0)

    q_strides, k_strides, v_strides = _strides(q, ragged), _strides(k, k.dim() == 3), _strides(v, v.dim() == 3)
    out_strides = _strides(out, ragged)
    aligned = _aligned((q, k, v, out), q_strides + k_strides + v_strides + out_strides) and (
        k_strides[1] < _NARROW and v_strides[1] < _NARROW
    )
    unit = 8 if aligned else 1
    if aligned:
        q_strides, k_strides = _eighths(q_strides), _eighths(k_strides)
        v_strides, out_strides = _eighths(v_strides), _eighths(out_strides)

    dtype = DTYPE_NAMES[q.dtype]
    rows = max_seqlen_q * group
    kind = "prefill" if num_splits == 1 or rows > 64 else "decode" if rows <= 16 else "short"
    local = left >= 0 or attention_chunk > 0
    tile = portable_tiles.tile(kernels.target.architecture, head_dim, head_dim_v, kind)
    handle = kernels.handle(("forward", dtype, head_dim, head_dim_v, kind, paged, local, softcap > 0, unit == 8))
    packed = group if _packs(pack_gqa, max_seqlen_q, group, tile.block_m, kind) else 1
    row_tiles = -(-max_seqlen_q * packed // tile.block_m)
    programs = row_tiles * (heads // packed) * batch
    if num_splits == 0:
        longest = capacity if max_seqlen_k is None else min(capacity, max_seqlen_k)
        if left >= 0:
            longest = min(longest, left + max(right, 0) + max_seqlen_q + tile.block_n)
        slots = max(1, kernels.multiprocessors - sm_margin) * _residents(kind)
        num_splits = best_splits(programs, slots, -(-longest // tile.block_n))
    lse_stride_batch, lse_stride_head = (0, total_rows) if ragged else (heads * q_shape[1], q_shape[1])
    out_partial = lse_partial = None
    if num_splits > 1:
        partial_shape = (num_splits, total_rows, heads, head_dim_v)
        out_partial = torch.empty(partial_shape, dtype=torch.float32, device=q.device)
        lse_partial = torch.empty(partial_shape[:3], dtype=torch.float32, device=q.device)
    kernels.launch(
        handle, programs * num_splits,
        q, k, v, out, lse, out_partial, lse_partial,
        cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q, seqused_k,
        page_table, cache_batch_idx, cache_leftpad, sinks,
        *q_strides, *k_strides, *v_strides, *out_strides,
        lse_stride_batch, lse_stride_head, table_stride, total_rows,
        q_shape[0] if ragged else q_shape[1], capacity, seqlen_k_new, page_size,
        heads, packed, group, row_tiles, num_splits, left, right, attention_chunk, flags,
        softmax_scale, float(softcap),
    )  # fmt: skip
    if out_partial is not None and lse_partial is not None:
        sequence = 0 if ragged else q_shape[1]
        partial_strides = (
            total_rows * heads * head_dim_v, sequence * heads * head_dim_v, heads * head_dim_v, head_dim_v,
        )  # fmt: skip
        _launch_combine(
            kernels, (out_partial, lse_partial), partial_strides,
            (total_rows * heads, sequence * heads, heads, 1), out, lse,
            (lse_stride_batch, 1, lse_stride_head), cu_seqlens_q, seqused_q, sinks,
            q_shape[0] if ragged else q_shape[1], max_seqlen_q, batch, num_splits, flags,
        )  # fmt: skip
    return result


def _strides(x: Tensor, ragged: bool) -> tuple[int, ...]:
    """Strides of (batch, token, head); a ragged tensor has one batch entry."""
    strides = x.stride()
    return (0, *strides[:2]) if ragged else strides[:3]


def _eighths(strides: tuple[int, ...]) -> tuple[int, ...]:
    return (strides[0] >> 3, strides[1] >> 3, strides[2] >> 3)


def _aligned(tensors: tuple[Tensor, ...], strides: tuple[int, ...]) -> bool:
    """Whether every row starts at a multiple of 16 bytes; the elements have 2 bytes."""
    bits = 0
    for stride in strides:
        bits |= stride
    addresses = 0
    for tensor in tensors:
        addresses |= tensor.data_ptr()
    return bits & 7 == 0 and addresses & 15 == 0


def _packs(pack_gqa: bool | None, max_seqlen_q: int, group: int, block_m: int, kind: str) -> bool:
    """Whether the query heads of a group share a tile: where they fill it better than tokens do."""
    if group == 1:
        return False
    if kind != "prefill":
        return True  # the tile was chosen for packed rows
    if pack_gqa is not None:
        return pack_gqa
    alone = group * math.ceil(max_seqlen_q / block_m)
    return math.ceil(max_seqlen_q * group / block_m) < 0.9 * alone


def _residents(kind: str) -> int:
    """Blocks that a multiprocessor holds at once, by shared memory and registers of the usual tiles."""
    return 1 if kind == "prefill" else 2


def best_splits(programs: int, slots: int, key_tiles: int) -> int:
    """Into how many parts the keys are cut: the least whose last wave is at most 15 % worse filled than the best's.

    `slots` blocks run at once. The figure of 85 % is FlashAttention's (hopper/heuristics.h).
    """
    most = min(128, key_tiles // _LEAST_TILES_PER_SPLIT)
    if most <= 1 or programs >= 4 * slots:
        return 1
    fill = []
    for splits in range(1, most + 1):
        waves = programs * splits / slots
        fill.append(waves / math.ceil(waves))
    enough = 0.85 * max(fill)
    return next(splits for splits, share in enumerate(fill, 1) if share >= enough)


def _launch_combine(
    kernels: DeviceKernels,
    partials: tuple[Tensor, Tensor],
    partial_strides: tuple[int, ...],
    lse_partial_strides: tuple[int, ...],
    out: Tensor,
    lse: Tensor | None,
    lse_strides: tuple[int, ...],
    cu_seqlens_q: Tensor | None,
    seqused_q: Tensor | None,
    sinks: Tensor | None,
    seqlen_q: int,
    max_seqlen_q: int,
    batch: int,
    num_splits: int,
    flags: int,
) -> None:
    """Join partials; strides are those of (split, batch, token, head), and (batch, token, head) for out and lse."""
    out_partial, lse_partial = partials
    heads, head_dim_v = out.shape[-2:]
    out_strides = _strides(out, out.dim() == 3)
    aligned = _aligned((out_partial, out), partial_strides + out_strides)
    if aligned:
        partial_strides = (partial_strides[0] >> 3, *_eighths(partial_strides[1:]))
        out_strides = _eighths(out_strides)
    handle = kernels.handle(("combine", DTYPE_NAMES[out_partial.dtype], DTYPE_NAMES[out.dtype], head_dim_v, aligned))
    item_tiles = -(-max_seqlen_q * heads // combine_rows(head_dim_v))
    kernels.launch(
        handle, item_tiles * batch,
        out_partial, lse_partial, out, lse, cu_seqlens_q, seqused_q, sinks,
        *partial_strides, *lse_partial_strides, *out_strides, *lse_strides,
        seqlen_q, heads, item_tiles, num_splits,
        flags & (CU_SEQLENS_Q | SEQUSED_Q | SINKS | SINKS_ARE_FLOAT32 | LSE),
    )  # fmt: skip


def append(call: dict[str, Any]) -> Tensor:
    """Put the new keys and values of a checked kvcache call into the cache; returns q, rotated where the call says."""
    q, k_new, v_new = call["q"], call["k"], call["v"]
    k_cache, v_cache = call["k_cache"], call["v_cache"]
    cos, sin, page_table = call["rotary_cos"], call["rotary_sin"], call["page_table"]
    cu_seqlens_q, cu_seqlens_k_new = call["cu_seqlens_q"], call["cu_seqlens_k_new"]
    kernels = kernels_of(q.device)
    ragged, ragged_new = cu_seqlens_q is not None, cu_seqlens_k_new is not None
    heads, kv_heads, head_dim, head_dim_v = q.shape[-2], k_new.shape[-2], q.shape[-1], v_new.shape[-1]
    batch = cu_seqlens_q.shape[0] - 1 if ragged else q.shape[0]
    rotated = q
    if cos is not None:
        # Rows of a multiple of 16 bytes, so that the attention kernel loads them as wide as q's own.
        wide = torch.empty((*q.shape[:-1], -(-head_dim // 8) * 8), dtype=q.dtype, device=q.device)
        rotated = wide[..., :head_dim]
    seqlen_new = k_new.shape[0] if ragged_new else k_new.shape[1]
    tiles_new = -(-seqlen_new * kv_heads // APPEND_ROWS)
    max_seqlen_q = call["max_seqlen_q"] or (q.shape[0] if ragged else q.shape[1])
    tiles_q = -(-max_seqlen_q * heads // APPEND_ROWS) if cos is not None else 0
    programs = (2 * tiles_new + tiles_q) * batch
    if programs == 0:
        return rotated
    left, right = call["window_size"]
    by_token = call["causal"] or left >= 0 or right >= 0 or call["attention_chunk"] > 0
    flags = (
        (CU_SEQLENS_Q if ragged else 0)
        | (CU_SEQLENS_K_NEW if ragged_new else 0)
        | (SEQUSED_K if call["cache_seqlens"] is not None else 0)
        | (CACHE_BATCH_IDX if call["cache_batch_idx"] is not None else 0)
        | (PAGE_TABLE if page_table is not None else 0)
        | (ROTARY if cos is not None else 0)
        | (ROTARY_INTERLEAVED if call["rotary_interleaved"] else 0)
        | (ROTARY_SEQLENS if call["rotary_seqlens"] is not None else 0)
        | (ROTATE_QUERY_BY_TOKEN if by_token else 0)
    )
    page_size = k_cache.shape[1] if page_table is not None else 1
    table_stride = page_table.shape[1] if page_table is not None else 0
    strides = (
        *_strides(q, ragged), *_strides(rotated, ragged),
        *_strides(k_new, ragged_new), *_strides(v_new, ragged_new), *_strides(k_cache, False),
        *_strides(v_cache, False),
    )  # fmt: skip
    aligned = _aligned((q, rotated, k_new, v_new, k_cache, v_cache), strides)
    if aligned:
        strides = tuple([stride >> 3 for stride in strides])
    kernels.launch(
        kernels.handle(("append", DTYPE_NAMES[q.dtype], head_dim, head_dim_v, aligned)), programs,
        q, rotated, k_new, v_new, k_cache, v_cache, cos, sin, cu_seqlens_q, cu_seqlens_k_new,
        call["cache_seqlens"], call["rotary_seqlens"], call["cache_batch_idx"], page_table,
        *strides, table_stride,
        cos.stride(0) if cos is not None else 0, sin.stride(0) if sin is not None else 0,
        q.shape[0] if ragged else q.shape[1], seqlen_new,
        page_size * table_stride if page_table is not None else k_cache.shape[1], page_size,
        heads, kv_heads, cos.shape[1] * 2 if cos is not None else 0, cos.shape[0] if cos is not None else 0,
        tiles_new, tiles_q, flags,
    )  # fmt: skip
    return rotated


def combine(out_partial: Tensor, lse_partial: Tensor, out: Tensor, lse: Tensor) -> None:
    """(splits, b, sq, hq, dv) or (splits, total_q, hq, dv) into out and lse, which have no split dimension."""
    ragged = out_partial.dim() == 4
    splits, lse_splits = out_partial.stride(0), lse_partial.stride(0)
    batch, seqlen = (1, out.shape[0]) if ragged else out.shape[:2]
    if out.numel() == 0:
        return
    _launch_combine(
        kernels_of(out.device), (out_partial, lse_partial),
        (splits, *_strides(out_partial[0], ragged)), (lse_splits, *_lse_strides(lse_partial[0], ragged)),
        out, lse, _lse_strides(lse, ragged), None, None, None, seqlen, seqlen, batch, out_partial.shape[0], LSE,
    )  # fmt: skip


def _lse_strides(lse: Tensor, ragged: bool) -> tuple[int, ...]:
    """Strides of (batch, token, head) of a token-major lse."""
    return (0, *lse.stride()) if ragged else lse.stride()


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor, lse: Tensor) -> None:
    """Join two partial results. Two tensors are two splits whose stride is the distance between them."""
    if out.numel() == 0:
        return
    if out_a.stride() != out_b.stride() or lse_a.stride() != lse_b.stride():
        out_a, out_b, lse_a, lse_b = (x.contiguous() for x in (out_a, out_b, lse_a, lse_b))
    ragged = out_a.dim() == 3
    split_stride = (out_b.data_ptr() - out_a.data_ptr()) // out_a.element_size()
    lse_split_stride = (lse_b.data_ptr() - lse_a.data_ptr()) // 4
    batch, seqlen = (1, out.shape[0]) if ragged else out.shape[:2]
    _launch_combine(
        kernels_of(out.device), (out_a, lse_a),
        (split_stride, *_strides(out_a, ragged)), (lse_split_stride, *_lse_strides(lse_a, ragged)),
        out, lse, _lse_strides(lse, ragged), None, None, None, seqlen, seqlen, batch, 2, LSE,
    )  # fmt: skip

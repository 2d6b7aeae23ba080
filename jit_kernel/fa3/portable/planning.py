"""What a kind of call launches: variant, grid and scalar arguments, from shapes, strides and settings alone.

A plan holds no tensor and depends on no value in one, so it is made once and remembered by the tuple it was made of.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from jit_kernel.fa3.call import Call
from jit_kernel.fa3.decision import Rejected, refusal
from jit_kernel.fa3.portable import tiles as portable_tiles
from jit_kernel.fa3.portable.kernels import COMBINE_SPLITS, DeviceKernels, combine_rows, result_of, unit, unserved

# Bits of the kernels' `flags`, as in kernel_sources/flash_attention_v3/portable/sequence.py.
CU_SEQLENS_Q, CU_SEQLENS_K, CU_SEQLENS_K_NEW = 1, 2, 4
SEQUSED_Q, SEQUSED_K, CACHE_BATCH_IDX, CACHE_LEFTPAD = 8, 16, 32, 64
LSE, SINKS, SINKS_ARE_FLOAT32, PAGE_TABLE = 128, 256, 512, 1024
ROTARY, ROTARY_INTERLEAVED, ROTARY_SEQLENS, ROTATE_QUERY_BY_TOKEN = 2048, 4096, 8192, 16384
ZERO_REST, Q_DESCALE, K_DESCALE, V_DESCALE = 32768, 65536, 131072, 262144
K_SCALE, V_SCALE = 524288, 1048576

# A wider token stride would overflow the 32-bit offsets inside a tile of at most 128 keys.
_NARROW = 2**31 // 256
# Less work than this in a block is less than joining it costs: 1 x 8k in 32 parts 26.3 us, in 64 23.3.
_LEAST_KEYS_PER_SPLIT = 128
_LEAST_KEYS_TO_SPLIT = 512

Strides = tuple[int, ...]


def flags_of(call: Call) -> int:
    """Which optional tensors a call has, and what is to be done to rows that it does not fill."""
    sinks = call.sinks
    return (
        (CU_SEQLENS_Q if call.cu_seqlens_q is not None else 0)
        | (CU_SEQLENS_K if call.cu_seqlens_k is not None else 0)
        | (CU_SEQLENS_K_NEW if call.cu_seqlens_k_new is not None else 0)
        | (SEQUSED_Q if call.seqused_q is not None else 0)
        | (SEQUSED_K if call.seqused_k is not None else 0)
        | (CACHE_BATCH_IDX if call.cache_batch_idx is not None else 0)
        | (CACHE_LEFTPAD if call.cache_leftpad is not None else 0)
        | (LSE if call.return_softmax_lse else 0)
        | (ZERO_REST if call.out is None else 0)
        | (SINKS if sinks is not None else 0)
        | (SINKS_ARE_FLOAT32 if sinks is not None and sinks.dtype is torch.float32 else 0)
    )


@dataclass(frozen=True)
class Layout:
    """A tensor of a call: its shape, and its strides in elements."""

    shape: tuple[int, ...]
    strides: Strides

    @property
    def rows(self) -> Strides:
        """Strides of (batch, token, head); a ragged tensor, (tokens, heads, d), has one batch entry."""
        return (0, *self.strides[:2]) if len(self.shape) == 3 else self.strides[:3]


@dataclass(frozen=True)
class Settings:
    """The scalars of a call that decide how it is launched; softmax_scale and softcap's value do not."""

    dtype: str  # of q
    kv_dtype: str
    qv: int  # 1 with qv, 2 with it alone
    qv_strides: Strides  # of (batch, token, head)
    factor_strides: Strides  # of q_descale, k_descale, v_descale, k_scale and v_scale; see factors.strides()
    batch: int
    max_seqlen_q: int
    max_seqlen_k: int
    seqlen_k_new: int
    table_width: int  # pages a sequence may have; 0: not paged
    window: tuple[int, int]  # causal is a right bound of 0
    chunk: int
    softcap: bool
    draft: tuple[int, int]  # words of a draft mask's row, and its stride; 0: there is none
    num_splits: int
    pack_gqa: bool | None
    sm_margin: int
    flags: int
    aligned_pointers: bool  # q, k, v, qv and out start at multiples of 16 bytes


@dataclass(frozen=True)
class Launch:
    """One launch but for its tensors: the kernel's handle, the grid and the scalar arguments behind the tensors."""

    handle: int
    grid: int
    scalars: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """The launches of one kind of call; `combine` and `partial_shape` where the keys are split."""

    forward: Launch
    combine: Launch | None
    partial_shape: tuple[int, int, int, int]


def make(kernels: DeviceKernels, q: Layout, k: Layout, v: Layout, out: Layout, call: Settings) -> Plan:
    """The plan of a call with at least one query row; compiles or loads its kernels.

    Raises NotImplementedError for a dtype or head sizes that no kernel here serves.
    """
    reason = unserved(call.dtype, q.shape[-1], v.shape[-1])
    if reason is not None:
        raise refusal(f"this call on {kernels.target}", [("portable", Rejected(reason, claimed=False))])
    ragged = call.flags & CU_SEQLENS_Q != 0
    heads, head_dim, head_dim_v = q.shape[-2], q.shape[-1], v.shape[-1]
    group = heads // k.shape[-2]
    total_rows = q.shape[0] if ragged else call.batch * q.shape[1]
    seqlen_q = q.shape[0] if ragged else q.shape[1]
    page_size = k.shape[1] if call.table_width else 1
    capacity = page_size * call.table_width or (k.shape[0] if len(k.shape) == 3 else k.shape[1])

    narrow = max(k.rows[1], v.rows[1]) < _NARROW
    inputs = ((q.rows, call.dtype), (k.rows, call.kv_dtype), (v.rows, call.kv_dtype), (call.qv_strides, call.dtype))
    strides, aligned = in_units((*inputs, (out.rows, result_of(call.dtype))), call.aligned_pointers and narrow)

    drafted = call.draft[0] > 0
    kind = tile_kind(call.num_splits, call.max_seqlen_q * group, aligned, drafted)
    tile = portable_tiles.tile(kernels.target.architecture, head_dim, head_dim_v, kind, call.qv, call.kv_dtype)
    local = is_local(call.window, call.chunk, drafted)
    variant = (
        call.dtype, head_dim, head_dim_v, kind, call.table_width > 0, local, call.softcap, aligned, drafted,
        call.kv_dtype, call.qv, call.flags & (K_SCALE | V_SCALE) != 0,
        has_whole_tiles(call.qv, page_size if call.table_width else 0, tile, call.flags & CACHE_LEFTPAD != 0),
    )  # fmt: skip
    packed = group if packs(call.pack_gqa, call.max_seqlen_q, group, tile.block_m, kind) else 1
    row_tiles = -(-call.max_seqlen_q * packed // tile.block_m)
    programs = row_tiles * (heads // packed) * call.batch
    num_splits = call.num_splits
    if num_splits == 0:
        slots = max(1, kernels.multiprocessors - call.sm_margin) * tile.residents
        num_splits = best_splits(programs, slots, _longest(call, capacity))
    lse_strides = (0, total_rows) if ragged else (heads * seqlen_q, seqlen_q)
    scalars = (
        *strides, *call.factor_strides, *lse_strides, call.table_width, total_rows, call.draft[1],
        seqlen_q, capacity, call.seqlen_k_new, page_size, heads, packed, group, row_tiles, num_splits,
        *call.window, call.chunk, call.draft[0], call.flags,
    )  # fmt: skip
    forward = Launch(kernels.handle(("forward", *variant)), programs * num_splits, scalars)
    partial_shape = (num_splits, total_rows, heads, head_dim_v)
    if num_splits == 1:
        return Plan(forward, None, partial_shape)
    rows = 0 if ragged else seqlen_q
    combine = combine_launch(
        kernels, "fp32", result_of(call.dtype), out.shape, call.aligned_pointers,
        (total_rows * heads * head_dim_v, rows * heads * head_dim_v, heads * head_dim_v, head_dim_v),
        (total_rows * heads, rows * heads, heads, 1), out.rows, (lse_strides[0], 1, lse_strides[1]),
        call.batch, seqlen_q, call.max_seqlen_q, num_splits, call.flags, call.dtype,
    )  # fmt: skip
    return Plan(forward, combine, partial_shape)


def in_units(rows: Sequence[tuple[Strides, str]], aligned: bool) -> tuple[Strides, bool]:
    """Strides of tensors, each with its dtype, as a kernel takes them, and whether all are multiples of 16 bytes.

    aligned: whether they may be: where they are, they count in units of 16 bytes.
    """
    units = [unit(dtype, True) for _, dtype in rows]
    aligned = aligned and not any(stride % n for (strides, _), n in zip(rows, units, strict=True) for stride in strides)
    if not aligned:
        return tuple(stride for strides, _ in rows for stride in strides), False
    return tuple(stride // n for (strides, _), n in zip(rows, units, strict=True) for stride in strides), True


def tile_kind(num_splits: int, rows: int, aligned: bool, drafted: bool) -> str:
    """The kind of tile for `rows` packed rows of a sequence. Without splits it never depends on lengths."""
    if num_splits != 1 and rows <= portable_tiles.ROWS["decode"]:
        return "decode"
    if not aligned:
        return "unaligned"
    if drafted:
        return "draft"
    return "short" if num_splits != 1 and rows <= portable_tiles.ROWS["short"] else "prefill"


def has_whole_tiles(qv: int, page_size: int, tile: portable_tiles.Tile, leftpad: bool) -> bool:
    """Whether each tile of keys lies in one page: with qv, whose wide rows' addresses fill the registers otherwise."""
    return qv > 0 and page_size > 0 and page_size % tile.block_n == 0 and not leftpad


def is_local(window: tuple[int, int], chunk: int, drafted: bool) -> bool:
    """Whether a kernel looks for keys before the first one that a row sees; with a draft mask always: fewer kernels."""
    return window[0] >= 0 or chunk > 0 or drafted


def packs(pack_gqa: bool | None, max_seqlen_q: int, group: int, block_m: int, kind: str) -> bool:
    """Whether the query heads of a group share a tile: where they fill it better than tokens do."""
    if group == 1:
        return False
    if kind in portable_tiles.ROWS or kind == "draft":
        return True  # the tile was chosen for packed rows
    if pack_gqa is not None:
        return pack_gqa
    alone = group * math.ceil(max_seqlen_q / block_m)
    return math.ceil(max_seqlen_q * group / block_m) < 0.9 * alone


def _longest(call: Settings, capacity: int) -> int:
    """An upper bound of the keys that one query tile sees."""
    longest = min(capacity, call.max_seqlen_k)
    left, right = call.window
    return longest if left < 0 else min(longest, left + max(right, 0) + call.max_seqlen_q)


def best_splits(programs: int, slots: int, keys: int) -> int:
    """Into how many parts the keys are cut: the least that fills its last wave within 15 % of the best.

    `slots` blocks run at once. The rule and its 85 % are FlashAttention's (hopper/heuristics.h).
    """
    most = min(128, keys // _LEAST_KEYS_PER_SPLIT)
    if keys < _LEAST_KEYS_TO_SPLIT or programs >= 0.8 * slots:
        return 1
    fill = []
    for splits in range(1, most + 1):
        waves = programs * splits / slots
        fill.append(waves / math.ceil(waves))
    enough = 0.85 * max(fill)
    return next(splits for splits, share in enumerate(fill, 1) if share >= enough)


def combine_launch(
    kernels: DeviceKernels,
    partial_dtype: str,
    dtype: str,
    out_shape: tuple[int, ...],
    aligned_pointers: bool,
    partial: Strides,
    lse_partial: Strides,
    out: Strides,
    lse: Strides,
    batch: int,
    seqlen_q: int,
    max_seqlen_q: int,
    num_splits: int,
    flags: int,
    sinks: str | None = None,
) -> Launch:
    """Joining partials: strides of (split, batch, token, head), for out and lse of (batch, token, head).

    sinks: the dtype of sinks that are not float32, where it is not that of the result.
    """
    heads, head_dim_v = out_shape[-2:]
    aligned = aligned_pointers and not any(stride & 7 for stride in (*partial, *out))
    if aligned:
        partial, out = tuple(s >> 3 for s in partial), tuple(s >> 3 for s in out)
    # Two long partial results want large tiles: 2 x 16384 x 32 rows took 2.6 ms in tiles of 4 rows.
    few, some, many = COMBINE_SPLITS
    rows = batch * max_seqlen_q * heads
    fills = rows >= kernels.multiprocessors * combine_rows(head_dim_v, few)
    splits = few if num_splits <= few and fills else some if num_splits <= some else many
    item_tiles = -(-max_seqlen_q * heads // combine_rows(head_dim_v, splits))
    flags &= CU_SEQLENS_Q | SEQUSED_Q | SINKS | SINKS_ARE_FLOAT32 | LSE
    scalars = (*partial, *lse_partial, *out, *lse, seqlen_q, heads, item_tiles, num_splits, flags)
    handle = kernels.handle(("combine", partial_dtype, dtype, head_dim_v, aligned, splits, sinks or dtype))
    return Launch(handle, item_tiles * batch, scalars)

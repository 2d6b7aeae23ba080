"""Tile sizes of the portable backward kernels, by architecture and head size, with reasons.

A tile is a pure function of architecture and head sizes: a sequence's gradients do not depend on its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

from jit_kernel.fa3.portable.tiles import family, padded


@dataclass(frozen=True)
class Tile:
    """block_m rows of queries and block_n keys; num_stages tiles of what the loop walks are in flight."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# By kernel and class of head sizes, the larger padded one. "pairs" makes the gradients of block_n keys and of their
# values and walks the rows, "keys" and "values" make one of them each, and "queries" holds block_m rows and walks the
# keys.
_Table = dict[tuple[str, int], Tile]

# Measured on an H200, bf16, 4 x 4,096 tokens, hidden size 2048, in ms without and with a causal mask; the whole
# backward pass of FlashAttention 2 takes 4.94 2.77 (64), 4.56 2.49 (128), 5.43 2.96 (256):
# pairs 64: 2.09 1.14; 4 stages 2.19 1.21; 2 stages 2.33 1.21; 128 keys and 8 warps 2.35 1.32; 32 rows 2.52 1.36.
# pairs 128: 1.91 1.11; 4 stages 1.96 1.13; 2 stages 2.11 1.11; 32 rows 2.19 1.24; 64 keys and 4 warps 2.26 1.29.
# pairs 256 spill, of the best tile 3.94 2.05, while values take 1.05 0.64 (64 rows and 2 stages 1.12 0.59) and keys
# 1.63 0.97 (2 stages 2.02 1.00, 16 rows 2.23 1.30): scores once more cost less.
# queries 64: 1.34 0.79; 128 rows 1.50 0.85; 64 keys 1.73 0.90. queries 128: 1.34 0.77; 128 keys and 2 stages 1.44 0.81.
# queries 256: 1.44 0.86; 2 stages 1.98 1.04; 64 rows, 4 warps 2.01 1.09.
_SM_90: _Table = {
    ("pairs", 64): Tile(64, 64, 4, 3),
    ("pairs", 128): Tile(64, 128, 8, 3),
    ("keys", 256): Tile(32, 128, 8, 3),
    ("values", 256): Tile(32, 128, 8, 3),
    ("queries", 64): Tile(64, 128, 4, 3),
    ("queries", 128): Tile(128, 64, 8, 3),
    ("queries", 256): Tile(128, 32, 8, 3),
}
# Not measured: chosen by the compiler's report, at most 136 bytes of spills.
_SM_80: _Table = {
    ("pairs", 64): Tile(64, 64, 4, 2),
    ("pairs", 128): Tile(32, 64, 4, 2),
    ("keys", 256): Tile(32, 64, 8, 2),
    ("values", 256): Tile(32, 64, 8, 2),
    ("queries", 64): Tile(64, 64, 4, 2),
    ("queries", 128): Tile(64, 32, 4, 2),
    ("queries", 256): Tile(64, 32, 8, 2),
}
# sm_86, sm_89, sm_120: as sm_80 with 99 KiB of shared memory.
_SMALL: _Table = _SM_80 | {
    ("keys", 256): Tile(16, 64, 8, 2),
    ("queries", 256): Tile(64, 16, 8, 2),
}
# Operands of tensor memory pass through registers: larger tiles spill up to 760 bytes, these up to 384. Not measured.
_SM_100: _Table = {
    ("pairs", 64): Tile(64, 128, 8, 2),
    ("pairs", 128): Tile(64, 64, 8, 2),
    ("keys", 256): Tile(32, 64, 8, 1),
    ("values", 256): Tile(32, 128, 8, 2),
    ("queries", 64): Tile(128, 64, 8, 2),
    ("queries", 128): Tile(128, 64, 8, 3),
    ("queries", 256): Tile(128, 32, 8, 2),
}
_TILES: dict[str, _Table] = {"sm_80": _SM_80, "small": _SMALL, "sm_90": _SM_90, "sm_100": _SM_100}


def tile(architecture: str, kernel: str, head_dim: int, head_dim_v: int) -> Tile:
    """The tile of a kernel, by its name in the tables, for an architecture and head sizes up to 256."""
    return _TILES[family(architecture)][kernel, _size(head_dim, head_dim_v)]


def parts(architecture: str, head_dim: int, head_dim_v: int) -> tuple[str, ...]:
    """The kernels that make the gradients of keys and values."""
    return ("values", "keys") if ("keys", _size(head_dim, head_dim_v)) in _TILES[family(architecture)] else ("pairs",)


def _size(head_dim: int, head_dim_v: int) -> int:
    return max(64, padded(head_dim), padded(head_dim_v))

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

_SM_90: _Table = {
    ("pairs", 64): Tile(64, 64, 4, 3),
    ("pairs", 128): Tile(64, 128, 8, 3),
    ("keys", 256): Tile(32, 128, 8, 3),
    ("values", 256): Tile(64, 128, 8, 2),
    ("queries", 64): Tile(64, 128, 4, 3),
    ("queries", 128): Tile(128, 64, 8, 3),
    ("queries", 256): Tile(128, 32, 8, 3),
}
_SM_80: _Table = {
    ("pairs", 64): Tile(64, 64, 4, 2),
    ("pairs", 128): Tile(32, 64, 4, 2),
    ("keys", 256): Tile(32, 64, 8, 2),
    ("values", 256): Tile(32, 64, 8, 2),
    ("queries", 64): Tile(64, 64, 4, 2),
    ("queries", 128): Tile(64, 32, 4, 2),
    ("queries", 256): Tile(64, 32, 8, 2),
}
_SMALL: _Table = _SM_80
_TILES: dict[str, _Table] = {"sm_80": _SM_80, "small": _SMALL, "sm_90": _SM_90, "sm_100": _SM_90}


def tile(architecture: str, kernel: str, head_dim: int, head_dim_v: int) -> Tile:
    """The tile of a kernel, by its name in the tables, for an architecture and head sizes up to 256."""
    return _TILES[family(architecture)][kernel, _size(head_dim, head_dim_v)]


def parts(architecture: str, head_dim: int, head_dim_v: int) -> tuple[str, ...]:
    """The kernels that make the gradients of keys and values."""
    return ("values", "keys") if ("keys", _size(head_dim, head_dim_v)) in _TILES[family(architecture)] else ("pairs",)


def _size(head_dim: int, head_dim_v: int) -> int:
    return max(64, padded(head_dim), padded(head_dim_v))

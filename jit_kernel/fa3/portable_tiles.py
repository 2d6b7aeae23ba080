"""Tile sizes of the portable kernels: one table, by architecture and head size, with reasons.

A tile is a pure function of architecture, head sizes and kind of tile: never of the batch or of a sequence's length,
so that with num_splits = 1 (always the "prefill" tile) a sequence's result does not depend on its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

from jit_kernel import triton_compiler


@dataclass(frozen=True)
class Tile:
    """block_m (token, head) rows against block_n keys at a time; num_stages key tiles are in flight.

    residents: blocks that a multiprocessor holds at once, by registers and shared memory; the choice of splits asks.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    residents: int = 1


# Rows of a tile by kind. "decode" is the least that the matrix unit takes, for one token of a packed group of up to
# 16 heads; "short" serves speculative tokens; both only where keys may be split, "prefill" everywhere.
ROWS = {"decode": 16, "short": 64}

# Head sizes are classed by the larger padded one. Shared memory holds num_stages key and value tiles and the queries.
_TILES: dict[str, dict[tuple[str, int], Tile]] = {
    # wgmma takes 64 rows a warpgroup: 8 warps work on 128 rows, one warpgroup's softmax beside the other's products.
    "sm_90": {
        ("prefill", 64): Tile(128, 128, 8, 3),
        ("prefill", 128): Tile(128, 128, 8, 3),
        ("prefill", 256): Tile(128, 64, 8, 2),
        ("short", 64): Tile(64, 64, 4, 3),
        ("short", 128): Tile(64, 64, 4, 3),
        ("short", 256): Tile(64, 64, 4, 2),
        ("decode", 64): Tile(16, 128, 4, 3),
        ("decode", 128): Tile(16, 64, 4, 3),
        ("decode", 256): Tile(16, 64, 4, 2),
    },
    # 163 KiB and mma.sync, whose operands pass through registers: 4 warps of 32 rows keep them in bounds.
    "sm_80": {
        ("prefill", 64): Tile(128, 64, 4, 3),
        ("prefill", 128): Tile(128, 64, 8, 3),
        ("prefill", 256): Tile(64, 32, 4, 2),
        ("short", 64): Tile(64, 64, 4, 3),
        ("short", 128): Tile(64, 64, 4, 2),
        ("short", 256): Tile(64, 32, 4, 2),
        ("decode", 64): Tile(16, 64, 4, 3),
        ("decode", 128): Tile(16, 64, 4, 3),
        ("decode", 256): Tile(16, 32, 4, 3),
    },
    # 99 KiB a block: as sm_80 with fewer or smaller stages.
    "small": {
        ("prefill", 64): Tile(128, 64, 4, 3),
        ("prefill", 128): Tile(128, 32, 8, 3),
        ("prefill", 256): Tile(64, 32, 4, 2),
        ("short", 64): Tile(64, 64, 4, 3),
        ("short", 128): Tile(64, 64, 4, 2),
        ("short", 256): Tile(64, 32, 4, 2),
        ("decode", 64): Tile(16, 64, 4, 3),
        ("decode", 128): Tile(16, 64, 4, 3),
        ("decode", 256): Tile(16, 32, 4, 2),
    },
}  # fmt: skip
_TILES["sm_100"] = _TILES["sm_90"]


def family(architecture: str) -> str:
    """Which column of the table serves an architecture; an unknown one gets the smallest tiles."""
    capability = triton_compiler.capability(architecture)
    if capability == 90:
        return "sm_90"
    if 100 <= capability < 120 and capability in triton_compiler.SHARED_LIMITS:
        return "sm_100"
    return "sm_80" if capability in (80, 87) else "small"


def padded(head_dim: int) -> int:
    """The power of two, at least 16, that a head size is padded to inside a kernel."""
    return max(16, 1 << (head_dim - 1).bit_length())


def tile(architecture: str, head_dim: int, head_dim_v: int, kind: str) -> Tile:
    """The tile of a kind ("prefill", "short", "decode") for an architecture and head sizes up to 256."""
    size = max(64, padded(head_dim), padded(head_dim_v))
    return _TILES[family(architecture)][kind, size]

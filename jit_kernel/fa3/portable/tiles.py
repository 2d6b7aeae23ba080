"""Tile sizes of the portable kernels: one table, by architecture and head size, with reasons.

A tile is a pure function of architecture, head sizes and kind of tile: never of the batch or of a sequence's length,
so that with num_splits = 1 (always the "prefill" tile) a sequence's result does not depend on its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

from jit_kernel.engine import triton_compiler


@dataclass(frozen=True)
class Tile:
    """block_m (token, head) rows against block_n keys at a time; num_stages key tiles are in flight.

    lead: how many tiles ahead pages are looked up, 1 or 4.
    residents: blocks that a multiprocessor holds at once, by registers and shared memory; the choice of splits asks.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    residents: int = 1
    lead: int = 1


_Table = dict[tuple[str, int | str], Tile]  # by kind and class of head sizes

# Rows of a tile by kind. "decode" is the least that the matrix unit takes, for one token of a packed group of up to
# 16 heads; "short" serves speculative tokens; both only where keys may be split, "prefill" everywhere.
ROWS = {"decode": 16, "short": 64}

# Rows of keys that are not 16-byte aligned load 2 bytes at a time through registers: a small tile leaves room for them.
_UNALIGNED: _Table = {("unaligned", size): Tile(32, 32, 4, 1, residents=2) for size in (64, 128, 256)}
_UNALIGNED |= {("unaligned", size): Tile(16, 16, 4, 1) for size in (512, "qv 256", "qv 512")}

# With a draft mask a row's bit of each key lives in a register: 64 rows and 64 keys spill 1448 bytes. Not measured.
_DRAFT: _Table = {
    ("draft", 64): Tile(32, 64, 4, 2, residents=2),
    ("draft", 128): Tile(32, 64, 4, 2, residents=2),
    ("draft", 256): Tile(32, 32, 4, 2, residents=2),
    ("draft", 512): Tile(16, 16, 4, 2),
    ("draft", "qv 256"): Tile(32, 32, 4, 2),
    ("draft", "qv 512"): Tile(16, 32, 4, 2),
}

# Head sizes are classed by the larger padded one, apart where there is qv. Measured on an H200, bf16, in TFLOP/s
# (prefill: 16,384 tokens, hidden size 2048, 4k and 16k, without and with causal mask) and GB/s (decode: 64 x 8k, 32/8
# heads, pages of 64):
# prefill 64: 418 356 431 412; of 8 warps and 128 keys 340 294 362 355.
# prefill 128: 457 382 488 487; 64 keys 442 382 466 465; 2 stages 437 361 434 428.
# prefill 256: 469 386 (4k); 64 keys and 2 stages 478 404, but see below; 64 rows 271 242.
# decode 128: 4226 of 4270 that a copy reaches; 64 keys and 4 warps 3250: small blocks keep more loads in flight.
# decode 64: 3985; 128 keys and 4 warps 3134. decode 256: 4137; 4 warps and 64 keys 3343.
# short 128 (32 x 8k, 4 tokens, 64/8 heads): 3291; 128 keys 1863; 32 rows 2895.
# prefill 128 of e4m3 (16k): 469 459; 3 stages 454 438; 64 keys 416 416.
# decode qv 512 (64 x 8k, 16 heads): 2161; 64 keys and 3 stages 1528. prefill qv 512 (128 heads): 164; e4m3 275.
# No 2 stages where wgmma works (64 rows and 4 warps upwards): with one buffer the matrix descriptors do not change in
# the loop, and ptxas 12.8 makes them of an unset uniform register where many are live. Seen in the unaligned variant of
# head sizes 40/24; "unaligned" tiles, whose loads cannot be pipelined at all, have 32 rows and so use mma.sync.
_SM_90: _Table = {
    ("prefill", 64): Tile(128, 64, 4, 3, residents=2),
    ("prefill", 128): Tile(128, 128, 8, 3),
    ("prefill", 256): Tile(128, 32, 8, 3),
    ("short", 64): Tile(64, 64, 4, 3, residents=2, lead=4),
    ("short", 128): Tile(64, 64, 4, 3, residents=2, lead=4),
    ("short", 256): Tile(64, 32, 4, 3),
    ("decode", 64): Tile(16, 64, 2, 4, residents=4, lead=4),
    ("decode", 128): Tile(16, 32, 2, 3, residents=4, lead=4),
    ("decode", 256): Tile(16, 32, 2, 2, residents=4),
    ("prefill", 512): Tile(64, 16, 8, 3),
    ("short", 512): Tile(64, 16, 8, 3),
    ("decode", 512): Tile(16, 16, 4, 3, residents=2),
    ("prefill", "qv 256"): Tile(64, 64, 4, 3),
    ("short", "qv 256"): Tile(64, 64, 4, 3),
    ("decode", "qv 256"): Tile(16, 32, 4, 3, residents=3),
    ("prefill", "qv 512"): Tile(64, 32, 8, 3),
    ("short", "qv 512"): Tile(64, 32, 8, 3),
    ("decode", "qv 512"): Tile(16, 32, 4, 3, residents=2),
    ("prefill", "128 e4m3"): Tile(128, 128, 8, 4),
    ("prefill", "qv 512 e4m3"): Tile(64, 64, 8, 3),
    ("short", "qv 512 e4m3"): Tile(64, 64, 8, 3),
    **_UNALIGNED,
    **_DRAFT,
}
# 163 KiB of shared memory and mma.sync, whose operands pass through registers: fewer keys at a time than wgmma, or they
# spill. Not measured: chosen by the compiler's report (at most 400 bytes of spills, for a head size of 256).
_SM_80: _Table = {
    ("prefill", 64): Tile(128, 64, 4, 3, residents=2),
    ("prefill", 128): Tile(128, 64, 8, 3),
    ("prefill", 256): Tile(64, 32, 4, 2, residents=2),
    ("short", 64): Tile(64, 64, 4, 3, residents=2, lead=4),
    ("short", 128): Tile(64, 64, 4, 2, residents=2, lead=4),
    ("short", 256): Tile(64, 32, 4, 2, residents=2),
    ("decode", 64): Tile(16, 64, 2, 3, residents=4, lead=4),
    ("decode", 128): Tile(16, 32, 2, 3, residents=4, lead=4),
    ("decode", 256): Tile(16, 32, 2, 2, residents=4),
    ("prefill", 512): Tile(32, 16, 4, 2),
    ("short", 512): Tile(32, 16, 4, 2),
    ("decode", 512): Tile(16, 16, 4, 2, residents=2),
    ("prefill", "qv 256"): Tile(64, 32, 4, 2),
    ("short", "qv 256"): Tile(64, 32, 4, 2),
    ("decode", "qv 256"): Tile(16, 32, 4, 3, residents=2),
    ("prefill", "qv 512"): Tile(32, 32, 8, 2),
    ("short", "qv 512"): Tile(32, 32, 8, 2),
    ("decode", "qv 512"): Tile(16, 32, 4, 2, residents=2),
    ("prefill", "128 e4m3"): Tile(128, 32, 8, 3),
    ("prefill", "256 e4m3"): Tile(64, 16, 4, 2),
    **_UNALIGNED,
    **_DRAFT,
}
# sm_86, sm_89, sm_120: as sm_80 with 99 KiB, so fewer keys where a stage of them is large.
_SMALL: _Table = _SM_80 | {
    ("prefill", 64): Tile(128, 64, 4, 3),
    ("prefill", 128): Tile(128, 32, 8, 3),
    ("prefill", 256): Tile(64, 32, 4, 2),
    ("short", 256): Tile(64, 32, 4, 2),
    ("decode", 64): Tile(16, 64, 2, 3, residents=2, lead=4),
    ("decode", 128): Tile(16, 32, 2, 3, residents=2, lead=4),
    ("decode", 256): Tile(16, 32, 2, 2, residents=2),
}
# tcgen05 wants 128 rows as wgmma does, and shared memory is the same; rows of 512 need more of it. Not measured.
_SM_100: _Table = _SM_90 | {
    ("prefill", "qv 512"): Tile(64, 16, 8, 3),
    ("short", "qv 512"): Tile(64, 16, 8, 3),
}
TILES: dict[str, _Table] = {
    "sm_80": _SM_80,
    "small": _SMALL,
    "sm_90": _SM_90,
    "sm_100": _SM_100,
}


def family(architecture: str) -> str:
    """Which column of the table serves an architecture; an unknown one gets the smallest tiles."""
    capability = triton_compiler.capability(architecture)
    if capability == 90:
        return "sm_90"
    if 100 <= capability < 120 and capability in triton_compiler.SHARED_LIMITS:
        return "sm_100"
    return "sm_80" if capability in (80, 87) else "small"


def has_tensor_memory(architecture: str) -> bool:
    """Whether products accumulate in tensor memory: there Triton's pipeline takes no operation with side effects."""
    return family(architecture) == "sm_100"


def padded(head_dim: int) -> int:
    """The power of two, at least 16, that a head size is padded to inside a kernel."""
    return max(16, 1 << (head_dim - 1).bit_length())


def tile(
    architecture: str, head_dim: int, head_dim_v: int, kind: str, qv: int = 0, kv_dtype: str | None = None
) -> Tile:
    """The tile of a kind (a key of the tables, and "unaligned", "draft") for an architecture and sizes up to 512.

    qv: whether there is one; kv_dtype: that of keys and values. A class of e4m3 stands in the tables where it differs.
    """
    size: int | str = max(64, padded(head_dim), padded(head_dim_v))
    if qv:  # d is 64: scores and values share a tile of values
        size = f"qv {max(256, padded(head_dim_v))}"
    table = TILES[family(architecture)]
    own = table.get((kind, f"{size} e4m3")) if kv_dtype == "e4m3" else None
    return own or table[kind, size]

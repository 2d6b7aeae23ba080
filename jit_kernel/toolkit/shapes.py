"""The shape of a launch, packed into two integers as kernel_sources/include/jit_kernel/cuda/launch_shape.h says."""

from __future__ import annotations

_GRID = ((31, "x"), (16, "y"), (16, "z"))
_MOST_THREADS, _MOST_CLUSTER = 1024, 16
_MOST_BLOCK = (1024, 1024, 64)
_MOST_SHARED = (1 << 20) - 1
_FIELD_BITS = {"block": (10, 10, 6), "cluster": (4, 4, 4)}

Size = int | tuple[int, ...]


def _three(name: str, size: Size, least: int) -> tuple[int, int, int]:
    sizes = size if isinstance(size, tuple) else (size,)
    if not 1 <= len(sizes) <= 3 or not all(type(each) is int for each in sizes):
        raise TypeError(f"{name} is {size!r}; it must be an int, or a tuple of 1 to 3 of them")
    if min(sizes) < least:
        raise ValueError(f"{name} is {size!r}; each must be at least {least}")
    x, y, z = (*sizes, 1, 1)[:3]
    return x, y, z


def pack_grid(grid: Size) -> int:
    """A grid of blocks; one with a 0 in it launches nothing. Raises TypeError or ValueError."""
    sizes = _three("grid", grid, 0)
    for (bits, name), size in zip(_GRID, sizes, strict=True):
        if size >= 1 << bits:
            raise ValueError(f"grid is {grid!r}; its {name} must be under 2^{bits}")
    x, y, z = sizes
    return 0 if 0 in sizes else x | y - 1 << 31 | z - 1 << 47


def pack_shape(block: Size, shared_bytes: int, cluster: Size, cooperative: bool, programmatic: bool) -> int:
    """The rest of a launch. Raises TypeError or ValueError."""
    threads, blocks = _three("block", block, 1), _three("cluster", cluster, 1)
    if threads[0] * threads[1] * threads[2] > _MOST_THREADS or threads[2] > _MOST_BLOCK[2]:
        raise ValueError(f"block is {block!r}; it must have at most {_MOST_THREADS} threads, {_MOST_BLOCK[2]} along z")
    if blocks[0] * blocks[1] * blocks[2] > _MOST_CLUSTER:
        raise ValueError(f"cluster is {cluster!r}; it must have at most {_MOST_CLUSTER} blocks")
    if type(shared_bytes) is not int:
        raise TypeError(f"shared_bytes is {shared_bytes!r}; it must be an int")
    if not 0 <= shared_bytes <= _MOST_SHARED:
        raise ValueError(f"shared_bytes is {shared_bytes}; it must be 0 to {_MOST_SHARED}")
    packed, place = 0, 0
    for name, sizes in (("block", threads), ("cluster", blocks)):
        for bits, size in zip(_FIELD_BITS[name], sizes, strict=True):
            packed |= size - 1 << place
            place += bits
        if name == "block":
            packed |= shared_bytes << place
            place += 20
    return packed | bool(cooperative) << place | bool(programmatic) << place + 1

"""The Hopper kernels as things to compile, and those of a device."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from jit_kernel.device import device_target
from jit_kernel.fa3.hopper import loaded
from jit_kernel.fa3.hopper.loaded import DeviceKernels
from jit_kernel.jit import KernelSpec

FOLDER, LAUNCHER, CACHED, FP8 = loaded.FOLDER, loaded.LAUNCHER, loaded.CACHED, loaded.FP8
PREPARE = "prepare_values"  # before the kernels in e4m3
WIDEN = "widen"  # a cache in e4m3 to 16 bits, before those on cached keys
DTYPES = ("bf16", "fp16")
# Head sizes of q and k, and of v; the least that hold a call's serve it, the rest is padded inside.
HEAD_DIMS = ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))
# Of the kernels in e4m3, of q, k and v alike.
FP8_HEAD_DIMS = (64, 128, 256)
# Those with a variant whose values a kernel before transposes.
PREPARED_HEAD_DIMS = (256,)
# Rows of queries in a tile, by head sizes; 128 where they are not named.
TILE_ROWS = {(64, 64): 256}
_APPEND_THREADS = 128  # kAppendThreads of append/params.h, as the unit asserts
_PREPARE_THREADS = 256  # kPreparerThreads of prefill/fp8_params.h, likewise
PREPARED_KEYS = 128  # kPreparedKeys there: of a block of prepared values
_WIDEN_THREADS = 256  # kWidenThreads of widen/params.h, likewise
# Of the decode kernels: of q, k and v, and the packed query rows of a sequence.
DECODE_HEAD_DIMS = (64, 128, 256)
DECODE_ROWS = (8, 16, 32, 64)
DECODE_MOST_ROWS = {64: 64, 128: 64, 256: 32}
# Of the MLA kernels: of v and qv, where q and k have 64, and the packed query rows of a tile.
MLA_HEAD_DIMS_V = (256, 512)
MLA_ROWS = (16, 32, 64)
# Of the backward kernels: of q, k and v alike; the rest is padded inside.
BACKWARD_HEAD_DIMS = (64, 128, 256)
# The compiler's account of registers and spills goes to the entry's log, which the tests read.
_FLAGS = ("--ptxas-options=-v",)


def padded(head_dim: int, head_dim_v: int) -> tuple[int, int] | None:
    """The head sizes of the kernel that serves a call's, or None."""
    fitting = (pair for pair in HEAD_DIMS if head_dim <= pair[0] and head_dim_v <= pair[1])
    return next(fitting, None)


def padded_fp8(head_dim: int, head_dim_v: int) -> int | None:
    """The head size of the kernel in e4m3 that serves a call's, or None."""
    return next((size for size in FP8_HEAD_DIMS if max(head_dim, head_dim_v) <= size), None)


def fp8_size(head_dim: int, head_dim_v: int) -> int:
    """As `padded_fp8`; raises ValueError where no kernel serves them."""
    size = padded_fp8(head_dim, head_dim_v)
    if size is None:
        raise ValueError(f"no kernel in e4m3 has head sizes {head_dim}/{head_dim_v}")
    return size


def forward_spec(dtype: str, head_dim: int, head_dim_v: int, masked: bool, softcap: bool) -> KernelSpec:
    """The kernel of one variant; `masked` stands for causal, window and chunk."""
    numbers = f"{head_dim}, {head_dim_v}, {str(masked).lower()}, {str(softcap).lower()}"
    unit = f'#include "flash_attention_v3/hopper/prefill/forward.cuh"\nJIT_KERNEL_EXPORT_FORWARD({dtype}, {numbers})\n'
    variant = (
        ("function", "forward"),
        ("dtype", dtype),
        ("head_dim", head_dim),
        ("head_dim_v", head_dim_v),
        ("masked", masked),
        ("softcap", softcap),
    )
    return KernelSpec(FOLDER, unit, "cuda", variant, _FLAGS)


def fp8_spec(head_dim: int, head_dim_v: int, masked: bool, prepared: bool) -> KernelSpec:
    """The kernel in e4m3 that serves head sizes; softcap is a branch in it. Raises ValueError where none does.

    prepared: the kernel of `prepare_spec` has transposed the values; else this one does.
    """
    size = fp8_size(head_dim, head_dim_v)
    unit = (
        '#include "flash_attention_v3/hopper/prefill/forward.cuh"\n'
        f"JIT_KERNEL_EXPORT_FORWARD_FP8({size}, {str(masked).lower()}, {str(prepared).lower()})\n"
    )
    variant = (("function", FP8), ("dtype", "e4m3"), ("head_dim", size), ("masked", masked), ("prepared", prepared))
    return KernelSpec(FOLDER, unit, "cuda", variant, _FLAGS)


def prepare_spec(size: int) -> KernelSpec:
    """The kernel that transposes values in e4m3 before the attention kernel of a head size runs."""
    unit = (
        '#include "flash_attention_v3/hopper/prefill/forward.cuh"\n'
        f"JIT_KERNEL_EXPORT_PREPARE_VALUES({size}, {_PREPARE_THREADS})\n"
    )
    launch = (("threads", _PREPARE_THREADS), ("shared_bytes", 0))
    variant = (("function", PREPARE), ("dtype", "e4m3"), ("head_dim", size), *launch)
    return KernelSpec(FOLDER, unit, "cuda", variant, _FLAGS)


def append_spec(dtype: str, quantises: bool = False) -> KernelSpec:
    """The kernel that puts new keys and values into a cache and rotates: every head size and layout.

    quantises: the cache is in e4m3 and the new keys are not. dtype: of all, "e4m3" where keys in it are turned.
    """
    unit = (
        '#include "flash_attention_v3/hopper/append/append.cuh"\n'
        f"JIT_KERNEL_EXPORT_APPEND({dtype}, {str(quantises).lower()}, {_APPEND_THREADS})\n"
    )
    cache = (("cache", "e4m3"),) if quantises else ()
    variant = (("function", "append"), ("dtype", dtype), *cache, ("threads", _APPEND_THREADS), ("shared_bytes", 0))
    return KernelSpec(FOLDER, unit, "cuda", variant, _FLAGS)


def decode_spec(dtype: str, head_dim: int, rows: int, mixed: bool = False) -> KernelSpec:
    """The kernel for tiles of at most `rows` packed query rows, tokens x group, of a sequence.

    mixed: over a cache in e4m3, of which a sequence may have several tiles; else one.
    """
    unit = (
        '#include "flash_attention_v3/hopper/decode/decode.cuh"\n'
        f"JIT_KERNEL_EXPORT_DECODE({dtype}, {head_dim}, {rows}, {str(mixed).lower()})\n"
    )
    cache = (("cache", "e4m3"),) if mixed else ()
    variant = (("function", "decode"), ("dtype", dtype), *cache, ("head_dim", head_dim), ("rows", rows))
    return KernelSpec(FOLDER, unit, "cuda", variant, _FLAGS)


def mla_spec(dtype: str, head_dim_v: int, rows: int) -> KernelSpec:
    """The kernel for scores of q k + qv v, of 64 and `head_dim_v` columns, with tiles of `rows` packed query rows.

    dtype: of the cache; beside one in e4m3 queries have any, and products are made in fp16.
    """
    mixed = dtype == "e4m3"
    arguments = f"{'fp16' if mixed else dtype}, {head_dim_v}, {rows}, {str(mixed).lower()}"
    unit = f'#include "flash_attention_v3/hopper/mla/mla.cuh"\nJIT_KERNEL_EXPORT_MLA({arguments})\n'
    cache = (("cache", "e4m3"),) if mixed else ()
    variant = (("function", "mla"), ("dtype", dtype), *cache, ("head_dim_v", head_dim_v), ("rows", rows))
    return KernelSpec(FOLDER, unit, "cuda", variant, _FLAGS)


def cached_spec(dtype: str, head_dim: int, head_dim_v: int) -> KernelSpec:
    """The kernel of a pair of head sizes on cached keys; mask, softcap and pages are branches in it."""
    unit = (
        '#include "flash_attention_v3/hopper/prefill/forward.cuh"\n'
        f"JIT_KERNEL_EXPORT_FORWARD_CACHED({dtype}, {head_dim}, {head_dim_v})\n"
    )
    variant = (("function", CACHED), ("dtype", dtype), ("head_dim", head_dim), ("head_dim_v", head_dim_v))
    return KernelSpec(FOLDER, unit, "cuda", variant, _FLAGS)


def backward_spec(dtype: str, head_dim: int, softcap: bool) -> KernelSpec:
    """The backward kernels of a head size; masks are branches in them."""
    unit = (
        '#include "flash_attention_v3/hopper/backward/backward.cuh"\n'
        f"JIT_KERNEL_EXPORT_BACKWARD({dtype}, {head_dim}, {str(softcap).lower()})\n"
    )
    variant = (("function", "backward"), ("dtype", dtype), ("head_dim", head_dim), ("softcap", softcap))
    return KernelSpec(FOLDER, unit, "cuda", variant, _FLAGS)


def backward_specs() -> Iterator[KernelSpec]:
    """Every backward kernel."""
    for dtype in DTYPES:
        for head_dim in BACKWARD_HEAD_DIMS:
            for softcap in (False, True):
                yield backward_spec(dtype, head_dim, softcap)


def widen_spec() -> KernelSpec:
    """The kernel that makes 16 bits of rows of a cache in e4m3: every head size, layout and dtype."""
    unit = f'#include "flash_attention_v3/hopper/widen/widen.cuh"\nJIT_KERNEL_EXPORT_WIDEN({_WIDEN_THREADS})\n'
    variant = (("function", WIDEN), ("dtype", "e4m3"), ("threads", _WIDEN_THREADS), ("shared_bytes", 0))
    return KernelSpec(FOLDER, unit, "cuda", variant, _FLAGS)


def all_specs() -> Iterator[KernelSpec]:
    """The launcher and every kernel: two dtypes, six pairs of head sizes, with and without mask and softcap, cached;
    those in e4m3; and the backward ones."""
    yield LAUNCHER
    yield from backward_specs()
    for head_dim in FP8_HEAD_DIMS:
        for masked in (False, True):
            yield fp8_spec(head_dim, head_dim, masked, prepared=False)
    for head_dim in PREPARED_HEAD_DIMS:
        yield prepare_spec(head_dim)
        for masked in (False, True):
            yield fp8_spec(head_dim, head_dim, masked, prepared=True)
    yield append_spec("e4m3")
    yield widen_spec()
    for dtype in DTYPES:
        yield append_spec(dtype)
        yield append_spec(dtype, quantises=True)
        for head_dim, head_dim_v in HEAD_DIMS:
            for masked in (False, True):
                for softcap in (False, True):
                    yield forward_spec(dtype, head_dim, head_dim_v, masked, softcap)
            yield cached_spec(dtype, head_dim, head_dim_v)
        for head_dim in DECODE_HEAD_DIMS:
            for rows in DECODE_ROWS:
                if rows <= DECODE_MOST_ROWS[head_dim]:
                    yield decode_spec(dtype, head_dim, rows)
                    yield decode_spec(dtype, head_dim, rows, mixed=True)
        for head_dim_v in MLA_HEAD_DIMS_V:
            for rows in MLA_ROWS:
                yield mla_spec(dtype, head_dim_v, rows)
    for head_dim_v in MLA_HEAD_DIMS_V:
        for rows in MLA_ROWS:
            yield mla_spec("e4m3", head_dim_v, rows)


_devices: dict[int, DeviceKernels] = {}


def kernels_of(device: torch.device) -> DeviceKernels:
    """The kernels of a tensor's device."""
    index: int = device.index
    found = _devices.get(index)
    if found is None:
        found = _devices[index] = DeviceKernels(index, device_target(device))
    return found

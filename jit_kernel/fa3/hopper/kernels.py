"""The Hopper kernels as things to compile, to load and to launch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from jit_kernel.device import Target, device_target
from jit_kernel.engine import cubin
from jit_kernel.jit import Cubin, KernelSpec

FOLDER = "flash_attention_v3/hopper"
# Host code, kept with the GPU target whose warm-up builds it.
LAUNCHER = KernelSpec(
    FOLDER, '#include "flash_attention_v3/hopper/launch/launcher.cpp"\n', "host", (("function", "launcher"),)
)
CACHED = "forward_cached"  # prefill on cached keys, as a kernel and as the launcher's function
DTYPES = ("bf16", "fp16")
# Head sizes of q and k, and of v; the least that hold a call's serve it, the rest is padded inside.
HEAD_DIMS = ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))
# Rows of queries in a tile, by head sizes; 128 where they are not named.
TILE_ROWS = {(64, 64): 256}
# The compiler's account of registers and spills goes to the entry's log, which the tests read.
_FLAGS = ("--ptxas-options=-v",)


def padded(head_dim: int, head_dim_v: int) -> tuple[int, int] | None:
    """The head sizes of the kernel that serves a call's, or None."""
    fitting = (pair for pair in HEAD_DIMS if head_dim <= pair[0] and head_dim_v <= pair[1])
    return next(fitting, None)


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


def cached_spec(dtype: str, head_dim: int, head_dim_v: int) -> KernelSpec:
    """The kernel of a pair of head sizes on cached keys; mask, softcap and pages are branches in it."""
    unit = (
        '#include "flash_attention_v3/hopper/prefill/forward.cuh"\n'
        f"JIT_KERNEL_EXPORT_FORWARD_CACHED({dtype}, {head_dim}, {head_dim_v})\n"
    )
    variant = (("function", CACHED), ("dtype", dtype), ("head_dim", head_dim), ("head_dim_v", head_dim_v))
    return KernelSpec(FOLDER, unit, "cuda", variant, _FLAGS)


def all_specs() -> Iterator[KernelSpec]:
    """The launcher and every kernel: two dtypes, six pairs of head sizes, with and without mask and softcap, cached."""
    yield LAUNCHER
    for dtype in DTYPES:
        for head_dim, head_dim_v in HEAD_DIMS:
            for masked in (False, True):
                for softcap in (False, True):
                    yield forward_spec(dtype, head_dim, head_dim_v, masked, softcap)
            yield cached_spec(dtype, head_dim, head_dim_v)


class DeviceKernels(cubin.DeviceKernels):
    """The kernels of one GPU; `forward` and `forward_cached` launch one by its handle."""

    def __init__(self, index: int, target: Target) -> None:
        super().__init__(index, target, LAUNCHER)

    def _keep(self, functions: Any) -> None:
        self.forward = functions["forward"]  # type: ignore[method-assign]
        self.forward_cached = functions[CACHED]  # type: ignore[method-assign]

    def forward(self, *arguments: object) -> bool:
        """What `forward` is until the launcher is loaded."""
        return bool(self._launcher()["forward"](*arguments))

    def forward_cached(self, *arguments: object) -> bool:
        """The same on cached keys."""
        return bool(self._launcher()[CACHED](*arguments))

    def _load_arguments(self, spec: KernelSpec, cubin: Cubin) -> tuple[Any, ...]:
        fields = dict(spec.variant)
        cached = fields["function"] == CACHED
        return fields["head_dim"], fields["head_dim_v"], cached or fields["masked"], cached


_devices: dict[int, DeviceKernels] = {}


def kernels_of(device: torch.device) -> DeviceKernels:
    """The kernels of a tensor's device."""
    index: int = device.index
    found = _devices.get(index)
    if found is None:
        found = _devices[index] = DeviceKernels(index, device_target(device))
    return found

"""The Hopper kernels as things to compile, to load and to launch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jit_kernel.device import Target
from jit_kernel.engine import cubin
from jit_kernel.jit import Cubin, KernelSpec

FOLDER = "flash_attention_v3/hopper"
# Host code, kept with the GPU target whose warm-up builds it.
LAUNCHER = KernelSpec(
    FOLDER, '#include "flash_attention_v3/hopper/launch/launcher.cpp"\n', "host", (("function", "launcher"),)
)
DTYPES = ("bf16", "fp16")
# Head sizes of q and k, and of v; the least that hold a call's serve it, the rest is padded inside.
HEAD_DIMS = ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))
_APPEND_THREADS = 128  # kAppendThreads of append/params.h, as the unit asserts
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


def append_spec(dtype: str) -> KernelSpec:
    """The kernel that puts new keys and values into a cache and rotates: every head size and layout."""
    unit = (
        '#include "flash_attention_v3/hopper/append/append.cuh"\n'
        f"JIT_KERNEL_EXPORT_APPEND({dtype}, {_APPEND_THREADS})\n"
    )
    variant = (("function", "append"), ("dtype", dtype), ("threads", _APPEND_THREADS), ("shared_bytes", 0))
    return KernelSpec(FOLDER, unit, "cuda", variant, _FLAGS)


def all_specs() -> Iterator[KernelSpec]:
    """The launcher and every kernel: two dtypes, six pairs of head sizes, with and without mask and softcap."""
    yield LAUNCHER
    for dtype in DTYPES:
        yield append_spec(dtype)
        for head_dim, head_dim_v in HEAD_DIMS:
            for masked in (False, True):
                for softcap in (False, True):
                    yield forward_spec(dtype, head_dim, head_dim_v, masked, softcap)


def _is_plain(spec: KernelSpec) -> bool:
    """Whether a variant itself says how it is launched; of the others the launcher has a table."""
    return "threads" in dict(spec.variant)


class DeviceKernels(cubin.DeviceKernels):
    """The kernels of one GPU; `forward` and `append` launch one by its handle."""

    def __init__(self, index: int, target: Target) -> None:
        super().__init__(index, target, LAUNCHER)

    def _keep(self, functions: Any) -> None:
        self.forward = functions["forward"]  # type: ignore[method-assign]
        self.append = functions["append"]  # type: ignore[method-assign]

    def forward(self, *arguments: object) -> bool:
        """What `forward` is until the launcher is loaded."""
        return bool(self._launcher()["forward"](*arguments))

    def append(self, *arguments: object) -> bool:
        """As `forward`."""
        return bool(self._launcher()["append"](*arguments))

    def _load_function(self, spec: KernelSpec) -> str:
        return "load_plain" if _is_plain(spec) else "load_kernel"

    def _load_arguments(self, spec: KernelSpec, cubin: Cubin) -> tuple[Any, ...]:
        fields = dict(spec.variant)
        if _is_plain(spec):
            return fields["function"], fields["threads"], fields["shared_bytes"]
        return fields["head_dim"], fields["head_dim_v"], fields["masked"]

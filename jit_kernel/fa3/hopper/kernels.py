"""The Hopper kernels as things to compile, to load and to launch."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from jit_kernel import jit
from jit_kernel.device import Target
from jit_kernel.jit import KernelSpec

FOLDER = "flash_attention_v3/hopper"
# Host code, kept with the GPU target whose warm-up builds it.
LAUNCHER = KernelSpec(
    FOLDER, '#include "flash_attention_v3/hopper/launch/launcher.cpp"\n', "host", (("function", "launcher"),)
)
DTYPES = ("bf16", "fp16")
# Head sizes of q and k, and of v; the least that hold a call's serve it, the rest is padded inside.
HEAD_DIMS = ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))
# The compiler's account of registers and spills goes to the entry's log, which the tests read.
_FLAGS = ("--ptxas-options=-v",)

WARM_UP = "python -m jit_kernel.warmup --target cuda:sm_90a"


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


def all_specs() -> Iterator[KernelSpec]:
    """The launcher and every kernel: two dtypes, six pairs of head sizes, with and without mask and softcap."""
    yield LAUNCHER
    for dtype in DTYPES:
        for head_dim, head_dim_v in HEAD_DIMS:
            for masked in (False, True):
                for softcap in (False, True):
                    yield forward_spec(dtype, head_dim, head_dim_v, masked, softcap)


class DeviceKernels:
    """The kernels of one GPU: compiled or loaded at first use, then a handle of the launcher's."""

    def __init__(self, index: int, target: Target) -> None:
        self.handles: dict[tuple[object, ...], int] = {}
        self.forward: Callable[..., bool] = self._load_and_forward
        self._index = index
        self._target = target
        self._functions: Any = None
        if not jit.is_stored(LAUNCHER, target):
            # Two seconds of g++ beside the first kernel's compilation: who needs the launcher waits for it.
            threading.Thread(target=self._build_launcher, name="jit_kernel-launcher", daemon=True).start()

    def _build_launcher(self) -> None:
        with contextlib.suppress(Exception):  # whoever needs the launcher asks again and gets the error
            jit.load(LAUNCHER, self._target)

    def _load_and_forward(self, *arguments: object) -> bool:
        """What `forward` is until the launcher is there."""
        return bool(self._launcher()["forward"](*arguments))

    def _launcher(self) -> Any:
        if self._functions is None:
            functions = jit.load(LAUNCHER, self._target)
            functions["prepare"](self._index)
            self.forward = functions["forward"]
            self._functions = functions
        return self._functions

    def load(self, key: tuple[object, ...], spec: KernelSpec) -> int:
        """The handle of a variant, compiled if need be, under `key` from then on.

        Raises RuntimeError when that would take a compiler while the current stream is being captured.
        """
        self._refuse_to_compile_under_capture(spec)
        fields = dict(spec.variant)
        image = jit.load_cubin(spec, self._target).image
        handle = int(self._launcher()["load_kernel"](image, fields["head_dim"], fields["head_dim_v"], fields["masked"]))
        self.handles[key] = handle
        return handle

    def _refuse_to_compile_under_capture(self, spec: KernelSpec) -> None:
        if not torch.cuda.is_current_stream_capturing():
            return
        missing = [str(each) for each in (LAUNCHER, spec) if not jit.is_stored(each, self._target)]
        if missing:
            raise RuntimeError(
                f"{' and '.join(missing)} would have to be compiled while a CUDA graph is being captured; "
                f"run `{WARM_UP}` first, or make the call once before the capture"
            )

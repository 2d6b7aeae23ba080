"""CUDA kernels of anybody's sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

import torch

from jit_kernel.engine.sources import Sources
from jit_kernel.engine.spec import KernelSpec, Scalar
from jit_kernel.toolkit.devices import Device
from jit_kernel.toolkit.kernels import Kernel
from jit_kernel.toolkit.shapes import Size

# The names of CUDA's own headers, and of C++.
_CUDA = {
    torch.float32: "float",
    torch.float64: "double",
    torch.float16: "__half",
    torch.bfloat16: "__nv_bfloat16",
    torch.float8_e4m3fn: "__nv_fp8_e4m3",
    torch.float8_e5m2: "__nv_fp8_e5m2",
    torch.int8: "signed char",
    torch.uint8: "unsigned char",
    torch.int16: "short",
    torch.int32: "int",
    torch.int64: "long long",
    torch.bool: "bool",
}
# Those of jit_kernel/cpu/element.h.
_CPU = _CUDA | {
    torch.float16: "jit_kernel::fp16",
    torch.bfloat16: "jit_kernel::bf16",
    torch.float8_e4m3fn: "jit_kernel::e4m3",
}
del _CPU[torch.float8_e5m2]
# The compiler names a unit's own constants after its first external function; without one after its process, and no two
# builds had the same bytes. The cubin holds nothing of the function.
_FIRST = 'extern "C" __device__ void jit_kernel_unit() {}'
_HEADERS = {"__half": "cuda_fp16.h", "__nv_bfloat16": "cuda_bf16.h", "__nv_fp8": "cuda_fp8.h"}


def ctype(of: torch.dtype | torch.Tensor, device: str | torch.device | None = None) -> str:
    """The C++ type of a dtype, or of a tensor's elements: "__nv_bfloat16" on CUDA, "jit_kernel::bf16" on the CPU.

    device: cuda or cpu; without one, the tensor's, and cuda for a dtype. Raises TypeError for a dtype without a type.
    """
    dtype = of.dtype if isinstance(of, torch.Tensor) else of
    if device is None:
        device = of.device if isinstance(of, torch.Tensor) else "cuda"
    kind = str(device).partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device is {str(device)!r}; it must be cpu or cuda")
    found = (_CPU if kind == "cpu" else _CUDA).get(dtype)
    if found is None:
        raise TypeError(f"{dtype} has no C++ type on {kind}; it must be one of {', '.join(map(str, _CUDA))}")
    return found


def cuda(
    sources: Sources | None,
    file: str,
    *,
    entry: str,
    device: Device = None,
    flags: Sequence[str] = (),
    variant: Mapping[str, Scalar] | None = None,
    cluster: Size = 1,
    cooperative: bool = False,
    programmatic: bool = False,
) -> Kernel:
    """A `__global__` function of a file as a kernel, compiled by NVRTC when it is first launched.

    sources: where the file lies; None for jit_kernel's own. entry: the function, with its template arguments,
    "rms_norm<__nv_bfloat16, 4096>". device: a GPU ("cuda:1"), or an architecture that need not be here
    ("cuda:sm_90a"); None for the GPU that is current at the first launch. flags: for NVRTC. variant: what lists and
    explanations call it; without one, the entry. cluster, cooperative, programmatic: as of `Kernel.launch`.
    """
    headers = [header for name, header in _HEADERS.items() if name in entry]
    lines = [_FIRST, *(f"#include <{header}>" for header in headers)]
    lines += [f'#include "{file}"', '#include "jit_kernel/cuda/entry_table.cuh"', f"JIT_KERNEL_ENTRY({entry})", ""]
    named = dict(variant or {"entry": entry})
    spec = spec_of(sources, file, "\n".join(lines), "cuda", named, flags, entry)
    return Kernel(spec, device, cluster, cooperative, programmatic)


def spec_of(
    sources: Sources | None,
    file: str,
    unit: str,
    route: str,
    variant: Mapping[str, Scalar],
    flags: Sequence[str],
    entry: str = "",
) -> KernelSpec:
    """The kernel of a file; its place in the store is called after the sources and the file.

    Raises ValueError for a file that is not there, TypeError for flags that no key would cover.
    """
    if isinstance(flags, str):
        raise TypeError(f"flags is {flags!r}; it must be a list of strings")
    for flag in flags:
        if flag.startswith(("-I", "-include", "--include", "-isystem", "--pre-include")):
            raise ValueError(f"flags has {flag!r}; what it brings in no key would cover: put it below the sources")
    if sources is None:
        return KernelSpec(str(PurePosixPath(*PurePosixPath(file).parts[:2])), unit, route, tuple(variant.items()),
                          tuple(flags), None, entry)  # fmt: skip
    if sources.read(file) is None:
        raise ValueError(f"file is {file!r}; it must be a file of {sources}")
    kernel = f"{sources.name}/{PurePosixPath(file).stem}"
    return KernelSpec(kernel, unit, route, tuple(variant.items()), tuple(flags), sources, entry)

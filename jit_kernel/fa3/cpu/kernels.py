"""The CPU libraries as things to compile and to load: one for each dtype, or pair of dtypes, and one that combines.

They take every head size up to 512 and every argument at run time (kernel_sources/flash_attention_v3/cpu).
"""

from __future__ import annotations

from collections.abc import Iterator

from jit_kernel import jit
from jit_kernel.jit import KernelSpec

MAX_HEAD_DIM = 512

_KERNEL = "flash_attention_v3/cpu"
_ELEMENTS = {"fp32": "f32", "bf16": "bf16", "fp16": "fp16", "e4m3": "e4m3"}


def forward_spec(dtype: str, kv_dtype: str | None = None) -> KernelSpec:
    """The library that attends in one dtype, or with queries of one over keys and values of another, e4m3."""
    export = f"JIT_KERNEL_EXPORT_FORWARD({_ELEMENTS[dtype]})"
    keys: dict[str, str] = {}
    if kv_dtype not in (None, dtype):
        export, keys = f"JIT_KERNEL_EXPORT_CHECKED_FORWARD({dtype}_over_{kv_dtype})", {"kv_dtype": str(kv_dtype)}
    variant = {"function": "forward", "dtype": dtype, **keys, "head_dim": "any"}
    return jit.library(None, f"{_KERNEL}/entry/forward.h", exports=[export], variant=variant).spec


def combine_spec() -> KernelSpec:
    """The library that combines splits and merges states, in every dtype."""
    exports = ["JIT_KERNEL_EXPORT_COMBINE()"]
    return jit.library(None, f"{_KERNEL}/entry/combine.h", exports=exports, variant={"function": "combine"}).spec


def backward_spec(dtype: str) -> KernelSpec:
    """The library of the backward pass in one dtype."""
    exports = [f"JIT_KERNEL_EXPORT_BACKWARD({_ELEMENTS[dtype]})"]
    variant = {"function": "backward", "dtype": dtype, "head_dim": "any"}
    return jit.library(None, f"{_KERNEL}/entry/backward.h", exports=exports, variant=variant).spec


def all_specs() -> Iterator[KernelSpec]:
    """What warm-up compiles, but for the backward pass (backward.variants)."""
    for dtype in _ELEMENTS:
        yield forward_spec(dtype)
    for dtype in ("bf16", "fp16"):
        yield forward_spec(dtype, "e4m3")
    yield combine_spec()

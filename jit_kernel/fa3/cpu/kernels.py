"""The CPU libraries as things to compile and to load: one for each dtype, or pair of dtypes, and one that combines.

They take every head size up to 512 and every argument at run time (kernel_sources/flash_attention_v3/cpu).
"""

from __future__ import annotations

from collections.abc import Iterator

from jit_kernel.jit import KernelSpec

MAX_HEAD_DIM = 512

_KERNEL = "flash_attention_v3/cpu"
_ELEMENTS = {"fp32": "f32", "bf16": "bf16", "fp16": "fp16", "e4m3": "e4m3"}
# Scores that are masked are -inf, so never -ffast-math. The library's threads outlive a dropped module: nodelete.
_FLAGS = ("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-pthread", "-Wl,-z,nodelete")


def forward_spec(dtype: str, kv_dtype: str | None = None) -> KernelSpec:
    """The library that attends in one dtype, or with queries of one over keys and values of another, e4m3."""
    export = f"JIT_KERNEL_EXPORT_FORWARD({_ELEMENTS[dtype]})"
    keys: tuple[tuple[str, str], ...] = ()
    if kv_dtype not in (None, dtype):
        export, keys = f"JIT_KERNEL_EXPORT_CHECKED_FORWARD({dtype}_over_{kv_dtype})", (("kv_dtype", str(kv_dtype)),)
    unit = f'#include "{_KERNEL}/entry/forward.h"\n{export}\n'
    variant = (("function", "forward"), ("dtype", dtype), *keys, ("head_dim", "any"))
    return KernelSpec(_KERNEL, unit, "host", variant, _FLAGS)


def combine_spec() -> KernelSpec:
    """The library that combines splits and merges states, in every dtype."""
    unit = f'#include "{_KERNEL}/entry/combine.h"\nJIT_KERNEL_EXPORT_COMBINE()\n'
    return KernelSpec(_KERNEL, unit, "host", (("function", "combine"),), _FLAGS)


def all_specs() -> Iterator[KernelSpec]:
    """What warm-up compiles."""
    for dtype in _ELEMENTS:
        yield forward_spec(dtype)
    for dtype in ("bf16", "fp16"):
        yield forward_spec(dtype, "e4m3")
    yield combine_spec()

"""The processes of overhead.py: they use public names alone, so that checkouts of any age can be measured.

python overhead_worker.py calls cpu|cuda CALLS     one JSON line a line of standard input: medians in microseconds
python overhead_worker.py first cpu|cuda           one JSON line: seconds of imports and of the first call
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

BATCH = 100  # calls that follow each other before the device is waited for


def first(device: str) -> dict[str, Any]:
    """Import the package, then torch and tvm_ffi, then a public name, and make one call."""
    begin = time.perf_counter()
    import jit_kernel

    package = time.perf_counter()
    import torch
    import tvm_ffi  # noqa: F401

    libraries = time.perf_counter()
    from jit_kernel import flash_attn_func

    names = time.perf_counter()
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    q, k, v = (torch.randn(1, 256, 8, 64, device=device, dtype=dtype) for _ in "qkv")
    if device == "cuda":
        torch.cuda.synchronize()
    called = time.perf_counter()
    out = flash_attn_func(q, k, v, causal=True)
    if device == "cuda":
        torch.cuda.synchronize()
    answered = time.perf_counter()
    assert out.isfinite().all()
    return {
        "package": jit_kernel.__file__,
        "import_s": package - begin,
        "public_name_s": names - libraries,
        "first_call_s": answered - called,
    }


def smallest_calls(device: str) -> dict[str, Callable[[], object]]:
    """The smallest calls by name, each followed by torch's SDPA on tensors of the same shapes."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    from jit_kernel import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

    # A GPU's smallest call is one tile of queries: 64.
    tokens, heads, d, dtype = (1, 1, 64, torch.float32) if device == "cpu" else (64, 2, 64, torch.bfloat16)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    def ints(*numbers: int) -> torch.Tensor:
        return torch.tensor(numbers, device=device, dtype=torch.int32)

    q, k, v, out = (normal(1, tokens, heads, d) for _ in "qkvo")
    a, b, c = (x.transpose(1, 2) for x in (q, k, v))
    flat_q, flat_k, flat_v, flat_out = (x[0] for x in (q, k, v, out))
    cu_seqlens = ints(0, tokens)
    row, row_out = normal(1, 1, heads, d), normal(1, 1, heads, d)
    k_pages, v_pages, table = normal(4, 16, heads, d), normal(4, 16, heads, d), ints(2, 0, 3, 1).view(1, 4)
    e, f, g = row.transpose(1, 2), *(normal(1, heads, 50, d) for _ in "kv")
    length = ints(50)

    def dense() -> object:
        return flash_attn_func(q, k, v, causal=True, out=out)

    def ragged() -> object:
        return flash_attn_varlen_func(
            flat_q, flat_k, flat_v, cu_seqlens, cu_seqlens, max_seqlen_q=tokens, max_seqlen_k=tokens, causal=True,
            out=flat_out,
        )  # fmt: skip

    def paged(num_splits: int = 1) -> object:
        return flash_attn_with_kvcache(
            row, k_pages, v_pages, cache_seqlens=length, page_table=table, causal=True, num_splits=num_splits,
            out=row_out,
        )  # fmt: skip

    calls: dict[str, Callable[[], object]] = {
        "flash_attn_func": dense,
        "flash_attn_func, torch SDPA": lambda: scaled_dot_product_attention(a, b, c, is_causal=True),
        "flash_attn_varlen_func": ragged,
        "flash_attn_varlen_func, torch SDPA": lambda: scaled_dot_product_attention(a, b, c, is_causal=True),
        "flash_attn_with_kvcache, paged": paged,
        "flash_attn_with_kvcache, paged, torch SDPA": lambda: scaled_dot_product_attention(e, f, g),
    }
    if device == "cuda":  # with one split it is prefill's kernels that serve
        calls["flash_attn_with_kvcache, paged, splits chosen"] = lambda: paged(num_splits=0)
    return calls


def medians(calls: dict[str, Callable[[], object]], device: str, count: int) -> dict[str, float]:
    """Median microseconds of each call, in batches that take turns, because a core's clock changes."""
    import torch

    taken: dict[str, list[int]] = {name: [] for name in calls}
    for _ in range(-(-count // BATCH)):
        for name, call in calls.items():
            if device == "cuda":
                torch.cuda.synchronize()
            for _ in range(BATCH):
                begin = time.perf_counter_ns()
                call()
                taken[name].append(time.perf_counter_ns() - begin)
    return {name: statistics.median(each) / 1e3 for name, each in taken.items()}


def serve(device: str, count: int) -> None:
    """A round for every line of standard input."""
    import torch

    import jit_kernel

    with torch.no_grad():
        calls = smallest_calls(device)
        for call in calls.values():
            call()
        print(json.dumps({"package": jit_kernel.__file__, "questions": ["round"]}), flush=True)
        for _ in sys.stdin:
            print(json.dumps(medians(calls, device, count)), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "first":
        print(json.dumps(first(sys.argv[2])))
    else:
        serve(sys.argv[2], int(sys.argv[3]))

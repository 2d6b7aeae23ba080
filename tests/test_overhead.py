"""A call's price before any arithmetic: the smallest call, from Python to return."""

from __future__ import annotations

import statistics
import time

import torch

from jit_kernel import flash_attn_func

CALLS = 10_000


def test_the_smallest_call():
    """b = 1, s = 1, one head, d = 64, fp32, out given: at most 15 us in the median, beside torch's SDPA."""
    q, k, v = (torch.randn(1, 1, 1, 64) for _ in range(3))
    out = torch.empty_like(q)
    heads_first = [tensor.transpose(1, 2) for tensor in (q, k, v)]
    ours, theirs = [], []
    with torch.no_grad():
        for _ in range(CALLS + 500):
            begin = time.perf_counter_ns()
            flash_attn_func(q, k, v, out=out)
            middle = time.perf_counter_ns()
            torch.nn.functional.scaled_dot_product_attention(*heads_first)
            ours.append(middle - begin)
            theirs.append(time.perf_counter_ns() - middle)
    assert torch.equal(out, v), "one key: the answer is its value"
    mine, sdpa = (statistics.median(times[500:]) / 1e3 for times in (ours, theirs))
    print(f"smallest call {mine:.1f} us, torch SDPA {sdpa:.1f} us")
    assert mine <= 15

"""A call's price before any arithmetic: the smallest call, from Python to return."""

from __future__ import annotations

import statistics
import time

import torch

from jit_kernel import flash_attn_func

CALLS = 2_000
ROUNDS = 10
MOST_US = 10.0
# Where MOST_US was set torch's SDPA takes 4.2 us and ours 5.1. A busy neighbour has doubled both for minutes: then the
# limit is this many times torch's time in the same round.
MOST_TIMES_SDPA = 2.0


def round_of_calls(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> tuple[float, float]:
    """Medians in microseconds of our call and of torch's SDPA, taken in turns."""
    heads_first = [tensor.transpose(1, 2) for tensor in (q, k, v)]
    ours, theirs = [], []
    for _ in range(CALLS):
        begin = time.perf_counter_ns()
        flash_attn_func(q, k, v, out=out)
        middle = time.perf_counter_ns()
        torch.nn.functional.scaled_dot_product_attention(*heads_first)
        ours.append(middle - begin)
        theirs.append(time.perf_counter_ns() - middle)
    return statistics.median(ours) / 1e3, statistics.median(theirs) / 1e3


def test_the_smallest_call(say: list[str]) -> None:
    """b = 1, s = 1, one head, d = 64, fp32, out given: within the limit in one of ten rounds after the first."""
    q, k, v = (torch.randn(1, 1, 1, 64) for _ in range(3))
    out = torch.empty_like(q)
    with torch.no_grad():
        round_of_calls(q, k, v, out)
        for _ in range(ROUNDS):
            mine, sdpa = round_of_calls(q, k, v, out)
            if mine <= MOST_US:
                break
    assert torch.equal(out, v), "one key: the answer is its value"
    say.append(f"smallest call {mine:.1f} us, torch SDPA {sdpa:.1f} us")
    assert mine <= max(MOST_US, MOST_TIMES_SDPA * sdpa)

"""What the parts of the prefill benchmark share: inputs, competitors that follow each other, and a result's line."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

Line = dict[str, Any]
TOKENS, HIDDEN = 16384, 2048


def compete(competitors: dict[str, Callable[[], object]], rounds: int, spent: int = 150) -> dict[str, list[float]]:
    """Milliseconds of each competitor in each round, in which it runs for `spent` milliseconds."""
    from triton.testing import do_bench

    times: dict[str, list[float]] = {name: [] for name in competitors}
    dice = random.Random(0)
    for _ in range(rounds):
        order = list(competitors)
        dice.shuffle(order)
        for name in order:
            times[name].append(do_bench(competitors[name], warmup=spent // 6, rep=spent, return_mode="median"))
    return times


def line_of(case: Line, operations: float, times: dict[str, list[float]]) -> Line:
    """A case's result: median and range of TFLOP/s, and what it is in units of cuDNN's median."""
    line = dict(case)
    for name, milliseconds in times.items():
        rates = sorted(operations / each / 1e9 for each in milliseconds)
        line[f"{name}_tflops"] = round(statistics.median(rates), 1)
        line[f"{name}_range"] = [round(rates[0], 1), round(rates[-1], 1)]
    if {"ours", "cudnn"} <= times.keys():
        line["over_cudnn"] = round(line["ours_tflops"] / line["cudnn_tflops"], 4)
    return line


def dense(head_dim: int, length: int, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shape = (TOKENS // length, length, HIDDEN // head_dim, head_dim)
    return [torch.randn(shape, device="cuda", dtype=dtype) for _ in range(3)]


def cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> Callable[[], object]:
    a, b, c = (x.transpose(1, 2) for x in (q, k, v))

    def call() -> object:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(a, b, c, is_causal=causal)

    return call

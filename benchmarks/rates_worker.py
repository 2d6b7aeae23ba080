"""The process that measures for rates.py: a round for every line of its standard input.

usage: rates_worker.py calls DEVICE COUNT
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch

import jit_kernel
from jit_kernel import flash_attn_func, flash_attn_with_kvcache

Calls = dict[str, Callable[[], object]]
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def prefill(device: str, dtype: torch.dtype, tokens: int, d: int, **options: object) -> Calls:
    """One dense call of 2 heads on a CPU, 16 on a GPU."""
    heads = 2 if device == "cpu" else 16
    q, k, v = (torch.randn(1, tokens, heads, d, device=device).to(dtype) for _ in "qkv")
    out = torch.empty_like(q)
    shown = " ".join(f"{name}={value}" for name, value in options.items())
    name = f"prefill {_NAMES[dtype]} {tokens} d {d} {shown}".rstrip()
    return {name: lambda: flash_attn_func(q, k, v, out=out, **options)}  # type: ignore[arg-type]


def decode(device: str, dtype: torch.dtype, batch: int, keys: int, page: int, **options: object) -> Calls:
    """One token of each sequence over its pages, 32/8 heads, d 128."""
    pages = keys // page
    cache = [torch.randn(batch * pages, page, 8, 128, device=device).to(dtype) for _ in "kv"]
    q = torch.randn(batch, 1, 32, 128, device=device).to(dtype)
    table = torch.randperm(batch * pages, device=device).to(torch.int32).view(batch, pages)
    lengths = torch.full((batch,), keys, dtype=torch.int32, device=device)
    shown = " ".join(f"{name}={value}" for name, value in options.items())
    name = f"decode {_NAMES[dtype]} {batch} x {keys}, page {page} {shown}".rstrip()
    return {
        name: lambda: flash_attn_with_kvcache(
            q,
            *cache,
            cache_seqlens=lengths,
            page_table=table,
            causal=True,
            **options,  # type: ignore[arg-type]
        )
    }


def cases(device: str) -> Calls:
    """What is measured on a device."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    window = {"causal": True, "window_size": (255, 0)}
    if device == "cpu":
        return {
            **prefill(device, bf16, 2048, 128),
            **prefill(device, bf16, 2048, 128, causal=True),
            **prefill(device, bf16, 2048, 64, causal=True),
            **prefill(device, bf16, 512, 128, causal=True),
            **prefill(device, bf16, 2048, 128, **window),
            **prefill(device, fp16, 1024, 128, causal=True),
            **prefill(device, fp32, 1024, 128, causal=True),
            **decode(device, bf16, 4, 4096, 16),
            **decode(device, bf16, 4, 4096, 16, window_size=(1023, 0)),
            **decode(device, fp16, 2, 4096, 16),
            **decode(device, fp32, 2, 4096, 16),
        }
    return {
        **{
            name: call
            for tokens in (4096, 16384)
            for d in (64, 128, 256)
            for options in ({}, {"causal": True})
            for name, call in prefill(device, bf16, tokens, d, **options).items()
        },
        **prefill(device, fp16, 4096, 128, causal=True),
        **prefill(device, bf16, 8192, 128, **window),
        **decode(device, bf16, 64, 8192, 16),
        **decode(device, bf16, 16, 32768, 64),
        **decode(device, bf16, 64, 8192, 16, window_size=(1023, 0)),
    }


def microseconds(call: Callable[[], object], device: str, count: int) -> float:
    """The median of `count` calls."""
    if device == "cpu":
        taken = []
        for _ in range(count):
            begin = time.process_time_ns()
            call()
            taken.append((time.process_time_ns() - begin) / 1e3)
        return statistics.median(taken)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    for event in events[:-1]:
        event.record()
        call()
    events[-1].record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) * 1e3 for a, b in itertools.pairwise(events))


def serve(device: str, count: int) -> None:
    """A round for every line of standard input."""
    torch.manual_seed(0)
    if device == "cpu":
        torch.set_num_threads(1)
    with torch.no_grad():
        calls = cases(device)
        for call in calls.values():
            call()
        print(json.dumps({"package": jit_kernel.__file__}), flush=True)
        for _ in sys.stdin:
            measured = {name: microseconds(call, device, count) for name, call in calls.items()}
            print(json.dumps(measured), flush=True)


if __name__ == "__main__":
    serve(sys.argv[2], int(sys.argv[3]))

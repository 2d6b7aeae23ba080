"""The process that measures for rates.py: one case for every line of its standard input.

usage: rates_worker.py calls DEVICE COUNT QUICK [MEMORY]

QUICK is 1 for few cases. MEMORY is a file whose bytes the tensors lie in: with one file for all workers they lie at
the same physical addresses in each.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable

import torch

import jit_kernel
from jit_kernel import flash_attn_func, flash_attn_with_kvcache

Calls = dict[str, Callable[[], object]]
_PAGE = 4096
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Inputs:
    """Random tensors of one device, in the order of the cases; on a CPU in a file that all workers map."""

    def __init__(self, device: str, memory: str | None) -> None:
        self.device = device
        self._bytes = None
        self._used = 0
        if memory is not None:
            self._bytes = torch.from_file(memory, shared=True, size=os.path.getsize(memory), dtype=torch.uint8)

    def normal(self, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """Normally distributed numbers; the same in every worker."""
        numbers = torch.randn(shape, device=self.device).to(dtype)
        if self._bytes is None:
            return numbers
        start, self._used = self._used, self._used + -(-numbers.nbytes // _PAGE) * _PAGE
        if self._used > len(self._bytes):
            raise RuntimeError(f"the inputs need more than the {len(self._bytes)} bytes that workers share")
        return self._bytes[start : start + numbers.nbytes].view(dtype).view(shape).copy_(numbers)


def prefill(inputs: Inputs, dtype: torch.dtype, tokens: int, d: int, **options: object) -> Calls:
    """One dense call of 2 heads on a CPU, 16 on a GPU."""
    heads = 2 if inputs.device == "cpu" else 16
    q, k, v, out = (inputs.normal(dtype, 1, tokens, heads, d) for _ in "qkvo")
    shown = " ".join(f"{name}={value}" for name, value in options.items())
    name = f"prefill {_NAMES[dtype]} {tokens} d {d} {shown}".rstrip()
    return {name: lambda: flash_attn_func(q, k, v, out=out, **options)}  # type: ignore[arg-type]


def decode(inputs: Inputs, dtype: torch.dtype, batch: int, keys: int, page: int, **options: object) -> Calls:
    """One token of each sequence over its pages, 32/8 heads, d 128."""
    pages = keys // page
    cache = [inputs.normal(dtype, batch * pages, page, 8, 128) for _ in "kv"]
    q, out = (inputs.normal(dtype, batch, 1, 32, 128) for _ in "qo")
    table = torch.randperm(batch * pages, device=inputs.device).to(torch.int32).view(batch, pages)
    lengths = torch.full((batch,), keys, dtype=torch.int32, device=inputs.device)
    shown = " ".join(f"{name}={value}" for name, value in options.items())
    name = f"decode {_NAMES[dtype]} {batch} x {keys}, page {page} {shown}".rstrip()
    return {
        name: lambda: flash_attn_with_kvcache(
            q,
            *cache,
            cache_seqlens=lengths,
            page_table=table,
            causal=True,
            out=out,
            **options,  # type: ignore[arg-type]
        )
    }


def cases(inputs: Inputs, quick: bool) -> Calls:
    """What is measured on a device."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    window = {"causal": True, "window_size": (255, 0)}
    if inputs.device == "cpu":
        shortest = {
            **prefill(inputs, bf16, 512, 128, causal=True),
            **decode(inputs, bf16, 4, 4096, 16),
            **decode(inputs, fp16, 2, 4096, 16),
            **decode(inputs, fp32, 2, 4096, 16),
        }
        if quick:
            return shortest
        return {
            **shortest,
            **decode(inputs, bf16, 4, 4096, 16, window_size=(1023, 0)),
            **prefill(inputs, bf16, 2048, 128),
            **prefill(inputs, bf16, 2048, 128, causal=True),
            **prefill(inputs, bf16, 2048, 64, causal=True),
            **prefill(inputs, bf16, 2048, 128, **window),
            **prefill(inputs, fp16, 1024, 128, causal=True),
            **prefill(inputs, fp32, 1024, 128, causal=True),
        }
    return {
        **{
            name: call
            for tokens in ((4096,) if quick else (4096, 16384))
            for d in (64, 128, 256)
            for options in ({}, {"causal": True})
            for name, call in prefill(inputs, bf16, tokens, d, **options).items()
        },
        **prefill(inputs, fp16, 4096, 128, causal=True),
        **prefill(inputs, bf16, 8192, 128, **window),
        **decode(inputs, bf16, 64, 8192, 16),
        **decode(inputs, bf16, 16, 32768, 64),
        **decode(inputs, bf16, 64, 8192, 16, window_size=(1023, 0)),
    }


def microseconds(call: Callable[[], object], device: str, count: int) -> float:
    """The median of `count` calls behind one that is not counted: another worker's data lie in the caches."""
    call()
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


def serve(device: str, count: int, quick: bool, memory: str | None) -> None:
    """Measure the case that each line of standard input names."""
    torch.manual_seed(0)
    if device == "cpu":
        torch.set_num_threads(1)
    with torch.no_grad():
        calls = cases(Inputs(device, memory), quick)
        for call in calls.values():
            call()
        if device == "cpu":  # not before: the first calls compiled
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        print(json.dumps({"package": jit_kernel.__file__, "questions": list(calls)}), flush=True)
        for line in sys.stdin:
            name = line.rstrip("\n")
            print(json.dumps({name: microseconds(calls[name], device, count)}), flush=True)


if __name__ == "__main__":
    serve(sys.argv[2], int(sys.argv[3]), sys.argv[4] == "1", sys.argv[5] if len(sys.argv) > 5 else None)

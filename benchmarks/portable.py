"""The portable implementation on a GPU against FlashAttention 2 as PyTorch carries it, and against a copy.

    python benchmarks/portable.py [--folder results]

Prefill in TFLOP/s (4 * b * hq * sq * sk * d, half with a causal mask), also of e4m3; decode in GB/s of keys and values
read, replayed from a captured graph, also of e4m3 caches beside bf16, and of absorbed MLA, where a key's 576 numbers
count once as bytes and 2 * 1088 operations for each head; the host's share of a warm call; a first call with an empty
and with a filled store.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["JIT_KERNEL_IMPLEMENTATION"] = "portable"
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import record  # noqa: E402
import torch  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention  # noqa: E402

from jit_kernel.flash_attention_v3 import flash_attn_func, flash_attn_with_kvcache  # noqa: E402

Line = dict[str, Any]
TOKENS, HIDDEN = 16384, 2048
DECODE = (  # batch, keys, tokens, query heads, key/value heads, head size, page size
    (64, 8192, 1, 32, 8, 128, 64),
    (64, 8192, 1, 32, 8, 128, 1),
    (64, 8192, 1, 32, 8, 64, 64),
    (64, 8192, 1, 32, 8, 256, 64),
    (16, 8192, 1, 32, 8, 128, 64),
    (1, 8192, 1, 32, 8, 128, 64),
    (128, 4096, 1, 32, 8, 128, 64),
    (32, 8192, 1, 64, 8, 128, 64),
    (32, 8192, 4, 64, 8, 128, 64),
)
E4M3 = torch.float8_e4m3fn
MIXED = (  # as DECODE, of a cache in e4m3
    (64, 32768, 1, 32, 8, 128, 64),
    (64, 32768, 1, 32, 8, 128, 1),
    (16, 8192, 1, 32, 8, 128, 64),
)
ABSORBED = (  # batch, keys, query heads, dtype
    (64, 8192, 16, torch.bfloat16),
    (64, 8192, 128, torch.bfloat16),
    (64, 8192, 128, E4M3),
)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def median_ms(work: Callable[[], object], repeats: int) -> float:
    """Median time of one run on the device, after two that warm up."""
    work(), work()
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in pairs:
        begin.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return sorted(begin.elapsed_time(end) for begin, end in pairs)[repeats // 2]


def prefill() -> list[Line]:
    lines = []
    for head_dim in (64, 128, 256):
        for seqlen in (1024, 4096, 16384):
            batch, heads = TOKENS // seqlen, HIDDEN // head_dim
            q, k, v = (normal(batch, seqlen, heads, head_dim) for _ in range(3))
            by_head = [x.transpose(1, 2) for x in (q, k, v)]
            for causal in (False, True):
                billions = 4 * batch * heads * seqlen**2 * head_dim * (0.5 if causal else 1) / 1e9

                def ours(q=q, k=k, v=v, causal=causal) -> object:
                    return flash_attn_func(q, k, v, causal=causal)

                def peer(by_head=by_head, causal=causal) -> object:
                    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                        return scaled_dot_product_attention(*by_head, is_causal=causal)

                rates = [billions / median_ms(work, 12) for work in (peer, ours)]
                lines.append(
                    {"case": "prefill", "head_dim": head_dim, "heads": heads, "seqlen": seqlen, "causal": causal,
                     "peer": "FA2 in torch's SDPA", "peer_tflops": round(rates[0], 1), "tflops": round(rates[1], 1),
                     "share": round(rates[1] / rates[0], 3)}
                )  # fmt: skip
    return lines


def copy_rate() -> float:
    """GB/s that a copy of 2 GiB reads and writes."""
    source = torch.empty(2**30, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    return 4 * source.numel() / median_ms(lambda: target.copy_(source), 20) / 1e6


def replayed_ms(calls: Callable[[], object]) -> float:
    """Median time of calls that are captured into a graph, after one that warms up."""
    calls()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()
    return median_ms(graph.replay, 20)


def e4m3_prefill() -> list[Line]:
    """16,384 tokens of one sequence, 16 heads of 128, beside bf16."""
    lines = []
    for causal in (False, True):
        billions = 4 * 16 * TOKENS**2 * 128 * (0.5 if causal else 1) / 1e9
        for dtype in (torch.bfloat16, E4M3):
            q, k, v = (normal(1, TOKENS, 16, 128).to(dtype) for _ in range(3))
            ms = median_ms(lambda q=q, k=k, v=v, causal=causal: flash_attn_func(q, k, v, causal=causal), 12)
            lines.append(
                {"case": "prefill of one sequence", "dtype": str(dtype)[6:], "head_dim": 128, "heads": 16,
                 "seqlen": TOKENS, "causal": causal, "tflops": round(billions / ms, 1)}
            )  # fmt: skip
    return lines


def absorbed() -> list[Line]:
    """Decode of absorbed MLA over pages of 64: keys of 64 behind values of 512, one head of both."""
    lines = []
    for batch, keys, heads, dtype in ABSORBED:
        q, qv = normal(batch, 1, heads, 64).to(dtype), normal(batch, 1, heads, 512).to(dtype)
        rows = normal(batch * keys // 64, 64, 1, 576).to(dtype)
        table = torch.randperm(len(rows), device="cuda").int().view(batch, -1)
        options = {"cache_seqlens": torch.full((batch,), keys, dtype=torch.int32, device="cuda"), "page_table": table}

        def call(q=q, qv=qv, rows=rows, options=options) -> object:
            return flash_attn_with_kvcache(q, rows[..., 512:], rows[..., :512], qv=qv, causal=True, **options)

        ms = replayed_ms(call)
        lines.append(
            {"case": "absorbed", "batch": batch, "keys": keys, "heads": heads, "dtype": str(dtype)[6:],
             "ms": round(ms, 4), "tflops": round(2 * batch * keys * heads * 1088 / ms / 1e9, 1),
             "gbytes_per_s": round(rows.numel() * rows.element_size() / ms / 1e6)}
        )  # fmt: skip
    return lines


def decode() -> list[Line]:
    copied = copy_rate()
    lines = [{"case": "copy", "gbytes_per_s": round(copied)}]
    for dtype, case in [*((torch.bfloat16, each) for each in DECODE), *((E4M3, each) for each in MIXED)]:
        batch, keys, tokens, heads, kv_heads, head_dim, page_size = case
        bytes_read = batch * keys * kv_heads * head_dim * 2 * dtype.itemsize
        inputs = []
        for _ in range(max(1, min(8, int(4e8 // bytes_read)))):  # together well past the L2 cache
            pages = batch * keys // page_size
            k_cache, v_cache = (normal(pages, page_size, kv_heads, head_dim).to(dtype) for _ in range(2))
            inputs.append((k_cache, v_cache, torch.randperm(pages, device="cuda").int().view(batch, -1)))
        q = normal(batch, tokens, heads, head_dim)
        lengths = torch.full((batch,), keys, dtype=torch.int32, device="cuda")

        def calls(inputs=inputs, q=q, lengths=lengths) -> None:
            for k_cache, v_cache, table in inputs:
                flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=lengths, page_table=table, causal=True)

        ms = replayed_ms(calls) / len(inputs)
        rate = bytes_read / ms / 1e6
        lines.append(
            {"case": "decode", "cache": str(dtype)[6:], "batch": batch, "keys": keys, "tokens": tokens,
             "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "page_size": page_size, "ms": round(ms, 4),
             "gbytes_per_s": round(rate), "share_of_copy": round(rate / copied, 3)}
        )  # fmt: skip
    return lines


def host() -> list[Line]:
    """Microseconds that a warm call keeps the host busy; the least of batches that the device drains in between."""
    q, cache = normal(4, 1, 8, 128), normal(64, 16, 2, 128)
    table = torch.arange(64, device="cuda", dtype=torch.int32).view(4, 16)
    lengths = torch.full((4,), 100, dtype=torch.int32, device="cuda")
    k = normal(4, 64, 8, 128)
    out = torch.empty_like(q)
    calls = {
        "flash_attn_func": lambda: flash_attn_func(q, k, k, causal=True, out=out),
        "flash_attn_with_kvcache, paged, num_splits=1": lambda: flash_attn_with_kvcache(
            q, cache, cache, cache_seqlens=lengths, page_table=table, causal=True, num_splits=1, out=out
        ),
    }
    lines = []
    for name, call in calls.items():
        for _ in range(20):
            call()
        least = float("inf")
        for _ in range(30):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(50):
                call()
            least = min(least, (time.perf_counter() - begin) / 50)
        lines.append({"case": "host", "call": name, "microseconds": round(least * 1e6, 1)})
    return lines


_FIRST_CALL = """
import json, time, torch
q = torch.randn(2, 512, 8, 128, device="cuda", dtype=torch.bfloat16)
torch.cuda.synchronize()
begin = time.perf_counter()
from jit_kernel import jit
from jit_kernel.flash_attention_v3 import flash_attn_func
flash_attn_func(q, q, q, causal=True)
torch.cuda.synchronize()
seconds = time.perf_counter() - begin
print(json.dumps([seconds, sum(event.action == "compiled" for event in jit.events())]))
"""


def first_call() -> list[Line]:
    """Import of the package and first call, in fresh processes; how many kernels each compiled."""
    lines = []
    with tempfile.TemporaryDirectory() as store:
        environment = {**os.environ, "JIT_KERNEL_CACHE_DIR": store, "PYTHONPATH": os.pathsep.join(sys.path)}
        for state in ("empty", "filled"):
            done = subprocess.run(
                [sys.executable, "-c", _FIRST_CALL], env=environment, capture_output=True, text=True, check=True
            )
            seconds, compiled = json.loads(done.stdout.splitlines()[-1])
            lines.append({"case": "first call", "store": state, "seconds": round(seconds, 3), "compiled": compiled})
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=record.RESULTS)
    folder = parser.parse_args().folder
    lines = [line for part in (first_call, host, prefill, e4m3_prefill, decode, absorbed) for line in part()]
    for line in lines:
        print(" ".join(f"{name}={value}" for name, value in line.items()))
    print(record.write("portable", lines, "cuda:0", folder))


if __name__ == "__main__":
    main()

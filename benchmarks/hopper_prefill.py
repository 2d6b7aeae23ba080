"""The Hopper implementation against cuDNN in the same run, and against the best of its peers by way of cuDNN.

    python benchmarks/hopper_prefill.py [--rounds 5] [--folder results] [--only prefill ragged ...]

Prefill in TFLOP/s, 4 * b * hq * sq * sk * d operations and half with a causal mask: the median of rounds in which the
competitors follow each other in random order, each timed by its own events with the L2 cache flushed between runs.
In e4m3 torch has no attention to compete with: the yardsticks are its product of two e4m3 matrices and cuDNN in bf16.
Then ragged batches, features beside plain calls, the compiler's time, a first call, and the host's share of a call.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

os.environ["JIT_KERNEL_IMPLEMENTATION"] = "hopper"
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import hopper_fp8  # noqa: E402
import record  # noqa: E402
import torch  # noqa: E402
from prefill_timing import HIDDEN, TOKENS, Line, compete, cudnn, dense, line_of  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention  # noqa: E402

from jit_kernel.flash_attention_v3 import flash_attn_func, flash_attn_varlen_func  # noqa: E402

# The best of cuDNN 9.19, FA3, FlashInfer 0.5.3, FA4 and FA2 over cuDNN, measured together on an H200 in bf16:
# (head size, sequence length, causal).
BEST_PEER = {
    (64, 1024, False): 1.00, (64, 1024, True): 1.00, (64, 4096, False): 1.11, (64, 4096, True): 1.08,
    (64, 16384, False): 1.18, (64, 16384, True): 1.18, (128, 1024, False): 1.00, (128, 1024, True): 1.07,
    (128, 4096, False): 1.10, (128, 4096, True): 1.15, (128, 16384, False): 1.10, (128, 16384, True): 1.13,
    (256, 1024, False): 1.01, (256, 1024, True): 1.02, (256, 4096, False): 1.07, (256, 4096, True): 1.13,
    (256, 16384, False): 1.09, (256, 16384, True): 1.16,
}  # fmt: skip

FIRST_CALL = """
import json, time, torch
q = torch.randn(1, 256, 8, 128, device="cuda", dtype=torch.bfloat16)
from jit_kernel import flash_attn_func, jit
torch.cuda.synchronize()
begin = time.perf_counter()
out = flash_attn_func(q, q, q, causal=True)
torch.cuda.synchronize()
seconds = time.perf_counter() - begin
assert out.isfinite().all()
events = jit.events()
print(json.dumps({
    "first_call_s": seconds,
    "loader_s": sum(event.seconds for event in events),
    "compiled": sum(event.action == "compiled" for event in events),
    "slowest_s": max(event.seconds for event in events),
}))
"""


def prefill(rounds: int, dtype: torch.dtype = torch.bfloat16) -> list[Line]:
    """The 18 cells of the peers' table."""
    lines = []
    for (head_dim, length, causal), best in BEST_PEER.items():
        q, k, v = dense(head_dim, length, dtype)
        ours = lambda q=q, k=k, v=v, causal=causal: flash_attn_func(q, k, v, causal=causal)  # noqa: E731
        times = compete({"cudnn": cudnn(q, k, v, causal), "ours": ours}, rounds)
        operations = 4 * TOKENS * length * HIDDEN * (0.5 if causal else 1)
        case = {"case": "prefill", "dtype": str(dtype), "head_dim": head_dim, "length": length, "causal": causal}
        line = line_of(case, operations, times)
        line["best_peer_over_cudnn"] = best
        line["over_best_peer"] = round(line["over_cudnn"] / best, 4)
        lines.append(line)
    return lines


def ragged(rounds: int) -> list[Line]:
    """Lognormal lengths against cuDNN's dense causal batch of 4096 tokens, d 128."""
    q, k, v = dense(128, 4096, torch.bfloat16)
    dice = torch.Generator().manual_seed(0)
    lengths = torch.exp(torch.randn(64, generator=dice) + 6.0).clamp(16, 8192).int().tolist()
    cu = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    lines = []
    for heads_q, heads_k in ((32, 8), (8, 1)):
        shapes = [(sum(lengths), heads, 128) for heads in (heads_q, heads_k, heads_k)]
        x, y, z = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)
        ours = lambda x=x, y=y, z=z: flash_attn_varlen_func(x, y, z, cu, cu, causal=True)  # noqa: E731
        times = compete({"cudnn": cudnn(q, k, v, True), "ours": ours}, rounds)
        own = line_of({}, sum(2.0 * n * n * heads_q * 128 for n in lengths), {"ours": times["ours"]})
        yard = line_of({}, 2.0 * TOKENS * 4096 * HIDDEN, {"cudnn": times["cudnn"]})
        line = {"case": "ragged lognormal", "heads_q": heads_q, "heads_k": heads_k, **own, **yard}
        line["over_cudnn"] = round(own["ours_tflops"] / yard["cudnn_tflops"], 4)
        lines.append(line)
    return lines


def features(rounds: int) -> list[Line]:
    """What a feature costs beside the plain causal call: 16384 tokens, d 128; operations of the plain call."""
    q, k, v = dense(128, 16384, torch.bfloat16)
    sinks = torch.randn(q.shape[2], device="cuda")
    competitors: dict[str, Callable[[], object]] = {
        "plain": lambda: flash_attn_func(q, k, v, causal=True),
        "sinks": lambda: flash_attn_func(q, k, v, causal=True, sinks=sinks),
        "lse": lambda: flash_attn_func(q, k, v, causal=True, return_softmax_lse=True),
        "softcap": lambda: flash_attn_func(q, k, v, causal=True, softcap=30.0),
        "window 1024": lambda: flash_attn_func(q, k, v, causal=True, window_size=(1024, 0)),
    }
    times = compete(competitors, rounds)
    return [{"case": "feature", "feature": name, "ms": round(statistics.median(ms), 4)} for name, ms in times.items()]


def compile_times() -> list[Line]:
    """NVRTC's time for one variant of each head size, without its own cache, and a first call end to end."""
    from jit_kernel import config
    from jit_kernel.engine import nvrtc
    from jit_kernel.fa3.hopper import kernels as hopper_kernels

    sources = config.kernel_sources_dir()
    lines: list[Line] = []
    specs = [hopper_kernels.forward_spec("bf16", *sizes, True, False) for sizes in hopper_kernels.HEAD_DIMS]
    specs += [hopper_kernels.fp8_spec(size, size, True, prepared=False) for size in hopper_kernels.FP8_HEAD_DIMS]
    for spec in specs:
        begin = time.perf_counter()
        nvrtc.compile_cubin(
            spec.unit,
            name="unit.cu",
            architecture="sm_90a",
            include_dirs=[sources, sources / "include"],
            flags=[*spec.flags, "--no-cache"],
        )
        fields = {name: dict(spec.variant)[name] for name in ("dtype", "head_dim")}
        lines.append({"case": "compile", **fields, "seconds": round(time.perf_counter() - begin, 3)})
    with tempfile.TemporaryDirectory() as store:
        environment = {
            **os.environ,
            "JIT_KERNEL_CACHE_DIR": store,
            "JIT_KERNEL_LOG": "quiet",
            "CUDA_CACHE_DISABLE": "1",
        }
        environment["PYTHONPATH"] = f"{ROOT}:{environment.get('PYTHONPATH', '')}"
        for case in ("first call, empty store", "first call, filled store"):
            answer = subprocess.run(
                [sys.executable, "-c", FIRST_CALL], capture_output=True, text=True, env=environment, check=True
            )
            lines.append({"case": case, **json.loads(answer.stdout)})
    return lines


def host_time(calls: int = 10_000) -> list[Line]:
    """Microseconds from Python call to return of a tiny call with `out` given, beside SDPA and a bare launch."""
    q, k, v = (torch.randn(1, 64, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    out = torch.empty_like(q)
    a, b, c = (x.transpose(1, 2) for x in (q, k, v))
    cu = torch.tensor([0, 64], device="cuda", dtype=torch.int32)
    flat_q, flat_k, flat_v, flat_out = (x[0] for x in (q, k, v, out))
    competitors: dict[str, Callable[[], object]] = {
        "flash_attn_func": lambda: flash_attn_func(q, k, v, causal=True, out=out),
        "flash_attn_varlen_func": lambda: flash_attn_varlen_func(
            flat_q, flat_k, flat_v, cu, cu, max_seqlen_q=64, max_seqlen_k=64, causal=True, out=flat_out
        ),
        "torch SDPA": lambda: scaled_dot_product_attention(a, b, c, is_causal=True),
        "a launch (torch fill_)": lambda: cu.fill_(64),
    }
    found: dict[str, list[int]] = {name: [] for name in competitors}
    for turn in range(calls // 100 + 2):  # in turns, because a core's clock changes
        for name, call in competitors.items():
            torch.cuda.synchronize()
            for _ in range(100):
                begin = time.perf_counter_ns()
                call()
                took = time.perf_counter_ns() - begin
                if turn >= 2:
                    found[name].append(took)
    return [
        {"case": "host time", "call": name, "us": round(statistics.median(taken) / 1e3, 2)}
        for name, taken in found.items()
    ]


def summary(lines: list[Line]) -> Line:
    """Geometric mean and worst cell over the best peer."""
    shares = [line["over_best_peer"] for line in lines]
    mean = math.exp(statistics.fmean(map(math.log, shares)))
    return {"case": "prefill summary", "geometric_mean": round(mean, 4), "worst": min(shares), "best": max(shares)}


def printed(lines: Iterable[Line]) -> Iterator[Line]:
    """The lines, each printed as it comes."""
    for line in lines:
        print(" ".join(f"{key}={value}" for key, value in line.items()), flush=True)
        yield line


def main() -> None:
    """Measure, print and append to results/hopper_prefill.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=record.RESULTS)
    parts = ("prefill", "fp16", "fp8", "ragged", "features", "compile", "host")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    options = parser.parse_args()
    for part in options.only:
        lines: Iterable[Line]
        if part in ("prefill", "fp16"):
            found = prefill(options.rounds, torch.bfloat16 if part == "prefill" else torch.float16)
            lines = [*found, {**summary(found), "dtype": found[0]["dtype"]}]
        elif part in ("ragged", "features"):
            lines = {"ragged": ragged, "features": features}[part](options.rounds)
        elif part == "fp8":
            lines = hopper_fp8.measure(min(options.rounds, hopper_fp8.MOST_ROUNDS))
        else:
            lines = compile_times() if part == "compile" else host_time()
        record.write("hopper_prefill", printed(lines), "cuda:0", options.folder)


if __name__ == "__main__":
    main()

"""Attention on the CPU against torch SDPA's flash backend and against the machine's own peaks, in one run.

usage: python benchmarks/cpu_attention.py [--threads 2] [--seconds 3] [--select decode ...] [--target cpu:...]

Ours, torch and the peaks (cpu_peaks.cpp: products in registers, reading memory) take turns, round after round, so that
what else the machine does falls on all of them; medians are compared. Ours and torch's change places every round: after
the peak, threads have to wake and inputs are in no cache. On a machine with AMX there are sections for
AVX-512-BF16 and plain AVX-512, too, each in a process of its own: our build without the tiles against a torch that is
kept from them; `--target` runs one section alone. Appends JSON lines to benchmarks/results/cpu_attention.jsonl.
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
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cpu_peaks
import record
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from jit_kernel import device, flash_attention_v3
from jit_kernel.fa3 import cpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TURN = 20.0  # GFLOP of a prefill's turn, at least: 10 ms with AMX, which is one call of 2048 tokens or 19 of 512
# What keeps torch from AMX: its products come from oneDNN (brgemm) or from MKL, and each has a switch of its own.
WITHOUT_AMX = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16", "MKL_ENABLE_INSTRUCTIONS": "AVX512_E3"}


@dataclass(frozen=True)
class Case:
    """One line of the table.

    `at_least` is what the project asks of `ratio` (to torch) or of `share` (of the peak), `slower_at_most` of our time
    beside that of `bf16`, the same call in that dtype.
    """

    name: str
    ours: Callable[[], Any]
    peer: Callable[[], Any] | None
    work: float  # GFLOP of a prefill, GB of keys and values of a decode
    peak: str  # "products" or "memory"
    dtype: torch.dtype = BF16
    calls: int = 1  # that `ours` and `peer` make
    ratio_at_least: float | None = None
    share_at_least: float | None = None
    bf16: Callable[[], Any] | None = None
    slower_at_most: float | None = None


def prefill(dtype: torch.dtype, tokens: int, d: int, causal: bool, **asked: float) -> Case:
    """8 heads of one sequence against itself."""
    heads = 8
    work = 4 * heads * tokens * tokens * d * (0.5 if causal else 1) * 1e-9
    calls = math.ceil(TURN / work)
    q, k, v = (torch.randn(1, tokens, heads, d).to(dtype) for _ in "qkv")
    out = torch.empty_like(q)
    q_peer, k_peer, v_peer = (x.transpose(1, 2).contiguous() for x in (q, k, v))

    def ours() -> None:
        for _ in range(calls):
            flash_attention_v3.flash_attn_func(q, k, v, causal=causal, out=out)

    def peer() -> None:
        for _ in range(calls):
            scaled_dot_product_attention(q_peer, k_peer, v_peer, is_causal=causal)

    name = f"{cpu.DTYPE_NAMES[dtype]} prefill {tokens} d{d}{' causal' if causal else ''}"
    return Case(name, ours, peer, work, "products", dtype, calls, **asked)


def decode(dtype: torch.dtype, batch: int, heads: int, heads_k: int, page_size: int = 0, **asked: float) -> Case:
    """One query a sequence against 4096 keys, in place or in pages of a shuffled cache.

    A turn is as many calls as read at least 0.5 GB, each with keys and values of its own as a model's layers have them:
    nothing is found in a cache of the processor, and a turn takes as long as one of the reading loop.
    """
    d, context = 128, 4096
    rows = (batch * context // page_size, page_size) if page_size else (batch, context)
    gigabytes = 4 * batch * context * heads_k * d * 1e-9
    layers = math.ceil(0.5 / gigabytes)
    q = torch.randn(batch, 1, heads, d).to(dtype)
    caches = [[torch.randn(*rows, heads_k, d, dtype=dtype) for _ in "kv"] for _ in range(layers)]
    lengths, out = torch.full((batch,), context, dtype=torch.int32), torch.empty_like(q)
    table = torch.randperm(rows[0]).to(torch.int32).view(batch, -1) if page_size else None
    pages = None if table is None else table.long()
    contiguous = [] if page_size else [[x.transpose(1, 2).contiguous() for x in cache] for cache in caches]

    def ours() -> None:
        for k, v in caches:
            flash_attention_v3.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, page_table=table, out=out)

    def attend(keys: Tensor, values: Tensor) -> None:
        scaled_dot_product_attention(q.transpose(1, 2), keys, values, enable_gqa=heads != heads_k)

    def gathered() -> None:
        for cache in caches:
            attend(*(x[pages].view(batch, context, heads_k, d).transpose(1, 2) for x in cache))

    def in_place() -> None:
        for keys, values in contiguous:
            attend(keys, values)

    layout = f" page {page_size}" if page_size else ""
    name = f"{cpu.DTYPE_NAMES[dtype]} decode batch {batch} {heads}/{heads_k}{layout}"
    peer = gathered if page_size else in_place
    return Case(name, ours, peer, gigabytes, "memory", dtype, layers, **asked)


def beside_bf16(make: Callable[..., Case], *rest: Any) -> Case:
    """An fp16 case with the bf16 one in the same rounds."""
    return replace(make(FP16, *rest), bf16=make(BF16, *rest).ours, slower_at_most=0.25)


def ragged(lengths: list[int], name: str) -> Case:
    """Self attention of sequences of these lengths in one call, causal, 8 heads, d 128."""
    heads, d = 8, 128
    q, k, v = (torch.randn(sum(lengths), heads, d).to(BF16) for _ in "qkv")
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    out = torch.empty_like(q)
    work = sum(2 * heads * n * n * d for n in lengths) * 1e-9

    def ours() -> None:
        flash_attention_v3.flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, causal=True, out=out)

    return Case(name, ours, None, work, "products")


def lognormal_lengths() -> list[int]:
    """64 lengths with a median of 256 and a long tail; always the same."""
    drawn = torch.exp(torch.randn(64, generator=torch.Generator().manual_seed(0)) * 0.8 + math.log(256))
    return [max(1, min(2048, int(n))) for n in drawn]


def cases() -> list[Callable[[], Case]]:
    """What is measured, each made when its turn comes: all of them at once would not fit in memory."""
    lengths = lognormal_lengths()
    weighed = round(sum(n * n for n in lengths) / sum(lengths))  # the dense length of the same work a token
    return [
        lambda: prefill(BF16, 2048, 128, False, ratio_at_least=2.0),
        lambda: prefill(BF16, 2048, 128, True, ratio_at_least=2.6),
        lambda: prefill(BF16, 2048, 64, True, ratio_at_least=2.0),
        lambda: prefill(BF16, 512, 128, False, ratio_at_least=2.0),
        lambda: prefill(FP32, 2048, 128, False, ratio_at_least=1.1),
        lambda: prefill(FP32, 2048, 128, True, ratio_at_least=1.4),
        lambda: beside_bf16(prefill, 2048, 128, False),
        lambda: beside_bf16(prefill, 2048, 128, True),
        lambda: beside_bf16(prefill, 2048, 64, True),
        lambda: beside_bf16(prefill, 512, 128, False),
        lambda: decode(BF16, 1, 32, 32, ratio_at_least=6.0),
        lambda: decode(BF16, 1, 32, 8, ratio_at_least=20.0),
        lambda: beside_bf16(decode, 1, 32, 8),
        lambda: beside_bf16(decode, 1, 32, 32),
        lambda: decode(BF16, 8, 32, 8, share_at_least=0.85),
        lambda: decode(BF16, 8, 32, 8, page_size=16, ratio_at_least=50.0, share_at_least=0.85),
        lambda: prefill(BF16, 4096, 128, False, share_at_least=0.75),
        lambda: prefill(BF16, 4096, 128, True, share_at_least=0.65),
        lambda: prefill(BF16, 4096, 64, True, share_at_least=0.65),
        lambda: ragged([weighed] * (sum(lengths) // weighed), "bf16 dense as long as ragged"),
        lambda: ragged(lengths, "bf16 ragged 64 lognormal"),
    ]


def measure(case: Case, peaks: cpu_peaks.Peaks, seconds: float) -> dict[str, Any]:
    """Rounds of ours, torch, bf16 and the peak until the time is up, at least 5."""
    ours: list[float] = []
    peer: list[float] = []
    bf16: list[float] = []
    bounds: list[dict[str, float]] = []
    began = 0.0
    while len(ours) < 6 or time.perf_counter() - began < seconds:
        turns = [(case.ours, ours), (case.peer, peer), (case.bf16, bf16)]
        for call, taken in turns if len(ours) % 2 else reversed(turns):
            if call is not None:
                start = time.perf_counter()
                call()
                taken.append((time.perf_counter() - start) / case.calls)
        time.sleep(0.01)  # torch's workers wait for more in a loop of their own: 10 % of the read bandwidth
        bounds.append(peaks.measure(case.peak, case.dtype))
        began = began or time.perf_counter()  # the first round warms up
    ours_ms = statistics.median(ours[1:]) * 1e3
    peak, *others = ((name, statistics.median(x[name] for x in bounds[1:])) for name in bounds[0])
    rate = case.work / ours_ms * 1e3
    unit = "GB/s" if case.peak == "memory" else "GFLOP/s"
    line: dict[str, Any] = {
        "case": case.name, "ours_ms": ours_ms, "ours_min_ms": min(ours[1:]) * 1e3, "rounds": len(ours) - 1,
        "rate": rate, "unit": unit, "peak": peak[0], "peak_rate": peak[1], "share": rate / peak[1],
    }  # fmt: skip
    line |= {f"share_of_{name}": rate / bound for name, bound in others if bound > 0}
    if peer:
        torch_ms = statistics.median(peer[1:]) * 1e3
        line |= {"torch_ms": torch_ms, "torch_min_ms": min(peer[1:]) * 1e3, "ratio": torch_ms / ours_ms}
    if bf16:
        bf16_ms = statistics.median(bf16[1:]) * 1e3
        line |= {"bf16_ms": bf16_ms, "slower": ours_ms / bf16_ms - 1, "slower_at_most": case.slower_at_most}
    line |= {"ratio_at_least": case.ratio_at_least, "share_at_least": case.share_at_least}
    return line


def show(line: dict[str, Any]) -> None:
    """One row of the table; a mark where less was reached than asked."""
    text = f"{line['case']:34s} {line['ours_ms']:9.3f} ms {line['rate']:8.1f} {line['unit']:7s}"
    text += f" {line['share']:5.0%} of {line['peak']} {line['peak_rate']:.0f}"
    if "share_of_bf16_dot" in line:
        text += f" ({line['share_of_bf16_dot']:.0%} of bf16_dot)"
    for key in ("ratio", "share"):
        asked = line[f"{key}_at_least"]
        if key == "ratio" and "ratio" in line:
            text += f"; {line['ratio']:.2f} x torch's {line['torch_ms']:.3f} ms"
        if asked is not None:  # a share of products is asked of VDPBF16PS, whatever else the machine has
            of = "share_of_bf16_dot" if key == "share" and "share_of_bf16_dot" in line else key
            reached = "" if line[of] >= asked else ", not reached"
            text += f" ({of.replace('_', ' ', 2)} asked: {asked:g}{reached})"
    if "slower" in line:
        reached = "" if line["slower"] <= line["slower_at_most"] else ", not reached"
        text += f"; {line['slower']:+.0%} of bf16's {line['bf16_ms']:.3f} ms"
        text += f" (at most {line['slower_at_most']:+.0%} asked{reached})"
    print(text, flush=True)


def section(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All cases for one target, in this process."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    cpu.cpu_target = lambda: options.target  # what the kernels of this process are compiled for
    peaks = cpu_peaks.Peaks(options.target, options.threads)
    common = {"target": str(options.target), "threads": options.threads, "torch_products": cpu_peaks.torch_products()}
    print(f"{options.target}, {options.threads} threads; torch's bf16 product: {common['torch_products']:.0f} GFLOP/s")
    lines = []
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        for make in cases():
            case = make()
            if any(part in case.name for part in options.select):
                line = measure(case, peaks, options.seconds)
                show(line)
                lines.append({**common, **line})
    return lines


def sections(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The lines of every section, each run by a process whose environment keeps torch to the target's instructions."""
    here = device.cpu_target()
    targets = [options.target or here]
    if options.target is None and "amxbf16" in here.features:
        targets += [
            device.Target("cpu", here.architecture, tuple(x for x in here.features if x != "amxbf16")),
            device.Target("cpu", here.architecture),
        ]
    lines: list[dict[str, Any]] = []
    for target in targets:
        without = "amxbf16" in here.features and "amxbf16" not in target.features
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "lines.json"
            command = [sys.executable, __file__, "--target", str(target), "--lines", str(path)]
            command += ["--threads", str(options.threads), "--seconds", str(options.seconds)]
            command += ["--select", *options.select]
            subprocess.run(command, check=True, env={**os.environ, **(WITHOUT_AMX if without else {})})
            lines += json.loads(path.read_text())
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=3.0, help="of each case")
    parser.add_argument("--select", nargs="*", default=[""], help="only cases whose name has one of these in it")
    parser.add_argument("--target", type=device.Target.parse)
    parser.add_argument("--lines", type=Path, help=argparse.SUPPRESS)  # where a section leaves its lines
    options = parser.parse_args()
    if options.lines:
        options.lines.write_text(json.dumps(section(options)))
    else:
        print(f"wrote {record.write('cpu_attention', sections(options))}")


if __name__ == "__main__":
    main()

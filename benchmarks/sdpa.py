"""torch's SDPA with jit_kernel behind it and without, in the same run.

usage: python benchmarks/sdpa.py [--device cpu|cuda] [--threads 2] [--seconds 3] [--rounds 5] [--select decode ...]

On the CPU both take turns, round after round, in an order that changes, and medians are compared: prefill and decode in
bf16, prefill in fp32. With --device cuda: the 18 cells of hopper_prefill.py beside torch's flash backend, which is
FlashAttention 2, forwards and with the backward pass, which is torch's own for both; and how far both gradients are
from float64, as a share of the limit of tests/support/gradients.py, by which a gradient may be twice as far as torch's.
Appends JSON lines to benchmarks/results/sdpa.jsonl, each when its case is measured.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import record  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention  # noqa: E402

from jit_kernel.integrations import counters, sdpa  # noqa: E402
from tests.support import gradients  # noqa: E402

Line = dict[str, Any]
BF16, FP32 = torch.bfloat16, torch.float32
TURN = 40.0  # GFLOP of a turn of prefill, at least
TOKENS, HIDDEN = 16384, 2048
CELLS = list(itertools.product((64, 128, 256), (1024, 4096, 16384), (False, True)))


@dataclass
class Case:
    """One call of SDPA, or several with keys of their own; the ratio that is asked for."""

    name: str
    call: Callable[[], None]
    calls: int
    ratio_at_least: float


def prefill(dtype: torch.dtype, d: int, causal: bool, asked: float) -> Case:
    """8 heads of one sequence of 2048 tokens."""
    heads, tokens = 8, 2048
    work = 4 * heads * tokens * tokens * d * (0.5 if causal else 1) * 1e-9
    calls = math.ceil(TURN / work)
    q, k, v = (torch.randn(1, heads, tokens, d).to(dtype) for _ in "qkv")

    def call() -> None:
        for _ in range(calls):
            scaled_dot_product_attention(q, k, v, is_causal=causal)

    return Case(f"{_name(dtype)} prefill {tokens} d{d}{' causal' if causal else ''}", call, calls, asked)


def decode(heads: int, heads_k: int, asked: float) -> Case:
    """One query against 4096 keys, of as many layers as hold 0.5 GB: nothing is found in a cache of the processor."""
    d, context = 128, 4096
    layers = math.ceil(0.5e9 / (4 * context * heads_k * d))
    q = torch.randn(1, heads, 1, d).to(BF16)
    caches = [[torch.randn(1, heads_k, context, d, dtype=BF16) for _ in "kv"] for _ in range(layers)]

    def call() -> None:
        for k, v in caches:
            scaled_dot_product_attention(q, k, v, enable_gqa=heads != heads_k)

    return Case(f"bf16 decode 4096 {heads}/{heads_k}", call, layers, asked)


def _name(dtype: torch.dtype) -> str:
    return {BF16: "bf16", FP32: "fp32"}[dtype]


def cpu_cases() -> Iterator[Case]:
    """Each made when its turn comes."""
    for d, causal in itertools.product((64, 128), (False, True)):
        yield prefill(BF16, d, causal, 2.2)
    yield decode(32, 32, 5.0)
    yield decode(32, 8, 15.0)
    for d in (64, 128):
        yield prefill(FP32, d, True, 1.35)


def measure(case: Case, seconds: float) -> Line:
    """Rounds of both until the time is up, at least 5 behind the first."""
    taken: dict[bool, list[float]] = {True: [], False: []}
    began = 0.0
    while len(taken[True]) < 6 or time.perf_counter() - began < seconds:
        for ours in (True, False) if len(taken[True]) % 2 else (False, True):
            with sdpa.active() if ours else nullcontext():
                start = time.perf_counter()
                case.call()
                taken[ours].append((time.perf_counter() - start) / case.calls * 1e3)
        began = began or time.perf_counter()  # the first round warms up
    ours_ms, torch_ms = (statistics.median(taken[ours][1:]) for ours in (True, False))
    return {
        "case": case.name, "ours_ms": ours_ms, "ours_min_ms": min(taken[True][1:]), "torch_ms": torch_ms,
        "torch_min_ms": min(taken[False][1:]), "rounds": len(taken[True]) - 1, "ratio": torch_ms / ours_ms,
        "ratio_at_least": case.ratio_at_least, "reached": torch_ms / ours_ms >= case.ratio_at_least,
    }  # fmt: skip


def on_cpu(options: argparse.Namespace) -> Iterator[Line]:
    """A line of each case, when it is measured."""
    torch.set_num_threads(options.threads)
    for case in cpu_cases():
        if any(part in case.name for part in options.select):
            counters.clear()
            line = measure(case, options.seconds)
            served = counters.read()["sdpa"]
            line |= {
                "load": os.getloadavg()[0],
                "threads": options.threads,
                "capability": torch.backends.cpu.get_cpu_capability(),
                **served,
            }
            show(line)
            yield line


def compete(call: Callable[[], object], rounds: int) -> dict[str, float]:
    """Median milliseconds with and without us, of rounds in random order, the L2 cache flushed between runs."""
    from triton.testing import do_bench

    times: dict[str, list[float]] = {"ours_ms": [], "torch_ms": []}
    dice = random.Random(0)
    for _ in range(rounds):
        for name in dice.sample(list(times), 2):
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION), sdpa.active() if name == "ours_ms" else nullcontext():
                times[name].append(do_bench(call, warmup=25, rep=150, return_mode="median"))
    return {name: statistics.median(each) for name, each in times.items()}


def cell(d: int, length: int, causal: bool, rounds: int) -> Line:
    shape = (TOKENS // length, length, HIDDEN // d, d)
    q, k, v = (torch.randn(shape, device="cuda", dtype=BF16).transpose(1, 2).requires_grad_() for _ in "qkv")
    grad_out = torch.randn(shape, device="cuda", dtype=BF16).transpose(1, 2)

    def forward() -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=causal)

    def both() -> object:
        return torch.autograd.grad(forward(), (q, k, v), grad_out)

    with torch.no_grad():
        line: Line = {"case": f"bf16 d{d} {length}{' causal' if causal else ''}", **compete(forward, rounds)}
    line |= {f"training_{name}": each for name, each in compete(both, rounds).items()}
    line["ratio"] = line["torch_ms"] / line["ours_ms"]
    line["training_ratio"] = line["training_torch_ms"] / line["training_ours_ms"]
    return line | of_gradients(d, causal)


def of_gradients(d: int, causal: bool) -> Line:
    """How far gradients are from float64: shares of the limit, of ours and of torch's own (by its own distance)."""
    shape = gradients.Shape(1024, 1024, hq=2, hk=2, d=d, dv=d, causal=causal, batch=1)
    q, k, v, g = shape.tensors(BF16, "cuda")

    def found() -> gradients.Three:
        inputs = [each.transpose(1, 2).detach().requires_grad_() for each in (q, k, v)]
        out = scaled_dot_product_attention(*inputs, is_causal=causal)
        dq, dk, dv = (each.transpose(1, 2) for each in torch.autograd.grad(out, inputs, g.transpose(1, 2)))
        return dq, dk, dv

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        own = found()
        with sdpa.active():
            ours = found()
    exact = gradients.by_formula(q, k, v, g, shape.seen("cuda"))
    return {
        "gradients_ours": gradients.share_of_limit(ours, own, exact),
        "gradients_torch": gradients.share_of_limit(own, own, exact),
    }


def on_cuda(options: argparse.Namespace) -> Iterator[Line]:
    """A line of each cell, when it is measured, and those of `summaries`."""
    lines = []
    for d, length, causal in CELLS:
        name = f"bf16 d{d} {length}{' causal' if causal else ''}"
        if any(part in name for part in options.select):
            counters.clear()
            line = {**cell(d, length, causal, options.rounds), **counters.read()["sdpa"]}
            lines.append(line)
            show(line)
            yield line
    for summary in summaries(lines):
        print(f"{summary['case']:34s} {summary['ratio']:.3f} x in the mean, {summary['least']:.3f} x at least")
        yield summary


def summaries(lines: list[Line]) -> list[Line]:
    """Of the cells' lines: the geometric mean and the least of both ratios; nothing where no cell was selected."""
    if not lines:
        return []
    found = []
    for name in ("ratio", "training_ratio"):
        ratios = [line[name] for line in lines]
        mean = statistics.geometric_mean(ratios)
        found.append({"case": f"summary of {name}", "ratio": mean, "least": min(ratios)})
    return found


def show(line: Line) -> None:
    text = f"{line['case']:34s} {line['ours_ms']:9.3f} ms; torch {line['torch_ms']:9.3f} ms, {line['ratio']:.2f} x"
    if "ratio_at_least" in line:
        text += f" (asked: {line['ratio_at_least']:g}{'' if line['reached'] else ', not reached'})"
    if "training_ratio" in line:
        text += f"; with the backward pass {line['training_ratio']:.2f} x; gradients {line['gradients_ours']:.2f}"
        text += f" of the limit, torch's {line['gradients_torch']:.2f}"
    print(f"{text}; served {line['served']}, passed on {line['passed_on'] or 0}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="on the CPU")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each case on the CPU")
    parser.add_argument("--rounds", type=int, default=5, help="of each cell on a GPU")
    parser.add_argument("--select", nargs="*", default=[""], help="only cases whose name has one of these in it")
    parser.add_argument("--folder", type=Path, default=record.RESULTS)
    options = parser.parse_args()
    torch.manual_seed(0)
    lines = on_cpu(options) if options.device == "cpu" else on_cuda(options)
    device = "cpu" if options.device == "cpu" else "cuda:0"
    print(f"wrote {record.write('sdpa', lines, device, options.folder)}")


if __name__ == "__main__":
    main()

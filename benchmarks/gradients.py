"""The backward pass on a CPU beside torch's own operator, interleaved in one run. Prints JSON lines, --out adds them.

    python benchmarks/gradients.py --out benchmarks/results/gradients.jsonl

Each line has the goal of its dtype, "value" the ratio torch's time / ours (median of the pairs' ratios), and both
medians. With one thread it is the thread's processor time, which a busy machine disturbs less. torch's operator is
`aten::_scaled_dot_product_flash_attention_for_cpu_backward`, which torch's SDPA calls.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jit_kernel.device import cpu_target
from jit_kernel.fa3.cpu import backward
from jit_kernel.fa3.gradients.call import Backward

GOALS = {torch.float32: 1.1, torch.bfloat16: 1.5}
HEADS = 4


def seconds(run: Callable[[], object]) -> float:
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    run()
    return clock() - start


def compared(dtype: torch.dtype, tokens: int, d: int, causal: bool, budget: float) -> dict[str, object]:
    """One line: pairs of both, one after the other, for about `budget` seconds, and at least 2."""
    q, k, v, grad = (torch.randn(1, tokens, HEADS, d).to(dtype).transpose(1, 2) for _ in range(4))
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    theirs = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    out, lse = forward(q, k, v, 0.0, causal)
    rows = (each.transpose(1, 2) for each in (grad, q, k, v, out))
    call = Backward(*rows, lse.contiguous(), d**-0.5, -1, 0 if causal else -1)
    times: list[tuple[float, float]] = []
    end = time.perf_counter() + budget
    backward.gradients(call)
    while len(times) < 2 or time.perf_counter() < end:
        ours = seconds(lambda: backward.gradients(call))
        times.append((ours, seconds(lambda: theirs(grad, q, k, v, out, lse, 0.0, causal))))
    products = 5 * 2 * HEADS * d * tokens * tokens / (2 if causal else 1)
    ours = statistics.median(each for each, _ in times)
    return {
        "bench": "gradients", "goal": GOALS[dtype], "value": round(statistics.median(b / a for a, b in times), 3),
        "dtype": str(dtype)[6:], "tokens": tokens, "heads": HEADS, "d": d, "causal": causal, "pairs": len(times),
        "threads": torch.get_num_threads(), "ours_ms": round(1e3 * ours, 1),
        "torch_ms": round(1e3 * statistics.median(b for _, b in times), 1), "gflops": round(products / ours / 1e9, 1),
        "target": str(cpu_target()), "torch": torch.__version__,
    }  # fmt: skip


def main() -> None:
    """Every dtype, length, head size and mask of the goals."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, help="a file of JSON lines to add to")
    parser.add_argument("--seconds", type=float, default=6.0, help="for each line, about")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--dtypes", nargs="+", default=[str(dtype)[6:] for dtype in GOALS])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for dtype in (getattr(torch, name) for name in options.dtypes):
        for tokens in options.tokens:
            for d in (64, 128):
                for causal in (False, True):
                    text = json.dumps(compared(dtype, tokens, d, causal, options.seconds))
                    print(text, flush=True)
                    if options.out is not None:
                        with options.out.open("a") as file:
                            file.write(text + "\n")


if __name__ == "__main__":
    main()

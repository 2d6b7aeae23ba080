"""Random cases on a GPU with the portable implementation: run as a program with seeds, print one line a case."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["JIT_KERNEL_IMPLEMENTATION"] = "portable"
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402

from jit_kernel import flash_attention_v3  # noqa: E402
from tests.support import case_run, cases  # noqa: E402
from tests.support.absorbed import with_qv  # noqa: E402

FEATURES = cases.FEATURES | cases.FP8_CACHES
# Head sizes are compile-time constants of the kernels: few of them, of every class, odd ones among them.
SPACES = [
    cases.Space(
        f"portable-{name}",
        device="cuda:0",
        dtypes=(dtype,),
        head_dims=head_dims,
        any_head_dim=0,
        qv_head_dims=qv_head_dims,
        features=FEATURES if name != "bf16" else cases.FEATURES,
        lengths=(150, 500, 2500),
        max_heads=16,
    )
    for name, dtype, head_dims, qv_head_dims in (
        ("bf16", torch.bfloat16, ((64, 64), (128, 128), (192, 128), (256, 256), (40, 24), (33, 65)), ((64, 512),)),
        ("fp16", torch.float16, ((64, 64), (128, 128), (96, 96)), ((64, 256),)),
        ("caches", torch.bfloat16, ((128, 128), (512, 512), (33, 65)), ((64, 512),)),
        ("e4m3", torch.float8_e4m3fn, ((64, 64), (128, 128), (192, 128), (40, 24)), ((64, 512),)),
    )
]
ABSORBED = 6  # every so many cases has qv


def plan_of(seed: int) -> cases.Plan:
    """The case of a seed: all spaces in turn, and more with qv than are drawn."""
    space = SPACES[seed % len(SPACES)]
    plan = cases.draw(seed, space)
    if seed % ABSORBED:
        return plan
    return with_qv(plan, space.qv_head_dims[0][1], only_qv=seed % (5 * ABSORBED) == 0)


def main(first: int, count: int) -> None:
    functions = {name: getattr(flash_attention_v3, name) for name in SPACES[0].functions}
    torch.set_num_threads(1)
    for seed in range(first, first + count):
        shares = case_run.judge(plan_of(seed), functions)
        print(f"case {seed} {shares.row:.4f} {shares.largest:.4f} {shares.lse:.4f}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))

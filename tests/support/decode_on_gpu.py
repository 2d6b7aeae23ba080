"""Calls that the Hopper decode kernels serve: random plans, and paged caches as a serving engine has them.

As a program, `python -m tests.support.decode_on_gpu KIND FIRST COUNT FREE`, it makes the calls of COUNT plans with FREE
multiprocessors left free, and prints a line for each. KIND is judge or hidden, or mixed-judge or mixed-hidden for a
cache in e4m3 beside queries of 16 bits, fp8-judge or fp8-hidden beside queries in e4m3. A call that no decode kernel
served is a failure.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

import jit_kernel.flash_attention_v3 as fa3
from jit_kernel import device
from jit_kernel.fa3 import hopper
from jit_kernel.fa3.hopper.kernels import DECODE_HEAD_DIMS, DECODE_MOST_ROWS
from tests.support import case_run, cases, hidden, reference
from tests.support.cases import Plan

NAMES = (cases.VARLEN, cases.KVCACHE)
# Draft masks as soon as they are claimed.
UNCLAIMED = {"qv", "only_qv", "descale_expanded", "odd_head_size"} | ({"draft_mask"} - hopper.CLAIMED_WITH_CACHE)
SPACE = cases.Space(
    "decode",
    device="cuda",
    dtypes=(torch.bfloat16, torch.float16),
    head_dims=((64, 64), (128, 128), (256, 256), (96, 96), (192, 128)),
    any_head_dim=256,
    head_dim_step=8,
    qv_head_dims=(),
    functions=NAMES,
    features=cases.FEATURES - UNCLAIMED,
    page_sizes=(1, 2, 3, 8, 16, 19, 24, 48, 64, 80, 96, 100, 128, 256),
    lengths=(150, 900, 5000),
    max_heads=16,
    max_batch=12,
    stride_step=8,
)
# For two implementations, one of which compiles every head size.
SHARED_SPACE = dataclasses.replace(SPACE, head_dims=((64, 64), (128, 128)), any_head_dim=0)
# Any number of query rows, with and without splits.
MIXED_SPACE = dataclasses.replace(
    SPACE,
    name="mixed",
    features=(SPACE.features | cases.FP8_CACHES) - ({"append", "rotary", "stored"} - hopper.CLAIMED_MIXED),
    head_dim_step=16,
    stride_step=16,
)
# Queries in e4m3, too.
FP8_SPACE = dataclasses.replace(
    MIXED_SPACE,
    name="fp8 cache",
    dtypes=(cases.FP8,),
)
ROOT = Path(__file__).resolve().parents[2]
MOST_SPARE = 5  # rows that a plan with seqused_q has more of a sequence than queries, at most


def few_rows(plan: Plan) -> Plan:
    """The plan with no more query rows than a decode kernel has, and with splits."""
    dice = Random(plan.seed + 2)
    size = next(each for each in DECODE_HEAD_DIMS if max(plan.d, plan.dv) <= each)
    most = DECODE_MOST_ROWS[size] // (plan.hq // plan.hk)
    seqused = plan.seqused_q and most > MOST_SPARE
    most = dice.randint(1, most - MOST_SPARE * seqused)
    lengths = tuple(min(n, most) for n in plan.lengths_q)
    splits = plan.num_splits if plan.num_splits not in (None, 1) else dice.choice((0, 0, 2, 7))
    return dataclasses.replace(plan, lengths_q=lengths, seqused_q=seqused, num_splits=splits, max_seqlen="exact")


def plans(
    first: int, count: int, space: cases.Space = SPACE, draw: Callable[[int, cases.Space], Plan] = cases.draw
) -> list[Plan]:
    """The next plans on a cache, from a seed on."""
    found: list[Plan] = []
    seed = first
    while len(found) < count:
        plan = draw(seed, space)
        if plan.function == cases.KVCACHE or plan.page_size > 0:
            found.append(few_rows(plan))
        seed += 1
    return found


def mixed_plans(
    first: int, count: int, draw: Callable[[int, cases.Space], Plan] = cases.draw, space: cases.Space = MIXED_SPACE
) -> list[Plan]:
    """The next plans with a cache in e4m3, from a seed on; half of them have few rows, and the others no splits."""
    found: list[Plan] = []
    seed = first
    while len(found) < count:
        plan = draw(seed, space)
        served = plan.dtype is not torch.float16 or not plan.token_scales
        if plan.key_dtype is cases.FP8 and served and (plan.function == cases.KVCACHE or plan.page_size > 0):
            found.append(few_rows(plan) if seed % 2 else dataclasses.replace(plan, num_splits=1))
        seed += 1
    return found


def functions(free: int) -> dict[str, Any]:
    """The public functions, on fewer multiprocessors."""
    return {name: partial(getattr(fa3, name), sm_margin=free) for name in NAMES}


def counted_launches(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """As count_launches, until `monkeypatch` puts back what was there."""
    # The launcher gives `known` its function when it is loaded, which must come before that is kept.
    hopper.kernels.kernels_of(torch.device("cuda", torch.cuda.current_device()))._launcher()
    for module, name in ((hopper.decode, "attend"), (hopper.known, "_decode"), (hopper.known, "serve")):
        monkeypatch.setattr(module, name, getattr(module, name))
    return count_launches()


def count_launches() -> list[None]:
    """From now on, one entry more for each call that a decode kernel serves, by the checks or without them."""
    launched: list[None] = []
    attend, decode, serve = hopper.decode.attend, hopper.known._decode, hopper.known.serve

    def counted(*given: Any, **more: Any) -> Any:
        result = attend(*given, **more)
        if result is not None:
            launched.append(None)
        return result

    def counting(decode: Callable[..., int]) -> Callable[..., int]:
        def counted(*given: Any) -> int:
            answer = decode(*given)
            launched.extend([None] * (answer == hopper.known._LAUNCHED))
            return answer

        return counted

    hopper.decode.attend = counted  # type: ignore[assignment]
    hopper.known._decode = None if decode is None else counting(decode)
    hopper.known.serve = lambda decode: serve(counting(decode))  # type: ignore[assignment]
    return launched


@dataclasses.dataclass
class Paged:
    """A call of flash_attn_with_kvcache over shuffled pages, of which those of no sequence's hold NaN."""

    q: Tensor
    k: Tensor
    v: Tensor
    table: Tensor
    lengths: Tensor
    given: dict[str, Any]

    @classmethod
    def of(
        cls, batch: int, queries: int, longest: int, heads: tuple[int, int], page_size: int, d: int = 128, **given: Any
    ) -> Paged:
        """In bf16; `over_e4m3` makes its cache one in e4m3."""
        count = -(-longest // page_size)
        table = torch.randperm(batch * count, device="cuda").view(batch, count).int()
        q = torch.randn(batch, queries, heads[0], d, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.randn(batch * count, page_size, heads[1], d, device="cuda", dtype=q.dtype) for _ in "kv")
        lengths = torch.full((batch,), longest, device="cuda", dtype=torch.int32)
        return cls(q, k, v, table, lengths, {"causal": True, **given})

    def over_e4m3(self, **scales: Tensor) -> Paged:
        """The same call over an e4m3 cache of these numbers, with k_descale, v_descale, k_scale or v_scale."""
        k, v = (x.to(cases.FP8) for x in (self.k, self.v))
        return dataclasses.replace(self, k=k, v=v, given=self.given | scales)

    def draw_lengths(self, seed: int) -> None:
        """Other lengths in the same memory: none, few, or as many as there is room for."""
        random = torch.Generator().manual_seed(seed)
        longest = self.table.shape[1] * self.k.shape[1]
        drawn = torch.randint(0, longest + 1, self.lengths.shape, generator=random)
        kind = torch.randint(0, 5, self.lengths.shape, generator=random)
        drawn[kind == 0] = 0
        drawn[kind == 1] = longest
        drawn[kind == 2] = drawn[kind == 2] % 100
        self.lengths.copy_(drawn)

    def __call__(self, **more: Any) -> Any:
        return fa3.flash_attn_with_kvcache(
            self.q, self.k, self.v, cache_seqlens=self.lengths, page_table=self.table, **self.given | more
        )

    @staticmethod
    def _raw(x: Tensor) -> Tensor:
        return x.view(torch.uint8) if x.dtype is cases.FP8 else x

    def check(self, answer: tuple[Tensor, Tensor] | None = None) -> float:
        """The worst share of the limit of this call's answer, or of another call's."""
        out, lse = answer or self(return_softmax_lse=True)
        sequences = []
        scales = {name: self.given[name] for name in ("k_scale", "v_scale") if name in self.given}
        descales = {name: self.given[name] for name in ("k_descale", "v_descale") if name in self.given}
        for i, (q, entries, n) in enumerate(zip(self.q, self.table.long(), self.lengths.tolist(), strict=True)):
            k, v = (self._raw(x)[entries].flatten(0, 1)[:n].view(x.dtype) for x in (self.k, self.v))
            own = {name: x[entries].flatten(0, 1)[:n] for name, x in scales.items()}
            own |= {name: x[i] for name, x in descales.items()}
            sequences.append(reference.Sequence(q, k, v, **own))
        problem = reference.Problem(sequences, causal=self.given["causal"], sinks=self.given.get("sinks"))
        return reference.check(list(out), list(lse), problem).worst


def in_processes(jobs: list[tuple[str, int, int, int]]) -> list[list[str]]:
    """The words of each line that decode_on_gpu prints for these jobs, some of them at a time."""

    def run(job: tuple[str, int, int, int]) -> list[list[str]]:
        command = [sys.executable, "-m", "tests.support.decode_on_gpu", *map(str, job)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500)
        assert done.returncode == 0, done.stdout[-200:] + done.stderr[-6000:]
        return [line.split() for line in done.stdout.splitlines() if line.startswith(("case ", "hidden "))]

    with ThreadPoolExecutor(max(1, min(12, device.cpu_count() - 2))) as pool:
        return [words for lines in pool.map(run, jobs) for words in lines]


def jobs_of(kind: str, free: tuple[int, ...], count: int, pieces: int) -> list[tuple[str, int, int, int]]:
    """So many plans for each number of free multiprocessors, in pieces; their seeds do not meet."""
    each = -(-count // pieces)
    return [(kind, (100 * i + j) * 20 * each, each, left) for i, left in enumerate(free) for j in range(pieces)]


def main(kind: str, first: int, count: int, free: int) -> None:
    torch.set_num_threads(1)
    launched, made = count_launches(), functions(free)
    hides = kind.endswith("hidden")
    draw_plans = {"mixed": mixed_plans, "fp8": partial(mixed_plans, space=FP8_SPACE)}.get(kind.split("-")[0], plans)
    for plan in draw_plans(first, count, draw=hidden.draw if hides else cases.draw):
        before = len(launched)
        if hides:
            print(f"hidden {plan.seed} {hidden.differ(plan, made)}", flush=True)
        else:
            print(f"case {plan.seed} {case_run.judge(plan, made).worst:.4f}", flush=True)
        calls = len(launched) - before
        expected = (2 if hides else 1) * (sum(plan.lengths_q) > 0 or plan.seqused_q)
        if calls < expected:
            raise AssertionError(f"{calls} launches of decode kernels, not {expected}: {plan!r}")


if __name__ == "__main__":
    main(sys.argv[1], *(int(number) for number in sys.argv[2:5]))

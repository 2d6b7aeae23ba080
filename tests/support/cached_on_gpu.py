"""The Hopper kernels on cached keys, called as the public functions are, with checks and without the dispatcher.

As a program, `python -m tests.support.cached_on_gpu`, it judges one call of each kind of page and of mask, and stops at
the first that is wrong; then it times the cells of many query rows that a serving engine has.
"""

from __future__ import annotations

import dataclasses
import inspect
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

import jit_kernel.flash_attention_v3 as fa3
from jit_kernel.fa3 import call as calls
from jit_kernel.fa3.call import Result
from jit_kernel.fa3.checks.call import checked
from jit_kernel.fa3.hopper import cached, widened
from tests.support import cases, reference

# Sequences around the kernels' tiles of 128 and 192 rows and of 80 to 128 keys, and pages of every kind: copied row by
# row, in boxes of 8 rows to a whole block, smaller and larger than a block.
SPACE = cases.Space(
    "cached",
    device="cuda",
    dtypes=(torch.bfloat16, torch.float16),
    head_dims=((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)),
    any_head_dim=256,
    head_dim_step=8,
    qv_head_dims=(),
    functions=(cases.VARLEN, cases.KVCACHE),
    features=cases.FEATURES - {"append", "new_ragged", "rotary", "qv", "only_qv", "odd_head_size"},
    page_sizes=(1, 2, 3, 8, 16, 19, 24, 48, 64, 80, 96, 100, 128, 256),
    lengths=(150, 500, 1500),
    max_heads=16,
    stride_step=8,
)
# The same over a cache in e4m3, whose rows become 16 bits first: tokens have no factors there.
WIDENED_SPACE = dataclasses.replace(
    SPACE,
    name="widened",
    dtypes=(torch.bfloat16, torch.float16, cases.FP8),
    features=SPACE.features | {"mixed"},
    head_dim_step=16,
    stride_step=16,
)


def _call(attend: Callable[..., Result | None], function: str, *given: Any, **arguments: Any) -> Result:
    names = inspect.signature(getattr(fa3, function)).parameters
    arguments.update(zip(names, given, strict=False))
    defaults = {name: p.default for name, p in names.items() if p.default is not inspect.Parameter.empty}
    result = attend(checked(calls.of(function, {**defaults, **arguments})), only_known=False)
    if result is None:
        raise RuntimeError("the launcher did not launch")
    return result


FUNCTIONS: Mapping[str, Callable[..., Result]] = {
    name: partial(_call, cached.try_attend, name) for name in SPACE.functions
}
# However few query rows there are.
WIDENED_FUNCTIONS: Mapping[str, Callable[..., Result]] = {
    name: partial(_call, widened.attend, name) for name in SPACE.functions
}


def has_cache(plan: cases.Plan) -> bool:
    """Whether the keys of a plan lie in a cache: in pages, or as flash_attn_with_kvcache takes them."""
    return plan.function == cases.KVCACHE or plan.page_size > 0


def plans(
    first: int, count: int, draw: Callable[[int, cases.Space], cases.Plan] = cases.draw, space: cases.Space = SPACE
) -> list[cases.Plan]:
    """The next plans on a cache, from a seed on; of WIDENED_SPACE on one in e4m3."""
    found: list[cases.Plan] = []
    seed = first
    while len(found) < count:
        plan = draw(seed, space)
        served = space is SPACE or plan.key_dtype is cases.FP8
        found += [plan] if has_cache(plan) and served else []
        seed += 1
    return found


def paged_call(
    batch: int,
    queries: int,
    length: int,
    heads: tuple[int, int],
    page_size: int,
    d: int = 128,
    words: int = 0,
    **given: Any,
) -> tuple[Callable[[], Result], reference.Problem]:
    """A call of flash_attn_with_kvcache, lse included, on shuffled pages, and the same as plain sequences.

    words: of each row of a draft mask of random bits; 0: there is none.
    """
    count = -(-length // page_size)
    table = torch.randperm(batch * count, device="cuda").view(batch, count).int()
    q = torch.randn(batch, queries, heads[0], d, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(batch * count, page_size, heads[1], d, device="cuda", dtype=q.dtype) for _ in "kv")
    lengths = torch.full((batch,), length, device="cuda", dtype=torch.int32)
    arguments = {"cache_seqlens": lengths, "page_table": table, "causal": True, "return_softmax_lse": True, **given}
    masks: list[torch.Tensor | None] = [None] * batch
    if words:
        mask = torch.randint(-(2**31), 2**31, (batch * queries, words), device="cuda").int()
        arguments["draft_mask"], masks = mask, list(mask.view(batch, queries, words))
    call = partial(FUNCTIONS[cases.KVCACHE], q, k, v, **arguments)
    sequences = [
        reference.Sequence(q[i], *(x[table[i].long()].flatten(0, 1)[:length] for x in (k, v)), draft_mask=masks[i])
        for i in range(batch)
    ]
    window = arguments.get("window_size", (-1, -1))
    return call, reference.Problem(sequences, causal=arguments["causal"], window_size=window)


def judge_each_kind() -> None:
    """One call of each kind, the simplest first."""
    kinds: list[dict[str, Any]] = [{"num_splits": 1}, {"num_splits": 0}, {"num_splits": 3}]
    kinds += [{"num_splits": 1, "causal": False}, {"num_splits": 1, "window_size": (100, 0)}]
    kinds += [{"num_splits": splits, "words": words} for splits, words in ((1, 1), (1, 9), (3, 9))]
    for page_size in (128, 64, 256, 16, 8, 48, 1, 3, 100):
        for d in (128, 64, 96, 192, 256):
            for kind in kinds:
                torch.manual_seed(0)
                call, problem = paged_call(2, 130, 1000, (8, 2), page_size, d, **kind)
                out, lse = call()
                torch.cuda.synchronize()
                worst = reference.check(list(out), list(lse), problem).worst
                print(f"pages of {page_size}, d {d}, {kind}: {worst:.3f} of the limit", flush=True)
                if not worst <= 1:
                    raise AssertionError("wrong")


# batch, queries, keys, heads of q and of k: chunked prefill of few and of many heads, and verification of 16 tokens.
CELLS = [
    (1, 256, 131072, (8, 1)),
    (1, 1024, 131072, (8, 1)),
    (1, 512, 32768, (32, 8)),
    (4, 2048, 8192, (32, 8)),
    (32, 16, 8192, (64, 8)),
]


def time_cells() -> None:
    """Medians of 30 calls, the L2 cache flushed before each."""
    flush = torch.empty(1 << 28, dtype=torch.int8, device="cuda")
    for batch, queries, length, heads in CELLS:
        for page_size in (64, 16, 1):
            call, _ = paged_call(batch, queries, length, heads, page_size)
            call()
            times = []
            for _ in range(30):
                flush.zero_()
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                call()
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end))
            print(f"{batch} x {queries} x {length} {heads}, pages of {page_size}: {statistics.median(times):.4f} ms")


if __name__ == "__main__":
    judge_each_kind()
    time_cells()

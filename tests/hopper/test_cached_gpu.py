"""The Hopper prefill kernels on cached keys, on the GPU that they are for."""

from __future__ import annotations

import math
import os
from functools import partial

import pytest
import torch

from jit_kernel import device
from jit_kernel.fa3.hopper import kernels as hopper_kernels
from tests.support import cached_on_gpu, case_run, cases, hidden, reference
from tests.support.cached_on_gpu import FUNCTIONS, plans

pytestmark = pytest.mark.gpu

CASES = int(os.environ.get("JIT_KERNEL_TEST_CASES", "400"))
PAGE_SIZES = (1, 3, 8, 16, 48, 64, 128, 256)
kvcache, varlen = FUNCTIONS[cases.KVCACHE], FUNCTIONS[cases.VARLEN]


@pytest.fixture(autouse=True)
def _hopper_only() -> None:
    if device.get_device_capability() != (9, 0):
        pytest.skip("the kernels are for compute capability 9.0")


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, device="cuda", dtype=torch.int32)


def paged(x: torch.Tensor, page_size: int, table: torch.Tensor) -> torch.Tensor:
    """A dense cache (b, sk, h, d) in the pages that a table names for each sequence; the rest is NaN."""
    pages = x.new_full((int(table.max()) + 1, page_size, *x.shape[2:]), math.nan)
    for row, entries in zip(x, table.tolist(), strict=True):
        for i, entry in enumerate(entries):
            rows = row[i * page_size : (i + 1) * page_size]
            pages[entry, : len(rows)] = rows
    return pages


def shuffled_table(batch: int, length: int, page_size: int) -> torch.Tensor:
    count = -(-length // page_size)
    return torch.randperm(batch * count, device="cuda").view(batch, count).int()


@pytest.mark.parametrize("free", [0, 120, 131])
def test_random_cases(free: int, say: list[str]) -> None:
    """With multiprocessors left free, few blocks take many tiles each, one after the other."""
    functions = {name: partial(function, sm_margin=free) for name, function in FUNCTIONS.items()}
    worst, worst_seed = 0.0, -1
    for plan in plans(free * CASES * 4, CASES):
        shares = case_run.judge(plan, functions)
        if shares.worst > worst:
            worst, worst_seed = shares.worst, plan.seed
    blocks = torch.cuda.get_device_properties(0).multi_processor_count - free
    say.append(f"hopper, cached: {CASES} random cases on {blocks} blocks, worst share {worst:.3f} (seed {worst_seed})")


@pytest.mark.parametrize("free", [0, 131])
def test_what_no_query_sees_reaches_no_result(free: int, say: list[str]) -> None:
    """Random masks: the bits that zeros give, whatever lies in the memory of hidden keys and values, and in no page."""
    functions = {name: partial(function, sm_margin=free) for name, function in FUNCTIONS.items()}
    counts = [hidden.differ(plan, functions) for plan in plans(free * 2000, CASES, hidden.draw)]
    with_some = sum(count > 0 for count in counts)
    assert with_some > CASES // 2
    say.append(f"hopper, cached: {len(counts)} calls, {with_some} with hidden keys, {sum(counts)} elements not finite")


@pytest.mark.parametrize("group", [1, 2, 3, 8])
@pytest.mark.parametrize("sizes", hopper_kernels.HEAD_DIMS, ids=str)
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_every_page_size_gives_the_bits_of_the_dense_cache(page_size: int, sizes: tuple[int, int], group: int) -> None:
    """One block of keys holds the same rows however they are brought; the dense cache is judged by the reference."""
    torch.manual_seed(page_size)
    batch, length, queries = 3, 700, 77
    q, k = randn(batch, queries, 2 * group, sizes[0]), randn(batch, length, 2, sizes[0])
    v, lengths = randn(batch, length, 2, sizes[1]), ints(700, 77, 311)
    sinks = randn(2 * group, dtype=torch.float32)
    settings = {"causal": True, "num_splits": 1, "sinks": sinks, "return_softmax_lse": True}
    out, lse = kvcache(q, k, v, cache_seqlens=lengths, **settings)
    used = lengths.tolist()
    problem = reference.Problem(
        [reference.Sequence(q[i], k[i, :n], v[i, :n]) for i, n in enumerate(used)], causal=True, sinks=sinks
    )
    assert reference.check(list(out), list(lse), problem).worst <= 1
    for i, n in enumerate(used):
        k[i, n:] = v[i, n:] = math.nan
    table = shuffled_table(batch, length, page_size)
    pages = paged(k, page_size, table), paged(v, page_size, table)
    other, other_lse = kvcache(q, *pages, cache_seqlens=lengths, page_table=table, **settings)
    assert torch.equal(other, out)
    assert torch.equal(other_lse, lse)


@pytest.mark.parametrize("page_size", [0, *PAGE_SIZES])
def test_left_padding_shifts_blocks_and_nothing_else(page_size: int) -> None:
    torch.manual_seed(page_size + 100)
    length, queries = 500, 130
    q, k, v = randn(4, queries, 4, 128), randn(4, length, 2, 128), randn(4, length, 2, 128)
    pads, lengths = [0, 5, 129, 300], [500, 400, 400, 310]
    for i, (pad, n) in enumerate(zip(pads, lengths, strict=True)):
        for x in (k, v):
            x[i, :pad] = x[i, n:] = math.nan
    given = {"cache_seqlens": ints(*lengths), "cache_leftpad": ints(*pads), "causal": True, "num_splits": 1}
    caches = (k, v)
    if page_size:
        table = shuffled_table(4, length, page_size)
        caches = paged(k, page_size, table), paged(v, page_size, table)
        given["page_table"] = table
    out, lse = kvcache(q, *caches, return_softmax_lse=True, **given)
    kept = [slice(pad, n) for pad, n in zip(pads, lengths, strict=True)]
    problem = reference.Problem(
        [reference.Sequence(q[i], k[i, rows], v[i, rows]) for i, rows in enumerate(kept)], causal=True
    )
    assert reference.check(list(out), list(lse), problem).worst <= 1


@pytest.mark.parametrize("page_size", [0, 3, 64])
def test_new_keys_that_lie_in_the_cache_count(page_size: int) -> None:
    """As after an append: the length is cache_seqlens and the new keys, of one number or of cu_seqlens_k_new."""
    torch.manual_seed(11)
    q, k, v = randn(2, 20, 4, 64), randn(2, 300, 2, 64), randn(2, 300, 2, 64)
    table = shuffled_table(2, 300, page_size) if page_size else None
    caches = (k, v) if table is None else (paged(k, page_size, table), paged(v, page_size, table))
    expected = kvcache(q, *caches, cache_seqlens=ints(107, 27), page_table=table, causal=True, num_splits=1)
    new = randn(2, 7, 2, 64)
    same = kvcache(
        q, *caches, new, new, cache_seqlens=ints(100, 20), page_table=table, causal=True, num_splits=1
    )  # fmt: skip
    assert torch.equal(same, expected)
    new, starts = randn(14, 2, 64), ints(0, 10, 14)
    same = kvcache(
        q, *caches, new, new, cache_seqlens=ints(97, 23), page_table=table, cu_seqlens_k_new=starts,
        causal=True, num_splits=1,
    )  # fmt: skip
    assert torch.equal(same, expected)


@pytest.mark.parametrize("page_size", [1, 16, 256])
@pytest.mark.parametrize("sizes", [(64, 64), (128, 128), (256, 256)], ids=str)
def test_a_sequence_alone_is_bitwise_the_one_in_a_batch(sizes: tuple[int, int], page_size: int) -> None:
    torch.manual_seed(12)
    batch, length = 24, 600
    lengths_q = torch.randint(1, 300, (batch,)).tolist()
    lengths_k = torch.randint(1, length, (batch,)).tolist()
    starts = torch.tensor([0, *lengths_q], device="cuda").cumsum(0).int()
    q = randn(sum(lengths_q), 8, sizes[0])
    table = shuffled_table(batch, length, page_size)
    k, v = (paged(randn(batch, length, 2, d), page_size, table) for d in sizes)
    settings = {"causal": True, "return_softmax_lse": True}
    out, lse = varlen(q, k, v, starts, None, page_table=table, seqused_k=ints(*lengths_k), **settings)
    for i in range(0, batch, 5):
        rows = slice(int(starts[i]), int(starts[i + 1]))
        alone, alone_lse = kvcache(
            q[None, rows], k, v, cache_seqlens=ints(lengths_k[i]), page_table=table[i : i + 1], num_splits=1, **settings
        )
        assert torch.equal(alone[0], out[rows])
        assert torch.equal(alone_lse[0], lse[:, rows])


@pytest.mark.parametrize("page_size", [0, 1, 64])
def test_the_same_call_a_thousand_times_gives_the_same_bits(page_size: int) -> None:
    torch.manual_seed(13)
    q, k, v = randn(5, 130, 8, 128), randn(5, 900, 2, 128), randn(5, 900, 2, 128)
    given = {"cache_seqlens": ints(900, 1, 130, 700, 64), "causal": True, "num_splits": 1}
    if page_size:
        given["page_table"] = table = shuffled_table(5, 900, page_size)
        k, v = paged(k, page_size, table), paged(v, page_size, table)
    first = kvcache(q, k, v, **given)
    for _ in range(1000):
        assert torch.equal(kvcache(q, k, v, **given), first)


@pytest.mark.parametrize("num_splits", [0, 5])
@pytest.mark.parametrize("sizes", hopper_kernels.HEAD_DIMS, ids=str)
def test_parts_of_long_keys_are_joined_to_the_same_bits_each_time(sizes: tuple[int, int], num_splits: int) -> None:
    """A chunk of queries at the end of many keys, few heads: more parts than tiles; and tiles with fewer blocks."""
    torch.manual_seed(15)
    lengths, page_size = [20_000, 90, 5_000], 64
    q = randn(3, 70, 8, sizes[0])
    table = shuffled_table(3, max(lengths), page_size)
    k, v = (randn(table.numel(), page_size, 1, d) for d in sizes)
    call = partial(
        kvcache, q, k, v, cache_seqlens=ints(*lengths), page_table=table, causal=True, return_softmax_lse=True
    )
    out, lse = call(num_splits=num_splits)
    keys = [[x[row.long()].flatten(0, 1)[:n] for x in (k, v)] for row, n in zip(table, lengths, strict=True)]
    problem = reference.Problem([reference.Sequence(q[i], *keys[i]) for i in range(3)], causal=True)
    assert reference.check(list(out), list(lse), problem).worst <= 1
    assert not torch.equal(call(num_splits=1)[0][0], out[0])  # the keys were cut
    for _ in range(200):
        again, again_lse = call(num_splits=num_splits)
        assert torch.equal(again, out)
        assert torch.equal(again_lse, lse)


def test_a_captured_call_replays_with_other_lengths() -> None:
    torch.manual_seed(14)
    q, k, v = randn(3, 40, 8, 128), randn(3, 1000, 1, 128), randn(3, 1000, 1, 128)
    table = shuffled_table(3, 1000, 16)
    pages = paged(k, 16, table), paged(v, 16, table)
    lengths, out = ints(1000, 1000, 1000), torch.empty_like(q)
    call = partial(kvcache, q, *pages, cache_seqlens=lengths, page_table=table, causal=True)
    call(out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(out=out)
    for seed in range(100):
        torch.manual_seed(seed)
        lengths.copy_(torch.randint(0, 1001, (3,)))
        expected = call()
        out.fill_(math.nan)
        graph.replay()
        assert torch.equal(out, expected)


def test_an_empty_cache_and_a_cache_without_a_key() -> None:
    q = randn(2, 9, 4, 128)
    for shape in ((2, 0, 2, 128), (2, 50, 2, 128)):
        cache = torch.full(shape, math.nan, device="cuda", dtype=torch.bfloat16)
        out, lse = kvcache(q, cache, cache, cache_seqlens=ints(0, 0), causal=True, return_softmax_lse=True)
        assert not bool(out.count_nonzero())
        assert bool((lse == -math.inf).all())


def test_the_space_has_every_kind_of_cache() -> None:
    counted = cases.coverage(plans(0, 300))
    assert {"keys paged", "keys dense", "batch_idx", "leftpad", "splits", "seqused_q", "draft_mask"} <= counted.keys()
    assert cached_on_gpu.SPACE.page_sizes[0] == 1

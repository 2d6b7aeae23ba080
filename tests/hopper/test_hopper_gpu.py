"""The Hopper kernels on the GPU that they are for: numbers, bits, graphs."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import pytest
import torch

import jit_kernel.flash_attention_v3 as fa3
from jit_kernel import config, device
from jit_kernel.engine import build
from jit_kernel.fa3 import hopper
from jit_kernel.fa3.hopper import kernels as hopper_kernels
from tests.support import case_run, cases, hidden, large_scores, reference
from tests.support.hopper_inputs import randn, starts

pytestmark = pytest.mark.gpu

# Sequences around the kernels' tiles of 128 and 192 queries and of 80 to 128 keys.
SPACE = cases.Space(
    "hopper",
    device="cuda",
    dtypes=(torch.bfloat16, torch.float16),
    head_dims=((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)),
    any_head_dim=256,
    head_dim_step=8,
    qv_head_dims=(),
    functions=(cases.VARLEN, cases.DENSE),
    features=cases.FEATURES
    - {"paged", "append", "new_ragged", "rotary", "batch_idx", "leftpad", "qv", "only_qv", "splits", "odd_head_size"}
    - {"draft_mask"},
    lengths=(150, 500, 1500),
    stride_step=8,
)
CASES = int(os.environ.get("JIT_KERNEL_TEST_CASES", "400"))
FUNCTIONS = {name: getattr(fa3, name) for name in (cases.VARLEN, cases.DENSE)}


@pytest.fixture(autouse=True)
def _hopper_only() -> None:
    if device.get_device_capability() != (9, 0):
        pytest.skip("the kernels are for compute capability 9.0")


@contextmanager
def forced(name: str) -> Iterator[None]:
    """Every call goes to one implementation, or fails."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JIT_KERNEL_IMPLEMENTATION", name)
        config.reload()
        yield
    config.reload()


@pytest.mark.parametrize("free", [0, 120, 131])
def test_random_cases(free: int, say: list[str]) -> None:
    """With multiprocessors left free, few blocks take many tiles each, one after the other."""
    functions = {name: partial(function, sm_margin=free) for name, function in FUNCTIONS.items()}
    worst, worst_seed = 0.0, -1
    with forced("hopper"):
        for seed in range(free * CASES, free * CASES + CASES):
            shares = case_run.judge(cases.draw(seed, SPACE), functions)
            if shares.worst > worst:
                worst, worst_seed = shares.worst, seed
    blocks = torch.cuda.get_device_properties(0).multi_processor_count - free
    say.append(f"hopper: {CASES} random cases on {blocks} blocks, worst share {worst:.3f} (seed {worst_seed})")


@pytest.mark.parametrize("free", [0, 131])
def test_what_no_query_sees_reaches_no_result(free: int, say: list[str]) -> None:
    """500 random masks: the bits that zeros give, whatever lies in the memory of hidden keys and values."""
    functions = {name: partial(function, sm_margin=free) for name, function in FUNCTIONS.items()}
    with forced("hopper"):
        counts = [hidden.differ(hidden.draw(seed, SPACE), functions) for seed in range(free * 500, free * 500 + 500)]
    with_some = sum(count > 0 for count in counts)
    assert with_some > 250
    say.append(f"hopper: {len(counts)} calls, {with_some} with hidden keys, {sum(counts)} elements not finite")


@pytest.mark.parametrize("implementation", ["hopper", "portable"])
@pytest.mark.parametrize("mask", [{"causal": True}, {"window_size": (200, 30)}, {"attention_chunk": 333}], ids=str)
@pytest.mark.parametrize("sizes", hopper_kernels.HEAD_DIMS, ids=str)
def test_what_no_row_of_a_tile_sees_reaches_none_of_them(
    implementation: str, mask: dict, sizes: tuple[int, int]
) -> None:
    """A tile has at most 256 queries, and begins at a multiple of its size."""
    torch.manual_seed(9)
    length, tile = 1500, 256
    q, k, v = randn(1, length, 2, sizes[0]), randn(1, length, 2, sizes[0]), randn(1, length, 2, sizes[1])
    problem = reference.Problem([], **mask)
    seen = reference.visible(problem, length, length, torch.device("cuda"))
    with forced(implementation):
        clean = fa3.flash_attn_func(q, k, v, **mask)
        for key in (0, 40, 130, 255, 300, 511, 700, 1025, 1499):
            bad = v.clone()
            bad[0, key] = math.nan
            out = fa3.flash_attn_func(q, k, bad, **mask)
            rows = seen[:, key].nonzero().flatten() // tile
            reached = torch.isin(torch.arange(length, device="cuda") // tile, rows)
            assert bool(out[0, seen[:, key]].isnan().all())
            assert torch.equal(out[0, ~reached], clean[0, ~reached]), (key, mask)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sizes", hopper_kernels.HEAD_DIMS, ids=str)
def test_a_sequence_alone_is_bitwise_the_one_in_a_batch(sizes: tuple[int, int], causal: bool) -> None:
    torch.manual_seed(1)
    lengths = torch.randint(1, 700, (64,)).tolist()
    total = sum(lengths)
    q, k, v = randn(total, 4, sizes[0]), randn(total, 2, sizes[0]), randn(total, 2, sizes[1])
    cu = starts(lengths)
    out, lse = fa3.flash_attn_varlen_func(q, k, v, cu, cu, causal=causal, return_softmax_lse=True)
    for i in range(0, 64, 7):
        rows = slice(int(cu[i]), int(cu[i + 1]))
        alone, alone_lse = fa3.flash_attn_func(
            q[None, rows], k[None, rows], v[None, rows], causal=causal, return_softmax_lse=True
        )
        assert torch.equal(alone[0], out[rows])
        assert torch.equal(alone_lse[0], lse[:, rows])


@pytest.mark.parametrize("implementation", ["hopper", "portable"])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_a_query_that_is_nan_gives_nan_in_its_row_alone(
    implementation: str, d: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JIT_KERNEL_IMPLEMENTATION", implementation)
    config.reload()
    try:
        q, k, v = (randn(1, 300, 2, d) for _ in "qkv")
        clean, clean_lse = fa3.flash_attn_func(q, k, v, causal=True, return_softmax_lse=True)
        q[0, 200, 1, 7] = math.nan
        out, lse = fa3.flash_attn_func(q, k, v, causal=True, return_softmax_lse=True)
    finally:
        monkeypatch.undo()
        config.reload()
    assert out[0, 200, 1].isnan().all()
    assert lse[0, 1, 200].isnan()
    clean[0, 200, 1], clean_lse[0, 1, 200] = out[0, 200, 1], lse[0, 1, 200]
    assert torch.equal(out.nan_to_num(9.0), clean.nan_to_num(9.0))
    assert torch.equal(lse.nan_to_num(9.0), clean_lse.nan_to_num(9.0))


def test_the_same_call_a_thousand_times_gives_the_same_bits() -> None:
    torch.manual_seed(2)
    lengths = [1, 900, 64, 300, 0, 129]
    q, k, v = (randn(sum(lengths), heads, 128) for heads in (8, 2, 2))
    cu = starts(lengths)
    first = fa3.flash_attn_varlen_func(q, k, v, cu, cu, causal=True)
    for _ in range(1000):
        assert torch.equal(fa3.flash_attn_varlen_func(q, k, v, cu, cu, causal=True), first)


def test_a_captured_call_replays_on_new_inputs_beside_eager_calls() -> None:
    torch.manual_seed(6)
    q, k, v = (randn(2, 500, 4, 128) for _ in range(3))
    out = torch.empty_like(q)
    fa3.flash_attn_func(q, k, v, causal=True, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            fa3.flash_attn_func(q, k, v, causal=True, out=out)
    side = torch.cuda.Stream()
    other = [randn(2, 777, 4, 128) for _ in range(3)]
    expected_other = fa3.flash_attn_func(*other, causal=True)
    for _ in range(20):
        for x in (q, k, v):
            x.normal_()
        expected = fa3.flash_attn_func(q, k, v, causal=True)
        out.fill_(math.nan)
        side.wait_stream(torch.cuda.current_stream())
        graph.replay()
        with torch.cuda.stream(side):
            beside = [fa3.flash_attn_func(*other, causal=True) for _ in range(5)]
        torch.cuda.synchronize()
        assert torch.equal(out, expected)
        assert all(torch.equal(each, expected_other) for each in beside)


def test_a_cold_call_under_capture_names_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (randn(1, 64, 2, 64) for _ in range(3))
    fa3.flash_attn_func(q, k, v)
    kernels = hopper.kernels.kernels_of(q.device)
    monkeypatch.setattr(kernels, "handles", {})
    monkeypatch.setattr(kernels, "_on_device", {})
    monkeypatch.setattr(build, "is_stored", lambda spec, target: False)
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(RuntimeError, match=re.escape("python -m jit_kernel.warmup --target cuda:sm_90a")),
        torch.cuda.graph(graph),
    ):
        fa3.flash_attn_func(q, k, v)
    monkeypatch.undo()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):  # the failure left no capture behind
        fa3.flash_attn_func(q, k, v)


def test_hopper_and_portable_agree(say: list[str]) -> None:
    seeds = range(10_000, 10_000 + CASES // 6)

    def share(seed: int) -> float:
        return case_run.judge(cases.draw(seed, SPACE), FUNCTIONS).worst

    worst = 0.0
    for name in ("hopper", "portable"):
        # Threads, because odd head sizes are compiled here: 40 s for 50 cases one after the other.
        with forced(name), ThreadPoolExecutor(max(1, device.cpu_count() - 2)) as pool:
            worst = max(worst, *pool.map(share, seeds))
    assert worst <= 1
    say.append(f"hopper and portable on {len(seeds)} shared cases: worst share {worst:.3f}")


def test_rows_without_queries_are_zero_in_an_output_of_ours() -> None:
    torch.manual_seed(7)
    q, k, v = (randn(300, 2, 128) for _ in range(3))
    cu = torch.tensor([10, 110, 200], device="cuda", dtype=torch.int32)
    used = torch.tensor([50, 0], device="cuda", dtype=torch.int32)
    torch.cuda.empty_cache()
    out, lse = fa3.flash_attn_varlen_func(q, k, v, cu, cu, seqused_q=used, causal=True, return_softmax_lse=True)
    filled = torch.zeros(300, dtype=torch.bool, device="cuda")
    filled[10:60] = True
    assert not bool(out[~filled].count_nonzero())
    assert bool((lse[:, ~filled] == -math.inf).all())
    # The keys are all 100 of the first sequence; the queries its first 50, aligned to the bottom right.
    sequence = reference.Sequence(q[10:60], k[10:110], v[10:110])
    shares = reference.check([out[10:60]], [lse[:, 10:60]], reference.Problem([sequence], causal=True))
    assert shares.worst <= 1


@pytest.mark.parametrize("case", large_scores.GPU_CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_large_scores(case: large_scores.Case, dtype: torch.dtype) -> None:
    """A huge scale, or huge products q·k: one-hot or shared weights, and no NaN."""
    for sq, sk in ((1, 300), (9, 70), (150, 150), (150, 600), (400, 1000)):
        for d in (64, 128, 256):
            wrong = large_scores.faults(case, dtype, sq, sk, paged=False, device="cuda", d=d, splits=1)
            assert not wrong, f"{sq} queries, {sk} keys, head size {d}: {wrong}"

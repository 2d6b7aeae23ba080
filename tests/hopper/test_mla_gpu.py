"""The Hopper MLA kernels on the GPU that they are for, through the public functions: numbers, bits, graphs."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
import torch

from jit_kernel import config, device
from jit_kernel.fa3.hopper import mla
from tests.support import case_run, cases, drafts, hidden, mla_on_gpu
from tests.support.hopper_inputs import poisoned
from tests.support.mla_on_gpu import Latent, functions, plans

pytestmark = pytest.mark.gpu

CASES = int(os.environ.get("JIT_KERNEL_TEST_CASES", "300"))
# batch, tokens, longest, heads, page size, dv: each number of rows, many tiles, cut and whole, boxes and single rows.
SHAPES = [
    (1, 1, 20_000, 128, 64, 512),
    (5, 1, 3000, 16, 64, 512),
    (37, 1, 900, 16, 1, 512),
    (3, 2, 2000, 16, 16, 512),
    (70, 4, 300, 16, 64, 512),
    (2, 16, 1000, 64, 24, 512),
    (9, 1, 1500, 64, 3, 256),
    (9, 1, 1500, 8, 64, 256),
    (200, 1, 300, 128, 64, 512),
]
LEAST = [SHAPES[0], SHAPES[1], SHAPES[2], SHAPES[4], SHAPES[6]]


@pytest.fixture(autouse=True)
def _hopper_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if device.get_device_capability() != (9, 0):
        pytest.skip("the kernels are for compute capability 9.0")
    monkeypatch.setenv("JIT_KERNEL_IMPLEMENTATION", "hopper")
    config.reload()
    yield
    monkeypatch.undo()
    config.reload()


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    return mla_on_gpu.counted_launches(monkeypatch)


@pytest.mark.parametrize("free", [0, 120, 131])
def test_random_cases(free: int, say: list[str], launched: list[None]) -> None:
    """On 132, 12 and 1 blocks: few blocks have many sequences each, one after the other. Caches of 16 bits and in e4m3,
    queries in e4m3, draft masks, appends and every form of a cache are among them."""
    made, chosen = functions(free), plans(10_000 * free, CASES)
    worst = max((case_run.judge(plan, made).worst, plan.seed) for plan in chosen)
    assert worst[0] <= 1
    assert len(launched) == CASES
    kinds = cases.coverage(chosen)
    say.append(
        f"hopper mla: {CASES} random cases ({kinds['mixed']} over e4m3, {kinds['draft_mask']} with draft masks), "
        f"{free} multiprocessors free, worst share {worst[0]:.3f} (seed {worst[1]})"
    )


def test_what_no_query_sees_reaches_no_result(say: list[str]) -> None:
    counts = [hidden.differ(plan, functions(0)) for plan in plans(5_000_000, CASES // 2, hidden.draw)]
    assert sum(count > 0 for count in counts) > len(counts) // 2
    say.append(f"hopper mla: {len(counts)} calls with {sum(counts)} elements that are not finite")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("over_e4m3", [False, True])
def test_lengths_of_a_serving_batch(
    shape: tuple[Any, ...], dtype: torch.dtype, over_e4m3: bool, launched: list[None]
) -> None:
    torch.manual_seed(1)
    call = Latent.of(*shape, dtype=dtype, over_e4m3=over_e4m3)
    for seed in range(2):
        call.draw_lengths(seed)
        assert call.check() <= 1, seed
    assert call.check(only_qv=True) <= 1
    assert call.check(num_splits=1, causal=False) <= 1
    assert len(launched) == 4


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[1] * shape[3] >= mla.TILE_ROWS], ids=str)
def test_an_e4m3_cache_gives_the_bits_of_the_16_bit_one_that_it_stands_for(shape: tuple[Any, ...]) -> None:
    """Of fp16, and with factors that are powers of two: there nothing is rounded, and 64 rows sum in one order."""
    torch.manual_seed(2)
    batch = shape[0]
    factors = {name: torch.full((batch, 1), x, device="cuda") for name, x in (("k_descale", 0.5), ("v_descale", 2.0))}
    call = Latent.of(*shape, dtype=torch.float16, over_e4m3=True)
    call.given.update(factors)
    for more in ({}, {"only_qv": True, "num_splits": 1}, {"window_size": (300, 0), "softcap": 20.0}):
        call.draw_lengths(len(more))
        found = call(return_softmax_lse=True, **more)
        assert all(map(torch.equal, found, call.in_16_bits()(return_softmax_lse=True, **more))), more


@pytest.mark.parametrize("over_e4m3", [False, True])
@pytest.mark.parametrize("heads", [8, 16, 40, 64])
@pytest.mark.parametrize("page_size", [64, 1])
def test_a_chain_gives_the_bits_of_a_causal_call(page_size: int, heads: int, over_e4m3: bool) -> None:
    torch.manual_seed(page_size + heads)
    for tokens in (1, 2, 7, 16):
        call = Latent.of(3, tokens, 700, heads, page_size, over_e4m3=over_e4m3)
        call.set_lengths([700, 64, 641])
        chain = drafts.pack(drafts.chain(tokens, 2).cuda()).repeat(3, 1)
        # Without causal a tile that is not the last one sees more keys, which other thread blocks have.
        for causal in (False, True) if tokens * heads <= mla.TILE_ROWS else (True,):
            assert torch.equal(call(draft_mask=chain, causal=causal), call()), (tokens, causal)
        assert not torch.equal(call(draft_mask=chain ^ (1 << 30)), call()), "a bit of the last key but one counts"


@pytest.mark.parametrize("heads", [1, 5, 16, 17, 32, 33, 40, 64, 65, 128])
def test_any_number_of_heads(heads: int, launched: list[None]) -> None:
    torch.manual_seed(heads)
    for tokens in (1, 3):
        assert Latent.of(3, tokens, 700, heads, 64).check() <= 1, tokens
    assert len(launched) == 2


@pytest.mark.parametrize("over_e4m3", [False, True])
@pytest.mark.parametrize("shape", LEAST, ids=str)
def test_a_captured_call_replays_with_other_lengths(shape: tuple[Any, ...], over_e4m3: bool) -> None:
    """Captured with the longest lengths: the bits of a plain call for others, with other queries."""
    torch.manual_seed(3)
    call = Latent.of(*shape, over_e4m3=over_e4m3)
    out = torch.empty(*call.queries.shape[:-1], shape[5], device="cuda", dtype=torch.bfloat16)
    call(out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(out=out)
    for seed in range(10):
        call.draw_lengths(seed)
        call.queries.normal_()
        expected = call(out=poisoned(*out.shape))
        out.fill_(math.nan)
        graph.replay()
        assert torch.equal(out, expected), seed


@pytest.mark.parametrize("over_e4m3", [False, True])
@pytest.mark.parametrize("shape", LEAST, ids=str)
def test_the_same_call_many_times_gives_the_same_bits(shape: tuple[Any, ...], over_e4m3: bool) -> None:
    torch.manual_seed(5)
    call = Latent.of(*shape, over_e4m3=over_e4m3)
    call.draw_lengths(5)
    first = call()
    differs = torch.zeros((), dtype=torch.bool, device="cuda")
    for _ in range(300):
        differs |= (call(out=poisoned(*first.shape)) != first).any()  # NaN differs from everything
    assert not bool(differs)


def test_calls_of_different_grids_leave_nothing_behind() -> None:
    """The counters of a stream are all zero after each launch: calls of many grids, none waited for."""
    torch.manual_seed(6)
    dice = Random(6)
    made = []
    for shape in LEAST:
        for free in (0, 65, 120, 131):
            call = Latent.of(*shape, sm_margin=free, over_e4m3=free % 2 > 0)
            call.draw_lengths(free)
            made.append((call, call()))
    torch.cuda.synchronize()
    differs = torch.zeros((), dtype=torch.bool, device="cuda")
    for _ in range(300):
        call, expected = dice.choice(made)
        differs |= (call(out=poisoned(*expected.shape)) != expected).any()
    assert not bool(differs)


@pytest.mark.parametrize("given", [{"num_splits": 1}, {"deterministic": True}], ids=str)
@pytest.mark.parametrize(("tokens", "heads"), [(1, 16), (4, 16), (1, 128)])
def test_a_sequence_has_the_same_bits_alone_and_among_others(given: dict[str, Any], tokens: int, heads: int) -> None:
    torch.manual_seed(9)
    call = Latent.of(9, tokens, 2000, heads, 64, **given)
    call.draw_lengths(9)
    together = call()
    for i in range(9):
        alone = Latent(call.queries[i : i + 1], call.pages, call.table[i : i + 1], call.lengths[i : i + 1], call.given)
        assert torch.equal(alone()[0], together[i]), i


def test_no_call_waits_for_the_device() -> None:
    calls = [Latent.of(*shape, over_e4m3=over_e4m3) for shape in LEAST for over_e4m3 in (False, True)]
    for call in calls:
        call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for call in calls:
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")

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
from tests.support import case_run, hidden, mla_on_gpu
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
def test_random_cases(free: int, say: list[str]) -> None:
    """With multiprocessors left free, few blocks have many sequences each, one after the other."""
    made = functions(free)
    worst = max((case_run.judge(plan, made).worst, plan.seed) for plan in plans(10_000 * free, CASES))
    assert worst[0] <= 1
    say.append(
        f"hopper mla: {CASES} random cases, {free} multiprocessors free, worst share {worst[0]:.3f} (seed {worst[1]})"
    )


def test_what_no_query_sees_reaches_no_result(say: list[str]) -> None:
    counts = [hidden.differ(plan, functions(0)) for plan in plans(5_000_000, CASES // 2, hidden.draw)]
    assert sum(count > 0 for count in counts) > len(counts) // 2
    say.append(f"hopper mla: {len(counts)} calls with {sum(counts)} elements that are not finite")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lengths_of_a_serving_batch(shape: tuple[Any, ...], dtype: torch.dtype, launched: list[None]) -> None:
    torch.manual_seed(1)
    call = Latent.of(*shape, dtype=dtype)
    for seed in range(2):
        call.draw_lengths(seed)
        assert call.check() <= 1, seed
    assert call.check(only_qv=True) <= 1
    assert call.check(num_splits=1, causal=False) <= 1
    assert len(launched) == 4


@pytest.mark.parametrize("heads", [1, 5, 16, 17, 32, 33, 40, 64, 65, 128])
def test_any_number_of_heads(heads: int, launched: list[None]) -> None:
    torch.manual_seed(heads)
    for tokens in (1, 3):
        assert Latent.of(3, tokens, 700, heads, 64).check() <= 1, tokens
    assert len(launched) == 2


@pytest.mark.parametrize("shape", LEAST, ids=str)
def test_a_captured_call_replays_with_other_lengths(shape: tuple[Any, ...]) -> None:
    """Captured with the longest lengths: the bits of a plain call for others, with other queries."""
    torch.manual_seed(3)
    call = Latent.of(*shape)
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


@pytest.mark.parametrize("shape", LEAST, ids=str)
def test_the_same_call_many_times_gives_the_same_bits(shape: tuple[Any, ...]) -> None:
    torch.manual_seed(5)
    call = Latent.of(*shape)
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
            call = Latent.of(*shape, sm_margin=free)
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
    calls = [Latent.of(*shape) for shape in LEAST]
    for call in calls:
        call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for call in calls:
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")

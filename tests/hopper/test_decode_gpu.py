"""The Hopper decode kernels on the GPU that they are for, through the public functions: numbers, bits, graphs."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from random import Random
from typing import Any

import pytest
import torch

import jit_kernel.flash_attention_v3 as fa3
from jit_kernel import config, device
from tests.support import case_run, cases, decode_on_gpu
from tests.support.decode_on_gpu import NAMES, SHARED_SPACE, Paged, functions, in_processes, jobs_of, plans
from tests.support.hopper_inputs import poisoned, randn

pytestmark = pytest.mark.gpu

CASES = int(os.environ.get("JIT_KERNEL_TEST_CASES", "1020"))  # for each number of multiprocessors
# batch, queries, longest, heads, page size, head size: in clusters, in parts, two heads a block, of boxes and of rows.
SHAPES = [
    (1, 1, 8192, (64, 8), 64, 128),
    (3, 1, 3000, (8, 2), 1, 64),
    (2, 1, 20_000, (8, 1), 16, 128),
    (37, 2, 1500, (16, 2), 64, 128),
    (37, 1, 1500, (8, 4), 1, 128),
    (64, 1, 700, (32, 8), 16, 128),
    (64, 4, 700, (16, 8), 1, 64),
    (70, 4, 300, (16, 2), 24, 256),
]


@pytest.fixture(autouse=True)
def _hopper_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A call that hopper claims and another implementation would serve is an error."""
    if device.get_device_capability() != (9, 0):
        pytest.skip("the kernels are for compute capability 9.0")
    monkeypatch.setenv("JIT_KERNEL_STRICT", "1")
    config.reload()
    yield
    monkeypatch.undo()
    config.reload()


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One entry for each call that a decode kernel serves."""
    return decode_on_gpu.counted_launches(monkeypatch)


@contextmanager
def forced(name: str) -> Iterator[None]:
    """Every call goes to one implementation, or fails."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JIT_KERNEL_IMPLEMENTATION", name)
        config.reload()
        yield
    config.reload()


def test_random_cases(say: list[str]) -> None:
    """With multiprocessors left free, few blocks have many sequences each, one after the other.

    Appends, rotary embeddings, cache_batch_idx and left padding are among them; every byte of a cache that must not
    change is compared.
    """
    found = in_processes(jobs_of("judge", (0, 120, 131), CASES, 4))
    assert len(found) >= 3 * CASES
    worst = max(found, key=lambda words: float(words[2]))
    assert float(worst[2]) <= 1
    say.append(f"hopper decode: {len(found)} random cases, worst share {worst[2]} (seed {worst[1]})")


def test_what_no_query_sees_reaches_no_result(say: list[str]) -> None:
    """Random masks: the bits that zeros give, whatever hidden keys and values hold, and pages that hold none."""
    found = in_processes(jobs_of("hidden", (0, 131), 250, 2))
    counts = [int(words[2]) for words in found]
    with_some = sum(count > 0 for count in counts)
    assert with_some > len(counts) // 2
    say.append(f"hopper decode: {len(counts)} calls, {with_some} with hidden keys, {sum(counts)} elements not finite")


def test_hopper_and_portable_agree(launched: list[None], say: list[str]) -> None:
    shared = plans(500_000, 500, SHARED_SPACE)
    worst = 0.0
    for name in ("hopper", "portable"):
        with forced(name), ThreadPoolExecutor(max(1, device.cpu_count() - 2)) as pool:
            worst = max(worst, *pool.map(lambda plan: case_run.judge(plan, functions(0)).worst, shared))
        assert len(launched) >= 480  # of the rest no query is left
    assert worst <= 1
    say.append(f"hopper decode and portable on {len(shared)} shared cases: worst share {worst:.3f}")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lengths_of_a_serving_batch(shape: tuple[Any, ...], launched: list[None]) -> None:
    torch.manual_seed(1)
    call = Paged.of(*shape)
    for seed in range(4):
        call.draw_lengths(seed)
        assert call.check() <= 1, seed
    assert len(launched) == 4


@pytest.mark.parametrize("batch", [33, 65, 300])
def test_sequences_that_are_looked_at_32_at_a_time(batch: int, launched: list[None]) -> None:
    torch.manual_seed(batch)
    call = Paged.of(batch, 1, 400, (8, 1), 16, 64)
    for seed in range(3):
        call.draw_lengths(seed)
        assert call.check() <= 1, seed
    assert len(launched) == 3


@pytest.mark.parametrize("softcap", [0.0, 1.2e-38])
def test_scores_that_are_all_the_same(softcap: float) -> None:
    """A scale so small that the step which references may lag behind by is no finite score."""
    torch.manual_seed(8)
    call = Paged.of(2, 1, 500, (8, 2), 16)
    scale = {"softcap": softcap} if softcap else {"softmax_scale": 1.2e-38}
    out = call(causal=False, **scale)
    for i, entries in enumerate(call.table.long()):
        mean = call.v[entries].flatten(0, 1)[:500].float().mean(0).repeat_interleave(4, 0)
        torch.testing.assert_close(out[i, 0].float(), mean, rtol=2**-7, atol=2**-9)


@pytest.mark.parametrize("page_size", [1, 64])
def test_a_long_sequence_is_read_by_every_block(page_size: int, launched: list[None]) -> None:
    torch.manual_seed(2)
    call = Paged.of(1, 2, 150_000, (32, 1), page_size, sinks=randn(32, dtype=torch.float32))
    assert call.check() <= 1
    assert len(launched) == 1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_captured_call_replays_with_other_lengths(shape: tuple[Any, ...], launched: list[None]) -> None:
    """Captured with the longest lengths: the bits of a plain call for 100 others, with other queries."""
    torch.manual_seed(3)
    call = Paged.of(*shape)
    out = torch.empty_like(call.q)
    call(out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(out=out)
    for seed in range(100):
        call.draw_lengths(seed)
        call.q.normal_()
        expected = call(out=poisoned(*call.q.shape))
        out.fill_(math.nan)
        graph.replay()
        assert torch.equal(out, expected), seed
    assert len(launched) == 102


def test_two_calls_of_one_graph_have_room_of_their_own(launched: list[None]) -> None:
    torch.manual_seed(4)
    call = Paged.of(9, 1, 2000, (16, 16), 16, 64)
    expected = call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
        again = call()
    for _ in range(3):
        graph.replay()
        assert torch.equal(out, expected)
        assert torch.equal(again, expected)
    assert len(launched) == 3


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], SHAPES[3], SHAPES[4]], ids=str)
def test_the_same_call_a_thousand_times_gives_the_same_bits(shape: tuple[Any, ...]) -> None:
    torch.manual_seed(5)
    call = Paged.of(*shape)
    call.draw_lengths(5)
    first = call()
    outs = [poisoned(*call.q.shape) for _ in range(2)]
    differs = torch.zeros((), dtype=torch.bool, device="cuda")
    for i in range(1000):
        differs |= (call(out=outs[i % 2]) != first).any()  # NaN differs from everything
        outs[(i + 1) % 2].fill_(math.nan)
    assert not bool(differs)


def test_calls_of_different_grids_leave_nothing_behind(launched: list[None]) -> None:
    """The counters of a stream are all zero after each launch: 600 calls of many grids, none waited for."""
    torch.manual_seed(6)
    dice = Random(6)
    made = []
    for shape in SHAPES:
        for free in (0, 65, 120, 131):
            call = Paged.of(*shape, sm_margin=free)
            call.draw_lengths(free)
            made.append((call, call(), poisoned(*call.q.shape)))
    torch.cuda.synchronize()
    differs = torch.zeros((), dtype=torch.bool, device="cuda")
    for _ in range(600):
        call, expected, out = dice.choice(made)
        out.fill_(math.nan)
        differs |= (call(out=out) != expected).any()
    assert not bool(differs)
    assert len(launched) == 600 + len(made)


def test_two_streams_share_nothing() -> None:
    torch.manual_seed(7)
    call, other = Paged.of(37, 1, 1500, (16, 2), 16), Paged.of(5, 1, 9000, (8, 1), 64)
    expected, expected_other = call(), other()
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    for _ in range(50):
        with torch.cuda.stream(side):
            beside = [other() for _ in range(4)]
        here = [call() for _ in range(4)]
        torch.cuda.synchronize()
        assert all(torch.equal(each, expected) for each in here)
        assert all(torch.equal(each, expected_other) for each in beside)


def test_no_call_waits_for_the_device(launched: list[None]) -> None:
    calls = [Paged.of(*shape) for shape in SHAPES]
    for call in calls:
        call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for call in calls:
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(launched) == 2 * len(calls)


@pytest.mark.parametrize("name", NAMES)
def test_without_splits_the_decode_kernels_are_not_asked(name: str, launched: list[None]) -> None:
    """A sequence's bits must not depend on its neighbours there: a call with num_splits=1 is prefill's."""
    call = Paged.of(3, 1, 500, (8, 2), 16)
    call(num_splits=1)
    assert launched == []
    if name == cases.VARLEN:
        starts = torch.arange(4, device="cuda", dtype=torch.int32)
        given = {"page_table": call.table, "seqused_k": call.lengths, "causal": True}
        fa3.flash_attn_varlen_func(call.q[:, 0], call.k, call.v, starts, None, 1, **given)
        assert launched == []
        fa3.flash_attn_varlen_func(call.q[:, 0], call.k, call.v, starts, None, 1, num_splits=0, **given)
        assert len(launched) == 1

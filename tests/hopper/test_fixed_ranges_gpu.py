"""Deterministic decode on the GPU that it is for: a sequence's bits are its own, whatever is beside it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

import jit_kernel.flash_attention_v3 as fa3
from jit_kernel import config, device
from tests.support import decode_on_gpu
from tests.support.decode_on_gpu import Paged
from tests.support.hopper_inputs import poisoned, randn

pytestmark = pytest.mark.gpu

# batch, queries, longest, heads, page size, head size: in clusters and without, two heads a block, odd heads, one
# stream, results that are kept in shared memory and in the launch's, ranges of one block and of many, chains of them.
SHAPES = [
    (1, 1, 8192, (64, 8), 64, 128),
    (3, 1, 1000, (32, 8), 16, 128),
    (20, 1, 8192, (32, 8), 64, 128),
    (70, 1, 700, (32, 8), 64, 128),
    (9, 1, 40_000, (8, 8), 64, 128),
    (37, 1, 3000, (8, 1), 64, 128),
    (33, 2, 3000, (12, 3), 1, 64),
    (20, 8, 5000, (64, 8), 64, 128),
    (12, 4, 9000, (32, 2), 16, 64),
    (24, 4, 3000, (32, 4), 64, 256),
    (40, 1, 1500, (8, 4), 1, 128),
    (21, 4, 9000, (32, 4), 64, 128),
    (70, 4, 3000, (64, 8), 64, 128),
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


def made(shape: tuple[Any, ...], seed: int = 0, **given: Any) -> Paged:
    torch.manual_seed(seed)
    call = Paged.of(*shape, deterministic=True, **given)
    call.draw_lengths(seed)
    return call


def some_of(call: Paged, chosen: list[int], more_pages: int = 0) -> Paged:
    """A call of some of the sequences, in this order; more_pages: room of the page table that no sequence uses."""
    table = torch.nn.functional.pad(call.table[chosen], (0, more_pages), value=-1)
    return dataclasses.replace(call, q=call.q[chosen], table=table, lengths=call.lengths[chosen])


def answer(call: Paged, **more: Any) -> tuple[Tensor, Tensor]:
    """out and lse by way of poisoned memory."""
    out, lse = call(return_softmax_lse=True, out=poisoned(*call.q.shape), **more)
    return out.clone(), lse.clone()


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], what: object) -> None:
    for one, other in zip(found, expected, strict=True):
        bits = torch.int16 if one.dtype is torch.bfloat16 else torch.int32
        assert torch.equal(one.contiguous().view(bits), other.contiguous().view(bits)), what


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_sequence_has_the_same_bits_alone_and_among_others(shape: tuple[Any, ...], launched: list[None]) -> None:
    """Alone, where another grid, clusters or none, and other cuts of the work serve it; in other orders and company."""
    call = made(shape)
    dice = Random(1)
    for seed in range(3):
        call.draw_lengths(seed)
        out, lse = answer(call)
        batch = len(call.lengths)
        longest = int(call.lengths.argmax())
        groups = [[i] for i in {longest, *dice.sample(range(batch), min(4, batch))}]
        groups += [dice.sample(range(batch), dice.randint(1, batch)) for _ in range(4)]
        for chosen in groups:
            for more_pages in (0, 200):
                found = answer(some_of(call, chosen, more_pages))
                assert_same(found, (out[chosen], lse[chosen]), (seed, chosen, more_pages))
    assert len(launched) >= 3 * 11  # of a batch of one


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_number_of_multiprocessors_does_not_matter(shape: tuple[Any, ...], launched: list[None]) -> None:
    call = made(shape, 2)
    expected = answer(call)
    for free in (1, 5, 33, 66, 100, 120, 131):
        assert_same(answer(call, sm_margin=free), expected, free)
    assert len(launched) == 8


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_numbers_are_right(shape: tuple[Any, ...], launched: list[None], say: list[str]) -> None:
    call = made(shape, 3)
    worst = 0.0
    for seed in range(4):
        call.draw_lengths(seed)
        for free in (0, 101, 131):
            call.given["sm_margin"] = free
            worst = max(worst, call.check())
    assert worst <= 1
    assert len(launched) == 12
    say.append(f"fixed ranges, {shape}: worst share {worst:.3f}")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_replays_of_a_graph_have_a_plain_calls_bits(shape: tuple[Any, ...], launched: list[None]) -> None:
    """Captured with the longest lengths, replayed with others: the bits of a plain call, and of a sequence alone."""
    call = made(shape, 4)
    longest = call.table.shape[1] * call.k.shape[1]
    call.lengths.fill_(longest)
    out = torch.empty_like(call.q)
    call(out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(out=out)
    for seed in range(40):
        call.draw_lengths(seed)
        call.q.normal_()
        expected = call(out=poisoned(*call.q.shape))
        out.fill_(math.nan)
        graph.replay()
        assert torch.equal(out, expected), seed
        if seed % 10 == 0:
            chosen = [seed % len(call.lengths)]
            assert torch.equal(some_of(call, chosen)(), expected[chosen]), seed
    assert len(launched) == 46


def test_the_longest_query_of_the_batch_does_not_matter(launched: list[None]) -> None:
    """Sequences of 1 to 16 tokens: kernels of 8 to 64 rows, and what each keeps where, give the same bits."""
    call = made((24, 1, 6000, (32, 8), 64, 128), 5)
    rows = [1, 2, 4, 8, 16] * 4 + [1] * 4
    q = torch.randn(sum(rows), 32, 128, device="cuda", dtype=torch.bfloat16)
    starts = [sum(rows[:i]) for i in range(len(rows) + 1)]
    offsets = torch.tensor(starts, device="cuda", dtype=torch.int32)

    def answered(chosen: slice, longest: int) -> Tensor:
        first = starts[chosen.start]
        return fa3.flash_attn_with_kvcache(
            q[first : starts[chosen.stop]], call.k, call.v, cache_seqlens=call.lengths[chosen],
            page_table=call.table[chosen], cu_seqlens_q=offsets[chosen.start : chosen.stop + 1] - first,
            max_seqlen_q=longest, causal=True, deterministic=True,
        )  # fmt: skip

    together = answered(slice(0, len(rows)), 16)
    for i, count in enumerate(rows):
        for longest in {count, 16}:
            alone = answered(slice(i, i + 1), longest)
            assert torch.equal(alone, together[starts[i] : starts[i + 1]]), (i, count, longest)
    assert len(launched) > len(rows)


@pytest.mark.parametrize(
    "given",
    [
        {"window_size": (1500, 0)},
        {"attention_chunk": 700},
        {"softcap": 20.0},
        {"sinks": True},
        {"cache_leftpad": True},
        {"window_size": (40, 0), "softcap": 5.0},
    ],
    ids=str,
)
def test_masks_and_other_arguments(given: dict[str, Any], launched: list[None]) -> None:
    call = made((20, 2, 6000, (32, 8), 64, 128), 6)
    per_sequence: dict[str, Tensor] = {}
    if "sinks" in given:
        given = {"sinks": randn(32, dtype=torch.float32)}
    if "cache_leftpad" in given:
        given = {}
        per_sequence["cache_leftpad"] = torch.arange(20, device="cuda", dtype=torch.int32) * 7 % 100
        call.lengths.clamp_(min=100)
    call.given |= given
    together = answer(call, **per_sequence)
    for i in range(0, 20, 3):
        alone = answer(some_of(call, [i], i * 20), **{name: x[i : i + 1] for name, x in per_sequence.items()})
        assert_same(alone, (together[0][[i]], together[1][[i]]), i)
    assert len(launched) == 8


def test_more_rows_than_decode_has_are_not_split(launched: list[None]) -> None:
    """Prefill's kernels then serve the call, as with num_splits=1."""
    call = made((3, 17, 4000, (32, 8), 64, 128), 7)
    assert_same(answer(call), answer(call, num_splits=1, deterministic=False), "many rows")
    assert launched == []


def test_calls_without_it_are_as_before(launched: list[None]) -> None:
    """Both kinds of launch share a stream's counters and memory; neither leaves anything behind."""
    calls = [made(shape, 8) for shape in SHAPES]
    fixed = [answer(call) for call in calls]
    free = [answer(call, deterministic=False) for call in calls]
    dice = Random(8)
    for _ in range(100):
        i = dice.randrange(len(calls))
        deterministic = dice.random() < 0.5
        assert_same(answer(calls[i], deterministic=deterministic), (fixed if deterministic else free)[i], i)
    assert len(launched) == 100 + 2 * len(calls)

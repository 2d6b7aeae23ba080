"""Fixed ranges of the Hopper decode kernels, without a GPU: cuts that are a sequence's own, whatever is beside it."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from tests.support import decode_checks as checks
from tests.support import decode_ranges as ranges
from tests.support import shared_numbers
from tests.support.decode_model import CLUSTER_PARTS, KEYS, Mask, Schedule, Seen, blocks_of_stream, seen_rows
from tests.support.decode_ranges import Launch, Range, Ranges, RangeSchedule

DECODE, LAUNCH = shared_numbers.HOPPER / "decode", shared_numbers.HOPPER / "launch"
SHAPES = [(256, 4), (128, 32)]  # head size and group: ranges of one block, and chains
KINDS = [
    Ranges.of(d, heads_k, group, halves) for d, group in SHAPES for heads_k in (1, 4, 8) for halves in (False, True)
]
LONGEST = 6000  # rows of a cache that holds any sequence of `works`


def cuts(items: list[Range], kind: Ranges) -> list[tuple[int, list[int]]]:
    """Ranges and their blocks, of all streams."""
    found = []
    for item in items:
        for stream in (0, 1) if kind.halves and item.ranges > 1 else (0,):
            blocks = blocks_of_stream(item, 2, 1 if kind.halves else 2, stream)[0]
            found.append((item.range + stream * (item.ranges // 2), blocks))
    return sorted(found)


def alone(seen: Seen, kind: Ranges) -> list[tuple[int, list[int]]]:
    """The cuts of a sequence that one thread block has to itself, which has both of two heads."""
    together = dataclasses.replace(kind, halves=False)
    return cuts(list(RangeSchedule([seen], 0, 1, together).items()), together)


def every_cut() -> None:
    """Every block once, in ranges that a sequence has alone, in the parts whose runs they end in."""
    for number, (sequences, parts, _) in enumerate(checks.works()):
        kind = KINDS[number % len(KINDS)]
        found: dict[int, list[Range]] = {}
        for part in range(parts):
            schedule = RangeSchedule(sequences, part, parts, kind)
            begin, end = schedule.at, schedule.end
            items = list(schedule.items())
            for item in items:
                found.setdefault(item.batch, []).append(item)
            largest = max((-(-seen.cost >> kind.cuts(seen)) for seen in sequences if seen.cost > 0), default=1)
            held = sum(max(1, len(blocks)) for item in items for _, blocks in cuts([item], kind))
            assert held < end - begin + 2 * largest * (2 if kind.halves else 1)
        assert set(found) == {batch for batch, seen in enumerate(sequences) if seen.cost > 0}
        for batch, items in found.items():
            seen = sequences[batch]
            made = cuts(items, kind)
            assert made == alone(seen, kind)
            blocks = [block for _, of_range in made for block in of_range]
            first = seen.low // KEYS
            assert blocks == list(range(first, first + seen.cost if seen.high > seen.low else first))
            assert len(made) == items[0].ranges == 1 << kind.cuts(seen) <= 1 << kind.log2_of(LONGEST)


def every_join() -> None:
    """One result of each sequence, its ranges joined as their tree says, in whatever order the parts come."""
    dice = Random(4)
    shared = 0
    for number, (sequences, parts, _) in enumerate(checks.works()):
        kind = KINDS[number % len(KINDS)]
        slots = 1 << kind.log2_of(LONGEST)
        launch = Launch(sequences, parts, kind, slots)
        order = dice.sample(range(parts), parts)
        results = launch.run(order)
        room = ranges.partials_of_head(parts, len(sequences), slots, kind.halves, 0)
        assert max(launch.partials, default=-1) < room
        assert max(launch.counters, default=-1) < parts
        shared += len(launch.counters)
        for batch, seen in enumerate(sequences):
            if seen.cost > 0:
                log2 = kind.cuts(seen)
                assert results.pop(batch) == ranges.tree_of(1 << log2, kind.chain(seen, log2))
        assert not results
    assert shared > 100


def every_cluster() -> None:
    """The streams of a cluster have the ranges that the sequence has without one."""
    for sequences, _, _ in checks.works():
        for seen in sequences:
            kind = Ranges.of(128, 8)
            if seen.cost == 0 or seen.cost > ranges.BLOCKS_OF_SHORT:
                continue
            items = ranges.items_of_cluster(seen, kind)
            streams = (0, 1) if items[0].ranges > CLUSTER_PARTS else (0,)
            held = [blocks_of_stream(item, 2, 1, stream)[0] for item in items for stream in (0, 1)]
            found = [blocks_of_stream(item, 2, 1, stream)[0] for item in items for stream in streams]
            assert [blocks for blocks in held if blocks] == [blocks for blocks in found if blocks]
            assert found[: items[0].ranges] == [blocks for _, blocks in alone(seen, kind)]


def test_cuts_are_a_sequences_own() -> None:
    every_cut()


def test_ranges_are_joined_in_their_order() -> None:
    every_join()


def test_a_cluster_has_the_same_ranges() -> None:
    every_cluster()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_cache_has_room_for_every_sequence(kind: Ranges) -> None:
    for rows in (1, 63, 64, 65, 1000, 8192, 8193, 20_000, 200_000):
        blocks = -(-rows // KEYS)
        for cost in {1, 2, 15, 16, 17, 127, 128, 129, 130, blocks // 2, blocks - 1, blocks}:
            for len_q in (1, 16):
                seen = Seen(0, cost * KEYS, cost, len_q)
                if 0 < cost <= blocks:
                    assert kind.cuts(seen) <= kind.log2_of(rows) <= ranges.MOST_RANGES_LOG2


def loads(lengths: list[int], capacity: int, heads_k: int = 8, d: int = 128) -> tuple[list[int], list[int]]:
    """Blocks of keys of each part of an H200's launch: with fixed ranges, and with free splits in the same parts."""
    grid = ranges.grid_of(2, d, 132, heads_k, len(lengths), capacity)
    assert not grid.in_clusters
    sequences = [seen_rows(Mask(right=0), 1, n, 0) for n in lengths]
    kind = Ranges.of(d, heads_k, 4, grid.heads_of_block == 1)
    fixed = [list(RangeSchedule(sequences, part, grid.parts, kind).items()) for part in range(grid.parts)]
    free = [list(Schedule(sequences, part, grid.parts).items()) for part in range(grid.parts)]
    return (
        [sum(len(blocks) for _, blocks in cuts(items, kind)) for items in fixed],
        [sum(item.block_end - item.block_begin for item in items) for items in free],
    )


CELLS = [([8192] * 16, 8192), ([4096] * 128, 4096), ([32768] * 64, 32768), ([8192] * 32, 8192), ([131072], 131072)]


@pytest.mark.parametrize(("lengths", "capacity"), CELLS, ids=lambda value: str(value)[:20])
def test_sequences_of_one_length_are_spread_as_evenly_as_without(lengths: list[int], capacity: int) -> None:
    fixed, free = loads(lengths, capacity)
    assert max(fixed) <= 1.04 * max(free)


def test_lognormal_lengths_are_spread_evenly() -> None:
    """The longest part, which the others' share of the memory's rate makes up for, and the mean of the longest ones."""
    dice = Random(5)
    for _ in range(20):
        lengths = [min(65536, int(dice.lognormvariate(math.log(4096) - 0.5, 1.0)) + 1) for _ in range(64)]
        fixed, free = loads(lengths, 65536)
        assert sum(fixed) == sum(free)
        assert max(fixed) <= 1.15 * max(free)


def test_the_model_has_the_kernels_own_numbers() -> None:
    text = (DECODE / "config.h").read_text(encoding="utf-8")
    for name, number in (
        ("kBlocksOfShort", ranges.BLOCKS_OF_SHORT),
        ("kRowsOfNarrowRange", ranges.ROWS_OF_NARROW),
        ("kBlocksOfWideRange", ranges.BLOCKS_OF_WIDE),
        ("kMostRangesLog2", ranges.MOST_RANGES_LOG2),
        ("kRowsOfTree", ranges.ROWS_OF_TREE),
        ("kChainLog2", ranges.CHAIN_LOG2),
    ):
        assert re.findall(rf"\b{name} = (\d+)[,;]", text) == [str(number)]
    launch = (LAUNCH / "decode_launch.h").read_text(encoding="utf-8")
    assert "most_log2 = heads_k >= 8 ? 4 : heads_k >= 4 ? 5 : 6;" in launch
    assert "blocks = shape.head_dim <= 128 ? 2 : 1;" in launch
    assert 1 << Ranges.of(128, 8).log2_of(8192) <= 2 * CLUSTER_PARTS


BATCHES: list[int] = []


def cuts_by_the_batch(kind: Ranges, seen: Seen) -> int:
    BATCHES.append(0)
    return max(0, CUTS(kind, seen) - len(BATCHES) % 3)


def next_part_too(schedule: RangeSchedule, *given: int) -> dict[str, Any]:
    made = SET_RANGE(schedule, *given)
    return {**made, "to": made["to"] + (made.get("parts", 1) > 1)}


def all_from_the_first(schedule: RangeSchedule, *given: int) -> dict[str, Any]:
    return {**SET_RANGE(schedule, *given), "first": 0}


def never_here(schedule: RangeSchedule, *given: int) -> dict[str, Any]:
    return {**SET_RANGE(schedule, *given), "first_part": 0}


def one_after_the_other(launch: Launch, item: Range) -> ranges.Tree:
    nodes, first = [], 0
    while first < item.ranges:
        count, tree = launch.partials[ranges.range_slot(item, first, launch.slots)]
        nodes, first = [*nodes, tree], first + count
    return functools.reduce(ranges.join, nodes)


def as_if_all_were_a_tree(launch: Launch, item: Range) -> ranges.Tree:
    return MERGED(launch, dataclasses.replace(item, chain=0))


CUTS, SET_RANGE, MERGED = Ranges.cuts, RangeSchedule.set_range, Launch._merged
MISTAKES: list[tuple[Callable[[], None], Any, str, Any]] = [
    (every_cut, Ranges, "cuts", cuts_by_the_batch),
    (every_cut, Ranges, "log2_of", lambda kind, rows_k: 3),
    (every_join, RangeSchedule, "set_range", next_part_too),
    (every_join, RangeSchedule, "set_range", all_from_the_first),
    (every_join, RangeSchedule, "set_range", never_here),
    (every_join, ranges, "range_slot", lambda item, first, slots: item.first_part * slots + first - item.first),
    (every_join, Launch, "_merged", one_after_the_other),
    (every_join, Launch, "_merged", as_if_all_were_a_tree),
    (every_cluster, ranges, "items_of_cluster", lambda seen, kind: CLUSTER(seen, Ranges(3, 1))),
]
CLUSTER = ranges.items_of_cluster


@pytest.mark.parametrize("number", range(len(MISTAKES)))
def test_a_model_with_a_mistake_fails(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    prove, where, name, wrong = MISTAKES[number]
    checks.works()
    monkeypatch.setattr(where, name, wrong)
    with pytest.raises((AssertionError, IndexError, KeyError)):
        prove()

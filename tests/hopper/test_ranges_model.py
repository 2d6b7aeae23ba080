"""Fixed ranges of the Hopper decode kernels, without a GPU: cuts that are a sequence's own, whatever is beside it."""

from __future__ import annotations

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
KINDS = [Ranges.of(streams, d, heads_k, 4) for streams, d in ((2, 64), (2, 128), (1, 256)) for heads_k in (1, 2, 4, 8)]
LONGEST = 6000  # rows of a cache that holds any sequence of `works`


def cuts(items: list[Range]) -> list[tuple[int, int, int]]:
    return [(item.range, item.block_begin, item.block_end) for item in items]


def alone(seen: Seen, kind: Ranges) -> list[tuple[int, int, int]]:
    """The cuts of a sequence that one thread block has to itself."""
    return cuts(list(RangeSchedule([seen], 0, 1, kind).items()))


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
            largest = max((kind.blocks_of(seen) for seen in sequences if seen.cost > 0), default=1)
            assert sum(max(1, item.block_end - item.block_begin) for item in items) < end - begin + largest
        assert set(found) == {batch for batch, seen in enumerate(sequences) if seen.cost > 0}
        for batch, items in found.items():
            seen = sequences[batch]
            assert cuts(items) == alone(seen, kind)
            blocks = [block for item in items for block in range(item.block_begin, item.block_end)]
            first = seen.low // KEYS
            assert blocks == list(range(first, first + seen.cost if seen.high > seen.low else first))
            assert len(items) == items[0].ranges <= kind.slots(LONGEST)


def every_join() -> None:
    """One result of each sequence, its ranges joined one after the other, in whatever order the parts come."""
    dice = Random(4)
    shared = 0
    for number, (sequences, parts, _) in enumerate(checks.works()):
        kind = KINDS[number % len(KINDS)]
        slots = kind.slots(LONGEST)
        launch = Launch(sequences, parts, kind, slots)
        order = dice.sample(range(parts), parts)
        results = launch.run(order)
        room = ranges.partials_of_head(parts, len(sequences), slots, keeps_in_shared=True)
        assert max(launch.partials, default=-1) < room
        assert max(launch.counters, default=-1) < parts
        shared += len(launch.counters)
        for batch, seen in enumerate(sequences):
            if seen.cost > 0:
                assert results.pop(batch) == ranges.joined(len(alone(seen, kind)))
        assert not results
    assert shared > 100


def every_cluster() -> None:
    """The streams of a cluster have the ranges that the sequence has without one."""
    for sequences, _, _ in checks.works():
        for seen in sequences:
            kind = Ranges.of(2, 128, 8)
            if seen.cost == 0 or seen.cost > ranges.BLOCKS_OF_SHORT:
                continue
            items = ranges.items_of_cluster(seen, kind)
            held = [blocks_of_stream(item, 2, 1, stream)[0] for item in items for stream in (0, 1)]
            found = [(blocks[0], blocks[-1] + 1) for blocks in held if blocks]
            assert all(not blocks for blocks in held[len(found) :])
            assert found == [cut[1:] for cut in alone(seen, kind) if seen.high > seen.low]


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
                    assert -(-cost // kind.blocks_of(seen)) <= kind.slots(rows)


def loads(lengths: list[int], capacity: int, heads_k: int = 8, d: int = 128) -> tuple[list[int], list[int]]:
    """Blocks of keys of each part of an H200's launch: with fixed ranges, and with free splits in the same parts."""
    grid = ranges.grid_of(2, d, 132, heads_k, len(lengths), capacity)
    assert not grid.in_clusters
    sequences = [seen_rows(Mask(right=0), 1, n, 0) for n in lengths]
    kind = Ranges.of(2, d, heads_k, 4)
    made = []
    for schedule in (RangeSchedule, Schedule):
        given = (kind,) if schedule is RangeSchedule else ()
        runs = [schedule(sequences, part, grid.parts, *given).items() for part in range(grid.parts)]
        made.append([sum(item.block_end - item.block_begin for item in run) for run in runs])
    return made[0], made[1]


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
    ):
        assert re.findall(rf"\b{name} = (\d+)[,;]", text) == [str(number)]
    launch = (LAUNCH / "decode_launch.h").read_text(encoding="utf-8")
    assert "most_log2 = heads_k >= 8 ? 4 : heads_k >= 4 ? 5 : 6;" in launch
    assert "blocks = shape.streams == 2 && heads_k % 2 != 0 ? 4 : shape.head_dim <= 64 ? 2 : 1;" in launch
    assert Ranges.of(2, 128, 8).slots(8192) <= 2 * CLUSTER_PARTS


def by_the_batch(kind: Ranges, seen: Seen) -> int:
    return max(1, BLOCKS_OF(kind, seen) + len(BATCHES) % 3)


BATCHES: list[int] = []


def blocks_of_any(kind: Ranges, seen: Seen) -> int:
    BATCHES.append(0)
    return by_the_batch(kind, seen)


def next_part_too(schedule: RangeSchedule, *given: int) -> dict[str, Any]:
    made = SET_RANGE(schedule, *given)
    return {**made, "arrivals": made["arrivals"] and made["arrivals"] + (made.get("parts", 1) > 1)}


def first_of_all(schedule: RangeSchedule, *given: int) -> dict[str, Any]:
    return {**SET_RANGE(schedule, *given), "is_first": True}


def merge_all(schedule: RangeSchedule, *given: int) -> dict[str, Any]:
    return {**SET_RANGE(schedule, *given), "merge_from": 0}


def never_here(schedule: RangeSchedule, *given: int) -> dict[str, Any]:
    return {**SET_RANGE(schedule, *given), "first_part": 0}


def in_two_halves(launch: Launch, item: Range) -> ranges.Tree:
    right = MERGED(launch, item)
    return (right[0][0], (right[0][1], right[1])) if item.ranges - item.merge_from > 2 else right


MERGED = Launch._merged
BLOCKS_OF, SET_RANGE = Ranges.blocks_of, RangeSchedule.set_range
MISTAKES: list[tuple[Callable[[], None], Any, str, Any]] = [
    (every_cut, Ranges, "blocks_of", blocks_of_any),
    (every_cut, Ranges, "slots", lambda kind, rows_k: 8),
    (every_join, RangeSchedule, "set_range", next_part_too),
    (every_join, RangeSchedule, "set_range", first_of_all),
    (every_join, RangeSchedule, "set_range", merge_all),
    (every_join, RangeSchedule, "set_range", never_here),
    (every_join, ranges, "range_slot", lambda item, slots: item.first_part * slots + item.before),
    (every_join, Launch, "_merged", in_two_halves),
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

"""The arithmetic of the Hopper decode kernels, without a GPU: whose every block is, every row, byte and page.

The properties are functions of their own, so that each is seen to fail on a model with a mistake in it.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import cache
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jit_kernel.fa3.hopper import kernels as hopper_kernels
from tests.support import decode_loads as loads
from tests.support import decode_model as model
from tests.support import reference, shared_numbers
from tests.support.decode_loads import Cache, Tile
from tests.support.decode_model import CLUSTER_PARTS, KEYS, Item, Mask, Schedule, Seen

DECODE, LAUNCH = shared_numbers.HOPPER / "decode", shared_numbers.HOPPER / "launch"
TILES = [
    Tile(d, rows)
    for d in hopper_kernels.DECODE_HEAD_DIMS
    for rows in hopper_kernels.DECODE_ROWS
    if rows <= hopper_kernels.DECODE_MOST_ROWS[d]
]
PAGE_SIZES = (0, 1, 2, 3, 7, 8, 16, 19, 24, 40, 48, 64, 80, 96, 100, 128, 192, 256, 1024)
QUIET = settings(max_examples=300, deadline=None)
Work = tuple[list[Seen], int, int]  # sequences, parts, key heads


def random_mask(dice: Random, longest: int) -> tuple[Mask, reference.Problem]:
    """A mask as the kernels have it, and as the reference has it."""
    left, right = (dice.choice((-1, -1, 0, dice.randint(0, 9), dice.randint(0, longest))) for _ in range(2))
    chunk = dice.randint(1, longest + 5) if dice.random() < 0.25 else 0
    bounds = [model.UNBOUNDED if bound < 0 else bound for bound in (left, right)]
    return Mask(*bounds, chunk), reference.Problem([], window_size=(left, right), attention_chunk=chunk)


@cache
def works() -> list[Work]:
    """Batches of one to three windows of 32 sequences; some see no key, some have no query."""
    dice, found = Random(1), []
    for _ in range(80):
        longest = dice.choice((1, 100, 700, 5000))
        mask, _ = random_mask(dice, longest)
        sequences = []
        for _ in range(dice.choice((1, 2, 5, 31, 32, 33, 70))):
            len_k = dice.choice((0, dice.randint(0, longest), longest))
            leftpad = dice.choice((0, 0, dice.randint(0, 200)))
            sequences.append(model.seen_rows(mask, dice.choice((0, 1, 1, 4, 16)), len_k, leftpad))
        found.append((sequences, dice.choice((1, 2, 3, 16, 33, 66, 132)), dice.choice((1, 3))))
    return found


def check_schedule(sequences: list[Seen], parts: int, heads_k: int) -> None:
    """Equal runs; every block in one part; slots and counters of no two; a merge of all parts in their order."""
    runs = [list(Schedule(sequences, part, parts).items()) for part in range(parts)]
    costs = [sum(max(1, item.block_end - item.block_begin) for item in run) for run in runs]
    assert sum(costs) == sum(seen.cost for seen in sequences)
    assert max(costs) - min(costs) <= 1
    of_batch: dict[int, list[tuple[int, Item]]] = defaultdict(list)
    for part, run in enumerate(runs):
        for item in run:
            of_batch[item.batch].append((part, item))
    counters: Counter[int] = Counter()
    slots: Counter[int] = Counter()
    for batch, seen in enumerate(sequences):
        held = of_batch.pop(batch, [])
        blocks = [block for _, item in held for block in range(item.block_begin, item.block_end)]
        sees_some = seen.cost > 0 and seen.high > seen.low
        assert blocks == list(range(seen.low // KEYS, -(-seen.high // KEYS) if sees_some else seen.low // KEYS))
        assert sees_some or len(held) <= 1
        assert bool(held) == (seen.cost > 0)
        for part, item in held:
            assert (item.low, item.high) == (seen.low, seen.high)
            assert item.is_first == (part == held[0][0])
            assert item.parts == len(held)
            if item.parts > 1:
                assert [each for each, _ in held] == list(range(item.first_part, item.first_part + item.parts))
        if len(held) > 1:
            for head in range(heads_k):
                written = [model.partial_slot(part, head, heads_k, item.is_first) for part, item in held]
                slots.update(written)
                met = {model.counter(item, head, heads_k) for _, item in held}
                assert len(met) == 1
                counters.update(met)
                for _, item in held:
                    assert model.merged_slots(item, head, heads_k) == written
    assert not of_batch
    assert set(slots.values()) | set(counters.values()) <= {1}
    assert max(slots, default=0) < model.PARTIALS_PER_BLOCK * parts * heads_k
    assert max(counters, default=0) < parts * heads_k


@cache
def placed() -> list[tuple[Cache, Item]]:
    """Items over caches of every kind of page, at any place of a sequence."""
    dice, found = Random(2), []
    for number in range(120):
        tile = dice.choice([tile for tile in TILES if tile.rows == 8])
        page_size = PAGE_SIZES[number % len(PAGE_SIZES)]
        low = dice.choice((0, 0, dice.randint(0, 300)))
        high = low + dice.choice((0, 1, dice.randint(0, 64), dice.randint(0, 400), 2200 if number % 20 == 0 else 65))
        begin, end = low // KEYS, -(-high // KEYS) if high > low else low // KEYS
        cuts = sorted(dice.randint(begin, end) for _ in range(2)) if dice.random() < 0.5 else [begin, end]
        place_rows = page_size or max(1, high + dice.choice((0, 1, 100)))
        two = tile.streams == 2 and dice.random() < 0.4
        columns = dice.choice((tile.head_dim, tile.head_dim, tile.head_dim - 8))
        made = Cache(tile, place_rows, page_size > 0, 1 + two, columns, dice.random() < 0.7, dice.choice((0, 6)))
        found.append((made, Item(0, low, high, *cuts)))
    return found


def check_loads(made: Cache, item: Item) -> None:
    """Every seen row lies where the products read it; bytes are as expected; no page without a seen row is read."""
    made.read.clear()
    stages = made.stages(item)
    step = made.blocks_of_stage
    assert [stage.block for stage in stages] == list(range(item.block_begin, item.block_end, step))
    for stage in stages:
        assert stage.arrived == stage.expected
        expected = loads.expected_stage(made, item, stage.block)
        assert expected.items() <= stage.written.items()
        if made.box_rows == 0:
            assert stage.written == expected
        assert max(stage.written, default=0) < made.tile.streams * made.tile.bytes_of_stream
    rows = range(item.low, item.high) if item.block_end > item.block_begin else range(0)
    begin, end = max(item.low, item.block_begin * KEYS), min(item.high, item.block_end * KEYS)
    assert set(made.read) <= {row // made.place_rows for row in rows[max(0, begin - item.low) : max(0, end - item.low)]}


def test_every_block_is_in_one_part_and_every_part_is_merged_once() -> None:
    every_work()
    shared = [
        item for work in works() for part in range(work[1]) for item in Schedule(*work[:1], part, work[1]).items()
    ]
    assert sum(item.parts > 2 for item in shared) > 100


def test_every_seen_row_is_loaded_once_and_no_unseen_page_is_looked_up() -> None:
    for made, item in placed():
        check_loads(made, item)
    assert {made.box_rows for made, _ in placed()} == {0, 8, 16, 32, 64}
    boxed = [made for made, _ in placed() if made.box_rows > 0]
    assert {made.box_panels for made in boxed} == {1, 2, 4}
    assert {made.copy_warps for made in boxed} == {1, 4}


def test_a_cluster_has_every_block_once() -> None:
    for sequences, _, _ in works():
        for seen in sequences:
            items = [model.item_of_cluster(seen, part) for part in range(CLUSTER_PARTS)]
            blocks = [block for item in items for block in range(item.block_begin, item.block_end)]
            if seen.cost > 0:  # else the cluster is told that there is no work
                last = -(-seen.high // KEYS) if seen.high > seen.low else seen.low // KEYS
                assert blocks == list(range(seen.low // KEYS, last))
            counts = [item.block_end - item.block_begin for item in items]
            assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("blocks", range(12))
def test_the_streams_of_a_block_take_every_stage_together(blocks: int) -> None:
    item = Item(0, 0, KEYS * blocks, 5, 5 + blocks)
    for streams, heads_of_block in ((1, 1), (2, 1), (2, 2)):
        made = Cache(Tile(256 if streams == 1 else 64, 8), 4096, True, heads_of_block, 64)
        stages = len(range(item.block_begin, item.block_end, made.blocks_of_stage))
        taken = [model.blocks_of_stream(item, streams, heads_of_block, stream) for stream in range(streams)]
        assert all(len(mine) + passed == stages for mine, passed in taken)
        assert sorted(block for mine, _ in taken for block in mine) == sorted([*range(5, 5 + blocks)] * heads_of_block)


def check_masks(count: int) -> None:
    """What is loaded is what some query sees, and a block without a mask is one that every query sees."""
    dice = Random(3)
    for _ in range(count):
        longest = dice.choice((5, 70, 300))
        mask, problem = random_mask(dice, longest)
        len_q, len_k, leftpad = dice.randint(1, 16), dice.randint(0, longest), dice.choice((0, 33))
        group, rows = dice.choice(((1, 16), (4, 64), (3, 64)))
        table = reference.visible(problem, len_q, len_k, torch.device("cpu"))
        seen = model.seen_rows(mask, len_q, len_k, leftpad)
        keys = table.any(0).nonzero().flatten().tolist()
        assert all(seen.low <= leftpad + key < seen.high for key in keys)
        assert not keys or (seen.low, seen.high) == (leftpad + keys[0], leftpad + keys[-1] + 1)
        assert seen.cost >= 1
        low, high = model.rows_of_all(mask, len_q, len_k, leftpad, rows, group)
        every = [leftpad + key for key in table.all(0).nonzero().flatten().tolist()]
        assert list(range(low, high)) == every


def test_rows_are_those_that_queries_see() -> None:
    check_masks(800)


@QUIET
@given(st.integers(1, 2**30), st.integers(0, 2**31 - 1))
def test_a_multiplication_divides_exactly(n: int, value: int) -> None:
    check_division(n, value)


def check_division(n: int, value: int) -> None:
    numbers = model.division(n)
    for near in (value, value // n * n, max(0, value // n * n - 1)):
        assert model.divided(near, numbers) == near // n


def test_every_page_size_group_and_number_of_parts_divides() -> None:
    for n in range(1, 3000):
        for value in (0, 1, n - 1, n, n + 1, 63 * n, 2**31 - 1, 2**31 - n):
            check_division(n, value)


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_threads_fill_the_operands_and_the_results_once(tile: Tile) -> None:
    rows, d = tile.rows, tile.head_dim
    check_probabilities(rows)
    places = list(model.output_places(d, rows))
    assert all(place == query * d + column for query, column, place in places)
    assert sorted(place for *_, place in places) == list(range(rows * d))
    pieces = list(loads.query_pieces(d, rows))
    assert sorted((index, piece) for index, piece, _ in pieces) == [(i, p) for i in range(rows) for p in range(d // 8)]
    for index, piece, address in pieces:
        assert address == piece // 8 * rows * 128 + index * 128 + (piece % 8 ^ index % 8) * 16


def check_probabilities(rows: int) -> None:
    """Rows of queries, 64 keys each, in the 128-byte swizzle, each number once."""
    places = list(model.probability_places(rows))
    assert sorted((query, key) for query, key, _ in places) == [(q, k) for q in range(rows) for k in range(KEYS)]
    for query, key, address in places:
        assert address == query * 128 + (key // 8 ^ query % 8) * 16 + key % 8 * 2


@QUIET
@given(st.sampled_from([1, 2]), st.integers(1, 132), st.integers(1, 40), st.integers(1, 300), st.integers(1, 200_000))
def test_a_grid_runs_at_once_and_loses_little(streams: int, free: int, heads_k: int, batch: int, rows_k: int) -> None:
    grid = model.decode_grid(streams, free, heads_k, batch, rows_k)
    if grid.in_clusters:
        assert grid.parts == CLUSTER_PARTS
        assert heads_k * batch * CLUSTER_PARTS <= free
        return
    groups = heads_k // grid.heads_of_block
    assert groups * grid.heads_of_block == heads_k
    assert grid.heads_of_block == 1 or streams == 2
    assert grid.parts >= 1
    most = max(1, free // groups)
    assert 0.96 * most <= grid.parts <= most


def test_the_model_has_the_kernels_own_numbers() -> None:
    text = (DECODE / "config.h").read_text(encoding="utf-8")
    for name, number in (
        ("kDecodeKeys", KEYS),
        ("kDecodePanel", loads.PANEL),
        ("kClusterParts", CLUSTER_PARTS),
        ("kPartialsPerBlock", model.PARTIALS_PER_BLOCK),
    ):
        assert re.findall(rf"\b{name} =\s+(\d+);", text) == [str(number)]
    assert shared_numbers.constant(LAUNCH / "decode_launch.h", "kRowsOfCluster") == str(model.ROWS_OF_CLUSTER)
    assert f"kRoom = {loads.ROOM // 1024} * 1024 - kOffsetTiles" in text
    assert all(3 <= tile.stages <= loads.MOST_STAGES for tile in TILES)
    for tile in TILES:  # a box of copies, a lane
        for page in PAGE_SIZES:
            for heads in range(1, tile.streams + 1):
                made = Cache(tile, page or 4096, page > 0, heads, tile.head_dim - 8)
                assert made.box_rows == 0 or made.copies <= 32 * made.copy_warps


def every_work() -> None:
    for work in works():
        check_schedule(*work)


def every_load() -> None:
    for made, item in placed():
        check_loads(made, item)


def every_division() -> None:
    for n in (3, 7, 48, 100, 2**30):
        check_division(n, 2**31 - 1)


def part_of_equal_runs(schedule: Schedule, block: int) -> int:
    return block // (schedule.run + 1)


def open_and_stay(schedule: Schedule, first: int) -> None:
    OPEN(schedule, first)
    schedule.costs = [min(cost, 40) for cost in schedule.costs]


def places_not_shifted(made: Cache, block: int, warp: int, lane: int) -> int:
    return block * KEYS + warp * made.rows_of_warp + lane


def half_of_the_needed(made: Cache, item: Item, row: int) -> bool:
    return row + made.box_rows <= min(item.high, item.block_end * KEYS) and row + made.box_rows > item.low


def one_more_box(made: Cache, item: Item, row: int) -> bool:
    return row <= min(item.high, item.block_end * KEYS) and row + made.box_rows > item.low


def past_the_part(made: Cache, item: Item, row: int) -> bool:
    return row < item.high and row + made.box_rows > item.low


def low_of_the_last(mask: Mask, len_q: int, len_k: int, leftpad: int) -> Seen:
    right = SEEN_ROWS(mask, len_q, len_k, leftpad)
    last = leftpad + max(0, mask.visible(len_q - 1, len_q, len_k)[0])
    return Seen(last, max(last, right.high), right.cost)


OPEN, SEEN_ROWS = Schedule._open, model.seen_rows
MISTAKES: list[tuple[Callable[[], None], Any, str, Any]] = [
    (every_work, model, "partial_slot", lambda part, head, heads_k, is_first: (part * heads_k + head) * 2),
    (every_work, model, "partial_slot", lambda part, head, heads_k, is_first: (part + heads_k * head) * 2 + is_first),
    (every_work, model, "counter", lambda item, head, heads_k: head),
    (every_work, model, "counter", lambda item, head, heads_k: item.first_part * heads_k + head + item.is_first),
    (every_work, Schedule, "part_of", part_of_equal_runs),
    (every_work, Schedule, "_open", open_and_stay),
    (every_work, model, "division", lambda n: (1 << 31, n.bit_length())),
    (every_load, Cache, "is_needed", half_of_the_needed),
    (every_load, Cache, "is_needed", one_more_box),
    (every_load, Cache, "is_needed", past_the_part),
    (every_load, Cache, "_lane_row", places_not_shifted),
    (every_load, Cache, "copies", property(lambda made: made.tile.panels << made.boxes_log2)),
    (every_load, Cache, "box_panels", property(lambda made: made.tile.panels)),
    (every_load, Cache, "row_in_place", lambda made, row: row % KEYS),
    (every_load, Cache, "box_rows", property(lambda made: 8 if made.paged else KEYS)),
    (lambda: check_masks(800), model, "seen_rows", low_of_the_last),
    (lambda: check_probabilities(16), model, "_address_of_lane", lambda warp, lane, rows: lane % 16 * 128 + warp * 32),
    (every_division, model, "divided", lambda value, numbers: value * numbers[0] >> 31 >> numbers[1] + 1),
]


@pytest.mark.parametrize("number", range(len(MISTAKES)))
def test_a_model_with_a_mistake_fails(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    prove, where, name, wrong = MISTAKES[number]
    works()
    placed()
    monkeypatch.setattr(where, name, wrong)
    with pytest.raises((AssertionError, IndexError, ZeroDivisionError)):
        prove()

"""The arithmetic of the Hopper decode kernels, without a GPU: whose every block is, every row, byte and page.

The properties are functions of their own, so that each is seen to fail on a model with a mistake in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import decode_checks as checks
from tests.support import decode_loads as loads
from tests.support import decode_model as model
from tests.support import shared_numbers
from tests.support.decode_loads import Cache, Tile
from tests.support.decode_model import CLUSTER_PARTS, KEYS, Item, Mask, Schedule, Seen

DECODE, LAUNCH = shared_numbers.HOPPER / "decode", shared_numbers.HOPPER / "launch"
QUIET = settings(max_examples=300, deadline=None)


def test_every_block_is_in_one_part_and_every_part_is_merged_once() -> None:
    checks.every_work()
    shared = [
        item
        for work in checks.works()
        for part in range(work[1])
        for item in Schedule(*work[:1], part, work[1]).items()
    ]
    assert sum(item.parts > 2 for item in shared) > 100


def test_every_seen_row_is_loaded_once_and_no_unseen_page_is_looked_up() -> None:
    for made, item in checks.placed():
        checks.check_loads(made, item)
    assert {made.box_rows for made, _ in checks.placed()} == {0, 8, 16, 32, 64}
    boxed = [made for made, _ in checks.placed() if made.box_rows > 0]
    assert {made.box_panels for made in boxed} == {1, 2, 4}
    assert {made.copy_warps for made in boxed} == {1, 4}


def test_a_cluster_has_every_block_once() -> None:
    for sequences, _, _ in checks.works():
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
    two_ranges = [(2, 1, distance) for distance in range(max(2, -(-blocks // 2)), blocks + 2)]
    for streams, heads_of_block, distance in [(1, 1, 1), (2, 1, 1), (2, 2, 1), *two_ranges]:
        item = Item(0, 0, KEYS * blocks, 5, 5 + blocks, distance=distance)
        made = Cache(Tile(256 if streams == 1 else 64, 8), 4096, True, heads_of_block, 64)
        stages = len(range(item.block_begin, item.end_of_first, made.step_of(item)))
        taken = [model.blocks_of_stream(item, streams, heads_of_block, stream) for stream in range(streams)]
        assert all(len(mine) + passed == stages for mine, passed in taken)
        assert sorted(block for mine, _ in taken for block in mine) == sorted([*range(5, 5 + blocks)] * heads_of_block)


def test_rows_are_those_that_queries_see() -> None:
    checks.check_masks(800)


@QUIET
@given(st.integers(1, 2**30), st.integers(0, 2**31 - 1))
def test_a_multiplication_divides_exactly(n: int, value: int) -> None:
    checks.check_division(n, value)


def test_every_page_size_group_and_number_of_parts_divides() -> None:
    for n in range(1, 3000):
        for value in (0, 1, n - 1, n, n + 1, 63 * n, 2**31 - 1, 2**31 - n):
            checks.check_division(n, value)


@pytest.mark.parametrize("tile", checks.TILES, ids=str)
def test_threads_fill_the_operands_and_the_results_once(tile: Tile) -> None:
    rows, d = tile.rows, tile.head_dim
    checks.check_probabilities(rows)
    places = list(model.output_places(d, rows))
    assert all(place == query * d + column for query, column, place in places)
    assert sorted(place for *_, place in places) == list(range(rows * d))
    pieces = list(loads.query_pieces(d, rows))
    assert sorted((index, piece) for index, piece, _ in pieces) == [(i, p) for i in range(rows) for p in range(d // 8)]
    for index, piece, address in pieces:
        assert address == piece // 8 * rows * 128 + index * 128 + (piece % 8 ^ index % 8) * 16


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
    assert all(3 <= tile.stages <= loads.MOST_STAGES for tile in checks.TILES)
    for tile in checks.TILES:  # a box of copies, a lane
        for page in checks.PAGE_SIZES:
            for heads in range(1, tile.streams + 1):
                made = Cache(tile, page or 4096, page > 0, heads, tile.head_dim - 8)
                assert made.box_rows == 0 or made.copies <= 32 * made.copy_warps


def part_of_equal_runs(schedule: Schedule, block: int) -> int:
    return block // (schedule.run + 1)


def open_and_stay(schedule: Schedule, first: int) -> None:
    OPEN(schedule, first)
    schedule.costs = [min(cost, 40) for cost in schedule.costs]


def places_not_shifted(made: Cache, item: Item, block: int, warp: int, lane: int) -> int:
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
    (checks.every_work, model, "partial_slot", lambda part, head, heads_k, is_first: (part * heads_k + head) * 2),
    (
        checks.every_work,
        model,
        "partial_slot",
        lambda part, head, heads_k, is_first: (part + heads_k * head) * 2 + is_first,
    ),
    (checks.every_work, model, "counter", lambda item, head, heads_k: head),
    (checks.every_work, model, "counter", lambda item, head, heads_k: item.first_part * heads_k + head + item.is_first),
    (checks.every_work, Schedule, "part_of", part_of_equal_runs),
    (checks.every_work, Schedule, "_open", open_and_stay),
    (checks.every_work, model, "division", lambda n: (1 << 31, n.bit_length())),
    (checks.every_load, Cache, "is_needed", half_of_the_needed),
    (checks.every_load, Cache, "is_needed", one_more_box),
    (checks.every_load, Cache, "is_needed", past_the_part),
    (checks.every_load, Cache, "_lane_row", places_not_shifted),
    (checks.every_load, Cache, "copies", property(lambda made: made.tile.panels << made.boxes_log2)),
    (checks.every_load, Cache, "box_panels", property(lambda made: made.tile.panels)),
    (checks.every_load, Cache, "row_in_place", lambda made, row: row % KEYS),
    (checks.every_load, Cache, "box_rows", property(lambda made: 8 if made.paged else KEYS)),
    (lambda: checks.check_masks(800), model, "seen_rows", low_of_the_last),
    (
        lambda: checks.check_probabilities(16),
        model,
        "_address_of_lane",
        lambda warp, lane, rows: lane % 16 * 128 + warp * 32,
    ),
    (checks.every_division, model, "divided", lambda value, numbers: value * numbers[0] >> 31 >> numbers[1] + 1),
]


@pytest.mark.parametrize("number", range(len(MISTAKES)))
def test_a_model_with_a_mistake_fails(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    prove, where, name, wrong = MISTAKES[number]
    checks.works()
    checks.placed()
    monkeypatch.setattr(where, name, wrong)
    with pytest.raises((AssertionError, IndexError, ZeroDivisionError)):
        prove()

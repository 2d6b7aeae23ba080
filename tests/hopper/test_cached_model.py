"""The arithmetic of the Hopper kernels on cached keys, without a GPU: every row of a block, every page, every byte."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jit_kernel.fa3 import call as calls
from jit_kernel.fa3.call import Call
from jit_kernel.fa3.hopper import cached
from jit_kernel.fa3.hopper import kernels as hopper_kernels
from jit_kernel.fa3.portable import planning
from tests.support import cached_model as model
from tests.support import drafts, reference, shared_numbers
from tests.support.cached_model import Cache

QUIET = settings(max_examples=200, deadline=None)
PREFILL = shared_numbers.HOPPER / "prefill"
TILES = [row for row in shared_numbers.tile_rows() if row.masked]
KEYS = sorted({row.keys for row in TILES})
PAGE_SIZES = (0, 1, 2, 3, 7, 8, 16, 19, 24, 40, 48, 64, 80, 96, 100, 112, 128, 240, 256, 1024)


@st.composite
def caches(draw: st.DrawFn) -> Cache:
    page_size = draw(st.sampled_from(PAGE_SIZES))
    capacity = draw(st.integers(1, 700))
    if page_size:
        capacity = -(-capacity // page_size) * page_size
    low, high = model.seen_rows(draw(st.integers(0, capacity)), draw(st.integers(0, capacity)))
    return Cache(draw(st.sampled_from(KEYS)), page_size, capacity, low, high)


def test_the_model_has_the_kernels_own_numbers() -> None:
    text = (PREFILL / "cached_producer.cuh").read_text(encoding="utf-8")
    assert re.findall(r"kRowLoaders = (\d+) ", text) == [str(model.ROW_LOADERS)]
    launch = shared_numbers.HOPPER / "launch" / "cached_launch.h"
    assert shared_numbers.constant(launch, "kSwizzleRows") == str(model.SWIZZLE_ROWS)
    rows = shared_numbers.HOPPER / "common" / "warpgroups.h"
    assert shared_numbers.constant(rows, "kRowsPerWarpgroup") == str(model.ROWS_PER_WARPGROUP)
    assert max(row.keys for row in TILES) // model.SWIZZLE_ROWS <= 32  # a lane for every box


@QUIET
@given(st.integers(1, 2**30), st.integers(0, 2**31 - 1))
def test_a_multiplication_divides_exactly(value: int, row: int) -> None:
    for near in (row, row // value * value, max(0, row // value * value - 1)):
        assert model.divided(near, *model.divisor(value)) == near // value


@QUIET
@given(caches())
def test_every_seen_row_is_loaded_and_every_other_value_is_zero(cache: Cache) -> None:
    blocks = cache.blocks
    seen = set()
    for block in blocks:
        edge = block in (blocks[0], blocks[-1])
        for i, held in enumerate(cache.values(block, clears=edge)):
            row = block * cache.keys + i
            if cache.low <= row < cache.high:
                page_size = cache.page_size or cache.capacity
                assert held == divmod(row, page_size), (block, i)
                seen.add(row)
            else:
                assert held == model.ZEROS, (block, i)
    assert seen == set(range(cache.low, cache.high))


@QUIET
@given(caches())
def test_no_entry_of_the_page_table_is_read_without_a_seen_row(cache: Cache) -> None:
    page_size = cache.page_size or cache.capacity
    needed = {row // page_size for row in range(cache.low, cache.high)}
    for block in cache.blocks:
        found, read = cache.load(block)
        assert read <= needed
        if cache.page_size:
            assert all(slot < cache.page_size for _, slot in found.values())  # no box crosses a page's end


@pytest.mark.parametrize("keys", KEYS)
def test_boxes_are_as_large_as_pages_and_blocks_allow(keys: int) -> None:
    for page_size in range(1, 300):
        rows = Cache(keys, page_size, page_size, 0, 0).box_rows
        if page_size % model.SWIZZLE_ROWS:
            assert rows == 0
        else:
            assert rows >= model.SWIZZLE_ROWS
            assert keys % rows == 0 == page_size % rows


@pytest.mark.parametrize("row", TILES, ids=lambda row: f"{row.head_dim}/{row.head_dim_v}")
def test_rows_are_copied_to_where_the_copy_engine_puts_them(row: shared_numbers.TileRow) -> None:
    for columns in (row.head_dim, row.head_dim_v):
        panel = 64 if columns % 64 == 0 else 32
        written = {}
        for _, _, _, lanes in model.row_copies(row.keys, columns, panel):
            for eight in range(0, 32, 8):  # the lanes that write at the same time reach every bank once
                assert len({address % 128 // 16 for *_, address in lanes[eight : eight + 8]}) == 8
            for in_block, piece, address in lanes:
                assert address not in written
                written[address] = in_block, piece
        pieces_of_panel = panel // 8
        expected = {}
        for in_block in range(row.keys):
            for piece in range(columns // 8):
                base = piece // pieces_of_panel * row.keys * panel * 2
                inside = in_block * panel * 2 + piece % pieces_of_panel * model.PIECE
                expected[base + model.swizzled(inside, panel * 2)] = in_block, piece
        assert written == expected


@QUIET
@given(st.integers(0, 300), st.integers(1, 500), st.integers(1, 130))
def test_parts_of_a_tile_are_all_of_its_blocks_once_and_none_is_empty(begin: int, count: int, splits: int) -> None:
    parts = model.cut(begin, begin + count, splits)
    assert [block for part in parts for block in part] == list(range(begin, begin + count))
    assert all(len(part) > 0 for part in parts)
    assert len(parts) <= splits


@QUIET
@given(st.integers(0, 300), st.integers(1, 3000), st.integers(1, 140), st.integers(1, 132))
def test_idle_blocks_take_the_ends_of_the_parts(begin: int, count: int, tiles: int, blocks: int) -> None:
    """Every block of keys once, and no block of the launch has more of them than without ends."""
    splits = model.parts_of_tiles(tiles, blocks, count * 128, cached.PARTS_OF_BLOCK * blocks)
    ends = model.ends_of_tiles(tiles, blocks, splits, cached.PARTS_OF_BLOCK * blocks)
    parts = model.cut(begin, begin + count, splits, ends)
    assert [block for part in parts for block in part] == list(range(begin, begin + count))
    assert all(len(part) > 0 for part in parts)
    longest = -(-count // splits)
    if len(parts) > splits:
        assert len(parts) == splits + 1 <= cached.PARTS_OF_BLOCK * blocks // tiles
        assert max(len(part) for part in parts[:-1]) <= longest - model.BLOCKS_OF_END
        assert ends * len(parts[-1]) <= longest


def test_idle_blocks_have_work_where_keys_are_many() -> None:
    """Of 256 x 131k with 8 and 1 heads, and of 1,024: 112 and 128 of 132 blocks had some, 147 and 512 of keys each."""
    for tiles, longest in ((16, 129), (64, 498)):
        splits = model.parts_of_tiles(tiles, 132, 131_072, 264)
        parts = model.cut(0, 1024, splits, model.ends_of_tiles(tiles, 132, splits, 264))
        assert max(len(part) for part in parts) == longest


@QUIET
@given(st.integers(1, 140), st.integers(1, 132), st.integers(0, 200_000))
def test_keys_are_cut_as_the_portable_kernels_cut_them(tiles: int, blocks: int, keys: int) -> None:
    """Where memory does not bound it: what one implementation's heuristic gives, so does the other's with its parts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "_LEAST_KEYS_PER_SPLIT", cached.LEAST_KEYS)
        patch.setattr(planning, "_LEAST_KEYS_TO_SPLIT", 2 * cached.LEAST_KEYS)
        expected = planning.best_splits(tiles, blocks, keys)
    assert model.parts_of_tiles(tiles, blocks, keys, 1 << 30) == expected
    bounded = model.parts_of_tiles(tiles, blocks, keys, cached.PARTS_OF_BLOCK * blocks)
    assert bounded == 1 or bounded * tiles <= cached.PARTS_OF_BLOCK * blocks


def test_tiles_of_one_part_lie_side_by_side_and_every_part_comes_once() -> None:
    found = model.order(7, 3, base=5)
    assert [part for part, _, _ in found] == sorted(part for part, _, _ in found)
    assert sorted((ordinal, part) for part, _, ordinal in found) == [(5 + t, p) for t in range(7) for p in range(3)]


def test_the_host_has_the_kernels_own_numbers_of_parts() -> None:
    text = (PREFILL / "cached_params.h").read_text(encoding="utf-8")
    for name, number in (
        ("kPartStateColumns", cached.STATE_COLUMNS),
        ("kLeastKeysOfPart", cached.LEAST_KEYS),
        ("kMostPartsOfTile", cached.MOST_PARTS),
        ("kBlocksOfEnd", model.BLOCKS_OF_END),
    ):
        assert re.findall(rf"{name} = (\d+)", text) == [str(number)]
    for row in TILES:
        rows = hopper_kernels.TILE_ROWS.get((row.head_dim, row.head_dim_v), 128)
        assert rows == row.warpgroups * model.ROWS_PER_WARPGROUP


def call_of(q: tuple[int, ...], k: tuple[int, ...], **given: object) -> Call:
    arguments = {"q": torch.empty(q), "k_cache": torch.empty(k), "v_cache": torch.empty(k), "num_splits": 0, **given}
    return Call(*calls.of(calls.KVCACHE, arguments))


def test_memory_for_parts_is_asked_for_where_keys_may_be_cut() -> None:
    page_table = torch.zeros(1, 2048, dtype=torch.int32)
    few = call_of((1, 256, 8, 8), (1, 64, 1, 8), page_table=page_table)
    assert cached.most_parts(few, 128, 132) == 264  # 16 tiles of up to 128 parts
    assert cached.most_parts(call_of((1, 256, 8, 8), (1, 1000, 1, 8)), 128, 132) == 16 * 3
    assert cached.most_parts(call_of((1, 256, 8, 8), (1, 500, 1, 8)), 128, 132) == 0  # too few keys
    assert cached.most_parts(call_of((8, 256, 8, 8), (8, 5000, 1, 8)), 128, 132) == 0  # enough tiles
    assert cached.most_parts(call_of((8, 256, 8, 8), (8, 5000, 1, 8), num_splits=3), 128, 132) == 8 * 16 * 3
    ragged = {"cu_seqlens_q": torch.tensor([0, 1, 130])}
    assert cached.most_parts(call_of((130, 3, 8), (2, 5000, 1, 8), **ragged), 128, 132) == 3 * (1 + 2) * 19


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 8, 16, 32, 64, 128])
def test_a_row_of_queries_is_the_token_and_head_that_the_kernel_takes_it_for(group: int) -> None:
    shift = model.pack_shift(group)
    assert 1 << shift == (group if 64 % group == 0 else 1)
    for first_row in (0, 64, 128, 64 * 37):
        for i in range(64):
            row = first_row + i
            assert model.packed_box(group, i, first_row) == (row >> shift, row & (1 << shift) - 1)


@QUIET
@given(st.sampled_from(KEYS), st.integers(1, 6), st.integers(0, 40), st.integers(1, 400), st.integers(0, 2**30))
def test_every_key_of_a_block_has_its_bit_of_the_draft_mask(
    keys: int, words: int, leftpad: int, length: int, seed: int
) -> None:
    bits = torch.rand(1, 32 * words, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask = drafts.pack(bits)
    expected = reference.drafted(mask, length)[0].tolist()
    unsigned = [word & 0xFFFFFFFF for word in mask[0].tolist()]
    first_drafted = leftpad + length - 32 * words
    for column in range(0, leftpad + length, keys):
        seen = model.drafted(unsigned, column - first_drafted, keys)
        assert column + keys > first_drafted or all(seen)  # such a block is not masked
        for row in range(max(column, leftpad), min(column + keys, leftpad + length)):
            assert seen[row - column] == expected[row - leftpad], (column, row)


@QUIET
@given(st.sampled_from(TILES), st.integers(0, 6), st.integers(1, 400))
def test_every_token_of_a_tile_is_asked_once_whether_it_sees_a_key(
    tile: shared_numbers.TileRow, shift: int, len_q: int
) -> None:
    rows = tile.warpgroups * model.ROWS_PER_WARPGROUP
    found: list[int] = []
    for first_row in range(0, len_q << shift, rows):
        asked = [row >> shift for row in model.asked_rows(first_row, rows, len_q, shift)]
        assert asked == sorted(set(asked), reverse=True)
        found += asked
    assert sorted(found) == list(range(len_q))

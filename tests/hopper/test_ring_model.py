"""A warpgroup must not skip so many keys that the producer waits without end for values: a model shows it."""

from __future__ import annotations

import dataclasses
import random

import pytest
from hypothesis import HealthCheck, find, given, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample

from tests.support import ring_model, shared_numbers
from tests.support.ring_model import Kernel, Tile

NO_BOUND = 1000
# No clock judges, on however busy a machine.
QUIET = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
SEARCH = settings(QUIET, max_examples=1000, derandomize=True, database=None)


def kernel_of(row: shared_numbers.TileRow) -> Kernel:
    in_registers = row.query_steps * 16 == row.head_dim
    first, last = shared_numbers.most_skipped(row.stages)
    return Kernel(row.warpgroups, row.stages, row.stages_q, row.overlap, in_registers, first, last)


# Where warpgroups skip blocks: with a mask, and where they do not take turns.
SKIPPING = [kernel_of(row) for row in shared_numbers.tile_rows() if row.masked and not row.ping_pong]

FP8_ROWS = shared_numbers.fp8_tile_rows()


def fp8_kernel_of(row: shared_numbers.Fp8TileRow) -> Kernel:
    numbers = row.warpgroups, row.stages, row.stages_q, True, False, *shared_numbers.most_skipped(row.stages)
    return Kernel(*numbers, stages_loaded=row.stages_loaded)


# Of e4m3, values pass through a ring more.
SKIPPING_FP8 = [fp8_kernel_of(row) for row in FP8_ROWS if row.masked and not row.ping_pong]
# On cached keys: those skip alike, with a mask, whether they take boxes or rows.
CACHED = [dataclasses.replace(each, clears=True, tells_late=late) for each in SKIPPING for late in (False, True)]
ANY_KERNEL = st.builds(
    lambda clears, tells_late, stages_loaded, warpgroups, stages, *schedule: Kernel(
        warpgroups, stages, *schedule, *shared_numbers.most_skipped(stages), clears, stages_loaded, tells_late
    ),
    st.booleans(),
    st.booleans(),
    st.integers(0, 3),
    st.sampled_from([2, 4]),
    st.integers(1, 5),
    st.integers(1, 2),
    st.booleans(),
    st.booleans(),
)


@st.composite
def tiles_of(draw: st.DrawFn, kernel: Kernel) -> list[Tile]:
    """Up to six tiles, in which each warpgroup sees any blocks or none."""
    tiles = []
    for _ in range(draw(st.integers(1, 6))):
        blocks = draw(st.integers(1, 9))
        edge = st.integers(-1, blocks + 1)
        seen = tuple((draw(edge), draw(edge)) for _ in range(kernel.warpgroups))
        tiles.append(Tile(blocks, seen))
    return tiles


def runs_to_its_end(kernel: Kernel, tiles: list[Tile], seed: int) -> bool:
    return not ring_model.stuck(kernel, tiles, random.Random(seed).choice)


def found_deadlock(kernel: Kernel) -> list[Tile] | None:
    try:
        return find(tiles_of(kernel), lambda tiles: not runs_to_its_end(kernel, tiles, 0), settings=SEARCH)
    except NoSuchExample:
        return None


def test_the_kernels_that_skip_are_those_of_64_and_256() -> None:
    assert [(kernel.warpgroups, kernel.stages, kernel.overlap) for kernel in SKIPPING] == [(4, 3, False), (2, 2, True)]
    assert [(row.head_dim, row.stages) for row in FP8_ROWS if row.masked and not row.ping_pong] == [(64, 3)]


def test_the_model_has_the_kernels_own_numbers() -> None:
    prefill = shared_numbers.HOPPER / "prefill"
    assert shared_numbers.constant(prefill / "producer.cuh", "kClaimBlocks") == str(ring_model.CLAIM_BLOCKS)
    assert shared_numbers.constant(prefill / "config.h", "kTileSlots") == str(ring_model.TILE_SLOTS)
    for stages in range(1, 6):
        first, last = shared_numbers.most_skipped(stages)
        assert min(first, last) >= 0
        assert first + last <= stages


@pytest.mark.parametrize("kernel", [*SKIPPING, *SKIPPING_FP8, *CACHED], ids=str)
@QUIET
@given(data=st.data())
def test_with_the_rule_no_order_of_steps_deadlocks(kernel: Kernel, data: st.DataObject) -> None:
    tiles, seed = data.draw(tiles_of(kernel)), data.draw(st.integers(0, 2**32))
    assert runs_to_its_end(kernel, tiles, seed)


@QUIET
@given(data=st.data())
def test_the_rule_holds_for_kernels_that_there_are_not(data: st.DataObject) -> None:
    kernel = data.draw(ANY_KERNEL)
    tiles, seed = data.draw(tiles_of(kernel)), data.draw(st.integers(0, 2**32))
    assert runs_to_its_end(kernel, tiles, seed)


@pytest.mark.parametrize("kernel", SKIPPING, ids=str)
@pytest.mark.parametrize("end", ["most_first", "most_last"])
def test_with_one_key_more_a_deadlock_is_found(kernel: Kernel, end: str) -> None:
    wide = dataclasses.replace(kernel, **{end: getattr(kernel, end) + 1})
    tiles = found_deadlock(wide)
    assert tiles is not None
    for seed in range(10):
        assert not runs_to_its_end(wide, tiles, seed)
        assert runs_to_its_end(kernel, tiles, seed)


@pytest.mark.parametrize("kernel", [*SKIPPING, *SKIPPING_FP8], ids=str)
def test_without_a_bound_a_deadlock_is_found(kernel: Kernel) -> None:
    """A warpgroup without queries skipped all of a tile's keys before it gave a value back: kernel_log.md."""
    assert found_deadlock(dataclasses.replace(kernel, most_first=NO_BOUND, most_last=NO_BOUND)) is not None

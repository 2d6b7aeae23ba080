"""The schedule of the Hopper MLA kernels, compiled for the CPU: every tile's keys are some part's, once, in order."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest

from jit_kernel import device, jit
from jit_kernel.engine import compiler
from jit_kernel.fa3.hopper import kernels, mla

HEADER = Path(__file__).parents[1] / "support" / "schedule_on_host.h"
KEYS = 128  # of a block
UNBOUNDED = 1 << 30


@dataclass(frozen=True)
class Item:
    """As MlaSchedule gives it."""

    batch: int
    low: int
    high: int
    begin: int
    end: int
    first_part: int
    parts: int
    is_first: int
    is_last: int


@dataclass(frozen=True)
class Work:
    """A causal call: cached keys of each sequence, query tokens of all, query heads, parts, window, tile."""

    lengths: tuple[int, ...]
    tokens: int
    heads: int
    parts: int
    window: int
    tile: int
    is_whole: bool

    def seen(self, length: int) -> tuple[int, int] | None:
        """Keys that some row of the tile sees; None where it has no row."""
        rows = self.tokens * self.heads
        if self.tile * mla.TILE_ROWS >= rows:
            return None
        first = self.tile * mla.TILE_ROWS // self.heads
        last = (min((self.tile + 1) * mla.TILE_ROWS, rows) - 1) // self.heads
        low = max(0, first + length - self.tokens - self.window)
        return low, max(low, min(length, last + length - self.tokens + 1))


@pytest.fixture(scope="module")
def items_of() -> Callable[[Work, int], list[Item]]:
    try:
        compiler.require("host")
    except compiler.CompilerNotFoundError as error:
        pytest.skip(str(error))
    unit = HEADER.read_text(encoding="utf-8")
    spec = jit.KernelSpec(kernels.FOLDER, unit, "host", (("function", "schedule_on_host"),))
    function = jit.load(spec, device.cpu_target())["mla_items_of"]

    def items(work: Work, part: int) -> list[Item]:
        packed = struct.pack(f"{len(work.lengths)}i", *work.lengths)
        data = bytes(function(packed, work.tokens, work.heads, work.parts, part, work.tile, work.window, work.is_whole))
        return [Item(*numbers) for numbers in struct.iter_unpack("9i", data)]

    return items


def cases() -> Iterator[Work]:
    dice = Random(21)
    for _ in range(80):
        longest = dice.choice((1, 100, 900, 9000, 70_000))
        lengths = [dice.choice((0, dice.randint(0, longest), longest)) for _ in range(dice.choice((1, 2, 9, 33, 66)))]
        tokens, heads = dice.choice((1, 1, 2, 4, 16)), dice.choice((1, 5, 16, 64, 128))
        tiles = -(-tokens * heads // mla.TILE_ROWS)
        window = dice.choice((UNBOUNDED, UNBOUNDED, dice.randint(0, longest)))
        yield Work(
            tuple(lengths), tokens, heads, dice.choice((1, 2, 16, 66, 132)), window, dice.randrange(tiles),
            dice.random() < 0.3,
        )  # fmt: skip


def test_every_block_of_keys_is_one_parts(items_of: Callable[[Work, int], list[Item]]) -> None:
    cut = 0
    for work in cases():
        by_part = [items_of(work, part) for part in range(work.parts)]
        for batch, length in enumerate(work.lengths):
            seen = work.seen(length)
            assert seen is not None
            low, high = seen
            mine = [(part, item) for part, items in enumerate(by_part) for item in items if item.batch == batch]
            assert [(item.low, item.high) for _, item in mine] == [seen] * len(mine), work
            ends = [low // KEYS, *(item.end for _, item in mine)]
            assert [item.begin for _, item in mine] == ends[:-1], work
            assert ends[-1] == (-(-high // KEYS) if high > low else low // KEYS), work
            first = mine[0][0]
            assert [part for part, _ in mine] == list(range(first, first + len(mine))), work
            if len(mine) > 1:
                cut += 1
                assert {(item.first_part, item.parts) for _, item in mine} == {(first, len(mine))}
                assert [item.is_first for _, item in mine] == [1] + [0] * (len(mine) - 1)
            else:
                assert mine[0][1].parts == 1
            assert not (work.is_whole and len(mine) > 1)
    assert cut > 100


def test_runs_are_equal_and_say_where_they_end(items_of: Callable[[Work, int], list[Item]]) -> None:
    for work in cases():
        costs = []
        for part in range(work.parts):
            items = items_of(work, part)
            assert [item.is_last for item in items[:-1]] == [0] * len(items[:-1])
            assert all(item.is_last for item in items[-1:]) or work.is_whole
            costs.append(sum(max(1, item.end - item.begin) for item in items))
        assert work.is_whole or max(costs) - min(costs) <= 1


def test_a_tile_without_rows_has_no_work(items_of: Callable[[Work, int], list[Item]]) -> None:
    work = Work((500, 3000), 3, 16, 4, UNBOUNDED, 1, False)
    assert work.seen(500) is None
    assert [items_of(work, part) for part in range(4)] == [[]] * 4

"""The Hopper decode kernels' schedule itself, compiled for the CPU, gives the items of its model."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from random import Random

import pytest

from jit_kernel import device, jit
from jit_kernel.engine import compiler
from jit_kernel.fa3.hopper import kernels
from tests.support import decode_model as model
from tests.support import decode_ranges
from tests.support.decode_model import CLUSTER_PARTS, Item, Mask, Schedule, Seen
from tests.support.decode_ranges import Range, Ranges, RangeSchedule

HEADER = Path(__file__).parents[1] / "support" / "schedule_on_host.h"
KINDS = [None, Ranges.of(128, 8, 4), Ranges.of(64, 2, 8), Ranges.of(128, 1, 8, True), Ranges.of(256, 4, 16, True)]
Numbers = tuple[int, ...]


@pytest.fixture(scope="module")
def items_of() -> Callable[..., bytes]:
    try:
        compiler.require("host")
    except compiler.CompilerNotFoundError as error:
        pytest.skip(str(error))
    unit = HEADER.read_text(encoding="utf-8")
    spec = jit.KernelSpec(kernels.FOLDER, unit, "host", (("function", "schedule_on_host"),))
    return jit.load(spec, device.cpu_target())["items_of"]


def numbers_of(item: Item, in_cluster: bool = False) -> Numbers:
    """The fields of a DecodeItem, but for those that a call without ranges, or a cluster, does not read."""
    bounds = (item.block_begin, item.block_begin + item.distance, item.end_of_first, item.block_end)
    rest = astuple(item)[10:] if isinstance(item, Range) else (0, 0, 0, 0, 0)
    shared = (item.first_part, item.parts, int(item.is_first))
    return (item.batch, item.low, item.high, *bounds, *((0, 1, 0) if in_cluster else shared), *rest)


def cases() -> list[tuple[list[int], int, int, int, Mask]]:
    """Lengths, query tokens, parts, the first number of a seed and the mask."""
    dice, found = Random(7), []
    for number in range(60):
        longest = dice.choice((1, 100, 900, 9000, 70_000))
        lengths = [dice.choice((0, dice.randint(0, longest), longest)) for _ in range(dice.choice((1, 2, 9, 33, 66)))]
        window = dice.choice((model.UNBOUNDED, model.UNBOUNDED, dice.randint(0, longest)))
        found.append((lengths, dice.choice((1, 1, 3, 8)), dice.choice((1, 2, 16, 33, 132)), number, Mask(window, 0)))
    return found


def test_the_items_of_parts_are_the_models(items_of: Callable[..., bytes]) -> None:
    ranged = 0
    for lengths, len_q, parts, number, mask in cases():
        kind = KINDS[number % len(KINDS)]
        seen = [model.seen_rows(mask, len_q, n, 0) for n in lengths]
        for part in {0, parts // 2, parts - 1, number % parts}:
            schedule = Schedule(seen, part, parts) if kind is None else RangeSchedule(seen, part, parts, kind)
            expected = [numbers_of(item) for item in schedule.items()]
            found = items_from(items_of, lengths, len_q, kind, parts, part, mask)
            if kind is None:
                found = [numbers[:10] + (0,) * 5 for numbers in found]
            assert found == expected, (lengths, len_q, parts, part, kind)
            ranged += sum(numbers[11] > 1 for numbers in found)
    assert ranged > 1000


@pytest.mark.parametrize("tiles", [2, 3, 7])
def test_the_tiles_of_a_sequence_are_sequences_of_its_tokens(tiles: int, items_of: Callable[..., bytes]) -> None:
    """Tile i of n tokens sees what n tokens see that stand at the end of so much less of the cache."""
    found_tiles = set()
    for lengths, len_q, parts, number, mask in cases():
        kind = KINDS[number % len(KINDS)]
        if kind is not None and len_q * tiles * kind.group > decode_ranges.ROWS_OF_TREE:
            kind = None  # the whole sequence's rows say how wide its ranges are, and what joins them
        ends = [n - (tiles - 1 - i) * len_q for n in lengths for i in range(tiles)]
        seen = [model.seen_rows(mask, len_q, n, 0) for n in ends]
        for part in {0, parts // 2, parts - 1}:
            schedule = Schedule(seen, part, parts) if kind is None else RangeSchedule(seen, part, parts, kind)
            items = list(schedule.items())
            expected = [(item.batch // tiles, *numbers_of(item)[1:], item.batch % tiles * len_q) for item in items]
            found = items_from(items_of, lengths, len_q * tiles, kind, parts, part, mask, tiles=tiles)
            if kind is None:
                found = [numbers[:10] + (0,) * 5 + numbers[15:] for numbers in found]
            assert found == expected, (lengths, len_q, parts, part, kind)
            found_tiles |= {numbers[15] // len_q for numbers in found}
    assert found_tiles == set(range(tiles))


def test_the_items_of_clusters_are_the_models(items_of: Callable[..., bytes]) -> None:
    kind = KINDS[1]
    assert kind is not None
    for lengths, len_q, *_, mask in cases():
        short = [min(n, 8192) for n in lengths]
        seen = [model.seen_rows(mask, len_q, n, 0) for n in short]
        for part in range(CLUSTER_PARTS):
            free = [cluster_item(each, batch, part) for batch, each in enumerate(seen)]
            fixed = [ranges_of_cluster(each, batch, part, kind) for batch, each in enumerate(seen)]
            for wanted, of in ((free, None), (fixed, kind)):
                found = items_from(items_of, short, len_q, of, 1, part, mask, in_clusters=True)
                assert [numbers[:7] for numbers in found] == [numbers[:7] for numbers in wanted]
                assert of is None or all(numbers[11] >= 1 for numbers in found)


def cluster_item(seen: Seen, batch: int, part: int) -> Numbers:
    item = model.item_of_cluster(seen, part)
    return (batch, *numbers_of(item, in_cluster=True)[1:5], item.block_end, item.block_end)


def ranges_of_cluster(seen: Seen, batch: int, part: int, kind: Ranges) -> Numbers:
    item = decode_ranges.items_of_cluster(seen, kind)[part]
    return (batch, *numbers_of(item, in_cluster=True)[1:7])


def items_from(
    items_of: Callable[..., bytes],
    lengths: list[int],
    len_q: int,
    kind: Ranges | None,
    parts: int,
    part: int,
    mask: Mask,
    in_clusters: bool = False,
    tiles: int = 1,
) -> list[Numbers]:
    """What a DecodeItem has, and behind it, where a sequence is several tiles, the first token of its own."""
    log2, blocks, group, halves = (0, 1, 1, False) if kind is None else astuple(kind)
    packed = struct.pack(f"{len(lengths)}i", *lengths)
    data = bytes(items_of(packed, len_q, group, parts, part, log2, blocks, halves, mask.left, in_clusters, tiles))
    return [numbers if tiles > 1 else numbers[:15] for numbers in struct.iter_unpack("16i", data)]

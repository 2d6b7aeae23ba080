"""Properties of the Hopper decode kernels' arithmetic, and the cases that they are held against.

Each raises AssertionError where the model of decode_model.py or decode_loads.py has a mistake.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from functools import cache
from random import Random

import torch

from jit_kernel.fa3.hopper import kernels as hopper_kernels
from tests.support import decode_loads as loads
from tests.support import decode_model as model
from tests.support import reference
from tests.support.decode_loads import Cache, Tile
from tests.support.decode_model import KEYS, Item, Mask, Schedule, Seen

TILES = [
    Tile(d, rows)
    for d in hopper_kernels.DECODE_HEAD_DIMS
    for rows in hopper_kernels.DECODE_ROWS
    if rows <= hopper_kernels.DECODE_MOST_ROWS[d]
]
PAGE_SIZES = (0, 1, 2, 3, 7, 8, 16, 19, 24, 40, 48, 64, 80, 96, 100, 128, 192, 256, 1024)
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


def every_work() -> None:
    for work in works():
        check_schedule(*work)


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
        if tile.streams == 2 and not two and cuts[1] - cuts[0] > 1:  # a range each stream, in a cluster
            distance = dice.randint(-(-(cuts[1] - cuts[0]) // 2), cuts[1] - cuts[0])
            found.append((made, Item(0, low, high, *cuts, distance=distance)))
    return found


def check_loads(made: Cache, item: Item) -> None:
    """Every seen row lies where the products read it; bytes are as expected; no page without a seen row is read."""
    made.read.clear()
    stages = made.stages(item)
    step = made.step_of(item)
    assert [stage.block for stage in stages] == list(range(item.block_begin, item.end_of_first, step))
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


def every_load() -> None:
    for made, item in placed():
        check_loads(made, item)


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


def check_division(n: int, value: int) -> None:
    numbers = model.division(n)
    for near in (value, value // n * n, max(0, value // n * n - 1)):
        assert model.divided(near, numbers) == near // n


def every_division() -> None:
    for n in (3, 7, 48, 100, 2**30):
        check_division(n, 2**31 - 1)


def check_probabilities(rows: int) -> None:
    """Rows of queries, 64 keys each, in the 128-byte swizzle, each number once."""
    places = list(model.probability_places(rows))
    assert sorted((query, key) for query, key, _ in places) == [(q, k) for q in range(rows) for k in range(KEYS)]
    for query, key, address in places:
        assert address == query * 128 + (key // 8 ^ query % 8) * 16 + key % 8 * 2

"""Fixed ranges of the Hopper decode kernels, as arithmetic in Python, and what must hold of them.

Each function follows one of decode/schedule.cuh, decode/ranges.cuh, decode/merge.cuh or launch/decode_launch.h. A
result is the tree of the joins that made it, so that two of the same bits are two of the same tree.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.support import decode_model as model
from tests.support.decode_model import CLUSTER_PARTS, KEYS, Item, Schedule, Seen

BLOCKS_OF_SHORT = 128  # kBlocksOfShort
ROWS_OF_NARROW, BLOCKS_OF_WIDE = 32, 16  # kRowsOfNarrowRange, kBlocksOfWideRange
Tree = Any  # the number of a range, or a pair of trees


@dataclass(frozen=True)
class Ranges:
    """DecodeRanges: what calls of a model share; `group` query heads a key head."""

    most_log2: int
    blocks: int
    group: int = 1

    @classmethod
    def of(cls, streams: int, head_dim: int, heads_k: int, group: int = 1) -> Ranges:
        most_log2 = 4 if heads_k >= 8 else 5 if heads_k >= 4 else 6
        joined = streams == 2 and heads_k % 2 != 0
        return cls(most_log2, 4 if joined else 2 if head_dim <= 64 else 1, group)

    def slots(self, rows_k: int) -> int:
        """Of a sequence of the longest cache."""
        longest = -(-rows_k // KEYS)
        return max(1, min(1 << self.most_log2 + (longest > BLOCKS_OF_SHORT), -(-longest // self.blocks)))

    def blocks_of(self, seen: Seen) -> int:
        """blocks_of_range."""
        log2 = self.most_log2 + (seen.cost > BLOCKS_OF_SHORT)
        wide = BLOCKS_OF_WIDE if seen.len_q * self.group > ROWS_OF_NARROW else 1
        return max(self.blocks, wide, seen.cost + (1 << log2) - 1 >> log2)


def ranges_before(block: int, start: int, end: int, size: int) -> int:
    """How many of a sequence's ranges belong to the parts whose runs end at a block of it, or behind it."""
    return -(-(end - start) // size) if block >= end else (block - start + (size - 1) // 2) // size


@dataclass(frozen=True)
class Range(Item):
    """DecodeItem of a call with fixed ranges."""

    range: int = 0
    ranges: int = 0
    before: int = 0
    arrivals: int = 0
    merge_from: int = 0


class RangeSchedule(Schedule):
    """DecodeSchedule of one part of such a call."""

    def __init__(self, sequences: list[Seen], part: int, parts: int, ranges: Ranges) -> None:
        super().__init__(sequences, part, parts)
        self.part, self.parts, self.ranges = part, parts, ranges

    def begin_of(self, part: int) -> int:
        return part * self.run + min(part, self.longer)

    def items(self) -> Iterator[Range]:
        """What `next` gives, until it gives nothing."""
        while self.at < self.end:
            source, start, end = self.find()
            seen = self.seen[source]
            size = self.ranges.blocks_of(seen)
            number = ranges_before(self.at, start, end, size)
            if number >= ranges_before(self.end, start, end, size):
                self.at = end
                continue
            begin = start + number * size
            stop = min(begin + size, end)
            first_block = seen.low // KEYS
            block_begin = first_block + begin - start
            block_end = first_block + stop - start if seen.high > seen.low else block_begin
            made = self.set_range(self.first + source, start, end, begin, size)
            yield Range(self.first + source, seen.low, seen.high, block_begin, block_end, **made)
            self.at = stop

    def set_range(self, batch: int, start: int, end: int, begin: int, size: int) -> dict[str, Any]:
        """What an item has to know of its sequence's ranges."""
        ranges, number = -(-(end - start) // size), (begin - start) // size
        first = ranges_before(max(start, self.begin_of(self.part)), start, end, size)
        behind = ranges_before(self.end, start, end, size)
        made = {"range": number, "ranges": ranges, "is_first": first == 0, "before": number - first}
        made["arrivals"] = behind - first if number + 1 == behind else 0
        if behind - first < ranges:
            first_part = self.part_of(min(start + size // 2, end - 1))
            made["parts"] = 2
            made["first_part"] = batch if len(self.sequences) < self.parts else first_part
            made["merge_from"] = ranges_before(self.begin_of(first_part + 1), start, end, size) - 1
        return made


def items_of_cluster(seen: Seen, ranges: Ranges) -> list[Item]:
    """item_of_cluster for each block of a sequence's cluster."""
    first, blocks = seen.low // KEYS, seen.cost if seen.high > seen.low else 0
    size = ranges.blocks_of(seen)
    bounds = [first + min(blocks, 2 * part * size) for part in range(CLUSTER_PARTS + 1)]
    return [Item(0, seen.low, seen.high, *bounds[part : part + 2], distance=size) for part in range(CLUSTER_PARTS)]


def range_slot(item: Range, slots: int) -> int:
    """range_of: of a key head."""
    return item.first_part * slots + item.range


def partials_of_head(parts: int, batch: int, slots: int, keeps_in_shared: bool) -> int:
    """Room of a key head."""
    return min(batch, parts) * slots + (0 if keeps_in_shared else parts)


def join(first: Tree, second: Tree) -> Tree:
    """join_kept, join_ranges."""
    return (first, second)


def joined(count: int, begin: Tree = 0, first: int = 0) -> Tree:
    """All ranges of a sequence, in their order."""
    tree = begin
    for number in range(first + 1, count):
        tree = join(tree, number)
    return tree


class Launch:
    """What the parts of a launch leave, one after the other in a given order: results of sequences and of whom."""

    def __init__(self, sequences: list[Seen], parts: int, ranges: Ranges, slots: int) -> None:
        self.runs = [list(RangeSchedule(sequences, part, parts, ranges).items()) for part in range(parts)]
        self.slots = slots
        self.partials: dict[int, Tree] = {}
        self.counters: dict[int, int] = {}
        self.results: dict[int, Tree] = {}

    def run(self, order: list[int]) -> dict[int, Tree]:
        """`finish` of every item. Each slot is written once, and the counters are zero at the end."""
        for part in order:
            kept: Tree = None
            for item in self.runs[part]:
                tree: Tree = item.range
                if item.is_first:
                    tree = join(kept, tree) if item.range > 0 else tree
                    if item.arrivals == 0:
                        kept = tree
                        continue
                if item.parts == 1:
                    self._give(item, tree)
                    continue
                slot = range_slot(item, self.slots)
                assert slot not in self.partials, "a slot is written twice"
                assert item.range < self.slots, "a slot of another sequence"
                self.partials[slot] = tree
                self._arrive(item)
        assert not any(self.counters.values()), "a counter that is not zero"
        return self.results

    def _arrive(self, item: Range) -> None:
        if item.arrivals == 0:
            return
        count = self.counters[item.first_part] = self.counters.get(item.first_part, 0) + item.arrivals
        if count == item.ranges:
            self.counters[item.first_part] = 0
            self._give(item, self._merged(item))

    def _merged(self, item: Range) -> Tree:
        """merge_parts."""
        tree = self.partials[item.first_part * self.slots + item.merge_from]
        for number in range(item.merge_from + 1, item.ranges):
            tree = join(tree, self.partials[item.first_part * self.slots + number])
        return tree

    def _give(self, item: Range, tree: Tree) -> None:
        assert item.batch not in self.results, "a sequence has two results"
        self.results[item.batch] = tree


def grid_of(
    streams: int, head_dim: int, multiprocessors: int, heads_k: int, batch: int, rows_k: int, has_room: bool = True
) -> model.Grid:
    """decode_grid of a call with fixed ranges; has_room: for what the blocks of a cluster send each other."""
    ranges = Ranges.of(streams, head_dim, heads_k)
    pairs = streams == 2 and heads_k % 2 == 0
    fits = has_room and pairs and ranges.slots(rows_k) <= streams * CLUSTER_PARTS
    return model.decode_grid(streams, multiprocessors, heads_k, batch, rows_k, may_cluster=fits, two=pairs)

"""Fixed ranges of the Hopper decode kernels, as arithmetic in Python, and what must hold of them.

Each function follows one of decode/schedule.cuh, decode/ranges.cuh, decode/merge.cuh or launch/decode_launch.h. A
result is the tree of the joins that made it, so that two of the same bits are two of the same tree.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.support import decode_model as model
from tests.support.decode_model import CLUSTER_PARTS, KEYS, Grid, Item, Schedule, Seen

BLOCKS_OF_SHORT = 128  # kBlocksOfShort
ROWS_OF_NARROW, BLOCKS_OF_WIDE = 32, 32  # kRowsOfNarrowRange, kBlocksOfWideRange
MOST_RANGES_LOG2 = 7  # kMostRangesLog2
ROWS_OF_TREE, CHAIN_LOG2 = 16, 3  # kRowsOfTree, kChainLog2
Tree = Any  # the number of a range, or a pair of trees


@dataclass(frozen=True)
class Ranges:
    """DecodeRanges: what calls of a model share; `group` query heads a key head; whether streams have halves."""

    most_log2: int
    blocks: int
    group: int = 1
    halves: bool = False

    @classmethod
    def of(cls, head_dim: int, heads_k: int, group: int = 1, halves: bool = False) -> Ranges:
        return cls(4 if heads_k >= 8 else 5 if heads_k >= 4 else 6, 2 if head_dim <= 128 else 1, group, halves)

    def log2_of(self, rows_k: int) -> int:
        """Of a sequence of the longest cache."""
        return self._log2_of(-(-rows_k // KEYS), self.blocks) if rows_k else 0

    def cuts(self, seen: Seen) -> int:
        """range_cuts."""
        wide = BLOCKS_OF_WIDE if seen.len_q * self.group > ROWS_OF_NARROW else 1
        return self._log2_of(seen.cost, max(self.blocks, wide))

    def chain(self, seen: Seen, log2: int) -> int:
        """range_cuts: how many of 2^log2 ranges are joined in turn, to base 2."""
        return min(CHAIN_LOG2, max(log2 - 1, 0)) if seen.len_q * self.group > ROWS_OF_TREE else 0

    def _log2_of(self, blocks: int, least: int) -> int:
        most = max(blocks // least, min(blocks, 2))
        return min(self.most_log2 + (blocks > BLOCKS_OF_SHORT), most.bit_length() - 1)

    def of_stream(self, log2: int) -> int:
        """How many of 2^log2 ranges a stream has."""
        return 1 << log2 - (self.halves and log2 > 0)


def begin_of_range(blocks: int, log2: int, number: int) -> int:
    """begin_of_range."""
    if number >> log2:
        return blocks
    begin = 0
    for bit in reversed(range(log2)):
        first = (blocks + 1) // 2
        if number >> bit & 1:
            begin, blocks = begin + first, blocks - first
        else:
            blocks = first
    return begin


def ranges_before(blocks: int, log2: int, block: int) -> int:
    """How many ranges have their middle before a block: ranges_before, by where each begins."""
    bounds = [begin_of_range(blocks, log2, number) for number in range((1 << log2) + 1)]
    return sum(block - bounds[i] >= -(-(bounds[i + 1] - bounds[i]) // 2) for i in range(1 << log2))


@dataclass(frozen=True)
class Range(Item):
    """DecodeItem of a call with fixed ranges."""

    first_end: int = 0  # end[0]
    range: int = 0
    ranges: int = 0
    first: int = 0  # from
    to: int = 0
    chain: int = 0

    @property
    def end_of_first(self) -> int:
        return self.first_end


class RangeSchedule(Schedule):
    """DecodeSchedule of one part of such a call."""

    def __init__(self, sequences: list[Seen], part: int, parts: int, ranges: Ranges) -> None:
        super().__init__(sequences, part, parts)
        self.part, self.parts, self.ranges = part, parts, ranges

    def begin_of(self, part: int) -> int:
        return part * self.run + min(part, self.longer)

    def before(self, block: int, start: int, end: int, log2: int) -> int:
        """How many of a stream's ranges belong to the parts whose runs end at a block of a sequence, or behind it."""
        of_stream = self.ranges.of_stream(log2)
        return of_stream if block >= end else ranges_before(end - start, log2, (block - start) * of_stream >> log2)

    def items(self) -> Iterator[Range]:
        """What `next` gives, until it gives nothing."""
        while self.at < self.end:
            source, start, end = self.find()
            seen = self.seen[source]
            log2 = self.ranges.cuts(seen)
            of_stream, number = self.ranges.of_stream(log2), self.before(self.at, start, end, log2)
            if number >= self.before(self.end, start, end, log2):
                self.at = end
                continue
            made = self.set_range(self.first + source, start, end, log2, number)
            bounds = blocks_of_range(seen, log2, number, self.ranges)
            made["chain"] = self.ranges.chain(seen, log2)
            yield Range(self.first + source, seen.low, seen.high, **bounds, **made)
            begin = begin_of_range(end - start, log2, number + 1) * (1 << log2) // of_stream
            self.at = start + begin if number + 1 < of_stream else end

    def set_range(self, batch: int, start: int, end: int, log2: int, number: int) -> dict[str, Any]:
        """What an item has to know of its sequence's ranges."""
        of_stream = self.ranges.of_stream(log2)
        first = self.before(max(start, self.begin_of(self.part)), start, end, log2)
        to = self.before(self.end, start, end, log2)
        made = {"range": number, "ranges": 1 << log2, "first": first, "to": to, "is_first": first == 0}
        if to - first < of_stream:
            half = (begin_of_range(end - start, log2, 1) + 1) // 2 * (1 << log2) // of_stream
            made["parts"] = 2
            first_part = self.part_of(min(start + half, end) - 1)
            made["first_part"] = batch if len(self.sequences) < self.parts else first_part
        return made


def blocks_of_range(seen: Seen, log2: int, number: int, ranges: Ranges) -> dict[str, int]:
    """set_range_blocks."""

    def begin(at: int) -> int:
        return seen.low // KEYS + (begin_of_range(seen.cost, log2, at) if seen.high > seen.low else 0)

    block, end = begin(number), begin(number + 1)
    if ranges.halves and log2 > 0:
        second = number + ranges.of_stream(log2)
        distance, last = begin(second) - block, begin(second + 1)
    else:
        distance, last = max(1, end - block) if ranges.halves else 1, end
    return {"block_begin": block, "block_end": last, "distance": distance, "first_end": end}


def items_of_cluster(seen: Seen, ranges: Ranges) -> list[Range]:
    """item_of_cluster for each block of a sequence's cluster."""
    log2 = ranges.cuts(seen)
    of_block = 2 if 1 << log2 > CLUSTER_PARTS else 1
    blocks = seen.cost if seen.high > seen.low else 0

    def begin(at: int) -> int:
        return seen.low // KEYS + begin_of_range(blocks, log2, min(at, 1 << log2))

    made = []
    for part in range(CLUSTER_PARTS):
        at = min(part * of_block, 1 << log2)
        given = {"first_end": begin(at + 1), "distance": max(1, begin(at + 1) - begin(at)), "ranges": 1 << log2}
        made.append(Range(0, seen.low, seen.high, begin(at), begin(at + of_block), **given))
    return made


def range_slot(item: Range, first: int, slots: int) -> int:
    """range_of: of a key head; the node's first range."""
    return item.first_part * slots + first


def partials_of_head(parts: int, batch: int, slots: int, halves: bool, kept_levels: int) -> int:
    """Room of a key head: RangeRoom."""
    return min(batch, parts) * slots + parts * (2 if halves else 1) * kept_levels


def join(first: Tree, second: Tree) -> Tree:
    """join_kept, join_before, join_streams."""
    return (first, second)


def tree_of(count: int, chain: int, first: int = 0) -> Tree:
    """All of so many ranges from one on."""
    if count <= 1 << chain:
        return functools.reduce(join, range(first, first + count))
    return join(tree_of(count // 2, chain, first), tree_of(count // 2, chain, first + count // 2))


def next_step(item: Range, count: int, level: int) -> tuple[bool, bool, int, int]:
    """Whether a result of so many ranges joins a kept one, or is kept; of how many it then is; where."""
    chain = item.chain
    if count < 1 << chain:
        begin = item.range >> chain << chain
        is_here, is_second = item.first <= begin, item.range + 1 - count > begin
        keeps = is_here and not is_second and item.range + 1 < item.to
        return is_here and is_second, keeps, item.range + 1 - begin, 0
    parent = item.range >> level + 1 << level + 1
    is_here, is_second = item.first <= parent <= item.to - (2 << level), item.range >> level & 1 == 1
    return is_here and is_second, is_here and not is_second, 2 * count, level - chain + (chain > 0)


def climb(item: Range, tree: Tree, kept: dict[int, Tree]) -> tuple[int, Tree]:
    """A range's result and those before it; of no range where it is kept."""
    count, level = 1, item.chain
    while True:
        joins, keeps, joined, where = next_step(item, count, level)
        if keeps:
            assert where not in kept, "something that was kept is lost"
            kept[where] = tree
            return 0, None
        if not joins:
            return count, tree
        tree, count = join(kept.pop(where), tree), joined
        level += joined > 1 << level


class Launch:
    """What the parts of a launch leave, one after the other in a given order: results of sequences and of whom."""

    def __init__(self, sequences: list[Seen], parts: int, ranges: Ranges, slots: int) -> None:
        self.runs = [list(RangeSchedule(sequences, part, parts, ranges).items()) for part in range(parts)]
        self.ranges, self.slots = ranges, slots
        self.partials: dict[int, tuple[int, Tree]] = {}
        self.counters: dict[int, int] = {}
        self.results: dict[int, Tree] = {}

    def run(self, order: list[int]) -> dict[int, Tree]:
        """`finish` of every item. Each slot is written once, and the counters are zero at the end."""
        for part in order:
            halves: dict[int, Tree] = {}
            for stream in (0, 1) if self.ranges.halves else (0,):
                self._run_stream(self.runs[part], stream, halves)
        assert not any(self.counters.values()), "a counter that is not zero"
        return self.results

    def _run_stream(self, items: list[Range], stream: int, halves: dict[int, Tree]) -> None:
        kept: dict[int, Tree] = {}
        for item in items:
            if stream == 1 and item.ranges == 1:
                continue
            before = stream * (item.ranges // 2)
            count, tree = climb(item, item.range + before, kept)
            assert max(kept, default=0) < MOST_RANGES_LOG2
            if count > 0 and item.parts > 1:
                self._share(item, before + item.range + 1 - count, count, tree)
            elif count > 0 and self.ranges.halves and item.ranges > 1 and stream == 0:
                halves[item.batch] = tree
            elif count > 0:
                self._give(item, join(halves.pop(item.batch), tree) if stream == 1 else tree)
        assert not kept, "something that was kept is lost"

    def _share(self, item: Range, first: int, count: int, tree: Tree) -> None:
        """finish_node."""
        slot = range_slot(item, first, self.slots)
        assert slot not in self.partials, "a slot is written twice"
        assert first < self.slots, "a slot of another sequence"
        self.partials[slot] = (count, tree)
        if item.range + 1 < item.to:
            return
        arrived = self.counters[item.first_part] = self.counters.get(item.first_part, 0) + item.to - item.first
        if arrived == item.ranges:
            self.counters[item.first_part] = 0
            self._give(item, self._merged(item))

    def _merged(self, item: Range) -> Tree:
        """merge_ranges."""
        kept: dict[int, Tree] = {}
        tree, end, in_chain = None, 0, (1 << item.chain) - 1
        while end < item.ranges:
            first = end
            count, tree = self.partials[range_slot(item, first, self.slots)]
            end = first + count
            if count <= in_chain and first & in_chain:
                tree = join(kept[0], tree)
            if end & in_chain:
                kept[0] = tree
                continue
            level = max(item.chain, count.bit_length() - 1)
            number = end - 1 >> level
            while number & 1:
                tree, level, number = join(kept[level], tree), level + 1, number >> 1
            kept[level] = tree
        return tree

    def _give(self, item: Range, tree: Tree) -> None:
        assert item.batch not in self.results, "a sequence has two results"
        self.results[item.batch] = tree


def grid_of(streams: int, head_dim: int, processors: int, heads_k: int, batch: int, rows_k: int, rows: int = 8) -> Grid:
    """decode_grid of a call with fixed ranges on so many multiprocessors; rows: of the kernel's tile."""
    of_block = 1 if rows > ROWS_OF_TREE else streams
    fits = 1 << Ranges.of(head_dim, heads_k).log2_of(rows_k) <= of_block * CLUSTER_PARTS
    return model.decode_grid(streams, processors, heads_k, batch, rows_k, may_cluster=fits)

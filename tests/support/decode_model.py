"""What the Hopper decode kernels do with a call's lengths and a cache, as arithmetic in Python.

Each function follows one of kernel_sources/flash_attention_v3/hopper: decode/schedule.cuh, decode/epilogue.cuh,
decode/merge.cuh, decode/consumer.cuh and launch/decode_launch.h say the same in C++. Loads are in decode_loads.py,
fixed ranges in decode_ranges.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

KEYS = 64  # kDecodeKeys
CLUSTER_PARTS = 8  # kClusterParts
PARTIALS_PER_BLOCK = 2  # kPartialsPerBlock
ROWS_OF_CLUSTER = 4096  # kRowsOfCluster
UNBOUNDED = 1 << 30
LANES = 32


def division(n: int) -> tuple[int, int]:
    """Division's multiplier and shift."""
    shift = 0
    while 1 << shift < n:
        shift += 1
    return ((1 << (31 + shift)) + n - 1) // n & 0xFFFFFFFF, shift


def divided(value: int, numbers: tuple[int, int]) -> int:
    """divide()."""
    return (2 * value & 0xFFFFFFFF) * numbers[0] >> 32 >> numbers[1]


@dataclass(frozen=True)
class Mask:
    """window_left, window_right and chunk of the parameters."""

    left: int = UNBOUNDED
    right: int = UNBOUNDED
    chunk: int = 0

    def visible(self, row: int, len_q: int, len_k: int) -> tuple[int, int]:
        """visible_keys of common/mask.cuh."""
        position = row + len_k - len_q
        low, high = max(0, position - self.left), min(len_k, position + self.right + 1)
        if self.chunk > 0:
            sign = -1 if position < 0 else 0
            begin = (divided(position ^ sign, division(self.chunk)) ^ sign) * self.chunk
            low, high = max(low, begin), min(high, begin + self.chunk)
        return low, high


@dataclass(frozen=True)
class Seen:
    """seen_rows: rows of the cache that some query sees, and how many blocks that is; `DecodeLengths` beside it."""

    low: int
    high: int
    cost: int
    len_q: int = 1
    len_k: int = 0
    leftpad: int = 0


def seen_rows(mask: Mask, len_q: int, len_k: int, leftpad: int) -> Seen:
    """What a sequence's queries see."""
    low = max(0, mask.visible(0, len_q, len_k)[0])
    high = mask.visible(len_q - 1, len_q, len_k)[1]
    first, last = leftpad + low, leftpad + max(low, high)
    blocks = -(-last // KEYS) - first // KEYS
    cost = blocks if high > low else 1
    return Seen(first, last, 0 if len_q <= 0 else cost, len_q, len_k, leftpad)


def rows_of_all(mask: Mask, len_q: int, len_k: int, leftpad: int, rows: int, group: int) -> tuple[int, int]:
    """every_low and every_high of run_item, by find_queries: rows of the cache that every query sees."""

    def query(thread: int) -> tuple[int, int]:
        token = divided(thread, division(group))
        low, high = mask.visible(token if token < len_q else len_q - 1, len_q, len_k)
        return leftpad + max(0, low), leftpad + high

    return query(rows - 1)[0], query(0)[1]


@dataclass(frozen=True)
class Item:
    """DecodeItem."""

    batch: int
    low: int
    high: int
    block_begin: int
    block_end: int
    first_part: int = 0
    parts: int = 1
    is_first: bool = False
    distance: int = 1  # begin[1] - begin[0]

    @property
    def end_of_first(self) -> int:
        """end[0], behind the last stage's first block; end[1] is block_end."""
        return self.block_end if self.distance == 1 else min(self.block_end, self.block_begin + self.distance)


class Schedule:
    """DecodeSchedule of one part: 32 sequences are open at a time."""

    def __init__(self, sequences: list[Seen], part: int, parts: int) -> None:
        self.sequences = sequences
        self.base = 0
        total = 0
        for first in range(0, len(sequences), LANES):
            self._open(first)
            total += sum(self.costs)
        self.run = divided(total, division(parts))
        self.longer = total - self.run * parts
        self.at = part * self.run + min(part, self.longer)
        self.end = self.at + self.run + (part < self.longer)
        if len(sequences) > LANES:
            self._open(0)

    def _open(self, first: int) -> None:
        assert first < len(self.sequences), "a part looks behind the last sequence"
        self.first = first
        here = self.sequences[first : first + LANES]
        self.seen = here + [Seen(0, 0, 0)] * (LANES - len(here))
        self.costs = [each.cost for each in self.seen]

    def part_of(self, block: int) -> int:
        """The part whose run a block lies in."""
        in_longer = self.longer * (self.run + 1)
        if block < in_longer:
            return block // (self.run + 1)
        return self.longer + (block - in_longer) // self.run

    def find(self) -> tuple[int, int, int]:
        """The lane of the sequence that the next block belongs to, and its first block and that behind its last."""
        while self.at >= self.base + sum(self.costs):
            self.base += sum(self.costs)
            self._open(self.first + LANES)
        up_to = list(itertools.accumulate(self.costs))
        source = sum(each <= self.at - self.base for each in up_to)
        end = self.base + up_to[source]
        return source, end - self.costs[source], end

    def items(self) -> Iterator[Item]:
        """What `next` gives, until it gives nothing."""
        while self.at < self.end:
            source, start, end = self.find()
            seen = self.seen[source]
            first_block = seen.low // KEYS
            begin = first_block + self.at - start
            finish = first_block + min(self.end, end) - start if seen.high > seen.low else begin
            first_part, parts = 0, 1
            if start < self.at or end > self.end:
                first_part = self.part_of(start)
                parts = self.part_of(end - 1) - first_part + 1
            is_first = self.at == start
            yield Item(self.first + source, seen.low, seen.high, begin, finish, first_part, parts, is_first)
            self.at = min(self.end, end)


def item_of_cluster(seen: Seen, part: int) -> Item:
    """The item of one block of a sequence's cluster."""
    first = seen.low // KEYS
    blocks = seen.cost if seen.high > seen.low else 0
    begin, end = (first + at * blocks // CLUSTER_PARTS for at in (part, part + 1))
    return Item(0, seen.low, seen.high, begin, end)


def partial_slot(part: int, head: int, heads_k: int, is_first: bool) -> int:
    """partial_of: which slot of the partial results an item's part writes."""
    return (part * heads_k + head) * 2 + is_first


def merged_slots(item: Item, head: int, heads_k: int) -> list[int]:
    """merge_parts: the slots that it reads, in its order."""
    first, step = partial_slot(item.first_part, head, heads_k, False), 2 * heads_k
    return [first + part * step + (part == 0) for part in range(item.parts)]


def counter(item: Item, head: int, heads_k: int) -> int:
    """arrive_last: the counter at which an item's parts meet."""
    return item.first_part * heads_k + head


def blocks_of_stream(item: Item, streams: int, heads_of_block: int, stream: int) -> tuple[list[int], int]:
    """The blocks that run_item gives a stream, and how many pairs of stages, of keys and values, it lets pass."""
    in_turns = streams == 2 and heads_of_block == 1
    second = in_turns and stream == 1
    step = 2 if in_turns and item.distance == 1 else 1
    block, blocks = item.block_begin + second * item.distance, []
    while block < (item.block_end if second else item.end_of_first):
        blocks.append(block)
        block += step
    passed = range(block, item.end_of_first + stream * item.distance, step) if in_turns else ()
    return blocks, len(passed)


@dataclass(frozen=True)
class Grid:
    """DecodeGrid: key heads of a thread block, and thread blocks for each of them."""

    heads_of_block: int
    parts: int
    in_clusters: bool


def decode_grid(
    streams: int,
    multiprocessors: int,
    heads_k: int,
    batch: int,
    rows_k: int,
    may_cluster: bool = True,
) -> Grid:
    """decode_grid on so many multiprocessors, sm_margin taken away; the last is fixed ranges' own."""
    clusters = heads_k * batch
    if (
        may_cluster
        and clusters >= 4
        and clusters * (CLUSTER_PARTS + 1) <= multiprocessors
        and rows_k <= clusters * ROWS_OF_CLUSTER
    ):
        return Grid(1, CLUSTER_PARTS, True)
    most = max(1, multiprocessors)
    two = streams == 2 and heads_k % 2 == 0 and 2 * batch * heads_k >= 3 * most
    groups = heads_k // 2 if two else heads_k
    parts = even = max(1, most // groups)
    if batch >= parts:
        while batch % even != 0:
            even -= 1
    elif batch > 0:
        even = parts // batch * batch
    return Grid(2 if two else 1, even if even * 100 >= parts * 96 else parts, False)


def probability_places(rows: int) -> Iterator[tuple[int, int, int]]:
    """store_probabilities: (query, key, byte of the buffer) of each number, by the lanes and registers of stmatrix.

    Transposed, a matrix's row is what a fragment has as column: thread t's two numbers are the rows 2 (t % 4) and the
    next, in column t / 4.
    """
    for warp in range(4):
        for first in range(0, rows // 4, 4 if rows > 8 else 2):  # registers: packed[first] and those behind it
            addresses = [_address_of_lane(warp, lane, rows) + first // 4 * 16 * 128 for lane in range(LANES)]
            for matrix in range(min(4, rows // 4)):
                register = first + matrix
                for lane in range(LANES):
                    for c in range(2):
                        query, key = accumulator(warp * 32 + lane, register // 2, register % 2, c)
                        address = addresses[8 * matrix + 2 * (lane % 4) + c] + 2 * (lane // 4)
                        yield query, key, address


def _address_of_lane(warp: int, lane: int, rows: int) -> int:
    half, row = lane // 8 % 2, lane % 8 + (lane // 16 * 8 if rows > 8 else 0)
    return row * 128 + ((2 * warp + half) ^ (row % 8)) * 16


def accumulator(thread: int, j: int, half: int, c: int) -> tuple[int, int]:
    """(column, row) of number 4 j + 2 half + c of a thread's accumulator: a query, and a key or a column of values."""
    return 8 * j + thread % 4 * 2 + c, thread // 32 * 16 + thread % 32 // 4 + 8 * half


def output_places(head_dim: int, rows: int) -> Iterator[tuple[int, int, int]]:
    """place_in_output as its callers use it: (query, column of the head, place in rows x head_dim numbers)."""
    for thread in range(128):
        for i in range(rows // 4):
            query = i // 2 * 8 + thread % 4 * 2 + i % 2
            place = query * head_dim + thread // 32 * 16 + thread % 32 // 4
            for panel in range(head_dim // 64):
                for half in range(2):
                    of_query, row = accumulator(thread, i // 2, half, i % 2)
                    yield of_query, 64 * panel + row, place + 64 * panel + 8 * half

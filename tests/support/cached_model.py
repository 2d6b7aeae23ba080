"""What the Hopper prefill kernels do with a cache, as arithmetic in Python: boxes, rows, swizzles, packed queries.

Each function follows one of kernel_sources/flash_attention_v3/hopper: cached_keys.cuh, cached_producer.cuh,
consumer.cuh, cached_drafts.cuh and launch/cached_launch.h say the same in C++.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

SWIZZLE_ROWS = 8  # kSwizzleRows
ROW_LOADERS = 3  # kRowLoaders
ROWS_PER_WARPGROUP = 64
PIECE = 16  # bytes of one copy
ZEROS = "zeros"  # what a cleared row of values holds
STALE = "stale"  # what was there before


def divisor(value: int) -> tuple[int, int]:
    """set_divisor's multiplier and shift."""
    shift = 0
    while 1 << shift < value:
        shift += 1
    return ((1 << (31 + shift)) + value - 1) // value & 0xFFFFFFFF, shift


def divided(row: int, multiplier: int, shift: int) -> int:
    """page_of, and chunk_of of mask.cuh."""
    return (2 * row & 0xFFFFFFFF) * multiplier >> 32 >> shift


def seen_rows(low: int, high: int) -> tuple[int, int]:
    """A tile's interval, by TileScheduler::write_cached."""
    return (low, high) if low < high else (0, 0)


def draft_word(words: list[int], at: int) -> int:
    """draft_word; the words as unsigned numbers."""
    return 0xFFFFFFFF if at < 0 else words[max(0, min(at, len(words) - 1))]


def drafted(words: list[int], first: int, keys: int) -> list[bool]:
    """Which keys of a block mask_drafts leaves a row: bit `first` is its first key's; four lanes share the row."""
    seen: dict[int, bool] = {}
    for lane in range(4):
        begin = first + 2 * lane  # accumulator_column
        low = draft_word(words, begin >> 5)
        for i in range(0, keys // 8, 4):
            high = draft_word(words, (begin >> 5) + i // 4 + 1)
            bits = (high << 32 | low) >> (begin & 31) & 0xFFFFFFFF
            low = high
            for j in range(8):
                if i + j // 2 < keys // 8:
                    seen[8 * (i + j // 2) + 2 * lane + j % 2] = bool(bits >> (j // 2 * 8 + j % 2) & 1)
    return [seen[key] for key in range(keys)]


def asked_rows(first_row: int, rows: int, len_q: int, shift: int) -> list[int]:
    """The rows of a tile of `rows` that is_seen asks."""
    end = min(first_row + rows, len_q << shift)
    return list(range(end - 1, first_row - 1, -(1 << shift)))


@dataclass(frozen=True)
class Cache:
    """A cache as a tile sees it: a dense one has page_size 0 and `capacity` rows."""

    keys: int  # of a block
    page_size: int
    capacity: int
    low: int  # rows that the tile sees
    high: int

    @property
    def box_rows(self) -> int:
        """Rows of a box, 0 where rows are copied one by one."""
        if self.page_size == 0:
            return self.keys
        rows = math.gcd(self.page_size, self.keys)
        return rows if rows % SWIZZLE_ROWS == 0 else 0

    @property
    def blocks(self) -> range:
        """The blocks of the tile, by TileScheduler::write_cached."""
        return range(self.low // self.keys, max(1, -(-self.high // self.keys)))

    def place(self, row: int) -> tuple[int, int]:
        """The entry of the page table and the row of its page that hold a row of the cache."""
        page = divided(row, *divisor(self.page_size)) if self.page_size else 0
        return page, row - page * self.page_size

    def load(self, block: int) -> tuple[dict[int, tuple[int, int]], set[int]]:
        """What the producers put into each row of a stage, and which entries of the page table they read."""
        return self._load_boxes(block) if self.box_rows else self._load_rows(block)

    def _load_boxes(self, block: int) -> tuple[dict[int, tuple[int, int]], set[int]]:
        found: dict[int, tuple[int, int]] = {}
        read: set[int] = set()
        for lane in range(32):
            row = block * self.keys + lane * self.box_rows
            copies = lane < self.keys // self.box_rows and row < self.high and row + self.box_rows > self.low
            if not copies:
                continue
            page, slot = self.place(row)
            read.add(page)
            for i in range(self.box_rows):
                assert lane * self.box_rows + i not in found
                found[lane * self.box_rows + i] = page, slot + i
        return found, read

    def _load_rows(self, block: int) -> tuple[dict[int, tuple[int, int]], set[int]]:
        found: dict[int, tuple[int, int]] = {}
        read: set[int] = set()
        for rank in range(ROW_LOADERS):
            n = 0
            while (rank + ROW_LOADERS * n) * 8 < self.keys:
                for lane in range(8):  # the other 24 have other pieces of the same rows
                    in_block = (rank + ROW_LOADERS * n) * 8 + lane
                    row = block * self.keys + in_block
                    if in_block < self.keys and self.low <= row < self.high:
                        assert in_block not in found
                        found[in_block] = self.place(row)
                        read.add(found[in_block][0])
                n += 1
        return found, read

    def values(self, block: int, *, clears: bool) -> list[object]:
        """The rows of a stage of values when its product begins, after clear_hidden_values."""
        found, _ = self.load(block)
        rows: list[object] = [found.get(i, STALE) for i in range(self.keys)]
        if clears:
            seen = max(0, min(self.high - block * self.keys, self.keys))
            hidden = min(self.low - block * self.keys, self.keys)
            for begin, end in ((0, hidden), (seen, self.keys)):
                for i in range(begin, end):
                    rows[i] = ZEROS
        return rows


def swizzled(offset: int, row_bytes: int) -> int:
    """Where the copy engine puts the byte at an offset of a panel: 16-byte pieces, exchanged by row."""
    period = offset // row_bytes % 8 if row_bytes == 128 else offset // 128 % 4
    return offset ^ period * PIECE


def row_copies(keys: int, head_dim: int, panel: int) -> Iterator[tuple[int, int, int, list[tuple[int, int, int]]]]:
    """Each instruction of copy_rows on a whole block: rank, n, j, and by lane (row, piece of the row, address)."""
    for rank in range(ROW_LOADERS):
        for n in range(-(-keys // 8 // ROW_LOADERS) + 1):
            if (rank + ROW_LOADERS * n) * 8 >= keys:
                break
            for j in range(head_dim // 32):
                lanes = []
                for lane in range(32):
                    in_block = (rank + ROW_LOADERS * n) * 8 + lane % 8
                    flip = in_block % 8 if panel == 64 else in_block // 2 % 4
                    inside = (lane // 8 + 4 * j % (panel // 8)) ^ flip
                    address = in_block * panel * 2 + 4 * j // (panel // 8) * keys * panel * 2 + (inside << 4)
                    lanes.append((in_block, lane // 8 + 4 * j, address))
                yield rank, n, j, lanes


def pack_shift(group: int) -> int:
    """pack_shift_of."""
    shift = (group - 1).bit_length()
    return shift if 1 << shift == group and group <= ROWS_PER_WARPGROUP else 0


def packed_box(group: int, row: int, first_row: int) -> tuple[int, int]:
    """(token, head of the tile) that the copy engine puts into a row of a warpgroup's queries, by the box's order.

    The box {columns, pack, 64 / pack} begins at token (first_row >> shift), and its rows lie head by head.
    """
    pack = 1 << pack_shift(group)
    box = [(token, head) for token in range(ROWS_PER_WARPGROUP // pack) for head in range(pack)]
    token, head = box[row]
    return (first_row >> pack_shift(group)) + token, head


BLOCKS_OF_END = 2  # kBlocksOfEnd


def cut(begin: int, end: int, splits: int, ends: int = 0) -> list[range]:
    """The blocks of each part of a tile, by TileScheduler::cut and PartCut; ends: tiles of an idle block."""
    each = -(-(end - begin) // splits)
    fewer = ends * (end - begin + BLOCKS_OF_END + splits) // (1 + splits * ends)
    if ends > 0 and fewer + BLOCKS_OF_END <= each:
        each = fewer
    parts = -(-(end - begin) // each)
    return [range(begin + part * each, min(end, begin + (part + 1) * each)) for part in range(parts)]


def parts_of_tiles(tiles: int, blocks: int, keys: int, most_parts: int) -> int:
    """Into how many parts tiles are cut with num_splits 0."""
    if tiles == 0 or 10 * tiles >= 8 * blocks:
        return 1
    most = min(128, keys // 256, most_parts // tiles)

    def fill(parts: int) -> float:
        work = tiles * parts
        return work / (-(-work // blocks) * blocks)

    best = max((fill(parts) for parts in range(1, most + 1)), default=0.0)
    least = min((parts for parts in range(1, most + 1) if fill(parts) >= 0.85 * best), default=128)
    return 1 if most <= 1 else least


def ends_of_tiles(tiles: int, blocks: int, parts: int, most_parts: int) -> int:
    """How many tiles there are for each block that so many parts leave idle, of one sequence with few heads."""
    idle = blocks - tiles * parts
    return -(-tiles // idle) if parts > 1 and idle > 0 and (parts + 1) * tiles <= most_parts else 0


def order(tiles: int, splits: int, base: int) -> list[tuple[int, int, int]]:
    """(part, tile of the section, ordinal) by linear index, by TileScheduler::seek, of a section behind base tiles."""
    found = []
    for index in range(base * splits, (base + tiles) * splits):
        offset = index - base * splits
        part = offset // tiles
        tile = offset - part * tiles
        found.append((part, tile, base * splits // splits + tile))
    return found

"""What the Hopper decode kernels' producers load of a cache, as arithmetic in Python: boxes, rows, bytes, page tables.

Each function follows kernel_sources/flash_attention_v3/hopper/decode/producer.cuh or launch/decode_launch.h.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.support.decode_model import KEYS, LANES, Item, divided, division

PANEL = 64  # kDecodePanel
ROOM = 200 * 1024  # of kRoom
MOST_STAGES = 10
PIECE = 16  # bytes of one copy of a thread


@dataclass(frozen=True)
class Tile:
    """DecodeConfig."""

    head_dim: int
    rows: int

    @property
    def streams(self) -> int:
        return 1 if self.head_dim > 128 else 2

    @property
    def panels(self) -> int:
        return self.head_dim // PANEL

    @property
    def bytes_of_stream(self) -> int:
        return KEYS * self.head_dim * 2

    @property
    def stages(self) -> int:
        offset = self.streams * self.rows * self.head_dim * 2 + self.streams * 2 * self.rows * KEYS * 2
        return min(MOST_STAGES, (ROOM - offset) // (self.streams * self.bytes_of_stream))


# Where a row's bytes of a stage come from: (key head, row of the cache, first column of a 16-byte piece).
Source = tuple[int, int, int]


@dataclass
class Stage:
    """One stage of keys or of values: what each 16 bytes hold, by address, and the bytes that its barrier counts."""

    block: int
    written: dict[int, Source] = field(default_factory=dict)
    arrived: int = 0
    expected: int = 0

    def write(self, address: int, source: Source) -> None:
        assert address not in self.written, f"16 bytes at {address} are written twice"
        self.written[address] = source


@dataclass(frozen=True)
class Cache:
    """A cache as the launcher describes it to the producers of one thread block, whose first key head is `head`."""

    tile: Tile
    place_rows: int  # of a page, or of a dense cache's entry
    paged: bool
    heads_of_block: int
    columns: int  # of a row of one head, before it is padded
    side_by_side: bool = True  # whether the heads of a row lie beside each other
    head: int = 0
    read: Counter[int] = field(default_factory=Counter, compare=False)  # entries of the page table, how often

    @property
    def box_rows(self) -> int:
        """box_rows_of."""
        if not self.paged:
            return KEYS
        rows = math.gcd(self.place_rows, KEYS)
        return rows if rows >= 8 else 0

    @property
    def box_panels(self) -> int:
        """box_panels_of."""
        if self.box_rows != KEYS or self.columns != self.tile.head_dim:
            return 1
        return 2 * self.tile.panels if self.heads_of_block == 2 and self.side_by_side else self.tile.panels

    @property
    def blocks_of_stage(self) -> int:
        return self.tile.streams if self.heads_of_block == 1 else 1

    @property
    def boxes_log2(self) -> int:
        boxes = 0
        assert self.box_rows > 0, "threads load each row"
        while self.box_rows << boxes < self.blocks_of_stage * KEYS:
            boxes += 1
        return boxes

    @property
    def copies(self) -> int:
        return self.tile.panels * self.heads_of_block // self.box_panels << self.boxes_log2

    @property
    def copy_warps(self) -> int:
        return 4 if self.copies > 4 else 1

    def index(self, row: int) -> int:
        return divided(row, division(self.place_rows))

    def place(self, row: int) -> int:
        """CachePlaces::place, as the entry of the page table that it reads; 0 of a dense cache."""
        if not self.paged:
            return 0
        self.read[self.index(row)] += 1
        return self.index(row)

    def row_in_place(self, row: int) -> int:
        return row - self.index(row) * self.place_rows

    def step_of(self, item: Item) -> int:
        return 1 if item.distance > 1 else self.blocks_of_stage

    def row_behind(self, item: Item, row: int) -> int:
        return row + row // KEYS * (item.distance - 1) * KEYS

    def stages(self, item: Item) -> list[Stage]:
        """The stages of keys of an item, one after the other; those of values are loaded alike."""
        return list(self.load_boxes(item) if self.box_rows else self.load_each_row(item))

    def is_needed(self, item: Item, row: int) -> bool:
        return row < min(item.high, item.block_end * KEYS) and row + self.box_rows > item.low

    def place_of(self, item: Item, row: int) -> int:
        return self.place(row) if self.is_needed(item, row) else 0

    def load_boxes(self, item: Item) -> Iterator[Stage]:
        """DecodeProducer::load_boxes, all lanes of all warps that ask for copies."""
        rows, boxes = self.box_rows, 1 << self.boxes_log2
        step = self.step_of(item)
        of_lane = [
            (lane >> self.boxes_log2) * step * KEYS + self.row_behind(item, (lane & (boxes - 1)) * rows)
            for lane in range(LANES)
        ]
        line = (32 >> self.boxes_log2) * step * KEYS
        places = next_places = [0] * LANES
        ahead = 0
        for block in range(item.block_begin, item.end_of_first, step):
            first = block * KEYS
            if ahead == 0:
                if block == item.block_begin:
                    next_places = [self.place_of(item, first + row) for row in of_lane]
                places = next_places
                next_places = [self.place_of(item, first + row + line) for row in of_lane]
                ahead = 32
            stage = Stage(block)
            needed = sum(self.is_needed(item, first + row) for row in of_lane[:boxes])
            stage.expected = needed * (self.copies >> self.boxes_log2) * rows * self.box_panels * PANEL * 2
            for warp in range(self.copy_warps):
                for lane in range(LANES):
                    copy = lane * self.copy_warps + warp
                    box, panel = copy & (boxes - 1), (copy >> self.boxes_log2) * self.box_panels
                    row = first + self.row_behind(item, box * rows)
                    if copy < self.copies and self.is_needed(item, row):
                        self._copy_box(stage, box, panel, places[32 - ahead + box], self.row_in_place(row))
            ahead -= boxes
            yield stage

    def _copy_box(self, stage: Stage, box: int, panel: int, place: int, in_place: int) -> None:
        """What the copy engine writes for one box: panel after panel, rows of 128 bytes, swizzled by their address."""
        rows, tile = self.box_rows, self.tile
        offset = box * rows // KEYS * tile.bytes_of_stream
        offset += panel * KEYS * PANEL * 2 + box * rows % KEYS * PANEL * 2
        assert offset % 1024 == 0, "a box begins within the swizzle's period"
        stage.arrived += rows * self.box_panels * PANEL * 2
        for each in range(self.box_panels):
            of_head, column = divmod(panel + each, tile.panels)
            for row in range(rows):
                inside = in_place + row
                assert not self.paged or inside < self.place_rows, "a box crosses a page's end"
                for piece in range(8):
                    address = offset + each * rows * 128 + row * 128 + piece * PIECE
                    source = self.head + of_head, place * self.place_rows + inside, column * PANEL + piece * 8
                    stage.write(address ^ address // 128 % 8 * PIECE, source)

    @property
    def rows_of_warp(self) -> int:
        return self.tile.streams * KEYS // 4

    def _lane_row(self, item: Item, block: int, warp: int, lane: int) -> int:
        in_stage = warp * self.rows_of_warp + lane
        return block * KEYS + (self.row_behind(item, in_stage) if self.heads_of_block == 1 else in_stage % KEYS)

    def _find_row(self, item: Item, block: int, warp: int, lane: int) -> int:
        row = self._lane_row(item, block, warp, lane)
        seen = item.low <= row < min(item.high, item.block_end * KEYS)
        return self.place(row) if seen and lane < self.rows_of_warp else -1

    def load_each_row(self, item: Item) -> Iterator[Stage]:
        """DecodeProducer::load_each_row, all four warps."""
        step = self.step_of(item)
        stages = [Stage(block) for block in range(item.block_begin, item.end_of_first, step)]
        for warp in range(4):
            place, following = (
                [self._find_row(item, item.block_begin + ahead * step, warp, lane) for lane in range(LANES)]
                for ahead in range(2)
            )
            for stage in stages:
                after = [self._find_row(item, stage.block + 2 * step, warp, lane) for lane in range(LANES)]
                self._load_rows(item, stage, warp, place)
                place, following = following, after
        yield from stages

    def _load_rows(self, item: Item, stage: Stage, warp: int, place: list[int]) -> None:
        """DecodeProducer::load_rows of one warp: 16 bytes a lane, several rows a pass."""
        tile = self.tile
        threads_of_row = tile.head_dim // 8
        at_once = LANES // threads_of_row
        for lane in range(LANES):
            piece, of_lane = lane % threads_of_row, lane // threads_of_row
            first_row = warp * self.rows_of_warp + of_lane
            address = piece // 8 * (KEYS * PANEL * 2) + first_row // KEYS * tile.bytes_of_stream
            address += first_row % KEYS * (PANEL * 2)
            for begin in range(0, self.rows_of_warp, at_once):
                row = begin + of_lane
                if place[row] < 0:
                    continue
                owner = self._lane_row(item, stage.block, warp, row)
                of_head = 0 if self.heads_of_block == 1 else (warp * self.rows_of_warp + row) // KEYS
                inside = place[row] * self.place_rows + self.row_in_place(owner)
                there = address + begin * (PANEL * 2) + ((piece ^ row) & 7) * PIECE
                stage.write(there, (self.head + of_head, inside, piece * 8))


def expected_stage(cache: Cache, item: Item, block: int) -> dict[int, Source]:
    """What the products read of a stage: a row of 128 bytes a key and panel, in the 128-byte swizzle, a tile a stream.

    Of rows that some query sees; a stream has the block behind the other's, or the other key head's.
    """
    tile = cache.tile
    found = {}
    for stream in range(tile.streams):
        of_head, of_block = (stream, block) if cache.heads_of_block == 2 else (0, block + stream * item.distance)
        if of_block >= item.block_end:
            continue
        for row in range(of_block * KEYS, (of_block + 1) * KEYS):
            if item.low <= row < item.high:
                for piece in range(tile.head_dim // 8):
                    address = stream * tile.bytes_of_stream + piece // 8 * KEYS * 128 + row % KEYS * 128
                    found[address + (piece % 8 ^ row % 8) * PIECE] = cache.head + of_head, row, piece * 8
    return found


def query_pieces(head_dim: int, rows: int) -> Iterator[tuple[int, int, int]]:
    """load_queries: (query, piece, address) of each 16 bytes that the threads of a stream store."""
    pieces = head_dim // 8
    at_once = 128 // pieces
    for thread in range(128):
        piece = thread % pieces
        for first in range(0, rows, at_once):
            index = first + thread // pieces
            if rows < at_once and index >= rows:
                break
            yield index, piece, piece // 8 * rows * 128 + index * 128 + ((piece % 8) ^ (index % 8)) * PIECE

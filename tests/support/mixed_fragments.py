"""What the threads of the mixed decode kernel hold of a block, as decode/e4m3.cuh places it: a model in numpy.

A tile in shared memory is modelled by its bytes, swizzled as the copy engine writes them; registers by the elements
that wgmma's layout gives them: of operand A row and column of every register of every thread, of operand B the
128-byte swizzle of rows of 64 columns.
"""

from __future__ import annotations

import numpy as np

KEYS = 64
Bytes = np.ndarray


class Layout:
    """The numbers of DecodeConfig for a head size."""

    def __init__(self, head_dim: int) -> None:
        self.head_dim = head_dim
        self.panel_bytes = 128 if head_dim > 64 else 64
        self.warp_step, self.lane_step = head_dim // 4, head_dim // 32
        self.panels = head_dim // 64

    def place_of_piece(self, row: int, piece: int) -> int:
        """Where 16 bytes of a row lie in a tile."""
        pieces = self.panel_bytes // 16
        swizzled = row % 8 if pieces == 8 else row // 2 % 4
        return (piece // pieces * KEYS + row) * self.panel_bytes + ((piece % pieces) ^ swizzled) * 16


def key_of_row(row: int) -> int:
    """Which of eight keys is a row of the first product."""
    return row ^ (row & 1) << 2


def as_loaded(rows: Bytes, layout: Layout) -> Bytes:
    """A block's rows as the copy engine leaves them: bytes of the address are XORed with those of the line above."""
    tile = np.zeros(KEYS * layout.head_dim, dtype=rows.dtype)
    for panel in range(layout.head_dim // layout.panel_bytes):
        for row in range(KEYS):
            for column in range(layout.panel_bytes):
                address = row * layout.panel_bytes + column
                mask = 0x70 if layout.panel_bytes == 128 else 0x30
                swizzled = address ^ (address >> 3 & mask)
                tile[panel * KEYS * layout.panel_bytes + swizzled] = rows[row, panel * layout.panel_bytes + column]
    return tile


def operand_a(thread: int, register: int, half: int) -> tuple[int, int]:
    """Row and column of an element of wgmma's 64 x 16 operand in registers."""
    warp, lane = divmod(thread, 32)
    return warp * 16 + lane // 4 + register % 2 * 8, lane % 4 * 2 + half + register // 2 * 8


def key_operand(tile: Bytes, layout: Layout) -> Bytes:
    """The first product's operand of all steps, 64 x head size, as load_keys fills the registers."""
    operand = np.zeros((KEYS, layout.head_dim), dtype=tile.dtype)
    for thread in range(128):
        lane = thread % 32
        row = thread // 32 * 16 + key_of_row(lane // 4)
        for m in range(layout.head_dim // 64):
            address = layout.place_of_piece(row, 4 * m + lane % 4)
            both = (tile[address : address + 16], tile[address + 8 * layout.panel_bytes :][:16])
            for j in range(4):
                for register in range(4):
                    for half in range(2):
                        at = operand_a(thread, register, half)
                        value = both[register % 2][4 * j + register // 2 * 2 + half]
                        operand[at[0], (4 * m + j) * 16 + at[1]] = value
    return operand


def query_columns(layout: Layout) -> list[int]:
    """Which column of the queries store_query puts at each place of the first product's sum."""
    columns = [-1] * layout.head_dim
    for piece in range(layout.head_dim // 8):
        thread, step = piece // 2 % 4, piece // 8 * 4 + piece % 2 * 2
        for i in range(4):
            at = (step + i // 2) * 2 + i % 2  # in 16 bytes, of which this thread has 4
            for half in range(2):
                columns[at * 8 + thread * 2 + half] = piece * 8 + 2 * i + half
    return columns


def value_operand(tile: Bytes, layout: Layout) -> Bytes:
    """The second product's operand: panel, row of the panel, place of a key, as load_values fills the registers."""
    operand = np.zeros((layout.panels, 64, KEYS), dtype=tile.dtype)
    for thread in range(128):
        lane = thread % 32
        column = thread // 32 * layout.warp_step + lane // 4 * layout.lane_step
        for step in range(KEYS // 16):
            for group in range(2):
                offset = (step * 16 + group * 8) * layout.panel_bytes
                two = []
                for key in (lane % 4 * 2, key_of_row(lane % 4 * 2 + 1)):
                    address = layout.place_of_piece(key, column // 16) + column % 16 + offset
                    two.append(tile[address : address + layout.lane_step])
                for i in range(layout.panels):
                    for of_pair in range(2):
                        for half in range(2):
                            row, place = operand_a(thread, 2 * group + of_pair, half)
                            operand[i, row, step * 16 + place] = two[half][2 * i + of_pair]
    return operand


def column_of(layout: Layout, panel: int, row: int) -> int:
    """The column of the result that a row of a panel is, as first_column and its steps have it."""
    warp, in_warp = divmod(row, 16)
    return warp * layout.warp_step + in_warp % 8 * layout.lane_step + 2 * panel + in_warp // 8


def banks(layout: Layout, kind: str) -> int:
    """The most addresses that one bank has in a part of a warp's load that shared memory serves at once."""
    width = 16 if kind == "keys" else layout.lane_step
    at_once = min(32, 128 // width)
    worst = 0
    for thread in range(0, 128, at_once):
        of_bank: dict[int, set[int]] = {}
        for lane in range(thread, thread + at_once):
            in_warp = lane % 32
            if kind == "keys":
                row = lane // 32 * 16 + key_of_row(in_warp // 4)
                address = layout.place_of_piece(row, in_warp % 4)
            else:
                column = lane // 32 * layout.warp_step + in_warp // 4 * layout.lane_step
                address = layout.place_of_piece(in_warp % 4 * 2, column // 16) + column % 16
            for word in range(address // 4, (address + width + 3) // 4):
                of_bank.setdefault(word % 32, set()).add(word)
        worst = max(worst, *(len(words) for words in of_bank.values()))
    return worst

"""The kernel that prepares values in e4m3, compiled for the CPU: every byte where the attention kernel reads it."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from jit_kernel import device, jit
from jit_kernel.engine import compiler
from jit_kernel.fa3.call import Call
from jit_kernel.fa3.hopper import kernels, prefill

HEADER = Path(__file__).parents[1] / "support" / "fp8_values_on_host.h"
COLUMNS, KEYS, BLOCK = 256, 64, kernels.PREPARED_KEYS
UNTOUCHED = 0xA5


@pytest.fixture(scope="module")
def on_host() -> Any:
    try:
        compiler.require("host")
    except compiler.CompilerNotFoundError as error:
        pytest.skip(str(error))
    unit = HEADER.read_text(encoding="utf-8")
    return jit.load(
        jit.KernelSpec(kernels.FOLDER, unit, "host", (("function", "fp8_values_on_host"),)), device.cpu_target()
    )


def places() -> torch.Tensor:
    """(keys, columns): where a tile has each byte, by what fp8_transposer.cuh says of keys, columns and swizzle."""
    key, column = torch.arange(KEYS)[:, None], torch.arange(COLUMNS)[None]
    row = column // 16 * 16 + column % 2 * 8 + column % 16 // 2
    place = key % 8 // 2 * 4 + key % 16 // 8 * 2 + key % 2
    return row * KEYS + (key // 16 ^ row // 2 % 4) * 16 + place


def prepared(v: torch.Tensor, length: int) -> torch.Tensor:
    """The blocks of a sequence and head of which v (keys, columns) is the first `length` keys."""
    blocks = max(1, -(-length // BLOCK))
    padded = torch.zeros(blocks * BLOCK, COLUMNS, dtype=torch.uint8)
    padded[:length, : v.shape[1]] = v[:length]
    tiles = torch.empty(blocks * BLOCK // KEYS, KEYS * COLUMNS, dtype=torch.uint8)
    tiles[:, places().flatten()] = padded.view(len(tiles), -1)
    return tiles.flatten()


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_every_byte_is_where_it_is_read_and_no_other_is_touched(on_host: Any, ragged: bool, seed: int) -> None:
    dice = Random(2 * seed + ragged)
    torch.manual_seed(seed)
    batch, heads, columns = dice.randint(1, 5), dice.randint(1, 2), dice.choice((16, 208, 256))
    lengths = [dice.choice((0, 1, 127, 128, 129, 300, dice.randint(0, 600))) for _ in range(batch)]
    shape = (sum(lengths),) if ragged else (batch, max(lengths))
    v = torch.randint(0, 256, (*shape, heads, columns + 16), dtype=torch.uint8)[..., :columns]
    used = [dice.randint(0, n if ragged else max(lengths)) for n in lengths] if dice.random() < 0.7 else None
    cu = torch.tensor([0, *lengths]).cumsum(0).int() if ragged else None
    call = Call.__new__(Call)
    call.v, call.cu_seqlens_k = v, cu
    room = torch.full((prefill.prepared_bytes(call, COLUMNS) + 64,), UNTOUCHED, dtype=torch.uint8)
    blocks = (len(room) - 64) // (BLOCK * COLUMNS * heads)
    seqused = None if used is None else torch.tensor(used, dtype=torch.int32)
    on_host["prepare"](v, room, cu, seqused, batch, blocks)
    expected = torch.full_like(room, UNTOUCHED)
    for i in range(batch):
        of_sequence = v[sum(lengths[:i]) :][: lengths[i]] if ragged else v[i]
        first = sum(lengths[:i]) // BLOCK + i if ragged else i * max(1, -(-max(lengths) // BLOCK))
        for head in range(heads):
            bytes_ = prepared(of_sequence[:, head], len(of_sequence) if used is None else used[i])
            at = (head * blocks + first) * BLOCK * COLUMNS
            assert bool((expected[at : at + len(bytes_)] == UNTOUCHED).all()), "blocks of two sequences meet"
            expected[at : at + len(bytes_)] = bytes_
    assert torch.equal(room, expected)


@pytest.mark.parametrize(
    ("begin", "end"), [(0, 64), (0, 0), (-5, 33), (17, 200), (1, 63), (16, 48), (40, 41), (64, 64)]
)
def test_keys_that_no_row_sees_become_zeros(on_host: Any, begin: int, end: int) -> None:
    tile = torch.randint(1, 256, (KEYS * COLUMNS,), dtype=torch.uint8)
    key = torch.arange(KEYS)
    expected = tile.clone()
    expected[places()[(key < begin) | (key >= end)].flatten()] = 0
    on_host["keep"](tile, begin, end)
    assert torch.equal(tile, expected)

"""Deterministic decode without a GPU: the launcher's grid and room beside their model, and who serves such calls."""

from __future__ import annotations

import struct

import pytest
import torch

from jit_kernel.device import Target
from jit_kernel.engine import compiler
from jit_kernel.fa3 import hopper, portable
from jit_kernel.fa3.decision import Accepted
from jit_kernel.fa3.features import Features
from jit_kernel.fa3.hopper import decode, kernels, known
from jit_kernel.fa3.musa import rules
from tests.support import decode_ranges
from tests.support.decode_double import OnHost, fields
from tests.support.decode_loads import Tile
from tests.support.decode_model import Grid

MULTIPROCESSORS = 132  # of the double
MOST_SHARED = 227 * 1024


@pytest.fixture(scope="module")
def double() -> OnHost:
    try:
        compiler.require("host")
    except compiler.CompilerNotFoundError as error:
        pytest.skip(str(error))
    return OnHost()


@pytest.fixture
def serving(double: OnHost, monkeypatch: pytest.MonkeyPatch) -> OnHost:
    """The double in place of the launcher."""
    for name in ("_decode", "_asks_first", "_asks_for_more"):
        monkeypatch.setattr(known, name, getattr(known, name))
    known.serve(double.known_decode)
    monkeypatch.setattr(decode.kernels, "kernels_of", lambda device: double)
    return double


def launch_of(double: OnHost, batch: int, heads_k: int, d: int, rows_k: int, deterministic: bool) -> tuple[int, ...]:
    """Grid, blocks of a cluster, threads and bytes of shared memory of a launch for one query token."""
    q = torch.empty(batch, 1, heads_k, d, dtype=torch.bfloat16)
    k, v = (torch.empty(1, 1, 1, 1, dtype=torch.bfloat16).expand(batch, rows_k, heads_k, d).contiguous() for _ in "kv")
    call = {"q": q, "k_cache": k, "v_cache": v, "num_splits": 0, "deterministic": deterministic}
    before = double.launches()
    assert known.try_unchecked(fields(call)) is not None
    assert double.launches() == before + 1
    return struct.unpack("6I", bytes(double.parameters())[-24:])


GRIDS = [(1, 8, 128, 512), (1, 2, 64, 600), (3, 8, 128, 300), (40, 8, 64, 70), (5, 3, 128, 64), (30, 2, 256, 64)]


@pytest.mark.parametrize(("batch", "heads_k", "d", "rows_k"), GRIDS)
def test_the_launchers_grid_is_the_models(serving: OnHost, batch: int, heads_k: int, d: int, rows_k: int) -> None:
    grid = decode_ranges.grid_of(1 if d > 128 else 2, d, MULTIPROCESSORS, heads_k, batch, rows_k)
    x, y, z, cluster, *_ = launch_of(serving, batch, heads_k, d, rows_k, deterministic=True)
    groups = heads_k // grid.heads_of_block
    assert (x, y, z) == ((grid.parts, groups, batch) if grid.in_clusters else (groups, grid.parts, 1))
    assert cluster == (decode_ranges.CLUSTER_PARTS if grid.in_clusters else 1)


@pytest.mark.parametrize("tile", [(64, 8), (64, 64), (128, 8), (128, 32), (128, 64), (256, 16), (256, 32)])
def test_a_launch_asks_for_the_models_room(double: OnHost, tile: tuple[int, int]) -> None:
    """It bounds what every shorter length needs, so that a captured graph has room for any."""
    d, rows = tile
    streams = Tile(d, rows).streams
    shared_levels = {(64, 8): 7, (64, 64): 0, (128, 8): 3, (128, 32): 0, (128, 64): 0, (256, 16): 3, (256, 32): 1}[tile]
    handle = double.handles[torch.bfloat16, d, rows, False]
    for heads_k in (1, 2, 4, 8):
        for batch in (1, 7, 64, 300):
            for rows_k in (0, 100, 8192, 8193, 131_072):
                grid: Grid = decode_ranges.grid_of(streams, d, MULTIPROCESSORS - 5, heads_k, batch, rows_k, rows)
                log2 = decode_ranges.Ranges.of(d, heads_k).log2_of(rows_k)
                halves = streams == 2 and grid.heads_of_block == 1 and not grid.in_clusters
                kept = max(0, log2 - halves - shared_levels)
                per_head = decode_ranges.partials_of_head(grid.parts, batch, 1 << log2, halves, kept)
                expected = per_head * heads_k * (rows * (d + 2) + 4)
                assert double.partial_floats(handle, 0, heads_k, batch, rows_k, 5, True) == expected


def test_results_are_kept_in_shared_memory_where_there_is_room(serving: OnHost) -> None:
    for d in kernels.DECODE_HEAD_DIMS:
        *_, shared = launch_of(serving, 1, 2, d, 64, deterministic=False)
        assert shared <= MOST_SHARED


DETERMINISTIC = Features("bf16", "bf16", 128, 128, 4, cache=True, aligned=True, split=True, deterministic=True)


def test_who_serves_such_a_call() -> None:
    assert isinstance(hopper.decide(Target("cuda", "sm_90a"), DETERMINISTIC), Accepted)
    assert isinstance(portable.decide(Target("cuda", "sm_80"), DETERMINISTIC), Accepted)
    reason = rules.rejection((0, 2, 2), DETERMINISTIC)
    assert reason is not None and reason.startswith("deterministic")

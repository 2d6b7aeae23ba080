"""Numbers and orders that the Hopper kernels' Python and C++ both hold."""

from __future__ import annotations

import re

import pytest

from jit_kernel import config
from jit_kernel.engine import triton_compiler
from jit_kernel.fa3.hopper import kernels as hopper_kernels
from jit_kernel.fa3.hopper import mla
from tests.support import shared_numbers

LAUNCH = shared_numbers.HOPPER / "launch"
HOST = config.package_dir() / "fa3" / "hopper"
# Names that the host side has for what the launcher calls otherwise.
SAME = {"result": "out", "only_known": "if_aligned", "offsets": "cu_seqlens_q", "attention_chunk": "chunk"}
SAME |= {"scale": "softmax_scale", "splits": "num_splits"}
OF_APPEND = {"k": "k_cache", "v": "v_cache", "cos": "rotary_cos", "seqused_k": "cache_seqlens"}
OF_APPEND |= {"rotary_interleaved": "interleaved"}


def test_the_head_sizes_are_the_tables() -> None:
    rows = shared_numbers.tile_rows()
    assert [(row.head_dim, row.head_dim_v) for row in rows if row.masked] == list(hopper_kernels.HEAD_DIMS)
    assert len(rows) == 2 * len(hopper_kernels.HEAD_DIMS)


def test_the_head_sizes_of_e4m3_are_the_tables() -> None:
    rows = shared_numbers.fp8_tile_rows()
    assert tuple(row.head_dim for row in rows if row.masked and not row.prepared) == hopper_kernels.FP8_HEAD_DIMS
    assert tuple(row.head_dim for row in rows if row.masked and row.prepared) == hopper_kernels.PREPARED_HEAD_DIMS
    inside = {(row.head_dim, row.masked): (row.keys, row.part_columns) for row in rows if not row.prepared}
    for row in rows:
        assert inside[row.head_dim, row.masked] == (row.keys, row.part_columns), "the same bits"
        assert row.prepared == (row.stages_loaded == 0)
    text = (shared_numbers.INCLUDE / "wgmma.cuh").read_text(encoding="utf-8")
    defined = {int(n) for n in re.findall(r"^JIT_KERNEL_WGMMA_E4M3\((\d+)", text, re.M)}
    assert defined == {row.keys for row in rows} | {row.part_columns for row in rows}


def test_both_sides_have_the_block_of_prepared_keys() -> None:
    path = shared_numbers.HOPPER / "prefill" / "fp8_params.h"
    assert int(shared_numbers.constant(path, "kPreparedKeys")) == hopper_kernels.PREPARED_KEYS


def test_nothing_else_lists_the_head_sizes() -> None:
    """The launcher and the kernels take them from the table."""
    for path in (LAUNCH / "prefill_launch.h", shared_numbers.HOPPER / "prefill" / "tile_size.h"):
        text = path.read_text(encoding="utf-8")
        assert text.count("prefill/tile_table.inc") == text.count("prefill/fp8_tile_table.inc") == 1
        assert not re.search(r"<\d+, \d+, (true|false|kMasked)>", text)


def test_the_wgmma_shapes_are_those_that_the_tiles_use() -> None:
    text = (shared_numbers.INCLUDE / "wgmma.cuh").read_text(encoding="utf-8")
    defined = {
        kind: {int(n) for n in re.findall(rf"^JIT_KERNEL_WGMMA_{kind}\((\d+)", text, re.M)} for kind in ("SS", "RS")
    }
    rows = shared_numbers.tile_rows()
    # Where all queries of prefill lie in registers it is named, never run; in decode the rows are the columns.
    # Of MLA half of the values' columns are one product's, or the rows.
    halves = {size // 2 for size in hopper_kernels.MLA_HEAD_DIMS_V}
    few = {*hopper_kernels.DECODE_ROWS, *hopper_kernels.MLA_ROWS}
    assert defined["SS"] == {row.keys for row in rows} | few | halves
    # Keys and values of an e4m3 cache are converted in registers: there the rows are the columns, too.
    in_registers = {row.keys for row in rows if row.query_steps} | {*hopper_kernels.DECODE_ROWS}
    assert defined["RS"] == in_registers | {row.head_dim_v for row in rows}


def test_the_decode_kernels_are_the_tables() -> None:
    text = (shared_numbers.HOPPER / "decode" / "config.h").read_text(encoding="utf-8")
    tiles = [(int(d), int(rows)) for d, rows in re.findall(r"TILE\((\d+), (\d+)\)", text)]
    most = hopper_kernels.DECODE_MOST_ROWS
    sizes = [(d, rows) for d in hopper_kernels.DECODE_HEAD_DIMS for rows in hopper_kernels.DECODE_ROWS]
    assert tiles == [(d, rows) for d, rows in sizes if rows <= most[d]]


def test_the_mla_kernels_are_the_tables() -> None:
    text = (shared_numbers.HOPPER / "mla" / "config.h").read_text(encoding="utf-8")
    tiles = [(int(d), int(rows)) for d, rows in re.findall(r"TILE\((\d+), (\d+)\)", text)]
    assert tiles == [(d, rows) for d in hopper_kernels.MLA_HEAD_DIMS_V for rows in hopper_kernels.MLA_ROWS]
    assert shared_numbers.constant(shared_numbers.HOPPER / "mla" / "config.h", "kMlaTileRows") == str(mla.TILE_ROWS)


def test_a_block_has_the_shared_memory_that_the_architecture_has() -> None:
    for family in ("prefill", "decode"):
        text = (shared_numbers.HOPPER / family / "config.h").read_text(encoding="utf-8")
        found = re.search(r"(?:kSharedBytes <=|kMostSharedBytes =) (\d+) \* 1024", text)
        assert found
        assert int(found[1]) * 1024 == triton_compiler.shared_limit("sm_90a")


@pytest.mark.parametrize(
    ("host", "launch", "function"),
    [
        ("prefill.py", "prefill_launch.h", "forward"),
        ("prefill.py", "fp8_launch.h", "forward_fp8"),
        ("cached.py", "cached_launch.h", "forward_cached"),
        ("widened.py", "widened_launch.h", "forward_widened"),
        ("decode.py", "decode_launch.h", "decode"),
        ("mla.py", "mla_launch.h", "mla"),
        ("append.py", "append_launch.h", "append"),
    ],
)
def test_the_host_passes_what_the_launcher_takes_in_its_order(host: str, launch: str, function: str) -> None:
    taken = shared_numbers.parameters(LAUNCH / launch, function)
    same = SAME | (OF_APPEND if function == "append" else {})
    passed = [same.get(str(given), given) for given in shared_numbers.arguments(HOST / host, function)]
    assert passed == taken


def test_the_exported_elements_are_the_dtypes() -> None:
    text = (shared_numbers.INCLUDE / "element_types.h").read_text(encoding="utf-8")
    assert tuple(re.findall(r"^struct (\w+) \{\};", text, re.M)) == (*hopper_kernels.DTYPES, "e4m3")

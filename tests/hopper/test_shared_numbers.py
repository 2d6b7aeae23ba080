"""Numbers and orders that the Hopper kernels' Python and C++ both hold."""

from __future__ import annotations

import re

import pytest

from jit_kernel import config
from jit_kernel.engine import triton_compiler
from jit_kernel.fa3.hopper import kernels as hopper_kernels
from tests.support import shared_numbers

LAUNCH = shared_numbers.HOPPER / "launch"
HOST = config.package_dir() / "fa3" / "hopper"
# Names that the host side has for what the launcher calls otherwise.
SAME = {"result": "out", "only_known": "if_aligned", "offsets": "cu_seqlens_q"}
SAME |= {"fresh": "seqlen_k_new", "attention_chunk": "chunk"}


def test_the_head_sizes_are_the_tables() -> None:
    rows = shared_numbers.tile_rows()
    assert [(row.head_dim, row.head_dim_v) for row in rows if row.masked] == list(hopper_kernels.HEAD_DIMS)
    assert len(rows) == 2 * len(hopper_kernels.HEAD_DIMS)


def test_nothing_else_lists_the_head_sizes() -> None:
    """The launcher and the kernels take them from the table."""
    for path in (LAUNCH / "prefill_launch.h", shared_numbers.HOPPER / "prefill" / "tile_size.h"):
        text = path.read_text(encoding="utf-8")
        assert text.count("prefill/tile_table.inc") == 1
        assert not re.search(r"<\d+, \d+, (true|false|kMasked)>", text)


def test_the_wgmma_shapes_are_those_that_the_tiles_use() -> None:
    text = (shared_numbers.INCLUDE / "wgmma.cuh").read_text(encoding="utf-8")
    defined = {
        kind: {int(n) for n in re.findall(rf"^JIT_KERNEL_WGMMA_{kind}\((\d+)", text, re.M)} for kind in ("SS", "RS")
    }
    rows = shared_numbers.tile_rows()
    assert defined["SS"] == {row.keys for row in rows}  # where all queries lie in registers it is named, never run
    assert defined["RS"] == {row.keys for row in rows if row.query_steps} | {row.head_dim_v for row in rows}


def test_a_block_has_the_shared_memory_that_the_architecture_has() -> None:
    text = (shared_numbers.HOPPER / "prefill" / "config.h").read_text(encoding="utf-8")
    found = re.search(r"kSharedBytes <= (\d+) \* 1024", text)
    assert found
    assert int(found[1]) * 1024 == triton_compiler.shared_limit("sm_90a")


@pytest.mark.parametrize(
    ("host", "launch", "function"),
    [("__init__.py", "prefill_launch.h", "forward"), ("cached.py", "cached_launch.h", "forward_cached")],
)
def test_the_host_passes_what_the_launcher_takes_in_its_order(host: str, launch: str, function: str) -> None:
    taken = shared_numbers.parameters(LAUNCH / launch, function)
    passed = shared_numbers.arguments(HOST / host, function)
    assert len(passed) == len(taken)
    named = [(SAME.get(given, given), wanted) for given, wanted in zip(passed, taken, strict=True) if given is not None]
    assert len(named) >= len(taken) - 2  # of which one is computed where it is passed
    assert [given for given, _ in named] == [wanted for _, wanted in named]


def test_the_exported_elements_are_the_dtypes() -> None:
    text = (shared_numbers.INCLUDE / "element.cuh").read_text(encoding="utf-8")
    assert tuple(re.findall(r"^struct (\w+) \{\};", text, re.M)) == hopper_kernels.DTYPES

"""Numbers and orders that the portable kernels' Python host side, Triton sources and launcher all hold."""

from __future__ import annotations

import importlib
import re
import sys

import pytest

from jit_kernel import config
from jit_kernel.engine import triton_process
from jit_kernel.fa3.portable import kernels as portable_kernels
from tests.support import shared_numbers

pytest.importorskip("triton")

FOLDER = config.package_dir() / "fa3" / "portable"
PACKED = shared_numbers.INCLUDE / "packed_arguments.h"


def signature(name: str) -> dict[str, str]:
    """SIGNATURE of one of the kernels' Triton sources."""
    sources = str(config.kernel_sources_dir())
    if sources not in sys.path:
        sys.path.append(sources)
    found: dict[str, str] = importlib.import_module(f"flash_attention_v3.portable.{name}").SIGNATURE
    return found


def test_the_flag_bits_are_the_same_on_both_sides() -> None:
    host = shared_numbers.python_bits(FOLDER / "planning.py")
    kernel = shared_numbers.python_bits(shared_numbers.PORTABLE / "sequence.py")
    assert host == {name.removeprefix("HAS_"): bit for name, bit in kernel.items()}
    assert sorted(host.values()) == [1 << i for i in range(21)]


@pytest.mark.parametrize("name", ["forward", "combine", "append"])
def test_the_launcher_takes_the_kernels_arguments(name: str) -> None:
    most = int(shared_numbers.constant(PACKED, "kMaxArguments"))
    assert 0 < len(signature(name)) <= most


def test_the_launchers_letters_are_the_compilers() -> None:
    table = (shared_numbers.INCLUDE / "entry_table.cuh").read_text(encoding="utf-8")
    values = set(re.findall(r"JIT_KERNEL_VALUE\([\w ]+, '(.)'\)", table))
    assert set(triton_process._TYPE_LETTERS.values()) == values
    elements = set(re.findall(r"JIT_KERNEL_LETTER\([\w ]+, '(.)'\)", table))
    assert set(triton_process._ELEMENT_LETTERS.values()) == elements
    assert set(re.findall(r"case '(.)':\s+return is\(", PACKED.read_text(encoding="utf-8"))) == elements
    kinds = {kind for name in ("forward", "combine", "append") for kind in signature(name).values()}
    assert {kind for kind in kinds if not kind.startswith("*")} < set(triton_process._TYPE_LETTERS)


def test_blocks_of_keys_and_rows_are_what_the_host_counts_with() -> None:
    """A tile's constants come from the numbers that the host side divides by."""
    append = portable_kernels.append_spec("bf16", 64, 64, True)
    assert f'"BLOCK_M": {portable_kernels.APPEND_ROWS},' in append.unit
    for splits in portable_kernels.COMBINE_SPLITS:
        combine = portable_kernels.combine_spec("fp32", "bf16", 64, True, splits)
        assert f'"BLOCK_SPLITS": {splits},' in combine.unit
        assert f'"BLOCK_M": {portable_kernels.combine_rows(64, splits)},' in combine.unit

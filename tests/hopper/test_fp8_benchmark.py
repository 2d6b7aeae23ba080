"""The lines of the e4m3 prefill benchmark, without a GPU."""

from __future__ import annotations

import sys

import pytest

from jit_kernel import config
from jit_kernel.fa3.hopper import prefill

sys.path.append(str(config.package_dir().parent / "benchmarks"))

import hopper_fp8
from hopper_fp8 import CELLS


def test_every_goal_has_its_cell() -> None:
    asked = {cell.goal: cell.asked for cell in CELLS if cell.goal}
    names = {"fp8 16k": 1000, "fp8 16k causal": 900, "fp8 4k": 860, "fp8 4k causal": 780, "fp8 d 256": 1100}
    assert asked == names
    assert len({(cell.head_dim, cell.length, cell.causal) for cell in CELLS}) == len(CELLS)


@pytest.mark.parametrize("cell", CELLS[:2], ids=str)
def test_a_line_has_the_median_in_its_own_operations(cell: hopper_fp8.Cell) -> None:
    """16,384 tokens of 2,048 columns: 2.199e12 operations, half of them behind a causal mask; the product 1.0995e12."""
    times = {"cudnn": [4.0, 4.0, 4.0], "ours": [2.0, 4.0, 1.0], "product": [1.0, 1.0, 1.0]}
    line = hopper_fp8.line_of_cell(cell, times)
    share = 0.5 if cell.causal else 1.0
    assert line["ours_tflops"] == pytest.approx(1099.5 * share, abs=0.1)
    assert line["ours_range"] == pytest.approx([549.8 * share, 2199.0 * share], abs=0.1)
    assert line["product_tflops"] == pytest.approx(1099.5, abs=0.1)
    assert line["over_product"] == pytest.approx(share, abs=1e-3)
    assert line["over_cudnn"] == pytest.approx(2, abs=1e-3)
    assert (line["goal"], line["value"], line["asked"]) == (cell.goal, line["ours_tflops"], cell.asked)


def test_the_kernel_that_transposes_inside_stands_beside_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"cudnn": [4.0], "ours": [2.0], "product": [1.0], "inside": [2.5]}
    line = hopper_fp8.line_of_cell(CELLS[4], times)
    assert line["ours_tflops"] == pytest.approx(1.25 * line["inside_tflops"], abs=0.1)
    monkeypatch.setattr(prefill, "prepares", lambda call: True)
    assert hopper_fp8.transposed_inside(lambda: prefill.prepares(None))() is False
    assert prefill.prepares(None) is True


def test_a_cell_without_a_goal_says_none() -> None:
    line = hopper_fp8.line_of_cell(CELLS[-1], {"cudnn": [1.0], "ours": [1.0], "product": [1.0]})
    assert "goal" not in line and "value" not in line

"""Prefill in e4m3, a part of hopper_prefill.py: TFLOP/s beside cuDNN in bf16 and the product of two e4m3 matrices.

Where values are transposed by a kernel before, the attention kernel that does it itself stands beside it ("inside").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from prefill_timing import HIDDEN, TOKENS, Line, compete, cudnn, dense, line_of

from jit_kernel.fa3.hopper import kernels, prefill
from jit_kernel.flash_attention_v3 import flash_attn_func

MOST_ROUNDS = 3
SPENT = 60  # milliseconds of a competitor in a round: ten cells of three take 10 s
MATRIX = 8192  # rows and columns of the yardstick's matrices


@dataclass(frozen=True)
class Cell:
    """A size; `goal` is the name under which its result is looked up later, `asked` the TFLOP/s asked for."""

    head_dim: int
    length: int
    causal: bool
    goal: str | None = None
    asked: int | None = None


CELLS = (
    Cell(128, 16384, False, "fp8 16k", 1000),
    Cell(128, 16384, True, "fp8 16k causal", 900),
    Cell(128, 4096, False, "fp8 4k", 860),
    Cell(128, 4096, True, "fp8 4k causal", 780),
    Cell(256, 16384, False, "fp8 d 256", 1100),
    Cell(256, 16384, True),
    Cell(256, 4096, False),
    Cell(256, 4096, True),
    Cell(64, 16384, False),
    Cell(64, 16384, True),
)


def matrix_product() -> Callable[[], object]:
    """The product of two square matrices of e4m3, 2 * MATRIX**3 operations, with the fast sums of cuBLAS."""
    a, b = (torch.randn(MATRIX, MATRIX, device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device="cuda")
    return lambda: torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)


def transposed_inside(call: Callable[[], object]) -> Callable[[], object]:
    """The same call, whose values are transposed by the attention kernel."""

    def inside() -> object:
        chosen, prefill.prepares = prefill.prepares, lambda _: False
        try:
            return call()
        finally:
            prefill.prepares = chosen

    return inside


def line_of_cell(cell: Cell, times: dict[str, list[float]]) -> Line:
    """A cell's result: the product stands beside it in its own operations."""
    operations = 4 * TOKENS * cell.length * HIDDEN * (0.5 if cell.causal else 1)
    case = {"case": "prefill fp8", "head_dim": cell.head_dim, "length": cell.length, "causal": cell.causal}
    line = line_of(case, operations, {name: times[name] for name in ("cudnn", "ours", "inside") if name in times})
    line |= line_of({}, 2.0 * MATRIX**3, {"product": times["product"]})
    line["over_product"] = round(line["ours_tflops"] / line["product_tflops"], 4)
    if cell.goal is not None:
        line |= {"goal": cell.goal, "value": line["ours_tflops"], "asked": cell.asked}
    return line


def measure(rounds: int) -> Iterator[Line]:
    """A line for each cell, as it is measured."""
    product = matrix_product()
    for cell in CELLS:
        q, k, v = dense(cell.head_dim, cell.length, torch.bfloat16)
        x, y, z = (each.to(torch.float8_e4m3fn) for each in (q, k, v))
        ours = lambda x=x, y=y, z=z, cell=cell: flash_attn_func(x, y, z, causal=cell.causal)  # noqa: E731
        competitors = {"cudnn": cudnn(q, k, v, cell.causal), "ours": ours, "product": product}
        if cell.head_dim in kernels.PREPARED_HEAD_DIMS:
            competitors["inside"] = transposed_inside(ours)
        times = compete(competitors, rounds, SPENT)
        yield line_of_cell(cell, times)

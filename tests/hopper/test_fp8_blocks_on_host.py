"""The e4m3 prefill kernels' loops over blocks of keys and their softmax, compiled for the CPU, against float64.

Neither the tensor cores nor the copy engine are there: the order of work is, what each lane keeps, and which product
each wait is for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from jit_kernel import device, jit
from jit_kernel.engine import compiler
from jit_kernel.fa3.hopper import kernels

HEADER = Path(__file__).parents[1] / "support" / "fp8_on_host.h"
BLOCK = 128  # keys of the largest block


@pytest.fixture(scope="module")
def run() -> Callable[..., bytes]:
    try:
        compiler.require("host")
    except compiler.CompilerNotFoundError as error:
        pytest.skip(str(error))
    unit = HEADER.read_text(encoding="utf-8")
    spec = jit.KernelSpec(kernels.FOLDER, unit, "host", (("function", "fp8_on_host"),))
    return jit.load(spec, device.cpu_target())["run"]


# First key of a row, keys, spread of scores, growth of them from key to key towards the first one, which comes last:
# references rise; scale as an exponent of 2, and whether scores are changed before they are masked.
CASES = [
    (0, 9, 1.0, 0.0, 1.4, False),
    (0, 128, 1.0, 0.0, 1.4, False),
    (40, 129, 4.0, 0.05, 1.4, False),
    (0, 700, 1.0, 0.0, 1.4, False),
    (300, 700, 4.0, 0.05, 1.4, False),
    (40, 640, 3.0, 0.0, 1.0, True),
    (0, 700, 1e7, 0.0, 1.0, False),  # exponents above 2^20: rows are far, and become so late in the next
    (0, 700, 1.0, 4e6, 0.25, False),
    (40, 700, 1.0, 0.05, 1e6, False),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("d", kernels.FP8_HEAD_DIMS)
def test_blocks_make_the_softmax_of_all_keys(
    d: int, case: tuple[int, int, float, float, float, bool], run: Callable[..., bytes]
) -> None:
    low, keys, spread, growth, scale, changes = case
    dice = torch.Generator().manual_seed(keys + d)
    held = -(-keys // BLOCK) * BLOCK
    scores = torch.randn(16, held, generator=dice) * spread + growth * torch.arange(held - 1, -1, -1)
    values = torch.randn(held, d, generator=dice) + 0.5
    values[keys:] = 0
    answer = run(scores.numpy().tobytes(), values.numpy().tobytes(), d, low, keys, scale, changes)
    found = torch.frombuffer(bytearray(answer), dtype=torch.float32).reshape(16, d + 1).double()

    logits = scores.double()[:, :keys] * (scale * math.log(2) * (0.5 if changes else 1))
    hidden = torch.arange(keys) < low + torch.arange(16)[:, None] % 8
    logits = logits.masked_fill(hidden, -math.inf)
    expected = logits.softmax(1) @ values[:keys].double()
    lse = logits.logsumexp(1)
    # Probabilities are rounded to e4m3, some 2 % each; a block too much or too little is 10 times that.
    assert (found[:, :d] - expected).norm() <= 0.02 * expected.norm()
    assert ((found[:, d] - lse).abs() <= 1e-5 + 1e-6 * lse.abs()).all()

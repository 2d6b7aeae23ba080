"""Ragged gradients on CUDA where rows belong to no sequence, by a stand-in for its operator that any machine has.

`aten::_flash_attention_backward` makes its results without a value in them and writes the rows of sequences alone. The
stand-in, registered for the CPU, does so, with NaN where nothing is written.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from jit_kernel import flash_attn_varlen_func
from jit_kernel.fa3.gradients import cpu, cuda
from tests.support import gradients

LENGTHS = {
    "rows behind both sides": ((5, 0, 9), (8, 3, 9)),
    "queries alone behind": ((5, 2), (8, 16)),
    "keys alone behind": ((10, 9), (8, 3)),
    "no rows behind": ((10, 9), (8, 16)),
    "nothing in any sequence": ((0, 0), (0, 0)),
}
ROWS_Q, ROWS_K = 19, 24
SCALE = 0.2


def _operator(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts_q: Tensor, starts_k: Tensor,
    longest_q: int, longest_k: int, *_: Any, scale: float, window_size_left: int, window_size_right: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    for starts, longest in ((starts_q, longest_q), (starts_k, longest_k)):
        assert starts.dtype == torch.int32 and starts.is_contiguous()
        assert 0 < int(starts.diff().max()) <= longest
    tensors, offsets = (grad_out, out, q, k, v), (starts_q, starts_k)
    grads = cpu.ragged(tensors, lse, offsets, scale, window_size_left, window_size_right)
    for grad, starts in zip(grads, (starts_q, starts_k, starts_k), strict=True):
        grad[int(starts[-1]) :] = math.nan
    return grads


@pytest.fixture
def stand_in() -> Iterator[None]:
    library: Any = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_backward", _operator, "CPU")
    yield
    library._destroy()


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("form", ["int32", "int64", "every second"])
def test_rows_of_no_sequence_have_no_gradient(name: str, form: str) -> None:
    torch.manual_seed(0)
    q, k, v, g = (each[0] for each in gradients.Shape(ROWS_Q, ROWS_K, batch=1).tensors(torch.float32))
    starts = [torch.tensor([0, *itertools.accumulate(each)], dtype=torch.int32) for each in LENGTHS[name]]
    longest = max(LENGTHS[name][0]), max(LENGTHS[name][1])
    settings: dict[str, Any] = {"softmax_scale": SCALE, "causal": True, "return_softmax_lse": True}
    out, lse = flash_attn_varlen_func(q, k, v, *starts, *longest, **settings)
    tensors = g, out, q, k, v
    lse = lse.masked_fill(lse == -math.inf, math.inf)
    expected = cpu.ragged(tensors, lse, (starts[0], starts[1]), SCALE, -1, 0)
    given = [each.long() if form == "int64" else each for each in starts]
    if form == "every second":
        given = [each.repeat_interleave(2)[::2] for each in given]
    found = cuda.flash(tensors, lse, (given[0], given[1]), longest, SCALE, -1, 0)
    for ours, ref, each in zip(found, expected, (starts[0], starts[1], starts[1]), strict=True):
        assert torch.equal(ours, ref)
        assert not ours[int(each[-1]) :].any()


@pytest.mark.parametrize(("starts", "longest"), [([0], (19, 24)), ([0, 0], (0, 24)), ([0, 0], (19, 0))])
def test_what_the_operator_does_not_take_has_no_gradient(starts: list[int], longest: tuple[int, int]) -> None:
    """No sequence, or none with queries or keys: without the operator, which has no kernel here."""
    q, k, v, g = (each[0] for each in gradients.Shape(ROWS_Q, ROWS_K, batch=1).tensors(torch.float32))
    lse = torch.zeros(4, ROWS_Q)
    offsets = torch.tensor(starts, dtype=torch.int32)
    found = cuda.flash((g, g, q, k, v), lse, (offsets, offsets), longest, SCALE, -1, 0)
    for grad, of in zip(found, (q, k, v), strict=True):
        assert grad.shape == of.shape and not grad.any()

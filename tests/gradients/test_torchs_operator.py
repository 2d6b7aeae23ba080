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
from jit_kernel.fa3.cpu import backward as cpu
from jit_kernel.fa3.decision import Accepted, Rejected
from jit_kernel.fa3.gradients import cuda
from jit_kernel.fa3.gradients.call import Backward
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
    sequences = Backward(
        grad_out, q, k, v, out, lse, scale, window_size_left, window_size_right, cu_seqlens_q=starts_q,
        cu_seqlens_k=starts_k,
    )  # fmt: skip
    grads = cpu.gradients(sequences)[:3]
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

    def call(starts_q: Tensor, starts_k: Tensor) -> Backward:
        return Backward(
            g, q, k, v, out, lse, SCALE, -1, 0, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k, max_seqlen_q=longest[0],
            max_seqlen_k=longest[1],
        )  # fmt: skip

    expected = cpu.gradients(call(starts[0], starts[1]))
    given = [each.long() if form == "int64" else each for each in starts]
    if form == "every second":
        given = [each.repeat_interleave(2)[::2] for each in given]
    found = cuda.gradients(call(given[0], given[1]))
    for ours, ref, each in zip(found[:3], expected[:3], (starts[0], starts[1], starts[1]), strict=True):
        assert torch.equal(ours, ref)
        assert not ours[int(each[-1]) :].any()


@pytest.mark.parametrize(("starts", "longest"), [([0], (19, 24)), ([0, 0], (0, 24)), ([0, 0], (19, 0))])
def test_what_the_operator_does_not_take_has_no_gradient(starts: list[int], longest: tuple[int, int]) -> None:
    """No sequence, or none with queries or keys: without the operator, which has no kernel here."""
    q, k, v, g = (each[0] for each in gradients.Shape(ROWS_Q, ROWS_K, batch=1).tensors(torch.float32))
    lse = torch.zeros(4, ROWS_Q)
    offsets = torch.tensor(starts, dtype=torch.int32)
    call = Backward(g, q, k, v, g, lse, SCALE, -1, 0, cu_seqlens_q=offsets, cu_seqlens_k=offsets)
    call.max_seqlen_q, call.max_seqlen_k = longest
    found = cuda.gradients(call)
    for grad, of in zip(found[:3], (q, k, v), strict=True):
        assert grad.shape == of.shape and not grad.any()


LACKING = {
    "grad_lse": torch.zeros(1), "attention_chunk": 3, "softcap": 1.0, "sinks": torch.zeros(4), "deterministic": True,
    "seqused_q": torch.zeros(2, dtype=torch.int32), "seqused_k": torch.zeros(2, dtype=torch.int32),
}  # fmt: skip


@pytest.mark.parametrize("name", LACKING)
def test_what_the_operator_lacks_is_refused_by_name(name: str) -> None:
    half = torch.zeros(2, 3, 4, 8, dtype=torch.bfloat16)
    call = Backward(half, half, half, half, half, torch.zeros(2, 4, 3), 1.0, -1, -1)
    assert isinstance(cuda.decide(call), Accepted)
    setattr(call, name, LACKING[name])
    decision = cuda.decide(call)
    assert isinstance(decision, Rejected) and decision.reason.startswith(name)

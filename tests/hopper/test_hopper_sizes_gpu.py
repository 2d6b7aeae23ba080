"""The Hopper kernels at the ends of the argument space: long sequences, far offsets, many sequences, chunks."""

from __future__ import annotations

import pytest
import torch

import jit_kernel.flash_attention_v3 as fa3
from jit_kernel import device
from tests.support import reference
from tests.support.hopper_inputs import poisoned, randn, starts

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _hopper_only() -> None:
    if device.get_device_capability() != (9, 0):
        pytest.skip("the kernels are for compute capability 9.0")


def rows_agree(
    out: torch.Tensor, lse: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, at: int
) -> None:
    """The query row `at` of one head against float64 over all its keys, causal."""
    scores = (k[: at + 1].double() @ q[at].double()) * q.shape[-1] ** -0.5
    expected = scores.softmax(0) @ v[: at + 1].double()
    error = (out[at].double() - expected).norm() / expected.norm()
    assert error < 2**-7, (at, float(error))
    assert abs(float(lse[at]) - float(scores.logsumexp(0))) < 1e-3


def test_a_sequence_of_131072_tokens_between_short_ones() -> None:
    torch.manual_seed(3)
    lengths = [0, 1, 131072, 5]
    q, k, v = (randn(sum(lengths), 1, 128) for _ in range(3))
    cu = starts(lengths)
    out, lse = fa3.flash_attn_varlen_func(q, k, v, cu, cu, causal=True, return_softmax_lse=True)
    assert bool(out.isfinite().all())
    assert torch.equal(out[0], v[0])
    for at in (0, 1, 127, 128, 65535, 100001, 131071):
        rows_agree(out[1:, 0], lse[0, 1:], q[1:, 0], k[1:, 0], v[1:, 0], at)


def test_offsets_beyond_two_to_the_31_elements() -> None:
    torch.manual_seed(4)
    lengths = [132_000, 300]  # 128 heads of 128: the second sequence starts behind 2**31 elements
    total = sum(lengths)
    q, k, v = (torch.empty(total, 128, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    for x in (q, k, v):
        x[-300:].normal_()
        x[:-300].zero_()
    cu = starts(lengths)
    used = torch.tensor([1, 300], device="cuda", dtype=torch.int32)
    out = poisoned(total, 128, 128)
    _, lse = fa3.flash_attn_varlen_func(
        q, k, v, cu, cu, seqused_q=used, seqused_k=used, causal=True, out=out, return_softmax_lse=True
    )
    tail = slice(total - 300, total)
    for head in (0, 127):
        for at in (0, 150, 299):
            rows_agree(out[tail, head], lse[head, tail], q[tail, head], k[tail, head], v[tail, head], at)
    assert bool(out[1 : total - 300 : 997].isnan().all())  # rows past seqused_q stay as they were


def test_strided_tensors_and_a_batch_of_more_sequences_than_are_sorted() -> None:
    torch.manual_seed(5)
    count = 1500
    lengths = torch.randint(0, 40, (count,)).tolist()
    packed = randn(sum(lengths), 8, 3 * 64)
    q, k, v = packed.split(64, dim=-1)
    cu = starts(lengths)
    out = fa3.flash_attn_varlen_func(q, k, v, cu, cu, causal=True)
    for i in (0, 1, 700, 1498, 1499):
        rows = slice(int(cu[i]), int(cu[i + 1]))
        alone = fa3.flash_attn_func(q[None, rows], k[None, rows], v[None, rows], causal=True)
        assert torch.equal(alone[0], out[rows])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_rows_of_one_tile_that_see_far_apart_keys_or_none(d: int, causal: bool) -> None:
    """A chunk's edge inside a tile: warpgroups skip keys, never more than the rings let through."""
    torch.manual_seed(8)
    for length, chunk in ((1500, 700), (1337, 1000), (900, 64), (2000, 333), (257, 129)):
        q, k, v = (randn(1, length, 2, d) for _ in range(3))
        out, lse = fa3.flash_attn_func(q, k, v, causal=causal, attention_chunk=chunk, return_softmax_lse=True)
        problem = reference.Problem([reference.Sequence(q[0], k[0], v[0])], causal=causal, attention_chunk=chunk)
        assert reference.check([out[0]], [lse[0]], problem).worst <= 1

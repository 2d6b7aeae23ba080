"""The portable backward kernels on an NVIDIA GPU: random cases against float64, captured calls, far offsets."""

from __future__ import annotations

import math
import os

import pytest
import torch
from torch import Tensor

from jit_kernel.fa3.gradients.call import Backward
from jit_kernel.fa3.portable import backward
from tests.support import portable_backward as cases

pytestmark = pytest.mark.gpu
CASES = int(os.environ.get("JIT_KERNEL_TEST_CASES", "100"))
SIZES = ((64, 64), (128, 128), (192, 128), (256, 256), (40, 24))


def test_random_cases(say: list[str]) -> None:
    """Every row within the rule; 0 in rows of no sequence, whose inputs are NaN; each fifth twice, bit for bit."""
    space = cases.Space((torch.bfloat16, torch.float16), SIZES, 300, "cuda")
    shares = []
    for seed in range(CASES):
        call = cases.draw(seed, space)
        found = backward.gradients(call)
        shares.append((cases.judge(call, found), seed))
        if seed % 5 == 0:
            cases.twice(call, found, backward.gradients(call))
    assert max(shares)[0] <= 1, sorted(shares)[-5:]
    say.append(
        f"portable backward on {torch.cuda.get_device_name()}: {CASES} cases, worst share and seed {max(shares)}"
    )


def plain(q: Tensor, k: Tensor, v: Tensor, seed: int) -> Backward:
    """A causal backward pass of (b, s, h, d) with out and lse in float32."""
    torch.manual_seed(seed)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) / math.sqrt(q.shape[-1])
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    scores = scores.masked_fill(hidden, -math.inf)
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.float()).to(q.dtype)
    lse = scores.logsumexp(-1)
    return Backward(torch.randn_like(out), q, k, v, out, lse, 1 / math.sqrt(q.shape[-1]), -1, 0)


def test_a_captured_call_replays_on_new_values() -> None:
    q, k, v = (torch.randn(2, 200, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    call = plain(q, k, v, 0)
    eager = backward.gradients(call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = backward.gradients(call)
    graph.replay()
    cases.twice(call, captured, eager)
    call.grad_out.normal_()
    graph.replay()
    cases.twice(call, captured, backward.gradients(call))
    assert not torch.equal(captured.v, eager.v)


def test_offsets_past_two_to_the_31st() -> None:
    """Tokens 2^31 elements apart give the bits that they give side by side."""
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free memory")
    heads, d, rows = 2, 64, 2**31 // 128 + 300
    starts = torch.tensor([0, rows - 150, rows], dtype=torch.int32, device="cuda")
    used = torch.tensor([0, 150], dtype=torch.int32, device="cuda")
    far = [torch.empty(rows, heads, d, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    near = [torch.randn(1, 150, heads, d, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    for x, y in zip(far, near, strict=True):
        x[-150:] = y[0]
    call = plain(*near, 1)
    # Both sides of the first sequence are empty but for its memory: zeros are written over all of it.
    lse = torch.empty(heads, rows, device="cuda")
    lse[:, -150:] = call.lse[0]
    out, grad_out = torch.empty_like(far[0]), torch.empty_like(far[0])
    out[-150:], grad_out[-150:] = call.out[0], call.grad_out[0]
    ragged = Backward(
        grad_out, *far, out, lse, call.softmax_scale, -1, 0, cu_seqlens_q=starts, cu_seqlens_k=starts,
        seqused_q=used, seqused_k=used, max_seqlen_q=150, max_seqlen_k=150,
    )  # fmt: skip
    expected = backward.gradients(call)
    found = backward.gradients(ragged)
    for one, other in zip(found[:3], expected[:3], strict=True):
        assert torch.equal(one[-150:], other[0])
        assert not bool(one[:-150].any())

"""The Hopper backward kernels on the GPU that they are for: numbers, bits, memory that holds anything."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch

from jit_kernel import device
from jit_kernel.fa3.decision import Accepted
from jit_kernel.fa3.gradients.call import Backward, Gradients
from jit_kernel.fa3.hopper import backward
from tests.support import hopper_backward
from tests.support.hopper_backward import Made, Plan

pytestmark = pytest.mark.gpu

CASES = int(os.environ.get("JIT_KERNEL_TEST_CASES", "400"))
SIZES = (64, 128, 256)


@pytest.fixture(autouse=True)
def _hopper_only() -> None:
    if device.get_device_capability() != (9, 0):
        pytest.skip("the kernels are for compute capability 9.0")


def gradients(call: Backward) -> Gradients:
    assert backward.decide(call) == Accepted()
    return backward.gradients(call)


def same_bits(a: Gradients, b: Gradients) -> bool:
    """Of rows without a NaN in them, as there is none in a gradient that passes."""
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    return all(torch.equal(x, y) for x, y in pairs)


def one(d: int, length: int, **settings: object) -> Plan:
    """Two dense sequences of one length, four query heads."""
    lengths = (length, length)
    base = Plan(1, torch.bfloat16, d, d, 2, 2, lengths, lengths, lengths, lengths, False, False)
    return dataclasses.replace(base, **settings)  # type: ignore[arg-type]


def test_random_cases(say: list[str]) -> None:
    """Every feature, both dtypes, ragged and dense; what no row sees is NaN."""
    worst, worst_seed = 0.0, -1
    for seed in range(CASES):
        made = hopper_backward.make(hopper_backward.draw(seed))
        share = hopper_backward.worst_share(made, gradients(made.call))
        assert share <= 1, made.plan
        if share > worst:
            worst, worst_seed = share, seed
    say.append(f"hopper backward: {CASES} random cases, worst share {worst:.3f} (seed {worst_seed})")


@pytest.mark.parametrize("mask", [{"right": 0}, {}, {"left": 300, "right": 20}, {"chunk": 700, "right": 0}], ids=str)
@pytest.mark.parametrize("d", SIZES)
def test_sums_in_order_have_the_same_bits_from_run_to_run(d: int, mask: dict) -> None:
    made = hopper_backward.make(one(d, 2100, deterministic=True, **mask))
    found = gradients(made.call)
    assert hopper_backward.worst_share(made, found) <= 1
    assert all(same_bits(found, gradients(made.call)) for _ in range(10))


def test_ragged_sums_in_order_have_the_same_bits_and_end() -> None:
    """Many sequences of all lengths, more tiles of keys than multiprocessors."""
    lengths = tuple(torch.randint(0, 900, (60,), generator=torch.Generator().manual_seed(3)).tolist())
    plan = dataclasses.replace(
        one(128, 1), lengths_q=lengths, lengths_k=lengths[::-1], used_q=lengths, used_k=lengths[::-1], ragged=True,
        right=0, deterministic=True,
    )  # fmt: skip
    made = hopper_backward.make(plan)
    found = gradients(made.call)
    assert hopper_backward.worst_share(made, found) <= 1
    assert all(same_bits(found, gradients(made.call)) for _ in range(10))


@pytest.mark.parametrize("d", SIZES)
def test_gradients_of_keys_have_the_same_bits_without_order(d: int) -> None:
    """Each is summed by one block, query by query; only those of queries are sums of several blocks."""
    made = hopper_backward.make(one(d, 1000, right=0))
    first, second = gradients(made.call), gradients(made.call)
    assert torch.equal(first.k, second.k)
    assert torch.equal(first.v, second.v)


@pytest.mark.parametrize("d", SIZES)
def test_a_long_causal_call_agrees_with_torchs(d: int) -> None:
    """More tiles than blocks run at a time; the reference in float64 would take too much memory."""
    torch.manual_seed(2)
    q, k, v, grad = (torch.randn(1, 8192, 4, d, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    leaves = [x.transpose(1, 2).detach().requires_grad_() for x in (q, k, v)]
    attend = torch.ops.aten._scaled_dot_product_flash_attention
    out, lse = attend(*leaves, 0.0, True)[:2]
    theirs = torch.autograd.grad(out, leaves, grad.transpose(1, 2))
    call = Backward(grad, q, k, v, out.detach().transpose(1, 2), lse.detach(), d**-0.5, -1, 0)
    for in_order in (False, True):
        call.deterministic = in_order
        for ours, other in zip(gradients(call)[:3], theirs, strict=True):
            off = (ours.transpose(1, 2).float() - other.float()).norm() / other.float().norm()
            assert off < 0.008


def without_keys(made: Made) -> Backward:
    call = made.call
    empty = torch.zeros(call.k.shape[0], 0, *call.k.shape[2:], dtype=call.k.dtype, device="cuda")
    return dataclasses.replace(
        call, k=empty, v=empty.clone(), out=torch.zeros_like(call.out), grad_out=torch.ones_like(call.out),
        lse=torch.zeros_like(call.lse) + call.sinks[:, None],  # type: ignore[index]
    )  # fmt: skip


def test_without_a_key_only_the_sinks_have_gradients() -> None:
    """lse is the sink there, whatever the query, so that its gradient is the sum of lse's."""
    made = hopper_backward.make(one(64, 130, sinks=True, grad_lse=True))
    found = gradients(without_keys(made))
    assert not found.q.any()
    assert found.k.numel() == found.v.numel() == 0
    assert found.sinks is not None
    assert made.call.grad_lse is not None
    assert torch.allclose(found.sinks, made.call.grad_lse.sum((0, 2)), atol=1e-3)


def test_rows_anywhere_in_memory() -> None:
    """Strides, an address that is no multiple of 16 bytes, an expanded gradient: the bits that copies give."""
    made = hopper_backward.make(one(64, 200, right=0, deterministic=True))
    call = made.call
    wide = torch.randn(2, 200, 4, 200, device="cuda", dtype=torch.bfloat16)
    grad = torch.randn(2, 200, 1, 64, device="cuda", dtype=torch.bfloat16).expand(2, 200, 4, 64)
    odd = dataclasses.replace(
        call, q=wide[..., 3:67], grad_out=grad, v=call.v.transpose(0, 1).contiguous().transpose(0, 1)
    )
    even = dataclasses.replace(odd, q=odd.q.contiguous(), grad_out=grad.contiguous(), v=odd.v.contiguous())
    assert same_bits(gradients(odd), gradients(even))


def test_a_captured_pass_gives_the_same_bits() -> None:
    made = hopper_backward.make(one(128, 500, right=0, deterministic=True))
    expected = gradients(made.call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gradients(made.call)
    for _ in range(3):
        graph.replay()
        assert same_bits(found, expected)

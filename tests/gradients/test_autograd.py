"""Gradients of flash_attn_func and flash_attn_varlen_func against float64, beside torch's own in the same dtype."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from jit_kernel import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from tests.support import case_run, gradients
from tests.support.gradients import Shape

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no NVIDIA GPU")
ON_GPU = (pytest.mark.gpu, NO_GPU)
KINDS = [
    *(("cpu", dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
    *(pytest.param("cuda", dtype, marks=ON_GPU) for dtype in (torch.bfloat16, torch.float16)),
]
each_kind = pytest.mark.parametrize(("device", "dtype"), KINDS, ids=str)
each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])

SHAPES = {
    "all": Shape(33, 70),
    "causal": Shape(70, 70, causal=True),
    "causal, more keys": Shape(33, 90, causal=True),
    "causal, more queries": Shape(90, 33, causal=True),
    "decode": Shape(1, 90, causal=True, hq=8),
    "window": Shape(300, 400, hq=2, hk=1, window_size=(50, 20)),
    "causal window": Shape(300, 300, hq=2, hk=2, causal=True, window_size=(31, -1)),
    "left bound": Shape(40, 60, window_size=(7, -1)),
    "right bound": Shape(40, 60, window_size=(-1, 5)),
    "window, more queries": Shape(60, 40, window_size=(7, 3)),
    "wide values": Shape(30, 30, causal=True, d=16, dv=40),
    "narrow values": Shape(30, 30, causal=True, d=48, dv=32),
    "head size 128": Shape(130, 130, causal=True, d=128, dv=128),
}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    with case_run.one_thread():
        yield


def dense(shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = flash_attn_func(q, k, v, causal=shape.causal, window_size=shape.window_size)
    assert isinstance(out, Tensor)
    return out


def of(out: Tensor, inputs: tuple[Tensor, ...], grad_out: Tensor) -> gradients.Three:
    dq, dk, dv = torch.autograd.grad(out, inputs, grad_out)
    return dq, dk, dv


@each_kind
@pytest.mark.parametrize("name", SHAPES)
def test_dense(name, device, dtype):
    shape = SHAPES[name]
    q, k, v, g = shape.tensors(dtype, device)
    inputs = tuple(each.requires_grad_() for each in (q, k, v))
    found = of(dense(shape, *inputs), inputs, g)
    seen = shape.seen(device)
    exact = gradients.by_formula(q, k, v, g, seen)
    share = gradients.share_of_limit(found, gradients.by_torch(q, k, v, g, seen), exact)
    print(f"{name}: {share:.3f} of the limit")
    assert share <= 1


@each_kind
def test_ragged(device, dtype):
    """Sequence by sequence the dense gradients; rows past the last sequence have none."""
    lengths_q, lengths_k = (5, 0, 40, 17), (9, 3, 40, 6)
    offsets = [torch.tensor([0, *itertools.accumulate(each)], dtype=torch.int32, device=device)
               for each in (lengths_q, lengths_k)]  # fmt: skip
    q, k, v, g = replace(Shape(65, 60), batch=1).tensors(dtype, device)
    inputs = tuple(each[0].requires_grad_() for each in (q, k, v))
    out = flash_attn_varlen_func(*inputs, *offsets, 40, 40, causal=True)
    assert isinstance(out, Tensor)
    found = of(out, inputs, g[0])
    assert all(each.isfinite().all() for each in found)
    rows, keys = 0, 0
    for sq, sk in zip(lengths_q, lengths_k, strict=True):
        where = slice(rows, rows + sq), slice(keys, keys + sk)
        if sq:
            one = (q[:, where[0]], k[:, where[1]], v[:, where[1]], g[:, where[0]])
            seen = Shape(sq, sk, causal=True).seen(device)
            own, exact = gradients.by_torch(*one, seen), gradients.by_formula(*one, seen)
            ours = found[0][None, where[0]], found[1][None, where[1]], found[2][None, where[1]]
            assert gradients.share_of_limit(ours, own, exact) <= 1
        rows, keys = rows + sq, keys + sk
    assert all(not found[0][rows:].any() and not each[keys:].any() for each in found[1:])
    assert not found[1][9:12].any()  # keys of the sequence without queries


@each_device
@pytest.mark.parametrize("dense_side", ["q", "k", "both"])
def test_ragged_on_one_side(dense_side, device):
    """Queries or keys of one length beside offsets of the others: the gradients of the call with both offsets."""
    q, k, v, g = Shape(8, 8).tensors(torch.bfloat16, device)
    offsets = torch.tensor([0, 8, 16], dtype=torch.int32, device=device)

    def found(q: Tensor, k: Tensor, v: Tensor, offsets_q: Tensor | None, offsets_k: Tensor | None) -> gradients.Three:
        inputs = tuple(each.requires_grad_() for each in (q, k, v))
        out = flash_attn_varlen_func(*inputs, offsets_q, offsets_k, 8, 8, causal=True)
        return of(out, inputs, g.reshape(out.shape))

    flat = [each.detach().flatten(0, 1) for each in (q, k, v)]
    expected = found(*flat, offsets, offsets)
    rows = [q] if dense_side != "k" else flat[:1]
    keys = [k, v] if dense_side != "q" else flat[1:]
    starts = [None if dense_side in (side, "both") else offsets for side in ("q", "k")]
    ours = found(*(each.detach() for each in (*rows, *keys)), *starts)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one.reshape(other.shape), other, rtol=2**-8, atol=2**-8)


def test_the_operator_is_what_it_says():
    """Its schema and its fake implementation, dense and ragged, with an empty side."""
    for shape in (Shape(5, 7, batch=1), Shape(5, 0, batch=1)):
        q, k, v, g = shape.tensors(torch.float32)
        out, lse = flash_attn_func(q, k, v, return_softmax_lse=True)
        dense_case = (g, q, k, v, out, lse, None, -1, 0)
        starts = [torch.tensor([0, rows], dtype=torch.int32) for rows in (5, shape.sk)]
        flat = (each[0] for each in (g, q, k, v, out, lse))
        ragged = (*flat, 0.5, 3, 2, None, 0, 1.0, torch.zeros(4), *starts, None, None, 5, shape.sk)
        for case in (dense_case, ragged):
            torch.library.opcheck(
                torch.ops.jit_kernel.backward.default, case, test_utils=("test_schema", "test_faketensor")
            )


def test_the_rule_refuses_a_mask_that_is_off_by_one():
    shape = SHAPES["causal, more keys"]
    q, k, v, g = shape.tensors(torch.bfloat16)
    exact = gradients.by_formula(q, k, v, g, shape.seen())
    own = gradients.by_torch(q, k, v, g, shape.seen())
    assert gradients.share_of_limit(own, own, exact) <= 1
    shifted = shape.seen().roll(-1, 0)
    assert gradients.share_of_limit(gradients.by_torch(q, k, v, g, shifted), own, exact) > 2


@each_device
def test_any_layout_and_any_of_the_inputs(device):
    """Inputs that are parts of one buffer, a gradient without memory of its own, one input that asks alone."""
    shape = Shape(20, 20, hq=2, hk=2, causal=True)
    qkv = torch.randn(2, 20, 3, 2, 32, device=device).bfloat16().requires_grad_()
    out = dense(shape, *qkv.unbind(2))
    (found,) = torch.autograd.grad(out.sum(), qkv)
    q, k, v = (each.detach().contiguous().requires_grad_() for each in qkv.unbind(2))
    expected = torch.autograd.grad(dense(shape, q, k, v), (q, k, v), torch.ones_like(out))
    for ours, apart in zip(found.unbind(2), expected, strict=True):
        torch.testing.assert_close(ours, apart, rtol=2**-8, atol=2**-8)
    alone = dense(shape, q.detach(), k, v.detach())
    assert torch.equal(torch.autograd.grad(alone.sum(), k)[0], expected[1])


@each_device
def test_rows_that_see_no_key_have_no_gradient(device):
    shape = Shape(9, 4, causal=True)
    q, k, v, g = (each.requires_grad_() for each in shape.tensors(torch.bfloat16, device))
    dq, dk, dv = of(dense(shape, q, k, v), (q, k, v), g)
    assert not dq[:, :5].any() and dq[:, 5:].any()
    assert dk.isfinite().all() and dv.isfinite().all()


@each_device
def test_second_derivatives_are_refused_by_name(device):
    q, k, v, _ = (each.requires_grad_() for each in Shape(5, 5).tensors(torch.bfloat16, device))
    (dq,) = torch.autograd.grad(flash_attn_func(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="the gradients of q, k, v and sinks cannot be differentiated"):
        dq.sum().backward()


ASKING = {
    "out": {"out": torch.empty(2, 5, 4, 32)},
    "draft_mask": {"draft_mask": torch.full((10, 1), -1, dtype=torch.int32)},
}


@pytest.mark.parametrize("name", ASKING)
def test_what_has_no_backward_pass_is_refused_by_name(name):
    q, k, v, _ = Shape(5, 5).tensors(torch.float32)
    v.requires_grad_()
    with pytest.raises(NotImplementedError, match=f"^v requires grad.* {name}"):
        flash_attn_varlen_func(q, k, v, None, None, **ASKING[name])
    with torch.no_grad():
        flash_attn_varlen_func(q, k, v, None, None, **ASKING[name])


def test_arguments_that_have_no_gradient_are_refused_by_name():
    q, k, v, _ = Shape(5, 5).tensors(torch.float32)
    with pytest.raises(NotImplementedError, match=r"^k_cache requires grad"):
        flash_attn_with_kvcache(q, k.requires_grad_(), v, cache_seqlens=5)
    table = torch.tensor([[0], [1]], dtype=torch.int32)
    used = torch.tensor([3, 5], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match=r"^k requires grad.* page_table"):
        flash_attn_varlen_func(q, k, v, None, None, seqused_k=used, page_table=table)


def test_malformed_calls_are_refused_as_without_gradients():
    q, k, v, _ = Shape(5, 5).tensors(torch.float32)
    with pytest.raises(ValueError, match=r"^k .*32"):
        flash_attn_func(q.requires_grad_(), k[..., :16], v)


@pytest.mark.parametrize("ragged", [False, True])
def test_compiled_programs_have_the_same_gradients(ragged):
    torch._dynamo.reset()
    offsets = torch.tensor([0, 7, 20], dtype=torch.int32)
    sizes = (20, 4, 32), (20, 2, 32), (20, 2, 32)
    inputs = tuple(torch.randn(*(size if ragged else (1, *size)), requires_grad=True) for size in sizes)

    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if ragged:
            out = flash_attn_varlen_func(q * 2, k, v, offsets, offsets, 13, 13, window_size=(5, 0))
        else:
            out = flash_attn_func(q * 2, k, v, causal=True)
        assert isinstance(out, Tensor)
        return out.sin()

    compiled = torch.compile(program, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*inputs).sum(), inputs)
    expected = torch.autograd.grad(program(*inputs).sum(), inputs)
    for ours, eager in zip(found, expected, strict=True):
        assert torch.equal(ours, eager)


def test_a_step_of_training_lowers_the_loss():
    """Through modules, twice over the same weights, as a user would."""
    projection = torch.nn.Linear(32, 3 * 64)
    x, target = torch.randn(2, 10, 32), torch.randn(2, 10, 64)
    optimizer = torch.optim.SGD(projection.parameters(), lr=0.5)
    losses = []
    for _ in range(20):
        q, k, v = projection(x).view(2, 10, 3, 2, 32).unbind(2)
        loss = (flash_attn_func(q, k, v, causal=True).flatten(2) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]

"""SDPA's kernels for CUDA: what they make of torch's arguments, on any device's tensors, and on a GPU all of it."""

from __future__ import annotations

import inspect
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as attend

from jit_kernel.integrations import counters, sdpa
from jit_kernel.integrations.torch_sdpa import behind, cuda
from tests.support import gradients, reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
each_device = pytest.mark.parametrize("device", DEVICES)
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(autouse=True)
def _fresh(request: pytest.FixtureRequest):
    if "cuda" in request.node.name and request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("torch sees no NVIDIA GPU")
    torch.manual_seed(0)
    counters.clear()
    yield
    counters.clear()


def made(shape: gradients.Shape, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, _ = shape.tensors(dtype, device)
    return q, k, v


def exact(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) in float64 of (b, s, h, d); the lse of a row that sees nothing is +inf, as FlashAttention 2 has it."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (each.double().transpose(1, 2) for each in (q, k, v))
    k, v = (each.repeat_interleave(group, 1) for each in (k, v))
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~seen, -math.inf)
    lse = torch.logsumexp(scores, -1)
    out = torch.softmax(scores, -1).nan_to_num(0.0) @ v
    return out.transpose(1, 2), torch.where(lse == -math.inf, math.inf, lse)


def judge(found: tuple[Any, ...], ref: tuple[Tensor, Tensor]) -> None:
    out, lse = found[0], found[1]
    slack = 4 * reference.ROW_SLACK[out.dtype] * ref[0].norm(dim=-1).clamp_min(0.1)
    assert bool(((out.double() - ref[0]).norm(dim=-1) <= slack).all())
    torch.testing.assert_close(lse.double(), ref[1], rtol=0, atol=1e-3)


SHAPES = {
    "all": gradients.Shape(33, 70),
    "causal": gradients.Shape(40, 40, causal=True),
    "causal, more queries": gradients.Shape(9, 4, causal=True),
    "window": gradients.Shape(30, 50, window_size=(7, 2)),
    "window, more queries": gradients.Shape(50, 30, window_size=(7, 2)),
}


@each_device
@each_dtype
@pytest.mark.parametrize("name", SHAPES)
def test_the_dense_forward_pass(name, dtype, device):
    shape = SHAPES[name]
    q, k, v = made(shape, dtype, device)
    left, right = shape.window_size
    found = cuda.forward(
        q, k, v, None, None, shape.sq, shape.sk, 0.0, shape.causal, False,
        window_size_left=left, window_size_right=right,
    )  # fmt: skip
    ref = exact(q, k, v, shape.seen(device))
    judge(found, ref)
    assert found[2].shape == (2,) and found[2].dtype == torch.uint64 and found[4].numel() == 0
    if shape.window_size == (-1, -1):
        rows = [each.transpose(1, 2) for each in (q, k, v)]
        out, lse, cum_q, cum_k, max_q, max_k, *_ = cuda.dense(*rows, 0.0, shape.causal)
        judge((out.transpose(1, 2), lse), ref)
        assert out.stride() == rows[0].stride()
        assert (cum_q, cum_k, max_q, max_k) == (None, None, shape.sq, shape.sk)


def ragged(device: str, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], list[Tensor], list[tuple[slice, slice]]]:
    lengths = (5, 0, 17, 8), (9, 4, 17, 3)
    q, k, v = made(gradients.Shape(30, 33, batch=1), dtype, device)
    starts = [[0, *itertools.accumulate(each)] for each in lengths]
    offsets = [torch.tensor(each, dtype=torch.int32, device=device) for each in starts]
    where = [(slice(*a), slice(*b)) for a, b in zip(*(itertools.pairwise(each) for each in starts), strict=True)]
    return (q[0], k[0], v[0]), offsets, where


@each_device
@each_dtype
@pytest.mark.parametrize("into", [False, True])
def test_the_ragged_forward_pass(into, dtype, device):
    """With and without memory for the result; keys end before their offsets say, by seqused_k, in a call of its own."""
    (q, k, v), offsets, where = ragged(device, dtype)
    used = torch.tensor([4, 2, 17, 0], dtype=torch.int32, device=device)
    for seqused_k in (None, used):
        call: tuple[Any, ...] = (q, k, v, *offsets, 17, 17, 0.0, True, False)
        if into:
            out = torch.full_like(q, math.nan)
            found = out, cuda.forward_into(out, *call, seqused_k=seqused_k)
        else:
            found = cuda.forward(*call, seqused_k=seqused_k)
        for at, (rows, keys) in enumerate(where):
            count = keys.stop - keys.start if seqused_k is None else int(used[at])
            keys = slice(keys.start, keys.start + count)
            if rows.start == rows.stop:
                continue
            seen = gradients.Shape(rows.stop - rows.start, count, causal=True).seen(device)
            ref = exact(q[None, rows], k[None, keys], v[None, keys], seen)
            judge((found[0][None, rows], found[1][None, :, rows]), ref)


@each_device
def test_pages(device):
    """block_table and seqused_k; the offsets of keys, which torch passes beside them, have no meaning."""
    q, k, v = made(gradients.Shape(2, 48), torch.bfloat16, device)
    table = torch.tensor([[4, 0, 2], [1, 5, 3]], dtype=torch.int32, device=device)
    pages_k, pages_v = (torch.full((6, 16, *each.shape[2:]), math.nan, device=device).bfloat16() for each in (k, v))
    for pages, each in ((pages_k, k), (pages_v, v)):
        pages[table.flatten().long()] = each.reshape(6, 16, *each.shape[2:])
    used = torch.tensor([20, 48], dtype=torch.int32, device=device)
    cu = torch.tensor([0, 2, 4], dtype=torch.int32, device=device)
    found = cuda.forward(
        q.flatten(0, 1), pages_k, pages_v, cu, cu, 2, 48, 0.0, True, False,
        seqused_k=used, block_table=table, num_splits=1,
    )  # fmt: skip
    for at, count in enumerate(used.tolist()):
        one = slice(at, at + 1)
        ref = exact(q[one], k[one, :count], v[one, :count], gradients.Shape(2, count, causal=True).seen(device))
        rows = slice(2 * at, 2 * at + 2)
        judge((found[0][None, rows], found[1][None, :, rows]), ref)


def test_what_is_passed_on_and_why():
    q, k, v = made(gradients.Shape(5, 5), torch.bfloat16, "cpu")
    rest: tuple[Any, ...] = (None, None, 5, 5)
    used = torch.tensor([5, 5], dtype=torch.int32)
    reasons = {
        "dropout": cuda.forward(q, k, v, *rest, 0.1, False, False),
        "return_debug_mask": cuda.forward(q, k, v, *rest, 0.0, False, True),
        "dtype float32": cuda.forward(q.float(), k.float(), v.float(), *rest, 0.0, False, False),
        "alibi_slopes": cuda.forward(q, k, v, *rest, 0.0, False, False, alibi_slopes=torch.zeros(4)),
        "a scale that is not positive and finite": cuda.forward(q, k, v, *rest, 0.0, False, False, scale=-1.0),
        "lengths of keys beside dense queries": cuda.forward(q, k, v, *rest, 0.0, False, False, seqused_k=used),
        "an empty tensor": cuda.forward(q[:0], k, v, *rest, 0.0, False, False),
        "head sizes whose elements do not lie side by side": cuda.forward(q.mT, k, v, *rest, 0.0, False, False),
        "block_table without seqused_k": cuda.forward(
            q[0], k, v, used, None, 5, 5, 0.0, False, False, block_table=torch.zeros(1, 1, dtype=torch.int32)
        ),
    }
    for reason, answer in reasons.items():
        assert isinstance(answer, behind.Passed) and answer == reason


def test_what_torchs_own_kernel_calls_is_torchs_own():
    """A call that is passed on counts once. On any machine, by `mean`, whose kernel calls `sum` by the dispatcher."""
    asked: list[str] = []

    def passes(reason: str) -> Any:
        return lambda *_, **__: asked.append(reason) or behind.Passed(reason)

    x = torch.randn(3, 4)
    own, inner = x.mean(1), torch.empty(3)
    library = behind.stand_behind({"mean.dim": passes("mean"), "sum.IntList_out": passes("sum")}, "CPU")
    try:
        assert torch.equal(x.mean(1), own)
        assert asked == ["mean"] and counters.read()["sdpa"] == {"served": 0, "passed_on": {"mean": 1}}
        with pytest.raises(IndexError):
            x.mean(5)
        torch.sum(x, [1], out=inner)  # by itself it is asked for, after an error too
        assert asked == ["mean", "mean", "sum"]
    finally:
        library._destroy()
    assert counters.read()["sdpa"] == {"served": 0, "passed_on": {"mean": 2, "sum": 1}}


@pytest.mark.skipif(torch.version.cuda is None, reason="torch was built without CUDA")
def test_the_operators_come_back():
    """Their tables of kernels, on any machine whose torch has kernels for CUDA."""
    present = {name: each for name, each in cuda.OPERATORS.items() if hasattr(torch.ops.aten, name)}
    before = [torch._C._dispatch_dump(f"aten::{name}") for name in present]
    library = behind.stand_behind(present, "CUDA")
    assert [torch._C._dispatch_dump(f"aten::{name}") for name in present] != before
    library._destroy()
    assert [torch._C._dispatch_dump(f"aten::{name}") for name in present] == before


@pytest.mark.gpu
@each_dtype
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("hk", "d"), [(4, 64), (2, 128), (4, 40)])
def test_sdpa_on_cuda(hk, d, is_causal, dtype):
    """SDPA by itself, without a choice of a backend: ours, forwards and, by torch's operator, backwards."""
    shape = gradients.Shape(130, 130, hk=hk, d=d, dv=d, causal=is_causal)
    q, k, v, g = shape.tensors(dtype, "cuda")

    def found() -> gradients.Three:
        inputs = [each.transpose(1, 2).detach().requires_grad_() for each in (q, k, v)]
        out = attend(*inputs, is_causal=is_causal, enable_gqa=hk != 4)
        ref, _ = exact(q, k, v, shape.seen("cuda"))
        slack = 4 * reference.ROW_SLACK[dtype] * ref.norm(dim=-1).clamp_min(0.1)
        assert bool(((out.transpose(1, 2).double() - ref).norm(dim=-1) <= slack).all())
        dq, dk, dv = (each.transpose(1, 2) for each in torch.autograd.grad(out, inputs, g.transpose(1, 2)))
        return dq, dk, dv

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        own = found()
    with sdpa.active():
        ours = found()
        assert counters.read()["sdpa"] == {"served": 1, "passed_on": {}}
    assert gradients.share_of_limit(ours, own, gradients.by_formula(q, k, v, g, shape.seen("cuda"))) <= 1


@pytest.mark.gpu
def test_varlen_attention_on_cuda():
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    (q, k, v), offsets, _ = ragged("cuda", torch.bfloat16)
    offsets = [offsets[0], offsets[0]]
    k, v = k[:30], v[:30]
    known = inspect.signature(varlen.varlen_attn).parameters
    settings: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "enable_gqa" in known:  # before torch had it, grouped heads were taken without a word
        settings["enable_gqa"] = True

    def found() -> list[Tensor]:
        inputs = [each.detach().requires_grad_() for each in (q, k, v)]
        out = varlen.varlen_attn(*inputs, *offsets, 17, 17, **settings)
        return [out, *torch.autograd.grad(out.square().sum(), inputs)]

    own = found()
    with sdpa.active():
        ours = found()
        assert counters.read()["sdpa"]["served"] == 1
    for a, b in zip(ours, own, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-6, atol=2**-6)


@pytest.mark.gpu
def test_the_registry_and_the_order_come_back():
    q = torch.randn(1, 2, 64, 64, device="cuda", dtype=torch.bfloat16)
    own = attend(q, q, q)
    order, current = (
        torch._C._get_sdp_priority_order(),
        getattr(torch.nn.attention, "current_flash_attention_impl", None),
    )
    before = current() if current else None
    with sdpa.active():
        assert torch._C._get_sdp_priority_order()[0] == int(SDPBackend.FLASH_ATTENTION.value)
        attend(q, q, q, dropout_p=0.5)
        assert counters.read()["sdpa"] == {"served": 0, "passed_on": {"dropout": 1}}
    assert torch._C._get_sdp_priority_order() == order
    assert (current() if current else None) == before
    assert torch.equal(attend(q, q, q), own)


@pytest.mark.gpu
def test_compiled_programs_on_cuda():
    torch._dynamo.reset()
    q, k, v = (torch.randn(1, 4, 128, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    program = torch.compile(lambda q, k, v: attend(q * 2, k, v, is_causal=True).sin(), fullgraph=True)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        own = program(q, k, v)
        with sdpa.active():
            ours = program(q, k, v)
            assert counters.read()["sdpa"]["served"] == 1
            torch.autograd.grad(ours.sum(), (q, k, v))
    torch.testing.assert_close(ours, own, rtol=2**-6, atol=2**-6)

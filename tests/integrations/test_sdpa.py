"""torch's SDPA on jit_kernel on the CPU: what is served and how well, what goes on to torch, and the way back."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as attend
from torch.utils._python_dispatch import TorchDispatchMode

from jit_kernel.integrations import counters, sdpa
from tests.support import case_run, gradients, reference

OPERATOR = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
NAMES = (OPERATOR.default.name(), "aten::scaled_dot_product_attention")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def dispatch_tables() -> list[str]:
    return [dump(name) for name in NAMES for dump in (torch._C._dispatch_dump, torch._C._dispatch_dump_table)]


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """Every test leaves torch as it found it, compared by its table of kernels."""
    torch.manual_seed(0)
    counters.clear()
    before = dispatch_tables()
    with case_run.one_thread():
        yield
    assert not sdpa.is_active()
    assert dispatch_tables() == before
    counters.clear()


def made(dtype: torch.dtype = torch.float32, sq: int = 20, sk: int = 20, hq: int = 4, hk: int = 4, d: int = 32,
         batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, v = (torch.randn(batch, rows, heads, d).to(dtype).transpose(1, 2) for rows, heads in
               ((sq, hq), (sk, hk), (sk, hk)))  # fmt: skip
    return q, k, v


def counted() -> tuple[int, dict[str, int]]:
    counts = counters.read().get("sdpa", {"served": 0, "passed_on": {}})
    return counts["served"], counts["passed_on"]


def exact(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """The formula in float64; seen broadcasts to (b, h, sq, sk)."""
    group = q.shape[1] // k.shape[1]
    k, v = (each.double().repeat_interleave(group, 1) for each in (k, v))
    scores = (q.double() @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~seen, -math.inf)
    return torch.softmax(scores, -1) @ v


def judge(ours: Tensor, own: Tensor, ref: Tensor) -> None:
    """The numeric rule's rows: twice torch's own distance from float64, and 2 epsilon."""
    limit = 2 * (own.double() - ref).norm(dim=-1) + 2 * reference.ROW_SLACK[ours.dtype] * ref.norm(dim=-1)
    assert bool(((ours.double() - ref).norm(dim=-1) <= limit).all())


def top_left(sq: int, sk: int) -> Tensor:
    return torch.ones(sq, sk, dtype=torch.bool).tril()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("sq", "sk"), [(20, 20), (1, 33), (12, 33), (33, 12)])
@pytest.mark.parametrize(("hk", "d"), [(4, 32), (2, 32), (1, 40)])
def test_served_calls(dtype, is_causal, sq, sk, hk, d):
    """Masks of torch's causal calls are aligned to the top left, whatever the lengths."""
    q, k, v = made(dtype, sq, sk, 4, hk, d)
    grouped: dict[str, Any] = {"is_causal": is_causal, "enable_gqa": hk != 4}
    own = attend(q, k, v, **grouped)
    with sdpa.active():
        ours = attend(q, k, v, **grouped)
    assert counted() == (1, {})
    assert ours.stride() == own.stride() and ours.dtype == own.dtype
    seen = top_left(sq, sk) if is_causal else torch.ones(sq, sk, dtype=torch.bool)
    judge(ours, own, exact(q, k, v, seen))


@pytest.mark.parametrize("q_layout", ["tokens first", "heads first", "part of a buffer"])
def test_the_operator_answers_in_torchs_layouts(q_layout):
    """Compiled programs rely on strides of the result and of the lse."""
    q, k, v = made(sq=9, sk=12, hq=4, hk=2)
    if q_layout == "heads first":
        q = q.contiguous()
    elif q_layout == "part of a buffer":
        q = torch.cat([q.transpose(1, 2), q.transpose(1, 2)], dim=2)[:, :, 4:].transpose(1, 2)
    own = OPERATOR(q, k, v, 0.0, True)
    with sdpa.active():
        ours = OPERATOR(q, k, v, 0.0, True)
    assert counted() == (1, {})
    for a, b in zip(ours, own, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def lengths_mask(*lengths: int, keys: int = 20) -> Tensor:
    return torch.arange(keys) < torch.tensor(lengths)[:, None, None, None]


MASKS = {
    "lengths": lengths_mask(7, 20),
    "lengths, spread over the queries": lengths_mask(7, 20).expand(2, 1, 20, 20).contiguous(),
    "lengths, spread over the heads": lengths_mask(7, 20).expand(2, 4, 20, 20),
    "one length for all": lengths_mask(9)[0, 0],
    "padding on the left": ~lengths_mask(5, 0),
    "a run of keys": lengths_mask(17, 20) & ~lengths_mask(3, 1),
    "causal": torch.ones(20, 20, dtype=torch.bool).tril()[None, None],
    "causal, with padding on the left": torch.ones(20, 20, dtype=torch.bool).tril() & ~lengths_mask(5, 0),
    "first queries that see nothing": torch.ones(20, 20, dtype=torch.bool).tril(-3),
    "a sequence without keys": lengths_mask(0, 20),
    "nothing hidden": torch.ones(20, 20, dtype=torch.bool),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("kind", ["bool", "-inf", "least"])
def test_masks_that_are_lengths_are_served(name, kind):
    seen = MASKS[name]
    if kind == "least" and not bool(seen.any(-1).all()):
        pytest.skip("what torch gives a row that sees nothing depends on the mask's numbers")
    hidden = {"bool": 0.0, "-inf": -math.inf, "least": torch.finfo(torch.float32).min}[kind]
    mask = seen if kind == "bool" else torch.zeros(seen.shape).masked_fill(~seen, hidden)
    q, k, v = made(hk=2)
    own = attend(q, k, v, attn_mask=mask, enable_gqa=True)
    with sdpa.active():
        ours = attend(q, k, v, attn_mask=mask, enable_gqa=True)
    assert counted() == (1, {})
    judge(ours, own, exact(q, k, v, seen).nan_to_num(0.0))


@pytest.mark.parametrize("name", ["causal, with padding on the left", "a sequence without keys", "lengths"])
def test_gradients_by_masks_that_are_lengths(name):
    """Those of torch's own, also in rows that see nothing."""
    inputs = [each.detach().requires_grad_() for each in made(hk=2)]

    def found() -> list[Tensor]:
        out = attend(*inputs, attn_mask=MASKS[name], enable_gqa=True)
        return list(torch.autograd.grad(out.square().sum(), inputs))

    own = found()
    with sdpa.active():
        ours = found()
    assert counted() == (1, {})
    for one, other in zip(ours, own, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_causal_mask_over_a_longer_cache_is_served():
    """Query i sees the first n + i keys: a prompt's second part, over a cache with room."""
    q, k, v = made(torch.bfloat16, sq=6, sk=30)
    seen = torch.arange(30) <= torch.arange(6)[:, None] + torch.tensor([4, 15])[:, None, None, None]
    own = attend(q, k, v, attn_mask=seen)
    with sdpa.active():
        ours = attend(q, k, v, attn_mask=seen)
    assert counted() == (1, {})
    judge(ours, own, exact(q, k, v, seen))


def test_what_a_mask_hides_may_hold_anything():
    q, k, v = made()
    expected = attend(q[:1], k[:1, :, :7], v[:1, :, :7])
    k[0, :, 7:], v[0, :, 7:] = math.nan, math.inf
    with sdpa.active():
        ours = attend(q, k, v, attn_mask=lengths_mask(7, 20))
    torch.testing.assert_close(ours[:1], expected, rtol=1e-5, atol=1e-5)


HOLES = torch.ones(20, 20, dtype=torch.bool)
HOLES[:, 5] = False
PASSED: dict[str, tuple[Any, str]] = {
    "a bias": (torch.randn(20, 20), "a mask that is no lengths"),
    "holes": (HOLES, "a mask that is no lengths"),
    "a mask by head": (lengths_mask(9, 20, 11, 4).transpose(0, 1), "a mask that is no lengths"),
    "a row that sees nothing by finite numbers": (
        torch.zeros(2, 1, 1, 20).masked_fill(~lengths_mask(0, 20), torch.finfo(torch.float32).min),
        "a mask that is no lengths",
    ),
    "causal, with padding on the right": (
        torch.ones(20, 20).tril().bool() & lengths_mask(9),
        "a mask that is no lengths",
    ),
    "a window": (torch.ones(20, 20).tril().triu(-3).bool(), "a mask that is no lengths"),
    "nan": (torch.full((20, 20), math.nan), "a mask that is no lengths"),
}


@pytest.mark.parametrize("name", PASSED)
def test_other_masks_go_on_to_torch(name):
    mask, reason = PASSED[name]
    q, k, v = made()
    own = attend(q, k, v, attn_mask=mask)
    with sdpa.active():
        ours = attend(q, k, v, attn_mask=mask)
    assert counted() == (0, {reason: 1})
    assert torch.equal(ours.nan_to_num(9.0), own.nan_to_num(9.0))


class Marked(Tensor):
    """A subclass that says nothing of its own."""


OTHERS: dict[str, tuple[Any, str]] = {
    "float64": (lambda q, k, v: attend(q.double(), k.double(), v.double()), "dtype float64"),
    "a negative scale": (lambda q, k, v: attend(q, k, v, scale=-0.5), "a scale that is not positive and finite"),
    "a large head": (
        lambda q, k, v: attend(*(each.repeat(1, 1, 1, 17) for each in (q, k, v))), "a head size above 512",
    ),
    "a subclass": (lambda q, k, v: attend(q.as_subclass(Marked), k, v).as_subclass(Tensor), "a tensor subclass"),
    "a mask beside is_causal": (
        lambda q, k, v: OPERATOR(q, k, v, 0.0, True, attn_mask=torch.zeros(20, 20))[0], "a mask beside is_causal",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_calls_go_on_to_torch_bit_for_bit(name):
    call, reason = OTHERS[name]
    q, k, v = made()
    own = call(q, k, v)
    with sdpa.active():
        ours = call(q, k, v)
    assert counted() == (0, {reason: 1})
    assert torch.equal(ours, own)


def test_dropout_is_torchs_own():
    q, k, v = made()
    with sdpa.active():
        torch.manual_seed(1)
        ours = attend(q, k, v, dropout_p=0.3)
    torch.manual_seed(1)
    assert torch.equal(ours, attend(q, k, v, dropout_p=0.3))
    with pytest.raises(RuntimeError) as own:
        OPERATOR(q, k, v, 0.3)
    with sdpa.active(), pytest.raises(RuntimeError) as ours:
        OPERATOR(q, k, v, 0.3)
    assert str(ours.value).splitlines()[0] == str(own.value).splitlines()[0]
    assert counted() == (0, {"dropout": 1})


def test_grouped_heads_are_not_copied():
    seen: list[tuple[str, int]] = []

    class Look(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append((function.name(), args[1].shape[1] if len(args) > 1 and isinstance(args[1], Tensor) else 0))
            return function(*args, **(kwargs or {}))

    q, k, v = made(hq=8, hk=2)
    with sdpa.active(), Look():
        attend(q, k, v, enable_gqa=True)
    assert seen == [(OPERATOR.default.name(), 2)]
    assert counted() == (1, {})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("hk", "is_causal"), [(4, False), (2, True)])
def test_gradients(dtype, hk, is_causal):
    """torch's backward operator takes our result and lse as its own: within twice its own distance from float64."""
    shape = gradients.Shape(33, 33, hk=hk, causal=is_causal)
    q, k, v, g = shape.tensors(dtype)

    def found() -> gradients.Three:
        inputs = [each.transpose(1, 2).detach().requires_grad_() for each in (q, k, v)]
        out = attend(*inputs, is_causal=is_causal, enable_gqa=hk != 4)
        dq, dk, dv = (each.transpose(1, 2) for each in torch.autograd.grad(out, inputs, g.transpose(1, 2)))
        return dq, dk, dv

    own = found()
    with sdpa.active():
        ours = found()
    assert counted() == (1, {})
    assert gradients.share_of_limit(ours, own, gradients.by_formula(q, k, v, g, shape.seen())) <= 1


def test_gradients_by_a_mask_of_lengths_and_after_the_way_back():
    """A forward pass of ours, and a backward pass that torch makes when it has its kernels again."""
    mask = lengths_mask(7, 20)
    inputs = [each.detach().requires_grad_() for each in made()]
    own = torch.autograd.grad(attend(*inputs, attn_mask=mask).sum(), inputs)
    with sdpa.active():
        out = attend(*inputs, attn_mask=mask)
    assert counted() == (1, {})
    for ours, torchs in zip(torch.autograd.grad(out.sum(), inputs), own, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-5)


def test_a_module_with_padding():
    layer = torch.nn.MultiheadAttention(64, 4, batch_first=True)
    x = torch.randn(2, 20, 64)
    padding = torch.arange(20) >= torch.tensor([13, 20])[:, None]

    def run() -> tuple[Tensor, Tensor]:
        out, _ = layer(x, x, x, key_padding_mask=padding, need_weights=False)
        (grad,) = torch.autograd.grad(out.square().sum(), layer.in_proj_weight)
        return out, grad

    own = run()
    with sdpa.active():
        ours = run()
    assert counted() == (1, {})
    for a, b in zip(ours, own, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_the_way_back():
    q, k, v = made()
    own = attend(q, k, v)
    before = dispatch_tables()
    sdpa.activate()
    sdpa.activate()
    try:
        assert sdpa.is_active()
        assert dispatch_tables() != before
        attend(q, k, v)
        assert counted() == (1, {})
    finally:
        sdpa.deactivate()
    assert not sdpa.is_active() and dispatch_tables() == before
    sdpa.deactivate()
    assert torch.equal(attend(q, k, v), own)
    assert counted() == (1, {})


def test_contexts_are_nested_and_survive_errors():
    with sdpa.active():
        with pytest.raises(ZeroDivisionError), sdpa.active():
            raise ZeroDivisionError
        assert sdpa.is_active()
        sdpa.activate()
        sdpa.deactivate()
        assert sdpa.is_active()
    assert not sdpa.is_active()
    sdpa.activate()
    with sdpa.active():
        pass
    assert sdpa.is_active()
    sdpa.deactivate()


def test_threads_share_it_until_the_last_context_ends():
    q, k, v = made()
    own, errors = attend(q, k, v), []

    def work() -> None:
        try:
            for _ in range(20):
                with sdpa.active():
                    torch.testing.assert_close(attend(q, k, v), own, rtol=1e-5, atol=1e-5)
                    assert sdpa.is_active()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert errors == []
    assert counted() == (80, {})


def test_an_older_torch_is_refused_and_nothing_is_left(monkeypatch):
    monkeypatch.delattr(torch.library, "get_kernel")
    with pytest.raises(NotImplementedError, match=r"torch is .*needs torch 2\.10 or newer"):
        sdpa.activate()
    with pytest.raises(NotImplementedError), sdpa.active():
        pass
    assert not sdpa.is_active()


def test_a_choice_of_torchs_other_backends_stays():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = made()
    with sdpa_kernel(SDPBackend.MATH):
        own = attend(q, k, v)
        with sdpa.active():
            assert torch.equal(attend(q, k, v), own)
    assert counted() == (0, {})

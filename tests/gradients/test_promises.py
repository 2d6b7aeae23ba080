"""What gradients promise beside their values: the same bits on any threads, memory, torch.func, what is refused."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from jit_kernel import flash_attn_func, flash_attn_varlen_func
from jit_kernel.commands import why
from jit_kernel.fa3.cpu import backward as cpu
from jit_kernel.fa3.gradients.call import Backward
from tests.support import case_run

ALL: dict[str, Any] = {
    "causal": True, "softcap": 4.0, "window_size": (9, 0), "attention_chunk": 8, "return_softmax_lse": True,
}  # fmt: skip


def inputs(sq: int = 11, hq: int = 4, hk: int = 2, d: int = 16) -> tuple[Tensor, ...]:
    made = (torch.randn(2, sq, heads, d) for heads in (hq, hk, hk))
    return (*(each.requires_grad_() for each in made), torch.randn(hq).requires_grad_())


def loss(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    out, lse = flash_attn_func(q, k, v, sinks=sinks, **ALL)
    return out.sin().sum() + lse.cos().sum()


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_on_any_number_of_threads(dtype):
    """One head, whose blocks of keys wait for each other, and several; twice each."""
    torch.manual_seed(0)
    for hq, hk in ((1, 1), (6, 2)):
        q, k, v, g = (torch.randn(1, 700, heads, 32).to(dtype) for heads in (hq, hk, hk, hq))
        out, lse = flash_attn_func(q, k, v, causal=True, return_softmax_lse=True)
        call = Backward(g, q, k, v, out, lse, 32**-0.5, -1, 0, sinks=torch.zeros(hq))
        found = []
        for threads in (1, 2, 3, 2, 5):
            torch.set_num_threads(threads)
            found.append(cpu.gradients(call))
        for each in found[1:]:
            assert all(map(torch.equal, each, found[0]))


@pytest.mark.filterwarnings("ignore:Input .* requires gradient and is not a double")
def test_gradients_are_differences_of_the_loss():
    """gradcheck in float32: a step of 1e-2 of every element of every input, with all that a call can have."""
    torch.manual_seed(0)
    q, k, v, sinks = inputs(sq=5, hq=2, hk=1, d=3)
    with case_run.one_thread():
        assert torch.autograd.gradcheck(loss, (q, k, v, sinks), eps=1e-2, atol=5e-3, rtol=1e-2, nondet_tol=0.0)


@pytest.mark.parametrize("which", ["out", "lse"])
def test_either_result_alone_can_be_differentiated(which):
    torch.manual_seed(0)
    given = inputs()
    out, lse = flash_attn_func(*given[:3], sinks=given[3], **ALL)
    assert out.requires_grad and lse.requires_grad
    alone = torch.autograd.grad((out if which == "out" else lse).sum(), given, retain_graph=True)
    zero = torch.zeros_like(lse if which == "out" else out)
    both = torch.autograd.grad(
        (out, lse), given, (torch.ones_like(out), zero) if which == "out" else (zero, lse * 0 + 1)
    )
    assert all(map(torch.equal, alone, both))


def test_torch_func_has_autograds_gradients():
    torch.manual_seed(0)
    given = inputs()
    expected = torch.autograd.grad(loss(*given), given)
    plain = tuple(each.detach() for each in given)
    assert all(map(torch.equal, torch.func.grad(loss, argnums=(0, 1, 2, 3))(*plain), expected))
    value, pull = torch.func.vjp(lambda q: loss(q, *plain[1:]), plain[0])
    assert torch.equal(value, loss(*plain)) and torch.equal(pull(torch.tensor(1.0))[0], expected[0])


def test_torch_func_refuses_by_name_what_there_is_not():
    torch.manual_seed(0)
    q, k, v, sinks = (each.detach() for each in inputs())
    of_q = torch.func.grad(loss)
    with pytest.raises(NotImplementedError, match="the gradients of q, k, v and sinks cannot be differentiated"):
        torch.func.grad(lambda x: of_q(x, k, v, sinks).sum())(q)
    with pytest.raises(NotImplementedError, match=r"^q is batched by torch\.vmap"):
        torch.vmap(of_q, in_dims=(0, None, None, None))(q[None], k, v, sinks)
    with pytest.raises(NotImplementedError, match=r"batched by torch\.vmap"):
        torch.func.jacrev(lambda x: flash_attn_func(x, k, v).flatten()[:3])(q)
    with pytest.raises(NotImplementedError, match=r"^q .*torch\.func"):
        torch.func.jvp(lambda x: loss(x, k, v, sinks), (q,), (q,))
    paged = {"seqused_k": torch.ones(2, dtype=torch.int32), "page_table": torch.zeros(2, 1, dtype=torch.int32)}
    with pytest.raises(NotImplementedError, match=r"^q requires grad.* page_table"):
        torch.func.grad(lambda x: flash_attn_varlen_func(x, k, v, None, None, **paged).sum())(q)


def test_a_compiled_step_has_the_same_gradients_of_everything():
    torch._dynamo.reset()
    torch.manual_seed(0)
    given = inputs()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*given), given)
    assert all(map(torch.equal, found, torch.autograd.grad(loss(*given), given)))


def test_checkpointing_keeps_half_and_changes_no_bit():
    """Of four layers only the inputs of two are kept; torch's hooks count what is."""
    torch.manual_seed(0)
    x, weights = torch.randn(1, 64, 2, 32), [torch.randn(32, 32, requires_grad=True) for _ in range(4)]

    def layer(x: Tensor, weight: Tensor) -> Tensor:
        q = x @ weight
        return x + flash_attn_func(q, q, x, causal=True)

    def step(through: Any) -> tuple[int, tuple[Tensor, ...]]:
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        at = x.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            for weight in weights:
                at = through(layer, at, weight)
        return sum(kept.values()), torch.autograd.grad(at.square().sum(), weights)

    plain, expected = step(lambda function, *given: function(*given))
    less, found = step(lambda function, *given: checkpoint(function, *given, use_reentrant=False))
    assert all(map(torch.equal, found, expected))
    assert less <= plain / 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_row_that_sees_one_key_has_exactly_no_gradient_of_its_query(dtype):
    """FlashAttention-3's own tests want it: dO V' and rowsum(dO O) are summed in one order."""
    torch.manual_seed(0)
    for d in (24, 64, 128):
        q, k, v = (torch.randn(9, 1, heads, d).to(dtype).requires_grad_() for heads in (6, 3, 3))
        out = flash_attn_func(q, k, v)
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
        assert not dq.any() and not dk.any() and dv.any()


def test_no_rows_and_no_keys():
    """Without keys the sink alone has a gradient, that of lse, which it is."""
    for sq, sk in ((0, 5), (5, 0)):
        q, k, v = (torch.randn(2, rows, 2, 8).requires_grad_() for rows in (sq, sk, sk))
        sinks = torch.randn(2, requires_grad=True)
        out, lse = flash_attn_func(q, k, v, sinks=sinks, return_softmax_lse=True)
        found = torch.autograd.grad(out.sum() + lse.sum(), (q, k, v, sinks))
        assert not any(bool(each.any()) for each in found[:3])
        assert torch.equal(found[3], torch.full((2,), 2.0 * sq if sk == 0 else 0.0))


def malformed() -> dict[str, tuple[dict[str, Any], str]]:
    i32 = {"dtype": torch.int32}
    return {
        "grad_out": ({"grad_out": torch.zeros(2, 5, 4, 9)}, "grad_out has shape"),
        "out": ({"out": torch.zeros(2, 5, 4, 8).half()}, "out has dtype"),
        "k": ({"k": torch.zeros(2, 5, 2, 9)}, "k has shape"),
        "heads": ({"k": torch.zeros(2, 5, 3, 8), "v": torch.zeros(2, 5, 3, 8)}, "q has 4 heads"),
        "lse": ({"lse": torch.zeros(2, 5, 4)}, "lse has shape"),
        "grad_lse": ({"grad_lse": torch.zeros(2, 4, 5).half()}, "grad_lse has dtype"),
        "sinks": ({"sinks": torch.zeros(3)}, "sinks has shape"),
        "cu_seqlens_q": ({"cu_seqlens_q": torch.zeros(3, **i32)}, "q has shape"),
        "seqused_k": ({"seqused_k": torch.tensor([5, 6], **i32)}, r"seqused_k\[1\] is 6"),
        "seqused_k of floats": ({"seqused_k": torch.tensor([3.9, 4.0])}, "seqused_k has dtype"),
        "softcap": ({"softcap": -3.0}, "softcap is -3.0; it must be at least 0"),
        "softmax_scale": ({"softmax_scale": math.nan}, "softmax_scale is nan; it must be finite"),
        "attention_chunk": ({"attention_chunk": -4}, "attention_chunk is -4; it must be between 0 and"),
        "left": ({"left": -5}, "left is -5; it must be between -1 and"),
        "v": ({"v": torch.zeros(())}, "v has shape"),
        "no head size": (dict.fromkeys(("q", "k"), torch.zeros(2, 5, 2, 0)), "q has shape .* its head size must be"),
        "a tensor without memory": ({"grad_out": torch.zeros(2, 5, 4, 8, device="meta")}, "grad_out is on meta"),
        "sinks without memory": ({"sinks": torch.zeros(4, device="meta")}, "sinks is on meta"),
        "sequences": ({"k": torch.zeros(1, 5, 2, 8), "v": torch.zeros(1, 5, 2, 8)}, "k has 1 sequences"),
    }


@pytest.mark.parametrize("name", malformed())
def test_the_operator_refuses_what_does_not_fit(name):
    wrong, message = malformed()[name]
    shapes = {"grad_out": 4, "q": 4, "k": 2, "v": 2, "out": 4}
    call: dict[str, Any] = {each: torch.zeros(2, 5, heads, 8) for each, heads in shapes.items()}
    call |= {"lse": torch.zeros(2, 4, 5), "softmax_scale": None, "left": -1, "right": -1}
    torch.ops.jit_kernel.backward(**call)
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        torch.ops.jit_kernel.backward(**call | wrong)


def test_offsets_that_lie_outside_are_refused():
    rows, lse = torch.zeros(9, 2, 8), torch.zeros(2, 9)
    for numbers in ([0, 10], [0, 5, 4], [-1, 4], [1, 4]):
        starts = torch.tensor(numbers, dtype=torch.int32)
        with pytest.raises(ValueError, match=r"^cu_seqlens_q holds"):
            torch.ops.jit_kernel.backward(
                rows, rows, rows, rows, rows, lse, None, -1, -1, cu_seqlens_q=starts, cu_seqlens_k=starts
            )


def test_a_longest_sequence_that_is_too_short_is_refused():
    rows, lse, starts = torch.zeros(9, 2, 8), torch.zeros(2, 9), torch.tensor([0, 9], dtype=torch.int32)
    given = (rows, rows, rows, rows, rows, lse, None, -1, -1)
    with pytest.raises(ValueError, match=r"^max_seqlen_k is 8; cu_seqlens_k has a sequence of 9"):
        torch.ops.jit_kernel.backward(*given, cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_k=8)


def test_why_says_who_serves_a_backward_pass(capsys):
    call = ["--backward", "--q", "bf16[2,64,8,64]", "--k", "bf16[2,64,2,64]", "--causal"]
    assert why.main([*call, "--device", "cpu", "--softcap", "3"]) == 0
    assert "cpu: serves it" in capsys.readouterr().out
    for target, server in (("cuda:sm_80", "portable"), ("cuda:sm_90a", "hopper")):
        assert why.main([*call, "--device", target]) == 0
        assert f"{server}: serves it" in capsys.readouterr().out
    assert why.main([*call, "--device", "cuda:sm_75"]) == 1
    assert "torch: rejected: it serves NVIDIA GPUs of compute capability 8.0 and newer" in capsys.readouterr().out
    assert why.main(["--backward", "--q", "bf16[2,64,8,64]", "--k", "e4m3[2,64,2,64]", "--device", "cpu"]) == 2
    assert "the backward pass has no torch.float8_e4m3fn" in capsys.readouterr().err
    assert why.main([*call, "--device", "musa:mp_31"]) == 1
    assert "musa: rejected: it has no backward pass" in capsys.readouterr().out
    assert why.main([*call, "--device", "cpu", "--out", "bf16[2,64,8,64]"]) == 2
    assert "out is given" in capsys.readouterr().err

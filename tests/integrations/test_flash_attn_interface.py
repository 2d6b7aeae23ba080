"""FlashAttention-3's module on jit_kernel: its names, order, defaults and returns, and its gradients."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import jit_kernel
from jit_kernel.integrations import counters
from jit_kernel.integrations import flash_attn_interface as fa3
from tests.support.fa3_calls import OFFSETS_K, OFFSETS_Q, appending, cached, dense, drawn, parameters, ragged
from tests.support.reference import Problem, Sequence, attend, check
from tests.support.valid_calls import ints

PEERS = json.loads((Path(__file__).parents[1] / "data" / "peer_signatures.json").read_text())
FA3 = PEERS["flash-attention hopper/flash_attn_interface.py @0251105a"]
# What the list of peers has not.
OTHERS = {
    "flash_attn_qkvpacked_func": "qkv, softmax_scale=None, causal=False, q_descale=None, k_descale=None, "
    "v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, deterministic=False, num_heads_q=None, "
    "sm_margin=0, return_attn_probs=False",
    "flash_attn_combine": "out_partial, lse_partial, out=None, out_dtype=None",
    "_flash_attn_forward": "q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None, "
    "cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, page_table=None, "
    "kv_batch_idx=None, leftpad_k=None, rotary_cos=None, rotary_sin=None, seqlens_rotary=None, q_descale=None, "
    "k_descale=None, v_descale=None, softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1, "
    "attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, num_splits=1, pack_gqa=None, "
    "sm_margin=0",
    "_flash_attn_backward": "dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, "
    "sequed_k=None, max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, "
    "is_causal=False, window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0",
}


@pytest.mark.parametrize("name", [*FA3, *OTHERS])
def test_signatures(name):
    found = parameters(getattr(fa3, name))
    if name in FA3:
        assert found == [(p["name"], p.get("default")) for p in FA3[name]]
    else:
        assert ", ".join(each if default is None else f"{each}={default}" for each, default in found) == OTHERS[name]


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"softcap": 4.0, "window_size": [3, 2]}], ids=str)
def test_answers_are_jit_kernels(options):
    """By position as far as the tensors go; the same bits, and lse where return_attn_probs asks for it."""
    for theirs, ours, call in (
        (fa3.flash_attn_func, jit_kernel.flash_attn_func, dense()),
        (fa3.flash_attn_varlen_func, jit_kernel.flash_attn_varlen_func, ragged()),
    ):
        wanted, wanted_lse = ours(**call, **options, return_softmax_lse=True)
        for deterministic in (False, True):
            assert torch.equal(theirs(*call.values(), **options, deterministic=deterministic), wanted)
        out, lse = theirs(*call.values(), **options, return_attn_probs=True)
        assert torch.equal(out, wanted) and torch.equal(lse, wanted_lse)


def test_answers_are_right():
    """Judged against float64, ragged with seqused_q and seqused_k."""
    call = ragged(torch.float32)
    out, lse = fa3.flash_attn_varlen_func(
        **call, seqused_q=ints(3, 5, 0), seqused_k=ints(11, 2, 9), causal=True, return_attn_probs=True
    )
    q, k, v = call["q"], call["k"], call["v"]
    problem = Problem([Sequence(q[:3], k[:11], v[:11]), Sequence(q[4:9], k[11:13], v[11:13])], causal=True)
    assert check([out[:3], out[4:9]], [lse[:, :3], lse[:, 4:9]], problem).worst <= 1


def test_a_cache_answers_four_values():
    """With return_softmax_lse: what holds the parts of split keys there is empty."""
    wanted, wanted_lse = jit_kernel.flash_attn_with_kvcache(**cached(), return_softmax_lse=True)
    assert torch.equal(fa3.flash_attn_with_kvcache(**cached()), wanted)
    for num_splits in (0, 3):
        split = fa3.flash_attn_with_kvcache(**cached(), num_splits=num_splits, return_softmax_lse=True)
        out, lse, *parts = split
        torch.testing.assert_close(out, wanted, rtol=2e-2, atol=1e-2)
        torch.testing.assert_close(lse, wanted_lse, rtol=1e-3, atol=1e-3)
        assert [part.numel() for part in parts] == [0, 0]


def test_keys_are_appended_in_place():
    ours, theirs = cached() | appending(), cached() | appending()
    wanted = jit_kernel.flash_attn_with_kvcache(**ours)
    assert torch.equal(fa3.flash_attn_with_kvcache(**theirs), wanted)
    assert torch.equal(theirs["k_cache"], ours["k_cache"]) and not torch.equal(ours["k_cache"], cached()["k_cache"])


@pytest.mark.parametrize("heads", [None, 4])
def test_packed_queries_keys_and_values(heads):
    torch.manual_seed(0)
    qkv = drawn(2, 9, 3, 4, 64) if heads is None else drawn(2, 9, 8, 64)
    q, k, v = qkv.unbind(2) if heads is None else qkv.split([4, 2, 2], dim=2)
    wanted = jit_kernel.flash_attn_func(q.contiguous(), k.contiguous(), v.contiguous(), causal=True)
    assert torch.equal(fa3.flash_attn_qkvpacked_func(qkv, causal=True, num_heads_q=heads), wanted)


@pytest.mark.parametrize(
    ("shape", "heads", "words"),
    [
        ((2, 9, 4, 4, 64), None, "qkv is a bfloat16 tensor of shape"),
        ((2, 9, 8, 64), None, r"num_heads_q None \(NoneType\)"),
        ((2, 9, 8, 64), 5, "num_heads_q is 5; it must be at least 1 and leave an even number of qkv's 8 heads"),
        ((2, 9, 8, 64), 8, "num_heads_q is 8"),
    ],
)
def test_packed_tensors_of_other_shapes(shape, heads, words):
    with pytest.raises(ValueError, match=words):
        fa3.flash_attn_qkvpacked_func(drawn(*shape), num_heads_q=heads)


def with_other_strides(tensor: Tensor) -> Tensor:
    odd = tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert odd.stride(-1) != 1
    return odd


def test_tensors_with_other_strides_are_copied():
    for function, call in ((fa3.flash_attn_func, dense()), (fa3.flash_attn_varlen_func, ragged())):
        odd = {name: with_other_strides(call[name]) for name in "qkv"}
        assert torch.equal(function(**call | odd), function(**call))
    call = cached() | appending()
    wanted = fa3.flash_attn_with_kvcache(**call)
    odd = {name: with_other_strides(call[name]) for name in ("q", "k", "v")}
    assert torch.equal(fa3.flash_attn_with_kvcache(**cached() | appending() | odd), wanted)
    with pytest.raises(ValueError, match="k_cache has strides"):
        fa3.flash_attn_with_kvcache(**call | {"k_cache": with_other_strides(call["k_cache"])})


def test_plans_of_lengths_with_gaps():
    sizes = {"batch_size": 3, "max_seqlen_q": 2, "max_seqlen_k": 40, "num_heads_q": 4, "num_heads_kv": 2, "headdim": 64}
    wide = torch.stack([ints(0, 17, 33), ints(9, 9, 9)], dim=1)
    made = fa3.get_scheduler_metadata(**sizes, cache_seqlens=wide[:, 0])
    wanted = fa3.flash_attn_with_kvcache(**cached())
    assert torch.equal(fa3.flash_attn_with_kvcache(**cached(), scheduler_metadata=made), wanted)


def test_bad_flags():
    for function, call, name in (
        (fa3.flash_attn_func, dense(), "return_attn_probs"),
        (fa3.flash_attn_varlen_func, ragged(), "deterministic"),
        (fa3.flash_attn_with_kvcache, cached(), "return_softmax_lse"),
    ):
        with pytest.raises(TypeError, match=f"{name} is 1 .*; it must be a bool"):
            function(**call, **{name: 1})


def exact_gradients(problem: Problem, grad: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Gradients of the formula, step by step in dtype, of all rows laid end to end."""
    leaves = [[x.detach().to(dtype).requires_grad_() for x in (s.q, s.k, s.v)] for s in problem.sequences]
    outs = [attend(Sequence(*leaf), problem, dtype)[0] for leaf in leaves]
    torch.autograd.backward(torch.cat(outs), grad.to(dtype))
    return [torch.cat([leaf[place].grad for leaf in leaves]) for place in range(3)]


MASKS = [
    {},
    {"causal": True},
    {"window_size": (5, 2)},
    {"window_size": (3, -1)},
    {"causal": True, "window_size": (4, 0)},
]


@pytest.mark.parametrize("options", MASKS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["dense", "ragged"])
def test_gradients(form, dtype, options):
    """At most twice as far from float64 as the formula in the inputs' dtype; grouped heads; bottom right masks."""
    call = dense(dtype) if form == "dense" else ragged(dtype)
    q, k, v = (call[name].requires_grad_() for name in "qkv")
    function = fa3.flash_attn_func if form == "dense" else fa3.flash_attn_varlen_func
    out, lse = function(**call, **options, return_attn_probs=True)
    assert not lse.requires_grad
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, (q, k, v), grad)
    if form == "dense":
        parts = zip(q, k, v, strict=True)
    else:
        bounds = [x.diff().tolist() for x in (OFFSETS_Q, OFFSETS_K, OFFSETS_K)]
        parts = zip(*(x.split(sizes) for x, sizes in zip((q, k, v), bounds, strict=True)), strict=True)
    problem = Problem([Sequence(*(x.detach() for x in part)) for part in parts], **options)
    rows = grad.reshape(-1, *grad.shape[-2:])
    exact, base = (exact_gradients(problem, rows, kind) for kind in (torch.float64, dtype))
    for ours, ref, own in zip(found, exact, base, strict=True):
        error = (ours.reshape(ref.shape).double() - ref).norm()
        slack = 2 * torch.finfo(dtype).eps
        assert error <= 2 * (own.double() - ref).norm() + slack * ref.norm()


MORE = {
    "softcap": ({"softcap": 5.0}, dense),
    "attention_chunk": ({"attention_chunk": 4}, dense),
    "seqused": ({"seqused_q": ints(3, 5, 0), "seqused_k": ints(3, 5, 0)}, ragged),
    "deterministic": ({"deterministic": True}, ragged),
}


@pytest.mark.parametrize("name", MORE)
def test_the_gradients_are_jit_kernels(name):
    options, form = MORE[name]
    call = form()
    inputs = [call[tensor].requires_grad_() for tensor in "qkv"]
    function = fa3.flash_attn_func if form is dense else fa3.flash_attn_varlen_func
    found = torch.autograd.grad(function(**call, **options).sum(), inputs)
    ours = jit_kernel.flash_attn_func if form is dense else jit_kernel.flash_attn_varlen_func
    options = {option: value for option, value in options.items() if option != "deterministic"}
    expected = torch.autograd.grad(ours(**call, **options).sum(), inputs)
    assert all(map(torch.equal, found, expected)) and all(bool(each.any()) for each in found)


def test_a_gradient_through_pages_is_refused_by_name():
    """By the backward pass: the forward pass answers, as FlashAttention-3's does with inputs that require grad."""
    q, pages = torch.randn(1, 3, 2, 32, requires_grad=True), torch.randn(2, 4, 2, 32)
    options = {"seqused_k": ints(5), "page_table": ints(0, 1)[None]}
    out, _ = fa3.passes.attend(jit_kernel.flash_attn_varlen_func, {
        "q": q, "k": pages, "v": pages, "cu_seqlens_q": None, "cu_seqlens_k": None, **options,
    })  # fmt: skip
    with pytest.raises(NotImplementedError, match="page_table of the backward pass"):
        out.sum().backward()


def test_other_inputs_without_a_gradient():
    call = dense(dv=256)
    qv = drawn(2, 9, 4, 256).requires_grad_()
    with pytest.raises(NotImplementedError, match="qv of the backward pass"):
        fa3.flash_attn_func(**call, qv=qv).sum().backward()
    call = {name: value.to(torch.float8_e4m3fn) for name, value in dense().items()}
    with pytest.raises(NotImplementedError, match=r"q is of torch\.float8_e4m3fn"):
        fa3.flash_attn_func(**call | {"q": call["q"].requires_grad_()}).sum().backward()
    with pytest.raises(NotImplementedError, match="q requires grad"):
        fa3.flash_attn_with_kvcache(**cached() | {"q": cached()["q"].requires_grad_()})


def test_a_compiled_program_is_one_graph():
    call = dense(torch.float32)
    leaves = [call[name].requires_grad_() for name in "qkv"]

    def program(*numbers: Tensor) -> Tensor:
        result: Tensor = fa3.flash_attn_func(*numbers, causal=True) * 2
        return result

    compiled = torch.compile(program, fullgraph=True, backend="aot_eager")
    grad = torch.randn(2, 9, 4, 64)
    for found, wanted in zip(
        torch.autograd.grad(compiled(*leaves), leaves, grad),
        torch.autograd.grad(program(*leaves), leaves, grad),
        strict=True,
    ):
        assert torch.equal(found, wanted)


def test_calls_are_counted():
    counters.clear()
    fa3.flash_attn_func(**dense())
    fa3.flash_attn_with_kvcache(**cached())
    with pytest.raises(ValueError, match="q has shape"):
        fa3.flash_attn_func(**dense() | {"q": drawn(9, 4, 64)})
    assert counters.read()["flash_attn_interface"] == {"served": 2, "passed_on": {}}


@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_reaches_the_backward_pass(deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from jit_kernel.fa3.gradients import choice

    real, seen = choice.gradients, []
    monkeypatch.setattr(choice, "gradients", lambda call: seen.append(call.deterministic) or real(call))
    q = torch.randn(4, 2, 32, requires_grad=True)
    cu = torch.tensor([0, 4], dtype=torch.int32)
    fa3.flash_attn_func(q[None], q[None], q[None], deterministic=deterministic).sum().backward()
    fa3.flash_attn_varlen_func(q, q, q, cu, cu, 4, 4, deterministic=deterministic).sum().backward()
    assert seen == [deterministic] * 2

"""The operators torch.ops.flash_attn_3.*, and how FlashAttention-3's module comes into a process and leaves it."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import jit_kernel
from jit_kernel.fa3.cpu import backward as gradients_cpu
from jit_kernel.fa3.gradients import cuda as gradients_cuda
from jit_kernel.fa3.gradients.call import Backward
from jit_kernel.integrations import counters, fa3_operators
from jit_kernel.integrations import flash_attn_interface as fa3
from tests.support.fa3_calls import OFFSETS_Q, appending, cached, dense, drawn, parameters, ragged
from tests.support.valid_calls import ints


@pytest.fixture
def operators() -> Iterator[Any]:
    fa3.install()
    yield torch.ops.flash_attn_3
    fa3.uninstall()


def positional(**given: Any) -> list[Any]:
    """The 34 arguments of `flash_attn_3::fwd` in their order; what is not given has `_flash_attn_forward`'s default."""
    names = [name for name, _ in parameters(fa3._flash_attn_forward)]
    defaults = {name: p.default for name, p in inspect.signature(fa3._flash_attn_forward).parameters.items()}
    assert len(names) == 34 and given.keys() <= set(names)
    return [given.get(name, defaults[name]) for name in names]


def test_forward_by_position(operators):
    """Dense into out, ragged, over pages, and a cache that is appended to."""
    call = dense()
    wanted, wanted_lse = jit_kernel.flash_attn_func(**call, causal=True, return_softmax_lse=True)
    room = torch.full((2, 4, 9, 64), torch.nan, dtype=torch.bfloat16).transpose(1, 2)  # as torch's SDPA lays it out
    out, lse, *parts = operators.fwd(*positional(**call, out_=room, causal=True))
    assert torch.equal(room, wanted) and out.data_ptr() == room.data_ptr() and torch.equal(lse, wanted_lse)
    assert [part.numel() for part in parts] == [0, 0]
    call = ragged()
    assert torch.equal(operators.fwd(*positional(**call))[0], jit_kernel.flash_attn_varlen_func(**call))
    paged = {
        "q": call["q"],
        "k": drawn(8, 16, 2, 64),
        "v": drawn(8, 16, 2, 64),
        "page_table": ints(*range(6)).view(3, 2),
    }
    paged |= {"cu_seqlens_q": OFFSETS_Q, "seqused_k": ints(32, 9, 20), "max_seqlen_q": 5}
    wanted = jit_kernel.flash_attn_varlen_func(**paged, cu_seqlens_k=None, window_size=(7, 0))
    found = operators.fwd(*positional(**paged, window_size_left=7, window_size_right=0))
    assert torch.equal(found[0], wanted)
    ours, theirs = cached() | appending(), cached() | appending()
    new = {"k_new": theirs["k"], "v_new": theirs["v"], "seqused_k": theirs["cache_seqlens"], "causal": True}
    tables = {name: theirs[name] for name in ("rotary_cos", "rotary_sin")}
    found = operators.fwd(*positional(q=theirs["q"], k=theirs["k_cache"], v=theirs["v_cache"], **new, **tables))
    assert torch.equal(found[0], jit_kernel.flash_attn_with_kvcache(**ours, num_splits=1))
    assert torch.equal(theirs["k_cache"], ours["k_cache"])


def test_the_function_of_all_arguments_is_the_operator(operators):
    for call in (dense() | {"softcap": 3.0}, ragged() | {"attention_chunk": 6}):
        found = fa3._flash_attn_forward(*positional(**call))
        for ours, theirs in zip(found, operators.fwd(*positional(**call)), strict=True):
            assert torch.equal(ours, theirs)


def test_defaults_of_the_operators(operators):
    q, k, v = dense().values()
    assert torch.equal(operators.fwd(q, k, v, is_causal=True)[0], jit_kernel.flash_attn_func(q, k, v, causal=True))
    schema = operators.fwd.default._schema
    assert len(schema.arguments) == 34 and schema.arguments[-5].name == "is_rotary_interleaved"


@pytest.mark.parametrize("name", ["cu_seqlens_k", "seqused_q"])
def test_what_does_not_go_with_a_cache(operators, name):
    given = {"q": drawn(3, 2, 4, 64), "k": drawn(3, 40, 2, 64), "v": drawn(3, 40, 2, 64), "leftpad_k": ints(0, 0, 0)}
    with pytest.raises(NotImplementedError, match=f"{name} of flash_attn_3::fwd over a cache is"):
        operators.fwd(*positional(**given, seqused_k=ints(3, 3, 3), **{name: ints(1, 1, 1)}))


def test_inputs_that_require_grad_are_below_autograd(operators):
    q, k, v = (x.requires_grad_() for x in dense().values())
    assert torch.equal(operators.fwd(q, k, v)[0], jit_kernel.flash_attn_func(**dense()))


@pytest.mark.parametrize("form", ["dense", "ragged"])
def test_backward_into_given_memory(operators, form):
    """The operator and `_flash_attn_backward` write what autograd has; the first result is sum(dout * out)."""
    call = dense() if form == "dense" else ragged()
    q, k, v = (call[name].requires_grad_() for name in "qkv")
    function = fa3.flash_attn_func if form == "dense" else fa3.flash_attn_varlen_func
    out, lse = function(**call, causal=True, return_attn_probs=True)
    dout = torch.randn_like(out)
    wanted = torch.autograd.grad(out, (q, k, v), dout)
    rest = [call.get(name) for name in ("cu_seqlens_q", "cu_seqlens_k")], [None, None]
    longest = [call.get(name) for name in ("max_seqlen_q", "max_seqlen_k")]
    tensors = [x.detach() for x in (dout, q, k, v, out, lse)]
    by_operator, by_function = ([torch.full_like(x, torch.nan) for x in tensors[1:4]] for _ in range(2))
    settings = [64**-0.5, True, -1, -1, 0.0, True, 0]
    first, *others = operators.bwd(*tensors, *by_operator, *rest[0], *rest[1], *longest, *settings)
    second = fa3._flash_attn_backward(*tensors, *rest[0], *rest[1], *longest, *by_function, *settings)
    for grads in (by_operator, by_function):
        assert all(map(torch.equal, grads, wanted))
    assert first.shape == lse.shape and torch.equal(first, second) and len(others) == 4
    torch.testing.assert_close(first, (tensors[0].double() * tensors[4].double()).sum(-1).mT.float())
    if form == "ragged":
        with pytest.raises(ValueError, match=r"^q has shape"):
            operators.bwd(*tensors)


def test_the_other_operators(operators):
    parts, sums = torch.randn(3, 2, 9, 4, 64), torch.randn(3, 2, 9, 4)
    for found, wanted in zip(
        operators.fwd_combine(parts, sums), jit_kernel.flash_attn_combine(parts, sums), strict=True
    ):
        assert torch.equal(found, wanted)
    sizes = (3, 2, 40, 4, 2, 64)
    given = {"is_causal": True, "window_size_left": 9, "page_size": 8, "num_splits": 2}
    found = operators.get_scheduler_metadata(*sizes, 64, torch.bfloat16, ints(0, 17, 33), **given)
    options = {"causal": True, "window_size": (9, -1), "page_size": 8, "num_splits": 2}
    assert torch.equal(found, jit_kernel.get_scheduler_metadata(*sizes, ints(0, 17, 33), **options))
    with pytest.raises(NotImplementedError, match="seqused_q of flash_attn_3::get_scheduler_metadata"):
        operators.get_scheduler_metadata(*sizes, 64, torch.bfloat16, ints(0, 17, 33), seqused_q=ints(1, 1, 1))


def test_install_and_uninstall(monkeypatch):
    before = ModuleType("flash_attn_interface")
    monkeypatch.setitem(sys.modules, "flash_attn_interface", before)
    fa3.install()
    fa3.install()
    assert importlib.import_module("flash_attn_interface") is fa3
    fa3.uninstall()
    fa3.uninstall()
    assert sys.modules["flash_attn_interface"] is before
    monkeypatch.delitem(sys.modules, "flash_attn_interface")
    fa3.install()
    fa3.uninstall()
    assert "flash_attn_interface" not in sys.modules
    assert not any(hasattr(torch.ops.flash_attn_3, name) for name in fa3_operators._SCHEMAS)


def test_operators_of_another_library_are_left_alone():
    library = torch.library.Library("flash_attn_3", "FRAGMENT")
    library.define("bwd(Tensor x) -> Tensor")
    try:
        with pytest.raises(RuntimeError, match=r"torch.ops.flash_attn_3.bwd exists"):
            fa3.install()
        assert "flash_attn_interface" not in sys.modules
    finally:
        library._destroy()


def test_torchs_own_fa3_finds_the_module(operators):
    attention = pytest.importorskip("torch.nn.attention")
    if not hasattr(attention, "activate_flash_attention_impl"):
        pytest.skip("torch 2.10 has no registry of flash attention")
    attention.activate_flash_attention_impl("FA3")
    try:
        assert attention.current_flash_attention_impl() == "FA3"
        with pytest.raises(RuntimeError, match="restore_flash_attention_impl"):
            fa3.uninstall()
    finally:
        attention.restore_flash_attention_impl()


@pytest.mark.filterwarnings("ignore:Warning only once for all operators")
@pytest.mark.skipif(not hasattr(torch.library, "get_kernel"), reason="torch before 2.10 has no FA3 to stand before it")
def test_gradients_do_not_come_back_through_what_stands_before_torchs_kernel():
    """As torch's "FA3" on CUDA: it replaces `_flash_attention_backward` by what calls `flash_attn_3::bwd`."""
    q, k, v = (x.requires_grad_() for x in dense().values())
    out, lse = jit_kernel.flash_attn_func(q, k, v, return_softmax_lse=True)
    dout = torch.randn_like(out)
    wanted = torch.autograd.grad(out, (q, k, v), dout)
    tensors = tuple(x.detach() for x in (dout, q, k, v, out))
    called = []

    def torchs_own(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any, **named: Any):
        assert rest[:5] == (None, None, 9, 9, 0.0) and named["scale"] == 0.125
        return gradients_cpu.gradients(Backward(dout, q, k, v, out, lse, named["scale"], -1, -1))[:3]

    def before_it(*arguments: Any, **named: Any):
        called.append(arguments)
        raise RecursionError("flash_attn_3::bwd calls it again")

    def found() -> tuple[Tensor, ...]:
        call = Backward(*tensors, lse.detach(), 0.125, -1, -1, max_seqlen_q=9, max_seqlen_k=9)
        return gradients_cuda.gradients(call)[:3]

    own, other = (torch.library.Library("aten", "IMPL", "CPU") for _ in range(2))
    try:
        own.impl("_flash_attention_backward", torchs_own, "CPU")
        gradients_cuda.hold_own_kernel("CPU")
        other.impl("_flash_attention_backward", before_it, "CPU")
        assert all(map(torch.equal, found(), wanted)) and not called
        gradients_cuda.release_own_kernel()
        with pytest.raises(RecursionError):
            found()
        other._destroy()
        assert all(map(torch.equal, found(), wanted))
    finally:
        gradients_cuda.release_own_kernel()
        other._destroy()
        own._destroy()


def test_install_comes_before_another_implementation_of_torchs(monkeypatch):
    """Its kernel would be held in place of torch's own."""
    attention = pytest.importorskip("torch.nn.attention")
    if not hasattr(attention, "activate_flash_attention_impl"):
        pytest.skip("torch 2.10 has no registry of flash attention")

    class Handle:
        def remove(self) -> None:
            pass

    monkeypatch.setitem(attention._registry._FLASH_ATTENTION_IMPLS, "other", Handle)
    attention.activate_flash_attention_impl("other")
    try:
        with pytest.raises(RuntimeError, match=r'"other" is active; call torch.nn.attention.restore_flash_attention'):
            fa3.install()
    finally:
        attention.restore_flash_attention_impl()
    assert not fa3.is_active() and not hasattr(torch.ops.flash_attn_3, "fwd")


def test_importing_the_module_registers_nothing():
    probe = (
        "import sys, torch; from jit_kernel.integrations import flash_attn_interface\n"
        "print('flash_attn_interface' in sys.modules, hasattr(torch.ops.flash_attn_3, 'fwd'))"
    )
    answer = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["False", "False"]


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
def test_torchs_sdpa_by_its_own_fa3_on_a_gpu(operators, causal):
    """torch calls our operators for the forward and the backward pass. Its FA3 asks for compute capability 9.0."""
    attention = torch.nn.attention
    if torch.cuda.get_device_capability() != (9, 0) or not hasattr(attention, "activate_flash_attention_impl"):
        pytest.skip("torch's FA3 needs compute capability 9.0 and torch 2.11")
    torch.manual_seed(0)
    leaves = [torch.randn(2, 8, 300, 64, device="cuda").bfloat16().requires_grad_() for _ in range(3)]
    grad = torch.randn(2, 8, 300, 64, device="cuda").bfloat16()

    def step() -> list[Tensor]:
        with attention.sdpa_kernel(attention.SDPBackend.FLASH_ATTENTION):
            out = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=causal)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    own = step()
    counters.clear()
    attention.activate_flash_attention_impl("FA3")
    try:
        ours = step()
    finally:
        attention.restore_flash_attention_impl()
    assert counters.read()["flash_attn_interface"]["served"] == 1
    for found, wanted in zip(ours, own, strict=True):
        torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)

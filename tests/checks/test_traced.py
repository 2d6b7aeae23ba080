"""Traced calls: their numbers, what they share, and the state of torch that they leave as it was."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import jit_kernel
from jit_kernel.fa3 import seam
from tests.support import valid_calls
from tests.support.valid_calls import FUNCTIONS, Call

Base = Callable[[], Call]
BASES: list[Base] = [valid_calls.dense, valid_calls.varlen, valid_calls.cache, valid_calls.metadata]


def each(kind: str) -> Any:
    """Every argument of this kind of every function."""
    places = [
        (base, name)
        for base in BASES
        for name, parameter in inspect.signature(seam.FUNCTIONS[FUNCTIONS[base].__name__]).parameters.items()
        if kind in parameter.annotation.split(" | ")
    ]
    return pytest.mark.parametrize(("base", "name"), places, ids=lambda x: x if isinstance(x, str) else x.__name__)


def fakes(mode: FakeTensorMode, call: Call) -> Call:
    return {name: mode.from_tensor(value) if isinstance(value, Tensor) else value for name, value in call.items()}


def refused(base: Base, call: Call, name: str) -> str:
    with pytest.raises((TypeError, ValueError, NotImplementedError)) as caught:
        FUNCTIONS[base](**call)
    text = str(caught.value)
    assert text.startswith(name), text
    assert len(text) < 300
    return text


@each("int")
@pytest.mark.parametrize("number", [-2, 2**31, 2**40, 2**63, -(2**63) - 1, 10**5000], ids=lambda n: f"{n.bit_length()}")
def test_an_int_that_no_int32_holds_is_refused_by_name(base, name, number):
    mode = FakeTensorMode()
    call = fakes(mode, base()) | {name: number}
    refused(base, call, name)
    with mode:
        assert "must be between 0 and 2147483647" in refused(base, call, name)


@each("int")
def test_a_tensor_in_an_ints_place(base, name):
    """One of integers is read, as in a call that is not traced; nothing else is taken for a number."""
    mode = FakeTensorMode()
    call, number = fakes(mode, base()), 9
    if name == "cache_seqlens":
        return  # it may be a tensor
    if name in ("num_heads_q", "num_heads_kv", "batch_size"):
        number = base()[name]
    wrong = (torch.tensor(0.5), torch.tensor([1, 2]), torch.tensor(True), torch.tensor(2, device="meta"))
    for inside in (mode, nullcontext()):
        with inside:
            FUNCTIONS[base](**call | {name: torch.tensor(number) if inside is not mode else _plain(number)})
    for tensor in (*wrong, torch.tensor(2**40), torch.tensor(-2)):
        refused(base, call | {name: tensor}, name)
        with mode:
            refused(base, call | {name: tensor}, name)


def _plain(number: int) -> Tensor:
    """A plain tensor where a mode would make a fake one."""
    with torch._C._DisableTorchDispatch():
        return torch.tensor(number)


@each("float")
@pytest.mark.parametrize(
    "value", [torch.tensor(0.5), torch.tensor(2), torch.tensor(1j), 10**5000, Fraction(10**5000)],
    ids=["float", "int", "complex", "huge", "huge fraction"],
)  # fmt: skip
def test_a_float_that_is_none_is_refused_by_name(base, name, value):
    mode = FakeTensorMode()
    refused(base, base() | {name: value}, name)
    refused(base, fakes(mode, base()) | {name: value}, name)
    with mode:
        refused(base, fakes(mode, base()) | {name: value}, name)
    with pytest.raises((TypeError, ValueError), match=name):
        make_fx(lambda q: FUNCTIONS[base](**base() | {"q": q, name: value}))(base()["q"])


@pytest.mark.parametrize(
    "window",
    [
        (torch.tensor(0.5), 0),
        (torch.tensor([1, 2]), 0),
        (torch.tensor(2, device="meta"), 0),
        [torch.tensor(2**40), 0],
        torch.tensor([1.0, 2.0]),
        torch.tensor([1, 2, 3]),
        (torch.tensor(1), 2, 3),
    ],
    ids=str,
)
def test_a_window_that_is_none_is_refused_by_name(window):
    base, mode = valid_calls.dense, FakeTensorMode()
    refused(base, fakes(mode, base()) | {"window_size": window}, "window_size")
    with mode:
        refused(base, fakes(mode, base()) | {"window_size": window}, "window_size")


def functional(memory: Tensor) -> Tensor:
    made: Tensor = FunctionalTensor.to_functional(memory)
    return made


def fake(memory: Tensor) -> Tensor:
    return FakeTensorMode().from_tensor(memory)


@pytest.mark.parametrize("kind", [functional, fake])
def test_what_is_written_shares_no_memory(kind):
    """Where one tensor lies in another's storage; slices between each other's rows are served."""
    memory = torch.randn(4, 2, 5, 4, 32)
    with FunctionalTensorMode() if kind is functional else nullcontext():
        buffer = kind(memory)
        q, k, v, _ = buffer
        behind = buffer.view(-1)[8 : 8 + v.numel()].view(v.shape)
        for out, name in ((v, "v"), (k, "k"), (behind, "q")):
            call = {"q": q, "k": k, "v": v, "out": out}
            assert f"shares its memory with {name}" in refused(valid_calls.dense, call, "out")
        row = kind(memory[3])[:, :1].expand(2, 5, 4, 32)
        assert "expanded" in refused(valid_calls.dense, {"q": q, "k": k, "v": v, "out": row}, "out")
        assert jit_kernel.flash_attn_func(q, k, v, out=buffer[3]).shape == v.shape
        rows = kind(memory.transpose(0, 2).contiguous()).transpose(0, 2)
        assert jit_kernel.flash_attn_func(rows[0], rows[1], rows[2], out=rows[3]).shape == v.shape


def test_functional_tensors_over_one_plain_memory_share_it():
    memory = torch.randn(3, 2, 5, 4, 32)
    with FunctionalTensorMode():
        q, k, v = map(functional, memory)
        call = {"q": q, "k": k, "v": v, "out": functional(memory[2])}
        assert "shares its memory with v" in refused(valid_calls.dense, call, "out")


@pytest.mark.parametrize("kind", [functional, fake])
def test_the_out_of_combine_shares_no_memory(kind):
    memory = torch.randn(3, 2, 5, 4, 32)
    with FunctionalTensorMode() if kind is functional else nullcontext():
        parts = kind(memory)
        call = {"out_partial": parts, "lse_partial": kind(torch.randn(3, 2, 5, 4)), "out": parts[1]}
        assert "shares its memory with out_partial" in refused(valid_calls.combine, call, "out")


@pytest.mark.parametrize("base", [*BASES, valid_calls.combine, valid_calls.merge], ids=lambda b: b.__name__)
def test_a_tangent_that_is_looked_for_under_a_fake_mode_leaves_no_trace(base):
    """torch failed to look, and left this thread without autograd and torch.jit.trace from there on."""
    call = base()
    name = next(name for name, value in call.items() if isinstance(value, Tensor))
    keys = torch._C._dispatch_tls_local_exclude_set().raw_repr()
    with forward_ad.dual_level(), FakeTensorMode():
        refused(base, call, name)
    assert torch._C._dispatch_tls_local_exclude_set().raw_repr() == keys
    x = torch.ones(2, requires_grad=True)
    assert x.view_as(x).requires_grad

"""Tensors that are no plain memory, as every argument of every function: resolved, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.nn import Parameter

import jit_kernel
from tests.support import odd_tensors, valid_calls
from tests.support.odd_tensors import BASES, REFUSED, Named, Wrapped, to, written
from tests.support.valid_calls import FUNCTIONS, Call

PLACES = list(odd_tensors.places())
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
each_place = pytest.mark.parametrize(("base", "name"), PLACES, ids=lambda x: x if isinstance(x, str) else x.__name__)
each_device = pytest.mark.parametrize("device", DEVICES)
FLOATING = [(base, name) for base, name in PLACES if base()[name].is_floating_point()]
each_floating = pytest.mark.parametrize(
    ("base", "name"), FLOATING, ids=lambda x: x if isinstance(x, str) else x.__name__
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def _plain_calls_passed_before():
    """What a check remembers of plain tensors must let no other kind pass."""
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        for base in BASES:
            FUNCTIONS[base](**to(device, base()))


def results(function: Any, call: Call) -> list[Tensor]:
    found = function(**call)
    return [*(found if isinstance(found, tuple) else (found,)), *(v for v in call.values() if isinstance(v, Tensor))]


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().resolve_neg().contiguous().view(torch.uint8)


def memory_of(call: Call) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in call.items() if type(value) is Tensor}


def refuses(error: type[Exception], base: Any, call: Call, name: str) -> str:
    """The text of the error, which names the argument; nothing is written."""
    others = {key: value for key, value in call.items() if key != name}
    before = memory_of(others)
    with pytest.raises(error) as caught:
        FUNCTIONS[base](**call)
    assert type(caught.value) is error or error is TypeError
    assert str(caught.value).startswith(f"{name} "), caught.value
    for key, copy in before.items():
        assert torch.equal(bits(others[key]), bits(copy)), f"{key} was written"
    return str(caught.value)


@each_device
@each_place
@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_memory_is_refused_by_name(kind, base, name, device):
    if kind == "fake" and base is valid_calls.metadata:
        pytest.skip("it has no other tensor, and a call of fake tensors is served")
    error, make = REFUSED[kind]
    call = to(device, base())
    call[name] = make(call[name])
    text = refuses(error, base, call, name)
    if kind == "batched":
        assert "torch.vmap" in text
    if kind == "functionalized":
        assert "torch.func.functionalize" in text


@each_device
@each_place
def test_nested_tensors_are_refused_by_name(base, name, device):
    call = to(device, base())
    rows = call[name]
    if rows.dim() < 2:
        pytest.skip("a nested tensor has two dimensions at least")
    for layout in (torch.strided, torch.jagged):
        try:
            nested = torch.nested.nested_tensor(list(rows.float().unbind()), layout=layout).to(rows.dtype)
        except NotImplementedError:
            pytest.skip(f"torch makes no nested {rows.dtype}")
        assert "nested" in refuses(TypeError, base, call | {name: nested}, name)


@each_device
@each_place
@pytest.mark.parametrize("make", [odd_tensors.negated, odd_tensors.imaginary], ids=lambda make: make.__name__)
def test_lazily_negated_tensors_are_resolved(make, base, name, device):
    """The results, and all that is written, are those of the same numbers in plain memory."""
    call = to(device, base())
    if call[name].dtype not in (torch.float32, torch.bfloat16, torch.int32) or (
        make is odd_tensors.imaginary and call[name].dtype != torch.float32
    ):
        pytest.skip("torch negates no such dtype lazily")
    odd = {key: value.clone() if isinstance(value, Tensor) else value for key, value in call.items()}
    odd[name] = make(odd[name])
    assert odd[name].is_neg()
    assert torch.equal(odd[name], call[name])
    if written(base, name):
        assert "negated" in refuses(TypeError, base, odd, name)
        return
    for found, expected in zip(results(FUNCTIONS[base], odd), results(FUNCTIONS[base], call), strict=True):
        assert torch.equal(bits(found), bits(expected))


@each_device
@each_place
def test_subclasses_that_own_memory_are_plain(base, name, device):
    expected = results(FUNCTIONS[base], to(device, base()))
    for kind in (Named, Parameter):
        torch.manual_seed(0)
        expected = results(FUNCTIONS[base], to(device, base()))
        torch.manual_seed(0)
        call = to(device, base())
        if kind is Parameter:
            call[name] = Parameter(call[name], requires_grad=False)
        else:
            call[name] = call[name].as_subclass(Named)
        for a, b in zip(results(FUNCTIONS[base], call), expected, strict=True):
            assert torch.equal(bits(a), bits(b))


@each_device
@each_place
def test_asynchronous_tensors_are_waited_for(base, name, device):
    """What a functional collective returns."""
    expected = results(FUNCTIONS[base], to(device, base()))[0]
    torch.manual_seed(0)
    call = to(device, base())
    call[name] = AsyncCollectiveTensor(call[name])
    if written(base, name):
        refuses(TypeError, base, call, name)
        return
    found = FUNCTIONS[base](**call)
    found = found[0] if isinstance(found, tuple) else found
    assert type(found) is Tensor
    assert torch.equal(bits(found), bits(expected))


@each_device
@each_floating
@pytest.mark.parametrize("grad_mode", [True, False], ids=["grad", "no_grad"])
def test_forward_mode_tangents_are_refused(grad_mode, base, name, device):
    """torch.no_grad() does not switch forward-mode derivatives off, so they are never dropped in silence."""
    call = to(device, base())
    if call[name].dtype == torch.float8_e4m3fn:
        pytest.skip("torch gives this dtype no tangent")
    with forward_ad.dual_level(), torch.set_grad_enabled(grad_mode):
        call[name] = forward_ad.make_dual(call[name], torch.ones_like(call[name]))
        assert "tangent" in refuses(NotImplementedError, base, call, name)


@each_device
def test_plain_tensors_are_served_while_others_have_tangents(device):
    call = to(device, valid_calls.dense())
    expected = jit_kernel.flash_attn_func(**call | {"out": None})
    with forward_ad.dual_level():
        assert torch.equal(jit_kernel.flash_attn_func(**call | {"out": None}), expected)
        plain = {name: value for name, value in call.items() if name not in ("sinks", "out")}
        jit_kernel.flash_attn_func(**plain)


@each_device
def test_an_empty_wrapper_is_a_wrapper(device):
    q = torch.empty(2, 0, 4, 32, device=device, dtype=torch.bfloat16)
    k = torch.randn(2, 5, 4, 32, device=device, dtype=torch.bfloat16)
    assert jit_kernel.flash_attn_func(q, k, k).shape == q.shape
    with pytest.raises(TypeError, match=r"^q is a Wrapped"):
        jit_kernel.flash_attn_func(Wrapped(q), k, k)


def test_a_wrapper_that_is_not_read_stays_out_of_the_way():
    """Descales beside 32-bit keys: the same result as without them."""
    call = valid_calls.dense() | {"out": None}
    expected = jit_kernel.flash_attn_func(**call)
    assert torch.equal(jit_kernel.flash_attn_func(**call, k_descale=torch.full((3,), torch.nan)), expected)

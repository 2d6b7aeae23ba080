"""Tensors without memory at an offset into it, whose address is no 0, and other arguments that are no plain memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils._mode_utils import no_dispatch

import jit_kernel
from jit_kernel import jit
from jit_kernel.device import cpu_target
from jit_kernel.fa3.checks import plain
from jit_kernel.fa3.cpu import kernels, known
from jit_kernel.fa3.features import DTYPE_NAMES
from tests.support import odd_tensors, valid_calls
from tests.support.odd_tensors import BASES
from tests.support.valid_calls import FUNCTIONS

PLACES = list(odd_tensors.places())
each_place = pytest.mark.parametrize(("base", "name"), PLACES, ids=lambda x: x if isinstance(x, str) else x.__name__)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def _plain_calls_passed_before():
    for base in BASES:
        FUNCTIONS[base](**base())


class Wrapped(Tensor):
    """A wrapper subclass at the offset of what it wraps."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device,
            storage_offset=inner.storage_offset(),
        )  # fmt: skip

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} was asked for")


class Dispatching(Tensor):
    """A subclass that has memory and answers for every operation itself."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with no_dispatch():
            return func(*args, **(kwargs or {}))


def behind(tensor: Tensor) -> Tensor:
    """The same numbers 64 elements behind the start of a storage."""
    memory = torch.zeros(64 + tensor.numel(), dtype=tensor.dtype)
    made = memory[64:].view(tensor.shape)
    return made.copy_(tensor)


def freed(tensor: Tensor) -> Tensor:
    made = behind(tensor)
    made.untyped_storage().resize_(0)
    return made


KINDS = {
    "wrapper": lambda t: Wrapped(behind(t)),
    "functional": lambda t: torch._to_functional_tensor(behind(t)),
    "functionalized": lambda t: odd_tensors.functionalized(behind(t)),
    "freed": freed,
    "fake": lambda t: FakeTensorMode().from_tensor(behind(t)),
}


def refused(base: Any, call: Any, name: str) -> str:
    with pytest.raises((TypeError, ValueError, NotImplementedError)) as caught:
        FUNCTIONS[base](**call)
    assert str(caught.value).startswith(name), caught.value
    return str(caught.value)


@each_place
@pytest.mark.parametrize("kind", KINDS)
def test_an_offset_is_no_memory(kind, base, name):
    if kind == "fake" and base is valid_calls.metadata:
        pytest.skip("a call of fake tensors alone is served")
    call = base()
    call[name] = KINDS[kind](call[name])
    others = {key: value.clone() for key, value in call.items() if type(value) is Tensor and key != name}
    refused(base, call, name)
    for key, copy in others.items():
        assert torch.equal(call[key].view(torch.uint8), copy.view(torch.uint8)), f"{key} was written"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["q", "k", "v", "out"])
def test_an_offset_is_no_memory_where_the_heap_lies_low(monkeypatch, kind, name):
    """A plain call there asks for each storage, and is served as before."""
    call = valid_calls.plain_dense()
    expected = FUNCTIONS[valid_calls.plain_dense](**call).clone()
    monkeypatch.setattr(known, "SURE_ADDRESS", 1 << 60)
    monkeypatch.setattr(known, "_libraries", {})
    known.serve(call["q"].dtype, jit.load(kernels.forward_spec(DTYPE_NAMES[call["q"].dtype]), cpu_target()))
    arguments = ("flash_attn_func", call["q"], call["k"], call["v"], None, False, (-1, -1), 0, 0.0, 1, False)
    arguments += (call["out"], None, None, None, None, None, None, 0, False)
    found = known.try_unchecked(arguments)
    assert found is not None
    assert found.shape == expected.shape
    call["out"] = torch.empty_like(expected)
    call[name] = KINDS[kind](call[name])
    refused(valid_calls.plain_dense, call, name)


@each_place
def test_a_subclass_that_answers_for_operations_is_read_as_memory(base, name):
    call = base()
    expected = FUNCTIONS[base](**call)
    torch.manual_seed(0)
    call = base()
    call[name] = Tensor._make_subclass(Dispatching, call[name])
    found = FUNCTIONS[base](**call)
    for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (found, expected)), strict=True):
        assert torch.equal(a.as_subclass(Tensor).view(torch.uint8), b.view(torch.uint8))


@each_place
@pytest.mark.parametrize("kind", [UninitializedParameter, UninitializedBuffer])
def test_a_tensor_without_a_shape_is_refused_by_name(kind, base, name):
    kwargs = {"requires_grad": False}
    refused(base, base() | {name: kind(**kwargs)}, name)


@each_place
def test_a_tensor_on_meta_is_refused_by_name(base, name):
    first = "cache_seqlens" if base is valid_calls.metadata else next(iter(base()))
    text = refused(base, base() | {name: base()[name].to("meta")}, first if name == first else name)
    assert "meta" in text


@pytest.mark.parametrize("base", BASES)
def test_a_call_on_meta_is_refused_by_its_first_tensor(base):
    call = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in base().items()}
    first = "cache_seqlens" if base is valid_calls.metadata else next(iter(call))
    assert "is on meta: jit_kernel serves cpu, cuda and musa" in refused(base, call, first)


@pytest.mark.parametrize("name", ["batch_size", "num_heads_q", "headdim", "num_splits"])
def test_a_number_on_meta_is_refused_by_name(name):
    refused(valid_calls.metadata, valid_calls.metadata() | {name: torch.tensor(2, device="meta")}, name)


def test_an_array_is_no_number():
    import numpy

    refused(valid_calls.cache, valid_calls.cache() | {"cache_seqlens": numpy.zeros(3)}, "cache_seqlens")


def arrays() -> list[Any]:
    import numpy

    read_only = numpy.zeros(3, dtype=numpy.int32)
    read_only.flags.writeable = False
    return [numpy.zeros(3, dtype=numpy.int32), read_only]


@pytest.mark.parametrize("name", ["cu_seqlens_q", "seqused_k", "softmax_scale", "softcap", "num_splits", "causal"])
def test_an_array_is_refused_by_name_after_a_call_that_passed(name):
    """The plain way's library takes an array as a tensor, and cannot be given a read-only one."""
    call = valid_calls.plain_varlen()
    for array in arrays():
        if isinstance(call.get(name), Tensor):
            same = array.__class__(call[name].shape, dtype=array.dtype)
            same[:] = call[name].numpy()
            same.flags.writeable = array.flags.writeable
            array = same
        refused(valid_calls.plain_varlen, call | {name: array}, name)


NO_DTYPES = [lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), UninitializedParameter, *(
    lambda i=i: arrays()[i] for i in range(2)
)]  # fmt: skip


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("make", NO_DTYPES)
def test_what_is_no_number_and_no_dtype_is_refused_by_name(make):
    refused(valid_calls.combine, valid_calls.combine() | {"out": None, "out_dtype": make()}, "out_dtype")
    for name in ("qkv_dtype", "causal", "num_splits", "batch_size", "window_size", "pack_gqa"):
        refused(valid_calls.metadata, valid_calls.metadata() | {name: make()}, name)
    pair = {"window_size": (make(), 1)}
    refused(valid_calls.plain_dense, valid_calls.plain_dense() | pair, "window_size")


class Loud:
    def __repr__(self) -> str:
        raise RuntimeError("nobody may look")


@pytest.mark.parametrize("value", [Loud(), [Loud()], (torch.ones(2).half(), torch.ones(2).half()), [0.0] * 10**6])
@pytest.mark.parametrize("name", ["q", "out", "sinks", "causal", "num_splits", "window_size"])
def test_an_error_text_asks_no_repr(name, value):
    with torch.autocast("cpu", torch.bfloat16):
        text = refused(valid_calls.dense, valid_calls.dense() | {name: value}, name)
    assert len(text) < 300


def test_negated_tensors_of_fp8_are_resolved():
    call = valid_calls.fp8()
    expected = FUNCTIONS[valid_calls.fp8](**call).clone()
    bits = call["k"].view(torch.uint8) ^ 0x80
    call["k"] = bits.view(torch.float8_e4m3fn)._neg_view()
    assert torch.equal(FUNCTIONS[valid_calls.fp8](**call), expected)


def test_a_collective_that_failed_names_the_argument(monkeypatch):
    def fail(_: Any) -> Tensor:
        raise RuntimeError("Invalid scalar type")

    call = valid_calls.dense()
    call["v"] = AsyncCollectiveTensor(call["v"])
    monkeypatch.setattr(AsyncCollectiveTensor, "wait", fail)
    assert "cannot be waited for: Invalid scalar type" in refused(valid_calls.dense, call, "v")


def test_what_is_written_under_a_functional_mode_is_functional():
    call = valid_calls.cache()
    with FunctionalTensorMode():
        call["v"] = FunctionalTensor.to_functional(call["v"])
        refused(valid_calls.cache, call, "k_cache")
        call = valid_calls.dense() | {"out": None}
        call["v"] = Wrapped(call["v"])
        call["q"] = FunctionalTensor.to_functional(call["q"])
        assert "FunctionalTensorMode" in refused(valid_calls.dense, call, "v")


def test_a_subclass_beside_functional_tensors_is_refused_by_name():
    """torch makes the answer one of the subclass, and fails."""
    call = valid_calls.dense() | {"out": None}
    call["k"] = call["k"].as_subclass(odd_tensors.Named)
    with FunctionalTensorMode():
        call["q"] = FunctionalTensor.to_functional(call["q"])
        refused(valid_calls.dense, call, "k")
    refused(valid_calls.dense, call | {"k": call["v"]}, "q")  # outside of its mode


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("q", torch.float32),
        ("causal", 1),
        ("num_splits", "x"),
        ("num_splits", torch.ones(2).int()),
        ("softcap", "x"),
        ("pack_gqa", torch.tensor(1)),
        ("softcap", 10**400),
    ],
)
def test_a_traced_call_names_the_argument_of_another_type(name, value):
    mode = FakeTensorMode()
    call = {n: mode.from_tensor(x) if isinstance(x, Tensor) else x for n, x in valid_calls.dense().items()}
    with mode:
        refused(valid_calls.dense, call | {name: value}, name)


def test_an_int_of_cache_seqlens_goes_with_fake_tensors_outside_of_their_mode():
    mode, call = FakeTensorMode(), valid_calls.plain_cache()
    call = {n: mode.from_tensor(x) if isinstance(x, Tensor) else x for n, x in call.items()}
    found = FUNCTIONS[valid_calls.plain_cache](**call | {"cache_seqlens": 3})
    assert (found[0] if isinstance(found, tuple) else found).shape == call["q"].shape


def test_a_meta_tensor_beside_functional_ones_is_no_answer():
    """torch took the shapes of such a call for its answer, in memory that nobody wrote."""
    call = valid_calls.plain_cache()
    with FunctionalTensorMode():
        call["q"] = FunctionalTensor.to_functional(call["q"])
        call["v_cache"] = call["v_cache"].to("meta")
        refused(valid_calls.plain_cache, call | {"out": None}, "v_cache")


def test_addresses_of_this_process_are_sure():
    assert plain.all_in_memory([torch.ones(1), None, 3, torch.empty(0)])
    assert not plain.all_in_memory([torch.ones(1), Wrapped(behind(torch.ones(3)))])
    q = torch.randn(1, 2, 2, 8)
    assert math.isfinite(float(jit_kernel.flash_attn_func(q, q, q).sum()))

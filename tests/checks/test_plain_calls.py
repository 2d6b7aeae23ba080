"""Calls of the CPU that pass Python's checks by: which they are, that they give the same bits, and what they decline.

That they let no mistake pass is tests/test_errors.py: a malformed call of a plain_...() base meets the library first.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import jit_kernel
from jit_kernel import config
from jit_kernel.fa3 import call as calls
from jit_kernel.fa3 import seam
from tests.support import valid_calls
from tests.support.valid_calls import Call, ints

pytestmark = pytest.mark.skipif(not jit_kernel._is_fa3_supported("cpu"), reason="no implementation serves the CPU here")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def _libraries():
    for dtype in DTYPES:
        q = torch.randn(1, 1, 1, 32).to(dtype)
        jit_kernel.flash_attn_func(q, q, q)


def tensors(dtype: torch.dtype, q: tuple[int, ...], k: tuple[int, ...]) -> Call:
    return {"q": torch.randn(q).to(dtype), "k": torch.randn(k).to(dtype), "v": torch.randn(k).to(dtype)}


def dense(dtype: torch.dtype = torch.float32) -> Call:
    return tensors(dtype, (2, 5, 4, 32), (2, 7, 2, 32))


def ragged(dtype: torch.dtype = torch.float32) -> Call:
    call = tensors(dtype, (9, 4, 32), (12, 2, 32))
    return call | {"cu_seqlens_q": ints(0, 4, 9), "cu_seqlens_k": ints(0, 5, 12)}


def cache(dtype: torch.dtype = torch.float32) -> Call:
    call = tensors(dtype, (2, 2, 4, 32), (2, 16, 2, 32))
    return {"q": call["q"], "k_cache": call["k"], "v_cache": call["v"], "cache_seqlens": ints(4, 13)}


def paged(dtype: torch.dtype = torch.float32) -> Call:
    call = tensors(dtype, (3, 4, 32), (8, 4, 2, 32))
    call = {"q": call["q"], "k_cache": call["k"], "v_cache": call["v"], "cache_seqlens": ints(7, 4)}
    return call | {"cu_seqlens_q": ints(0, 1, 3), "page_table": ints(1, 2, 3, 99).reshape(2, 2)}


OF = {
    dense: "flash_attn_func",
    ragged: "flash_attn_varlen_func",
    cache: "flash_attn_with_kvcache",
    paged: "flash_attn_with_kvcache",
}
SERVED: list[Call] = [
    {},
    {"causal": True, "return_softmax_lse": True},
    {"window_size": (3, 1)},
    {"window_size": [2, 0], "softcap": 8.0},
    {"softmax_scale": 0.3, "attention_chunk": 3},
    {"num_splits": 3, "return_softmax_lse": True},
]


class DeclinedError(Exception):
    """The call went on to the checks in Python."""


def plain(function: str, call: Call) -> Any:
    """The call as the library takes it by itself, if it does."""

    def declined(*_: Any) -> None:
        raise DeclinedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seam, "_checked", declined)
        try:
            return getattr(jit_kernel, function)(**call)
        except DeclinedError:
            return None


def by_python(function: str, call: Call) -> Any:
    """The call as it goes without the library's own checks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calls, "try_unchecked", None)
        return jit_kernel._load_fa3_kernels("cpu")[function](**call)


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def same_bits(found: Any, expected: Any) -> None:
    assert len(as_tuple(found)) == len(as_tuple(expected))
    for a, b in zip(as_tuple(found), as_tuple(expected), strict=True):
        assert a.dtype == b.dtype
        assert a.stride() == b.stride()
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("options", SERVED, ids=str)
@pytest.mark.parametrize("make", OF, ids=lambda make: make.__name__)
def test_plain_calls_are_served_with_the_same_bits(make, options, dtype):
    call = make(dtype) | options
    served = plain(OF[make], call)
    assert served is not None, "a plain call took the long way"
    same_bits(served, by_python(OF[make], call))
    same_bits(served, getattr(jit_kernel, OF[make])(**call))


@pytest.mark.parametrize("make", OF, ids=lambda make: make.__name__)
def test_out_and_bounds_are_plain(make):
    """out with gaps, max_seqlen and, for pages and ragged keys, lengths of their own."""
    call = make()
    wide = torch.full((*call["q"].shape[:-1], 40), -7.0)
    call["out"] = wide[..., :32]
    if make in (ragged, paged):
        call["max_seqlen_q"] = 5
    if make is ragged:
        call |= {"max_seqlen_k": 2**31 - 1, "seqused_k": ints(0, 7)}
    expected = by_python(OF[make], call | {"out": None})
    assert plain(OF[make], call) is call["out"]
    assert torch.equal(call["out"], expected)
    assert bool((wide[..., 32:] == -7.0).all())


@pytest.mark.parametrize(
    "base", [base for base in valid_calls.FUNCTIONS if base.__name__.startswith("plain_")], ids=lambda b: b.__name__
)
def test_the_calls_that_are_malformed_were_plain(base):
    assert plain(valid_calls.FUNCTIONS[base].__name__, base()) is not None


def _with_values_of_their_own_size() -> Call:
    return dense() | {"v": torch.randn(2, 7, 2, 16)}


DECLINED = {
    "sinks": (dense, lambda: dense() | {"sinks": torch.randn(4)}),
    "descale": (dense, lambda: dense(torch.float8_e4m3fn) | {"q_descale": torch.rand(2, 2)}),
    "deterministic as a number": (dense, lambda: dense() | {"deterministic": 0}),
    "hints": (dense, lambda: dense() | {"pack_gqa": True, "sm_margin": 2}),
    "head sizes that differ": (dense, _with_values_of_their_own_size),
    "a parameter": (dense, lambda: dense() | {"q": torch.nn.Parameter(torch.randn(2, 5, 4, 32), requires_grad=False)}),
    "softcap as an int": (dense, lambda: dense() | {"softcap": 8}),
    "no queries": (dense, lambda: dense() | {"q": torch.randn(2, 0, 4, 32)}),
    "rows without a query": (ragged, lambda: ragged() | {"cu_seqlens_q": ints(0, 4, 8), "return_softmax_lse": True}),
    "seqused_q": (ragged, lambda: ragged() | {"seqused_q": ints(1, 5)}),
    "qv": (ragged, valid_calls.mla),
    "an int for all lengths": (cache, lambda: cache() | {"cache_seqlens": 9}),
    "cache_leftpad": (cache, lambda: cache() | {"cache_leftpad": ints(1, 2)}),
    "cache_batch_idx": (cache, lambda: cache() | {"cache_batch_idx": ints(1, 0)}),
    "new keys": (cache, valid_calls.cache),
    "scheduler_metadata": (cache, valid_calls.planned),
}


@pytest.mark.parametrize("name", DECLINED)
def test_what_is_declined_is_served_the_long_way(name):
    make, change = DECLINED[name]
    call = change()
    copies = {key: value.clone() if isinstance(value, Tensor) else value for key, value in call.items()}
    assert plain(OF[make], call) is None
    if name == "deterministic as a number":
        with pytest.raises(TypeError, match="deterministic"):
            jit_kernel.flash_attn_func(**call)
        return
    found = getattr(jit_kernel, OF[make])(**call)
    same_bits(found, by_python(OF[make], copies))


def test_gradients_are_declined_in_grad_mode_alone():
    call = dense()
    call["k"].requires_grad_()
    assert plain("flash_attn_func", call) is None
    with torch.no_grad():
        assert plain("flash_attn_func", call) is not None


def test_a_setting_that_rules_the_cpu_out_rules_plain_calls_out(monkeypatch):
    jit_kernel.flash_attn_func(**dense())
    monkeypatch.setenv("JIT_KERNEL_IMPLEMENTATION", "musa")
    config.reload()
    try:
        with pytest.raises(NotImplementedError, match="JIT_KERNEL_IMPLEMENTATION"):
            jit_kernel.flash_attn_func(**dense())
    finally:
        monkeypatch.undo()
        config.reload()


def test_results_lie_on_the_cpu_whatever_the_default_device_is():
    """A serving engine makes its GPU the default device."""
    calls = {
        "flash_attn_func": dense(),
        "flash_attn_varlen_func": ragged() | {"seqused_q": ints(1, 5), "return_softmax_lse": True},
        "flash_attn_with_kvcache": cache() | {"return_softmax_lse": True},
        "flash_attn_combine": valid_calls.combine() | {"out": None},
        "merge_state": valid_calls.merge(),
    }
    for name, call in calls.items():
        function = getattr(jit_kernel, name)
        expected = function(**call)
        with torch.device("meta"):
            if call.keys() == dense().keys():
                assert plain(name, call) is not None
            found = function(**call)
            again = by_python(name, call) if name in OF.values() else found
        same_bits(found, expected)
        same_bits(again, expected)

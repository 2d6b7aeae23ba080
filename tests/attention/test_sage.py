"""SageAttention's packages, each recognised by what it is and asked for no more than it does."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import Tensor

import jit_kernel.flash_attention_v3 as fa3
from jit_kernel.attention import (
    DiffusionAttention,
    select_backend,
)
from jit_kernel.attention.dense import sage
from tests.support.musa_device import Machine, to_cpu, to_musa, write_package
from tests.support.sage_packages import SAGE_1, SAGE_MATE


@pytest.mark.parametrize(
    "error", ["RuntimeError('no MUSA device')", "OSError('libcuda.so.1')", "ImportError('triton')"]
)
def test_any_exception_of_the_import_is_a_reason(install: Any, error: str) -> None:
    install(f"raise {error}")
    found = select_backend("sage", 64, torch.bfloat16, "cpu")
    assert found.backend == "fa"
    assert f"importing sageattention failed with {error.split('(')[0]}" in found.reasons[0]


def test_pypis_package_is_for_cuda_whatever_the_tensor_says(install: Any) -> None:
    """Under torchada a MUSA tensor says is_cuda, and 1.x would take it."""
    install(SAGE_1)
    found = sage.find()
    assert isinstance(found, sage.Sage)
    assert found.flavour == "PyPI 1.x"
    pretending = types.SimpleNamespace(type="musa", is_cuda=True)
    reason = found.rejection(64, torch.bfloat16, pretending)  # type: ignore[arg-type]
    assert reason == "the installed sageattention (PyPI 1.x) is for cuda, not musa"
    cuda = torch.device("cuda", 0)
    assert found.rejection(64, torch.bfloat16, cuda) is None
    assert found.rejection(80, torch.bfloat16, cuda) == "PyPI 1.x serves head sizes 64, 96, 128, not 80"
    assert found.rejection(64, torch.float64, cuda) == "PyPI 1.x serves dtypes float16, bfloat16, float32, not float64"


def test_the_callers_k_stays(install: Any) -> None:
    install(SAGE_1)
    found = sage.find()
    assert isinstance(found, sage.Sage)
    q, k, v = (torch.randn(1, 8, 2, 64) for _ in "qkv")
    before = k.clone()
    found(q, k, v, False, None, False)
    assert torch.equal(k, before)
    found.function(q, k, v, tensor_layout="NHD")
    assert not torch.equal(k, before)  # what the copy protects from


def test_an_lse_that_would_be_swallowed_is_refused(install: Any) -> None:
    install(SAGE_1)
    found = sage.find()
    assert isinstance(found, sage.Sage)
    q = torch.randn(1, 8, 2, 64)
    assert isinstance(found.function(q, q.clone(), q, tensor_layout="NHD", return_lse=True), Tensor)  # swallowed
    with pytest.raises(NotImplementedError, match=r"PyPI 1\.x has no lse to return"):
        found(q, q, q, False, None, True)
    with pytest.raises(NotImplementedError, match="causal and 8 queries for 4 keys: it serves equal lengths only"):
        found(q, q[:, :4], q[:, :4], True, None, False)


def test_later_packages_are_recognised_by_signature_or_version(install: Any) -> None:
    install(SAGE_1.replace("smooth_k=True", "return_lse=False"), "2.2.0")
    found = sage.find()
    assert isinstance(found, sage.Sage)
    assert (found.flavour, found.returns_lse, found.spoils_k) == ("SageAttention 2", True, False)


def test_mates_wrapper_serves_musa(stack: Machine) -> None:
    write_package(stack.folder, "sageattention", __init__=SAGE_MATE)
    q, k, v = (torch.randn(2, 9, 4, 64).bfloat16() for _ in "qkv")
    attention = DiffusionAttention(64, torch.bfloat16, "musa", "sage", causal=True, strict=True)
    assert attention.selection.backend == "sage"
    out, lse = attention(*to_musa((q, k, v)), return_softmax_lse=True)
    expected, expected_lse = fa3.flash_attn_func(q, k, v, causal=True, return_softmax_lse=True)
    assert torch.allclose(to_cpu(out).float(), expected.float(), atol=2e-2)
    assert torch.allclose(to_cpu(lse), expected_lse, atol=1e-3)
    assert select_backend("sage", 256, torch.bfloat16, "musa").backend == "fa"

"""Selection of a backend: messages, fallbacks, and the layer that uses what was chosen."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import jit_kernel.flash_attention_v3 as fa3
from jit_kernel import config
from jit_kernel.attention import (
    AttentionLayer,
    DiffusionAttention,
    FlashAttentionBackend,
    ForwardMetadata,
    select_backend,
)
from tests.support.musa_device import Machine

# Messages


@pytest.mark.parametrize("version", [4, 2, "3", None])
def test_other_versions_of_flash_attention(version: Any) -> None:
    message = re.escape(
        f"fa_impl_ver is {version!r}; it must be 3 (FlashAttention-3), the only version that exists here"
    )
    with pytest.raises(ValueError, match=message):
        FlashAttentionBackend(fa_impl_ver=version, device="cpu")


def test_an_unknown_backend() -> None:
    with pytest.raises(
        ValueError, match="backend is 'xformers'; it must be one of fa, sage, sdpa, or None for the best"
    ):
        select_backend("xformers", 64, torch.bfloat16, "cpu")


@pytest.mark.parametrize("device", ["musa", "musa:1"])
@pytest.mark.parametrize(
    "ask",
    [
        lambda device: FlashAttentionBackend(device=device),
        lambda device: select_backend(None, 64, torch.bfloat16, device),
        lambda device: DiffusionAttention(64, torch.bfloat16, device, "sdpa"),
    ],
)
def test_musa_where_there_is_none(device: str, ask: Any) -> None:
    with pytest.raises(NotImplementedError) as caught:
        ask(device)
    text = str(caught.value)
    assert f"device is {device!r}, and no Moore Threads GPU can be used here" in text
    for part in (
        "torch_musa: missing (not installed; install torch_musa 2.7",
        "MATE: missing (not installed; git clone",
    ):
        assert part in text


def test_an_unknown_device() -> None:
    with pytest.raises(ValueError, match="device is 'tpu'; it must be cpu, cuda or musa"):
        FlashAttentionBackend(device="tpu")


def test_sage_without_its_package(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(3):
        found = select_backend("sage", 64, torch.bfloat16, "cpu")
    assert found.backend == "fa"
    assert found.reasons == (
        "sage: importing sageattention failed with ModuleNotFoundError: No module named 'sageattention'",
    )
    warnings = [record for record in caplog.records if "attention backend 'sage'" in record.getMessage()]
    assert len(warnings) == 1
    assert "'fa' takes its place" in warnings[0].getMessage()
    with pytest.raises(NotImplementedError, match="attention backend 'sage' is not available on cpu"):
        select_backend("sage", 64, torch.bfloat16, "cpu", strict=True)
    monkeypatch.setenv("JIT_KERNEL_STRICT", "1")
    config.reload()
    with pytest.raises(NotImplementedError, match="'sage' is not available"):
        select_backend("sage", 64, torch.bfloat16, "cpu")
    monkeypatch.undo()
    config.reload()


def test_the_install_command_is_for_the_device(stack: Machine, caplog: pytest.LogCaptureFixture) -> None:
    assert select_backend("sage", 64, torch.bfloat16, "musa").backend == "fa"
    assert "to install: git clone --recursive https://github.com/MooreThreads/mate.git && pip install" in caplog.text


def test_what_fa_does_not_serve_falls_to_sdpa(stack: Machine, caplog: pytest.LogCaptureFixture) -> None:
    assert select_backend("fa", 64, torch.float64, "cpu").backend == "sdpa"
    found = select_backend(None, 320, torch.float32, "musa")
    assert found.backend == "sdpa"
    assert "fp32: MATE computes in bf16 and fp16 only" in found.reasons[0]
    assert "'sdpa' takes its place" in caplog.text


def test_the_best_is_no_fallback(caplog: pytest.LogCaptureFixture) -> None:
    found = select_backend(None, 64, torch.bfloat16, "cpu", strict=True)
    assert (found.backend, found.reasons) == ("fa", ())
    assert select_backend("sdpa", 64, torch.bfloat16, "cpu", strict=True).backend == "sdpa"
    assert not caplog.records


# DiffusionAttention


@pytest.mark.parametrize("backend", ["fa", "sdpa"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("sq", "sk"), [(9, 9), (5, 12), (12, 5)])
def test_diffusion_attention(backend: str, causal: bool, sq: int, sk: int) -> None:
    q, k, v = torch.randn(2, sq, 4, 64), torch.randn(2, sk, 2, 64), torch.randn(2, sk, 2, 64)
    attention = DiffusionAttention(64, torch.float32, "cpu", backend, causal=causal, softmax_scale=0.2, strict=True)
    expected = fa3.flash_attn_func(q, k, v, softmax_scale=0.2, causal=causal)
    torch.testing.assert_close(attention(q, k, v), expected, rtol=1e-4, atol=1e-5)


def test_diffusion_attention_says_what_is_wrong() -> None:
    attention = DiffusionAttention(64, torch.float32, "cpu", "sdpa")
    q = torch.zeros(1, 4, 2, 64)
    for bad, message in (
        ((q[0], q, q), r"q has shape \(4, 2, 64\)"),
        ((q, q.bfloat16(), q), "k is bfloat16 on cpu; the backend was chosen for float32"),
        ((q, q, q[:, :3]), "k and v must agree"),
    ):
        with pytest.raises(ValueError, match=message):
            attention(*bad)
    with pytest.raises(NotImplementedError, match="has no lse to return"):
        attention(q, q, q, return_softmax_lse=True)


# FlashAttentionBackend


def test_forwards_use_what_was_chosen_not_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that replaces the module's functions later, or another backend, changes nothing."""
    backend = FlashAttentionBackend(device="cpu", plan_ahead=True)
    for name in ("flash_attn_varlen_func", "flash_attn_with_kvcache", "get_scheduler_metadata", "merge_state"):
        monkeypatch.setattr(fa3, name, lambda *args, **kwargs: pytest.fail("the default was called"))
    q, k = torch.randn(6, 4, 64), torch.randn(6, 2, 64)
    cu = torch.tensor([0, 2, 6], dtype=torch.int32)
    backend.forward_extend(q, k, k, ForwardMetadata(cu, 4))
    cache = torch.randn(2, 9, 2, 64)
    lengths = torch.tensor([4, 9], dtype=torch.int32)
    out = backend.forward_extend(q, None, None, ForwardMetadata(cu, 4, lengths, 9), k_cache=cache, v_cache=cache)
    _, lse = backend.forward_decode(q, cache, cache, ForwardMetadata(cu, 4, lengths, 9), return_softmax_lse=True)
    backend.merge(out, lse, out, lse)


def test_extend_and_decode_are_the_public_functions() -> None:
    backend = FlashAttentionBackend(device="cpu", deterministic=True)
    assert backend.num_splits == 1
    layer = AttentionLayer(window_size=(3, 0), softcap=4.0, sinks=torch.zeros(4), softmax_scale=0.3)
    cu, new = torch.tensor([0, 2, 6], dtype=torch.int32), torch.randn(2, 1, 2, 64)
    q, k, v = torch.randn(6, 4, 64), torch.randn(6, 2, 64), torch.randn(6, 2, 64)
    options = {"causal": True, "window_size": (3, 0), "softcap": 4.0, "sinks": layer.sinks, "softmax_scale": 0.3}
    expected = fa3.flash_attn_varlen_func(q, k, v, cu, cu, 4, 4, **options)
    assert torch.equal(backend.forward_extend(q, k, v, ForwardMetadata(cu, 4), layer), expected)
    caches, lengths = [torch.randn(2, 9, 2, 64) for _ in "kv"], torch.tensor([4, 7], dtype=torch.int32)
    one = torch.randn(2, 1, 4, 64)
    copies = [cache.clone() for cache in caches]
    expected = fa3.flash_attn_with_kvcache(one, *copies, k=new, v=new, cache_seqlens=lengths, num_splits=1, **options)
    metadata = ForwardMetadata(None, 1, lengths, 9)
    assert torch.equal(backend.forward_decode(one, *caches, metadata, layer, k=new, v=new), expected)
    assert all(torch.equal(a, b) for a, b in zip(caches, copies, strict=True))


def test_missing_pieces_are_named() -> None:
    backend, q = FlashAttentionBackend(device="cpu"), torch.zeros(2, 2, 64)
    cu, lengths = torch.tensor([0, 2], dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
    with pytest.raises(ValueError, match="k and v are None"):
        backend.forward_extend(q, None, None, ForwardMetadata(cu, 2))
    with pytest.raises(ValueError, match="k_cache and v_cache are None"):
        backend.forward_extend(q, q, q, ForwardMetadata(cu, 2, lengths, 2))
    with pytest.raises(ValueError, match="cache_seqlens is None"):
        backend.forward_decode(q, q, q, ForwardMetadata(cu, 2))

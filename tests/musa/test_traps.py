"""The traps of MATE, torchada and their namesakes: each with the fault itself shown where the guard is taken away."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import jit_kernel
import jit_kernel.flash_attention_v3 as fa3
from jit_kernel.fa3.musa import mate as musa_mate
from jit_kernel.fa3.musa import metadata as musa_metadata
from jit_kernel.fa3.musa import prebuilt as musa_prebuilt
from jit_kernel.fa3.musa import results as musa_results
from jit_kernel.fa3.seam import FUNCTIONS as CPU
from tests.support import musa_device
from tests.support.musa_calls import decode_call, metadata_of, same, truth
from tests.support.musa_device import Machine, machine, on_musa, to_musa

KVCACHE, VARLEN, DENSE = "flash_attn_with_kvcache", "flash_attn_varlen_func", "flash_attn_func"


def ragged(lengths: list[int], d: int = 64, seed: int = 0) -> dict[str, Any]:
    """A self-attention call over packed sequences, long enough that a lost tail shows."""
    random = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    q, k, v = (torch.randn(total, heads, d, generator=random).bfloat16() for heads in (4, 2, 2))
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return {"q": q, "k": k, "v": v, "cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": max(lengths)} | {
        "max_seqlen_k": max(lengths),
        "causal": True,
    }


# What the prebuilt kernels get wrong


def strided_k(call: dict[str, Any]) -> dict[str, Any]:
    """k and v as two views of one fused buffer: k's elements reach beyond k.numel() from its start."""
    fused = torch.cat([call["k"], call["v"]], dim=-1)
    return call | {"k": fused[..., :64], "v": fused[..., 64:]}


def test_a_strided_k_is_read_to_its_end(stack: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    call = strided_k(ragged([40, 50]))
    expected = truth(VARLEN, call)
    assert same(on_musa(VARLEN)(**call), expected)
    assert stack.mate.calls[-1].path == "mubin"
    monkeypatch.setattr(musa_prebuilt, "corrected", lambda *_: {})
    assert not same(on_musa(VARLEN)(**call), expected)


def test_a_single_sequence_keeps_its_length(stack: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed with room behind it, as a static buffer has: MATE's prebuilt kernel would attend to all of the buffer."""
    call = ragged([30])
    call["k"], call["v"] = (torch.cat([x, torch.full_like(x, 7.0)]) for x in (call["k"], call["v"]))
    expected = truth(VARLEN, call)
    assert same(on_musa(VARLEN)(**call), expected)
    monkeypatch.setattr(musa_prebuilt, "corrected", lambda *_: {})
    assert not same(on_musa(VARLEN)(**call), expected)


def test_out_with_strides_is_not_handed_to_mate(stack: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    call = ragged([20, 9])
    wide = torch.zeros(29, 4, 128).bfloat16()
    out = on_musa(VARLEN)(**call, out=wide[..., :64])
    assert same(wide[..., :64], truth(VARLEN, call))
    assert not wide[..., 64:].count_nonzero()
    assert out.data_ptr() == wide.data_ptr()
    monkeypatch.setattr(musa_prebuilt, "destination", lambda call: call.out)
    with pytest.raises(RuntimeError, match="out must be contiguous"):
        on_musa(VARLEN)(**call, out=wide[..., :64])


def test_a_window_that_is_causal_by_another_name(stack: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    call = ragged([20, 9]) | {"causal": False, "window_size": (-1, 0)}
    assert same(on_musa(VARLEN)(**call), truth(VARLEN, call))
    unguarded = lambda causal, window_size: {"causal": causal, "window_size": window_size}  # noqa: E731
    monkeypatch.setattr(musa_metadata, "mask", unguarded)
    with pytest.raises(RuntimeError, match="refused the call with an assertion"):
        on_musa(VARLEN)(**call)


# Sinks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sinks_lose_nothing(stack: Machine, dtype: torch.dtype) -> None:
    """MATE takes them in bf16 alone, and then drops metadata and splits; ours come after the call."""
    call = decode_call(batch=3, sq=1, keys=90)
    call |= {name: call[name].half() for name in ("q", "k_cache", "v_cache")}
    sinks = torch.tensor([5.0, 4.0, -1.0, 6.0]).to(dtype)
    metadata = metadata_of(call, qkv_dtype=torch.float16)
    out = getattr(fa3, KVCACHE)(**to_musa(call | {"sinks": sinks}), scheduler_metadata=metadata)
    assert stack.mate.calls[-1].compiled_for["has_metadata"]
    assert not stack.mate.calls[-1].compiled_for["has_learnable_sink"]
    assert same(out.inner, truth(KVCACHE, call | {"sinks": sinks}))
    assert not same(out.inner, truth(KVCACHE, call))


# Calling


def test_an_int_cache_seqlens_is_expanded_to_the_batch(stack: Machine) -> None:
    """MATE expands it to the number of pages."""
    call = decode_call(batch=2, sq=1, keys=9)
    pages = {name: call[name].reshape(-1, 4, 2, 64) for name in ("k_cache", "v_cache")}
    table = torch.arange(8, dtype=torch.int32).reshape(2, 4)
    call |= pages | {"cache_seqlens": 9, "page_table": table}
    out = on_musa(KVCACHE)(**call)
    assert same(out, truth(KVCACHE, call))
    found = jit_kernel._load_fa3_kernels("musa:0")[KVCACHE](**to_musa(call))  # the mapping's function resolves it, too
    assert same(found.inner, out)
    with pytest.raises(AssertionError):
        stack.function(KVCACHE)(**to_musa(call))


def test_out_of_kvcache_is_written_though_mate_has_no_such_argument(stack: Machine) -> None:
    call = decode_call(batch=2, sq=1, keys=9)
    out = torch.full_like(call["q"], float("nan"))
    given = to_musa(out)
    assert getattr(fa3, KVCACHE)(**to_musa(call), out=given) is given
    assert same(out, truth(KVCACHE, call))
    with pytest.raises(TypeError, match="out"):
        stack.function(KVCACHE)(**to_musa(call), out=given)


def test_an_out_that_is_not_written_is_copied(stack: Machine) -> None:
    """A wrapper that drops `out`, as one between an engine and MATE did: the result is used, the buffer filled."""
    whole = musa_mate.load()

    def dropping(*, out: Tensor | None = None, **rest: Any) -> Any:
        return whole.flash_attn_varlen_func(**rest)

    musa_mate._mate = musa_mate.Mate(whole.version, dropping, dropping, dropping)
    call = ragged([5, 6])
    out = torch.full_like(call["q"], float("nan"))
    on_musa(VARLEN)(**call, out=out)
    assert same(out, truth(VARLEN, call))


@pytest.mark.parametrize("dense", [False, True])
def test_sizes_beyond_int32_take_a_compiled_kernel(
    stack: Machine, monkeypatch: pytest.MonkeyPatch, dense: bool
) -> None:
    call = ragged([16, 16])
    if dense:
        call = {name: call[name].unflatten(0, (2, 16)) for name in "qkv"} | {"causal": True}
    name = DENSE if dense else VARLEN
    on_musa(name)(**call)
    assert stack.mate.calls[-1].path == "mubin"
    monkeypatch.setattr(musa_prebuilt, "_INT32_ELEMENTS", 100)
    assert same(on_musa(name)(**call), truth(name, call))
    assert stack.mate.calls[-1].path == "jit"


def test_four_results_become_two(stack: Machine) -> None:
    call = decode_call(batch=2, sq=1, keys=9) | {"return_softmax_lse": True}
    assert len(stack.function(KVCACHE)(**to_musa(call))) == 4
    assert len(on_musa(KVCACHE)(**call)) == 2


def test_mate_is_called_without_gradients(stack: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its varlen function is an autograd.Function with a backward for varlen alone."""
    on_musa(VARLEN)(**ragged([5, 6]))
    assert stack.grad_enabled == [False]
    wanting = to_musa(ragged([5, 6]))
    wanting["q"].requires_grad_()
    with pytest.raises(NotImplementedError, match="q requires grad"):
        fa3.flash_attn_varlen_func(**wanting)
    monkeypatch.setattr(torch, "no_grad", contextlib.nullcontext)
    on_musa(VARLEN)(**ragged([5, 6]))
    assert stack.grad_enabled[-1] is True


def test_every_call_is_by_keyword(stack: Machine) -> None:
    """FA3's and sglang's positions differ from the wrapper's from index 9 on."""
    seen: list[int] = []
    whole = musa_mate.load()

    def counting(*args: Any, **kwargs: Any) -> Any:
        seen.append(len(args))
        return whole.flash_attn_varlen_func(**kwargs)

    musa_mate._mate = musa_mate.Mate(whole.version, counting, counting, counting)
    on_musa(VARLEN)(**ragged([5, 6]))
    assert seen == [0]


def test_only_qv_is_refused_before_torchada_could_drop_it(stack: Machine) -> None:
    call = decode_call(batch=2, sq=1, keys=9) | {"qv": None, "only_qv": True}
    with pytest.raises((ValueError, NotImplementedError)):
        on_musa(KVCACHE)(**call)
    served = {name: value for name, value in call.items() if name not in ("qv", "only_qv")}
    on_musa(KVCACHE)(**served, only_qv=False)
    assert all("only_qv" not in arguments for _, arguments in stack.given)


def test_rows_past_seqused_q_stay(stack: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    call = ragged([9, 9]) | {"seqused_q": torch.tensor([4, 0], dtype=torch.int32)}
    out = on_musa(VARLEN)(**call)
    assert not out[4:].count_nonzero()
    given = torch.full_like(call["q"], 5.0)
    on_musa(VARLEN)(**call, out=given)
    assert (given[4:9] == 5.0).all()
    assert (given[9:] == 5.0).all()
    assert same(given[:4], out[:4])


def test_new_keys_may_have_rows_behind_them(stack: Machine) -> None:
    """MATE asserts that packed new keys end where cu_seqlens_k_new does."""
    call = decode_call(batch=2, sq=1, keys=9)
    new = torch.randn(5, 2, 64).bfloat16()
    call |= {"k": new, "v": new, "cu_seqlens_k_new": torch.tensor([0, 1, 3], dtype=torch.int32)}
    copied = {name: call[name].clone() for name in ("k_cache", "v_cache")}
    assert same(on_musa(KVCACHE)(**call), truth(KVCACHE, call | copied))


def test_empty_rows_are_never_nan(stack: Machine) -> None:
    """sigmoid(-inf - sink) is 0, and the lse becomes the sink."""
    out, lse = musa_results.with_sinks(
        torch.zeros(2, 1, 4), torch.full((1, 2), -float("inf")), torch.tensor([0.25]), ragged_q=True
    )
    assert not out.count_nonzero()
    assert lse.tolist() == [[0.25, 0.25]]


# Logging


def test_mates_logging_is_pointed_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setenv("MATE_LOGLEVEL", "10")
    with machine(tmp_path / "site", CPU):
        on_musa(VARLEN)(**ragged([5, 6]))
    assert "MATE_LOGLEVEL is 10: MATE reads every tensor of every call" in caplog.text


def test_the_double_refuses_plain_tensors(stack: Machine) -> None:
    with pytest.raises(AssertionError, match="inputs must be on MUSA device"):
        stack.function(VARLEN)(**ragged([5]))
    assert isinstance(to_musa(torch.zeros(1)), musa_device.MusaTensor)

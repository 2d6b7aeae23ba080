"""The traps of MATE's scheduler metadata and of new keys: each with the fault shown where the guard is taken away."""

from __future__ import annotations

import contextlib
import inspect

import pytest
import torch
from torch import Tensor

import jit_kernel.flash_attention_v3 as fa3
from jit_kernel.fa3 import call as calls
from jit_kernel.fa3 import musa as ours
from jit_kernel.fa3.call import Call
from jit_kernel.fa3.musa import mate as musa_mate
from jit_kernel.fa3.musa import metadata as musa_metadata
from tests.support.mate_kernels import ForeignMetadataError
from tests.support.musa_calls import decode_call, metadata_of, same, truth
from tests.support.musa_device import RUNTIME, Machine, on_musa, to_musa

KVCACHE = "flash_attn_with_kvcache"


def test_mates_own_sinks_would_drop_the_metadata(stack: Machine) -> None:
    call = decode_call(batch=3, sq=1, keys=90)
    table = musa_metadata.table_of(metadata_of(call), 3)
    stack.function(KVCACHE)(**to_musa(call | {"sinks": torch.zeros(4).bfloat16()}), scheduler_metadata=table)
    assert not stack.mate.calls[-1].compiled_for["has_metadata"]


def test_metadata_is_never_sliced_by_another_batch(stack: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = decode_call(batch=4, sq=1, keys=90)
    metadata, start = metadata_of(whole), 24
    half = {name: x[:2] if isinstance(x, Tensor) else x for name, x in whole.items()}
    kvcache = getattr(fa3, KVCACHE)
    with pytest.raises(ValueError, match="scheduler_metadata has shape"):
        kvcache(**to_musa(half), scheduler_metadata=metadata)
    monkeypatch.setattr(musa_metadata, "table_of", lambda metadata, batch: metadata[start:])
    stack.kernels.strict = False
    out = kvcache(**to_musa(half), scheduler_metadata=metadata)
    assert out.inner.isnan().any()  # rows that the misread table never lists


def test_a_buffer_of_another_layout_is_refused(stack: Machine) -> None:
    """FA3's metadata has another length and order; so has MATE's bare table."""
    call = decode_call(batch=3, sq=1, keys=90)
    for length in (1 + 4 * 4, 4 * 3, 24 + 8 * 3 + 1):
        with pytest.raises(ValueError, match="scheduler_metadata has shape"):
            getattr(fa3, KVCACHE)(**to_musa(call), scheduler_metadata=to_musa(torch.zeros(length, dtype=torch.int32)))


def test_metadata_is_made_on_its_lengths_device(stack: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """MATE allocates it on the current device."""
    call = decode_call(batch=2, sq=1, keys=20)
    for index in (0, 1):
        metadata = metadata_of({name: to_musa(x, index) for name, x in call.items()})
        assert metadata.device == torch.device("musa", index)
        assert RUNTIME.current_device() == 0
        out = getattr(fa3, KVCACHE)(**to_musa(call, index), scheduler_metadata=metadata)
        assert out.device == torch.device("musa", index)
    assert stack.kernels.issued[-1]["device"] == 1
    monkeypatch.setattr(musa_mate, "device_guard", lambda device: contextlib.nullcontext())
    metadata_of({name: to_musa(x, 1) for name, x in call.items()})
    assert stack.kernels.issued[-1]["device"] == 0


def test_cu_seqlens_k_new_without_keys_is_dropped(stack: Machine) -> None:
    """MATE adds it to the lengths in its metadata, and compiles another variant."""
    call = decode_call(batch=2, sq=1, keys=20)
    new = torch.tensor([0, 1, 2], dtype=torch.int32)
    metadata = metadata_of(call, cu_seqlens_k_new=new)
    assert stack.kernels.issued[-1]["new"] is None
    out = getattr(fa3, KVCACHE)(**to_musa(call | {"cu_seqlens_k_new": new}), scheduler_metadata=metadata)
    assert not stack.mate.calls[-1].compiled_for["has_cu_seqlens_k_new"]
    assert same(out.inner, truth(KVCACHE, call))
    raw = {**to_musa(call), "cu_seqlens_k_new": to_musa(new)}
    defaults = {p.name: p.default for p in inspect.signature(fa3.flash_attn_with_kvcache).parameters.values()}
    unchecked = Call(*calls.of(KVCACHE, defaults | raw))  # the checks would drop it before
    unchecked.max_seqlen_q = 1
    ours.attend(unchecked)
    assert not stack.mate.calls[-1].compiled_for["has_cu_seqlens_k_new"]
    stack.function(KVCACHE)(**raw)
    assert stack.mate.calls[-1].compiled_for["has_cu_seqlens_k_new"]


def test_cu_seqlens_k_new_with_keys_is_refused_in_a_capture(stack: Machine) -> None:
    call = decode_call(batch=2, sq=1, keys=20)
    new = {name: call[f"{name}_cache"][:, :1].flatten(0, 1).clone() for name in "kv"}
    call |= new | {"cu_seqlens_k_new": torch.tensor([0, 1, 2], dtype=torch.int32)}
    RUNTIME.capturing = True
    with pytest.raises(NotImplementedError, match="cannot be captured into a graph"):
        on_musa(KVCACHE)(**call)
    RUNTIME.capturing = False
    assert on_musa(KVCACHE)(**call).isfinite().all()


def test_multi_query_decode_states_its_queries(stack: Machine) -> None:
    """Speculative verification: metadata made for one query a sequence is another call's."""
    call = decode_call(batch=2, sq=4, keys=90)
    out = getattr(fa3, KVCACHE)(**to_musa(call), scheduler_metadata=metadata_of(call))
    assert same(out.inner, truth(KVCACHE, call))
    with pytest.raises(ForeignMetadataError, match="max_seqlen_q was 1, now 4"):
        getattr(fa3, KVCACHE)(**to_musa(call), scheduler_metadata=metadata_of(call, max_seqlen_q=1))

"""Scheduler metadata serves the calls that its splits can serve; for any other the parameter that differs is named."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

import jit_kernel
from jit_kernel.fa3 import call as calls
from jit_kernel.fa3 import header
from jit_kernel.fa3.call import MetadataParameters
from jit_kernel.fa3.checks.call import checked
from tests.support.valid_calls import ints

B, SQ, SK, HQ, HK, D = 3, 5, 24, 4, 2, 64
WINDOWS = [(7, 0), (0, 0), (-1, 0), (7, 3), (-1, 3), (-1, -1)]
each_window = pytest.mark.parametrize("window", WINDOWS, ids=str)


def plan(**more: Any) -> Tensor:
    sizes = {"batch_size": B, "max_seqlen_q": SQ, "max_seqlen_k": SK, "num_heads_q": HQ, "num_heads_kv": HK}
    made = sizes | {"headdim": D, "qkv_dtype": torch.float32, "cache_seqlens": ints(4, 19, 11), "num_splits": 2}
    return jit_kernel.get_scheduler_metadata(**made | more)


def attend(
    metadata: Tensor | None,
    window: tuple[int, int],
    *,
    causal: bool = False,
    softcap: float = 0.0,
    num_splits: int = 2,
) -> Tensor:
    torch.manual_seed(0)
    q, k, v = torch.randn(B, SQ, HQ, D), torch.randn(B, SK, HK, D), torch.randn(B, SK, HK, D)
    options = {"num_splits": num_splits, "causal": causal, "window_size": window, "softcap": softcap}
    lengths = {"cache_seqlens": ints(4, 19, 11), "scheduler_metadata": metadata}
    found = jit_kernel.flash_attn_with_kvcache(q, k, v, **lengths, **options)
    assert isinstance(found, Tensor)
    return found


@each_window
@pytest.mark.parametrize("causal", [False, True])
def test_metadata_made_without_a_window_serves_every_window(window, causal):
    """A window that ends at the query masks as causal does, and the call is not causal for that."""
    assert torch.equal(attend(plan(causal=causal), window, causal=causal), attend(None, window, causal=causal))


@each_window
def test_metadata_of_a_call_that_is_not_causal_serves_no_causal_one(window):
    with pytest.raises(ValueError, match="made with causal = 0; this call has 1"):
        attend(plan(), window, causal=True)


@each_window
@pytest.mark.parametrize("made", [(7, 0), (3, 3), (-1, 3)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_one_plan_serves_layers_with_other_windows(made, window, causal):
    """Engines plan once a step, with the window of a group of layers or none, and global layers use the plan too."""
    metadata = plan(window_size=made, causal=causal)
    assert torch.equal(attend(metadata, window, causal=causal), attend(None, window, causal=causal))


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_one_plan_serves_layers_with_a_softcap_and_without(planned, softcap):
    metadata = plan(has_softcap=planned)
    assert torch.equal(attend(metadata, (-1, -1), softcap=softcap), attend(None, (-1, -1), softcap=softcap))


def test_a_plan_for_more_keys_than_the_cache_has_room_for_serves():
    metadata = plan(max_seqlen_k=131072)
    assert torch.equal(attend(metadata, (-1, -1)), attend(None, (-1, -1)))


@pytest.mark.parametrize("batch", [0, 1, 3, 4, 5, 16, 64, 255, 256])
def test_metadata_fits_the_buffers_of_serving_engines(batch):
    """sglang and vLLM allocate 1 + round_up(b, 4) * 4 numbers for the largest batch and copy each plan to the front."""
    metadata = plan(batch_size=batch, cache_seqlens=torch.ones(batch, dtype=torch.int32))
    assert metadata.shape == (1 + -(-max(batch, 1) // 4) * 4 * 4,)


def test_a_copy_in_a_buffer_of_an_engine_is_verified():
    made = plan()
    buffer = torch.zeros(1 + 64 * 4, dtype=torch.int32)
    buffer[: made.shape[0]] = made
    for copy in (buffer, buffer[: made.shape[0]]):
        assert torch.equal(attend(copy, (-1, -1)), attend(None, (-1, -1)))
        with pytest.raises(ValueError, match="made with num_splits = 2; this call has 3"):
            attend(copy, (-1, -1), num_splits=3)
    with pytest.raises(ValueError, match=r"has shape \(16,\); for a batch of 3 it must hold at least 17 numbers"):
        attend(made[:16], (-1, -1))


def test_every_parameter_comes_back_from_the_header():
    """Numbers that share one of the header's with others: each is named with its own value."""
    shared = {"qkv_dtype": (torch.float16, 2, 0), "pack_gqa": (False, 0, -1), "cache_leftpad": (ints(0, 0, 0), 1, 0)}
    shared |= {"cu_seqlens_q": (ints(0, 5, 10, 15), 1, 0), "causal": (True, 1, 0)}
    for name, (value, made, wanted) in shared.items():
        with pytest.raises(ValueError, match=f"made with {name} = {made}; this call has {wanted}"):
            attend(plan(**{name: value}), (-1, -1))


@pytest.mark.parametrize("keys", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_metadata_of_another_implementation_serves_where_q_and_keys_differ(keys):
    """Metadata has one dtype: whoever serves that one made it, not whoever serves q in 16 bit over e4m3."""
    q, lengths = torch.zeros(B, SQ, HQ, D).bfloat16(), ints(4, 19, 11)
    caches = {f"{name}_cache": torch.zeros(B, SK, HK, D).to(keys) for name in "kv"}
    parameters = {
        name: p.default for name, p in inspect.signature(jit_kernel.flash_attn_with_kvcache).parameters.items()
    }
    given = parameters | caches | {"q": q, "cache_seqlens": lengths}
    made = {}
    for maker in ("portable", "hopper", "cpu"):
        made[maker] = header.make(maker, MetadataParameters(B, SQ, SK, HQ, HK, D, lengths))
    call = checked(calls.of(calls.KVCACHE, given | {"scheduler_metadata": made["hopper"]}))
    assert header.verify("hopper", call)["batch_size"] == B
    for maker, served in (("portable", keys != q.dtype), ("cpu", False)):
        if served:
            assert header.verify(maker, call)["batch_size"] == B
            continue
        with pytest.raises(ValueError, match=f"must come from get_scheduler_metadata of the {maker} implementation"):
            header.verify(maker, call)

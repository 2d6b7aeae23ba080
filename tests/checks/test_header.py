"""Scheduler metadata serves the calls that its splits can serve; for any other the parameter that differs is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import jit_kernel
from tests.support.valid_calls import ints

B, SQ, SK, HQ, HK, D = 3, 5, 24, 4, 2, 64
WINDOWS = [(7, 0), (0, 0), (-1, 0), (7, 3), (-1, 3), (-1, -1)]
each_window = pytest.mark.parametrize("window", WINDOWS, ids=str)


def plan(**more: Any) -> Tensor:
    sizes = {"batch_size": B, "max_seqlen_q": SQ, "max_seqlen_k": SK, "num_heads_q": HQ, "num_heads_kv": HK}
    made = sizes | {"headdim": D, "qkv_dtype": torch.float32, "cache_seqlens": ints(4, 19, 11), "num_splits": 2}
    return jit_kernel.get_scheduler_metadata(**made | more)


def attend(metadata: Tensor | None, window: tuple[int, int], *, causal: bool) -> Tensor:
    torch.manual_seed(0)
    q, k, v = torch.randn(B, SQ, HQ, D), torch.randn(B, SK, HK, D), torch.randn(B, SK, HK, D)
    options = {"num_splits": 2, "causal": causal, "window_size": window}
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


@pytest.mark.parametrize("made", [(7, 0), (3, 3), (-1, 3)], ids=str)
def test_metadata_made_with_another_window_is_refused(made):
    with pytest.raises(ValueError, match=r"made with (causal|window_left|window_right) = "):
        attend(plan(window_size=made), (5, 0), causal=False)

"""Cascade attention: keys that many queries share are read once, then merged with each sequence's own keys.

Source of the merge: with the two parts' lse, out = sum_i exp(lse_i - lse) * out_i, lse = log sum_i exp(lse_i), because
a softmax over a union of keys is the denominator-weighted mean of the softmaxes over its parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from jit_kernel.attention.metadata import AttentionLayer, ForwardMetadata
from jit_kernel.attention.plan import retagged


def merged(
    decode: Callable[..., Any],
    merge: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    prefix: ForwardMetadata,
    suffix: ForwardMetadata,
    layer: AttentionLayer,
) -> tuple[Tensor, Tensor]:
    """out and lse of `FlashAttentionBackend.forward_cascade`, by its decode and merge.

    Each part has scheduler metadata under a tag of its own.
    """
    if layer.window_size[0] >= 0 or layer.window_size[1] > 0 or layer.attention_chunk > 0:
        raise NotImplementedError(
            f"cascade attention with window_size {layer.window_size} and attention_chunk {layer.attention_chunk}: "
            "their bounds count keys across prefix and suffix; use forward_extend or forward_decode for such a layer"
        )
    if prefix.cu_seqlens_q is None or suffix.cu_seqlens_q is None:
        raise ValueError("cu_seqlens_q is None; cascade attention groups the tokens of q (total_q, hq, d) in two ways")
    # Every prefix key precedes every query, and the sink must enter the denominator once: with the suffix.
    shared = replace(layer, causal=False, window_size=(-1, -1), sinks=None)
    own = replace(layer, causal=layer.causal or layer.window_size[1] == 0, window_size=(-1, -1))
    out_a, lse_a = decode(q, k_cache, v_cache, retagged(prefix, "prefix"), shared, return_softmax_lse=True)
    out_b, lse_b = decode(q, k_cache, v_cache, retagged(suffix, "suffix"), own, return_softmax_lse=True)
    return merge(out_a, lse_a, out_b, lse_b)

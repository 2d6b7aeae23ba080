"""Attention of one layer of a transformers model, with the mask that make_mask() made for the forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jit_kernel.fa3.call import UNBOUNDED
from jit_kernel.flash_attention_v3 import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from jit_kernel.integrations import told
from jit_kernel.integrations.transformers.layouts import Ragged
from jit_kernel.integrations.transformers.masks import Mask

HOST = "transformers"
Settings = dict[str, Any]

# Arguments that models hand on to attention and that say nothing about its scores.
_WITHOUT_EFFECT = frozenset(
    {"position_ids", "cache_position", "use_cache", "return_dict", "output_hidden_states", "logits_to_keep"}
    | {"num_items_in_batch", "deterministic", "output_router_logits", "return_loss"}
    # Of continuous batching: what its cache has done by now.
    | {"read_index", "write_index", "logits_indices", "logits_processor_args"}
)


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Mask | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | dict[str, Tensor] | None = None,
    max_length_q: int | Tensor | None = None,
    max_length_k: int | Tensor | dict[str, int] | None = None,
    cache: Any = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """One layer's attention: query (b, hq, sq, d), key and value (b, hk, sk, d or dv) to (b, sq, hq, dv).

    softcap: of the scores. s_aux: (hq,) sinks. A model that makes no mask (vision encoders) has is_causal, else
    the module's, for more than one query, and sliding_window. cu_seq_lens_q, cu_seq_lens_k (sequences + 1,): sequences
    packed end to end. cache: of continuous batching; while cu_seq_lens_k is still a dict by kind of layer, as in
    transformers 5.23, this layer's keys and values are written to it here.
    Rows of padding get what they see of their sequence where it lies before them, else 0.
    Raises NotImplementedError for dropout, attention weights, position biases, and every argument unknown here.
    """
    if isinstance(cu_seq_lens_k, dict):
        key, value, cu_seq_lens_k, max_length_k = _cached(
            module, key, value, cache, {**others, "cu_seq_lens_k": cu_seq_lens_k, "max_length_k": max_length_k}
        )
    _refuse(dropout, attention_mask, others)
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    packed = cu_seq_lens_q is not None and cu_seq_lens_k is not None
    mask = attention_mask
    if mask is None:
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        mask = _unmasked(q, k, bool(causal) and (packed or q.shape[1] > 1), sliding_window)
    if mask.later is not None and not packed:
        mask = mask.later()
    sinks = s_aux if s_aux is None or s_aux.dtype == q.dtype else s_aux.float()
    settings: Settings = {
        "softmax_scale": scaling,
        "causal": mask.causal,
        "window_size": mask.window_size,
        "attention_chunk": mask.attention_chunk,
        "softcap": softcap or 0.0,
        "sinks": sinks,
    }
    if packed:
        lengths = tuple(n if isinstance(n, int) else None for n in (max_length_q, max_length_k))
        found = _packed(q, k, v, mask, (cu_seq_lens_q, cu_seq_lens_k), lengths, settings)
    elif mask.bits is not None and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return _by_sdpa(query, key, value, mask, settings), None
    else:
        if k.shape[1] != mask.keys:
            k, v = k[:, : mask.keys], v[:, : mask.keys]
        found = _with_layout(q, k, v, mask, settings)
    told.served(HOST)
    return found, None


def _cached(
    module: torch.nn.Module, key: Tensor, value: Tensor, cache: Any, paged: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor, int | Tensor | None]:
    """(key, value, cu_seq_lens_k, max_length_k) of a layer, with what continuous batching's cache holds of them.

    paged: the arguments that the cache reads, and in which it writes this layer's lengths.
    """
    if not callable(getattr(cache, "update", None)):
        raise TypeError(
            f"cache is {type(cache).__name__}; beside a cu_seq_lens_k by kind of layer it must be the cache of "
            "continuous batching, which has update()"
        )
    key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=paged)
    return key, value, paged["cu_seq_lens_k"], paged["max_length_k"]


def _packed(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, offsets: tuple[Any, Any], longest: tuple[Any, ...], settings: Settings
) -> Tensor:
    """Sequences packed end to end by cu_seq_lens_q and cu_seq_lens_k; the mask gives its settings alone."""
    if mask.padded:
        raise NotImplementedError("cu_seq_lens_q stands beside an attention_mask with padding; give one of them")
    if mask.bits is not None and not mask.packing:
        raise NotImplementedError(
            "cu_seq_lens_q stands beside a mask that is neither causal nor a window; give one of them"
        )
    return _ragged(q, k, v, Ragged(None, offsets[0], None, offsets[1], *longest), settings)


def _unmasked(q: Tensor, k: Tensor, causal: bool, sliding_window: int | None) -> Mask:
    """The mask of a model that makes none; sliding_window counts the token itself, on either side."""
    window = UNBOUNDED
    if sliding_window is not None:
        window = (sliding_window - 1, 0 if causal else sliding_window - 1)
    return Mask(q.shape[1], k.shape[1], causal, window)


def _with_layout(q: Tensor, k: Tensor, v: Tensor, mask: Mask, settings: Settings) -> Tensor:
    if mask.ragged is not None:
        out = _ragged(q, k, v, mask.ragged, settings)
        if mask.behind is not None:  # the rows of both are none of the other
            out = out + _ragged(q, k, v, mask.behind, {**settings, "causal": False})
        return out
    if mask.bits is not None or mask.leftpad is not None or mask.lengths is not None or _continues(q, mask):
        lengths: Tensor | int | None = mask.lengths
        if lengths is None and k.shape[1] != mask.keys:  # a number costs a tensor and the slower way to a kernel
            lengths = mask.keys
        found = flash_attn_with_kvcache(
            q, k, v,
            cache_seqlens=lengths,
            cache_leftpad=mask.leftpad,
            draft_mask=mask.bits,
            **settings,
        )  # fmt: skip
    else:
        found = flash_attn_func(q, k, v, **settings)
    assert isinstance(found, Tensor)
    return found


def _continues(q: Tensor, mask: Mask) -> bool:
    """Whether the queries are the last of more keys."""
    return mask.aligned and q.shape[1] < mask.keys


def _ragged(q: Tensor, k: Tensor, v: Tensor, rows: Ragged, settings: Settings) -> Tensor:
    """Attention over rows laid end to end; 0 in the rows that are none of them."""
    q_rows, k_rows, v_rows = (
        x.flatten(0, 1) if of is None else x.flatten(0, 1).index_select(0, of)
        for x, of in ((q, rows.rows_q), (k, rows.rows_k), (v, rows.rows_k))
    )
    found = flash_attn_varlen_func(
        q_rows, k_rows, v_rows, rows.cu_q, rows.cu_k, rows.longest_q, rows.longest_k, **settings
    )
    assert isinstance(found, Tensor)
    if rows.rows_q is not None:
        every = found.new_zeros(q.shape[0] * q.shape[1], *found.shape[1:])
        found = every.index_copy(0, rows.rows_q, found)
    return found.view(*q.shape[:2], *found.shape[1:])


def _by_sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Mask, settings: Settings) -> Tensor:
    """The gradient of a mask that FlashAttention has no setting for: torch's SDPA, told and counted."""
    for name in ("softcap", "sinks"):
        if settings[name] is not None and not (isinstance(settings[name], float) and settings[name] == 0):
            raise NotImplementedError(
                f"a gradient through {name} and a mask that is neither causal nor a window: use torch.no_grad(), or "
                "attn_implementation='eager'"
            )
    assert mask.seen is not None
    told.passed_on(HOST, "a gradient through a mask that is neither causal nor a window")
    found = torch.nn.functional.scaled_dot_product_attention(
        query, key[:, :, : mask.keys], value[:, :, : mask.keys],
        attn_mask=mask.seen, scale=settings["softmax_scale"], enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return found.transpose(1, 2)


def _refuse(dropout: float, attention_mask: object, others: dict[str, Any]) -> None:
    """NotImplementedError for what would change the result and cannot be honoured."""
    if dropout:
        raise NotImplementedError(
            f"jit_kernel has no dropout in attention, and dropout is {dropout}: a model in training has its config's "
            "attention_dropout. Set it to 0 before the model is made, or call model.eval()"
        )
    if attention_mask is not None and not isinstance(attention_mask, Mask):
        kind = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise NotImplementedError(
            f"jit_kernel takes padding masks of shape (batch, tokens) alone, not a mask of {kind}"
        )
    for name, value in others.items():
        if value is not None and value is not False and name not in _WITHOUT_EFFECT:
            shown = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{value!r:.60}"
            raise NotImplementedError(f"jit_kernel cannot honour {name}, {shown}: use another attn_implementation")

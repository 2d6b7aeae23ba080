"""Attention for Hugging Face transformers: `register()`, then `attn_implementation="jit_kernel_fa3"`.

transformers asks two things of an attention implementation: a mask, made once a forward pass from a mask function
and the padding, and attention itself, called by every layer with that mask. The mask made here is no tensor: it says
which of FlashAttention's masks the mask function is, and which rows are padding. Padded batches are laid out without
their padding (cu_seqlens); a cache with padding on the left is attended to where it lies (cache_leftpad).

What cannot be done is refused: NotImplementedError names what it was. Nothing that changes a score is ignored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from jit_kernel.flash_attention_v3 import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

NAME = "jit_kernel_fa3"

# Arguments that models hand on to attention and that say nothing about its scores.
_WITHOUT_EFFECT = frozenset(
    {"position_ids", "cache_position", "use_cache", "return_dict", "output_hidden_states", "logits_to_keep"}
    | {"num_items_in_batch", "deterministic", "sliding_window", "output_router_logits", "return_loss"}
)


def register() -> None:
    """Make "jit_kernel_fa3" an attention implementation of every transformers model in this process."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, make_mask)


@dataclass(frozen=True, eq=False)
class Mask:
    """Which keys a query sees: FlashAttention's settings, aligned to the bottom right, and the padding.

    keys: how many of the cache's keys take part; a static cache has room behind them.
    real: (b, keys) bool, False where a token is padding; None when there is no padding.
    """

    queries: int
    keys: int
    causal: bool
    window_size: tuple[int, int]
    attention_chunk: int
    real: Tensor | None

    @property
    def aligned(self) -> bool:
        """Whether a query's place among the keys matters; the queries are then the last of the keys."""
        return self.causal or self.window_size != (-1, -1) or self.attention_chunk > 0

    @cached_property
    def left_padding(self) -> Tensor | None:
        """(b,) int32 padding tokens before each sequence, None when there is padding elsewhere."""
        assert self.real is not None
        padding = self.keys - self.real.sum(dim=1)
        first = torch.arange(self.keys, device=self.real.device) >= padding[:, None]
        return padding.to(torch.int32) if torch.equal(first, self.real) else None

    @cached_property
    def rows(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(rows of q, cu_seqlens_q, rows of k, cu_seqlens_k), rows counted over the batch laid end to end."""
        assert self.real is not None
        keys, cu_seqlens_k = _laid_end_to_end(self.real)
        if self.aligned:
            return (*_laid_end_to_end(self.real[:, self.keys - self.queries :]), keys, cu_seqlens_k)
        everything = torch.ones(self.real.shape[0], self.queries, dtype=torch.bool, device=self.real.device)
        return (*_laid_end_to_end(everything), keys, cu_seqlens_k)

    # generate() makes the mask of a static cache before the forward pass, as if it were a tensor of four dimensions.
    ndim = 4

    def contiguous(self) -> Mask:
        """This mask; make_mask() gets it back and hands it on."""
        return self


def _laid_end_to_end(real: Tensor) -> tuple[Tensor, Tensor]:
    lengths = real.sum(dim=1, dtype=torch.int32)
    return real.flatten().nonzero().flatten(), torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | Mask | None = None,
    **_: Any,
) -> Mask:
    """The mask of one forward pass: the mask function recognised, and attention_mask (b, tokens) as padding.

    Raises NotImplementedError for a mask function that is none of FlashAttention's.
    """
    if isinstance(attention_mask, Mask):
        return attention_mask
    causal, window_size, chunk = _recognise(mask_function)
    mask = Mask(q_length, kv_length, causal, window_size, chunk, None)
    keys = int(q_offset) + q_length - kv_offset if mask.aligned else kv_length
    if not q_length <= keys <= kv_length and mask.aligned:
        raise NotImplementedError(
            f"{NAME}: {q_length} queries at position {int(q_offset)} and {kv_length} keys from position {kv_offset}; "
            "the queries must be the last tokens of the keys"
        )
    if chunk and kv_offset:
        raise NotImplementedError(f"{NAME}: chunked attention over a cache that dropped its first {kv_offset} keys")
    real = None
    if attention_mask is not None:
        if attention_mask.dim() != 2:
            raise NotImplementedError(
                f"{NAME}: attention_mask has shape {tuple(attention_mask.shape)}; it must be (batch, tokens)"
            )
        real = attention_mask[:, kv_offset : kv_offset + keys].bool()
        real = torch.nn.functional.pad(real, (0, keys - real.shape[1]))  # room of a cache that no token fills yet
        real = None if bool(real.all()) else real
    mask = Mask(q_length, keys, causal, window_size, chunk, real)
    if real is not None and (window_size != (-1, -1) or chunk) and _has_holes(real):
        raise NotImplementedError(
            f"{NAME}: attention_mask has padding between tokens of a sequence, and a window or chunk counts it; "
            "pad on the left or on the right"
        )
    return mask


def _has_holes(real: Tensor) -> bool:
    starts = real.int().diff(dim=1, prepend=real.new_zeros(real.shape[0], 1, dtype=torch.int32)) == 1
    return bool((starts.sum(dim=1) > 1).any())


def _recognise(mask_function: Callable[..., Any]) -> tuple[bool, tuple[int, int], int]:
    """(causal, window_size, attention_chunk) of a transformers mask function, by the function that made it."""
    if mask_function is causal_mask_function:
        return True, (-1, -1), 0
    if mask_function is bidirectional_mask_function:
        return False, (-1, -1), 0
    maker = getattr(mask_function, "__qualname__", repr(mask_function)).split(".")[0]
    closure = getattr(mask_function, "__closure__", None) or ()
    held = dict(zip(mask_function.__code__.co_freevars, (c.cell_contents for c in closure), strict=True))
    if maker == "sliding_window_overlay":
        return False, (held["sliding_window"] - 1, -1), 0
    if maker == "sliding_window_bidirectional_overlay":
        return False, (held["sliding_window"], held["sliding_window"]), 0
    if maker == "chunked_overlay":
        return False, (-1, -1), held["chunk_size"]
    if maker == "and_masks":
        causal, window_size, chunk = False, (-1, -1), 0
        for part in held["mask_functions"]:
            also_causal, window, also_chunk = _recognise(part)
            if (window != (-1, -1) and window_size != (-1, -1)) or (also_chunk and chunk):
                raise NotImplementedError(f"{NAME}: a mask of two windows or two chunk sizes")
            causal, chunk = causal or also_causal, chunk or also_chunk
            window_size = window if window != (-1, -1) else window_size
        return causal, window_size, chunk
    raise NotImplementedError(
        f"{NAME} has causal, bidirectional, sliding window and chunked masks; this model asks for one made by "
        f"{maker} (packed sequences, image blocks and prefixes are such): use another attn_implementation"
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
    **others: Any,
) -> tuple[Tensor, None]:
    """One layer's attention: query (b, hq, sq, d), key and value (b, hk, sk, d or dv) to (b, sq, hq, dv).

    softcap: of the scores. s_aux: (hq,) sinks. A model that makes no mask (vision encoders) has is_causal, else
    the module's, for more than one query. Padding's rows are 0 where the mask is causal, windowed or chunked.
    Raises NotImplementedError for dropout, attention weights, position biases, and every argument unknown here.
    """
    _refuse(dropout, attention_mask, others)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    mask = attention_mask
    if mask is None:
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        mask = Mask(q.shape[1], k.shape[1], bool(causal) and q.shape[1] > 1, (-1, -1), 0, None)
    sinks = s_aux
    if sinks is not None and sinks.dtype != q.dtype:
        sinks = sinks.float()
    settings: dict[str, Any] = {
        "softmax_scale": scaling,
        "causal": mask.causal,
        "window_size": mask.window_size,
        "attention_chunk": mask.attention_chunk,
        "softcap": softcap or 0.0,
        "sinks": sinks,
    }
    k, v = k[:, : mask.keys], v[:, : mask.keys]
    if mask.aligned and q.shape[1] < mask.keys and (mask.real is None or mask.left_padding is not None):
        leftpad = None if mask.real is None else mask.left_padding
        out = flash_attn_with_kvcache(q, k, v, cache_seqlens=mask.keys, cache_leftpad=leftpad, **settings)
    elif mask.real is None:
        out = flash_attn_func(q, k, v, **settings)
    else:
        out = _ragged(q, k, v, mask, settings)
    assert isinstance(out, Tensor)
    return out, None


def _ragged(q: Tensor, k: Tensor, v: Tensor, mask: Mask, settings: dict[str, Any]) -> Tensor:
    """Attention over the rows that are no padding, laid end to end."""
    rows_q, cu_seqlens_q, rows_k, cu_seqlens_k = mask.rows
    q_rows, k_rows, v_rows = (
        x.flatten(0, 1).index_select(0, rows) for x, rows in ((q, rows_q), (k, rows_k), (v, rows_k))
    )
    found = flash_attn_varlen_func(
        q_rows, k_rows, v_rows, cu_seqlens_q, cu_seqlens_k, mask.queries, mask.keys, **settings
    )
    assert isinstance(found, Tensor)
    out = found.new_zeros(q.shape[0] * q.shape[1], *found.shape[1:])
    return out.index_copy_(0, rows_q, found).view(*q.shape[:2], *found.shape[1:])


def _refuse(dropout: float, attention_mask: object, others: dict[str, Any]) -> None:
    """NotImplementedError for what would change the result and cannot be honoured."""
    if dropout:
        raise NotImplementedError(f"{NAME} has no dropout, and dropout is {dropout}: call model.eval()")
    if attention_mask is not None and not isinstance(attention_mask, Mask):
        kind = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise NotImplementedError(f"{NAME} takes padding masks of shape (batch, tokens) alone, not a mask of {kind}")
    for name, value in others.items():
        if value is not None and value is not False and name not in _WITHOUT_EFFECT:
            raise NotImplementedError(f"{NAME} cannot honour {name}={value!r:.60}: use another attn_implementation")

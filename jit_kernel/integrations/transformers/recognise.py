"""Which mask a mask function of transformers is: FlashAttention's settings by its name and closure, else by its values.

A mask function answers, for index tensors of batch, head, query and key, which keys are seen. The ones that
transformers makes are known by the function that made them. Any other, and any that torch.compile traces, whose
closures cannot be read, is called: its answer is the mask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import __version__

from jit_kernel.fa3.call import UNBOUNDED  # the very tuple by which a call is known not to need a check

try:
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask
except ImportError as error:
    raise ImportError(f"transformers is {__version__}; jit_kernel works with 5.4 and newer") from error


@dataclass(frozen=True)
class Kind:
    """FlashAttention's settings for a mask function.

    packed: (b, tokens), the sequence that each token belongs to, where sequences are laid end to end; else None.
    known: False where only the function's values tell the mask.
    """

    causal: bool = False
    window_size: tuple[int, int] = UNBOUNDED
    attention_chunk: int = 0
    packed: Tensor | None = None
    known: bool = True

    @property
    def aligned(self) -> bool:
        """Whether a query's place among the keys matters."""
        return self.causal or self.window_size != UNBOUNDED or self.attention_chunk > 0


UNKNOWN = Kind(known=False)


def recognise(mask_function: Callable[..., Any], causal_at_least: bool) -> Kind:
    """The kind of a mask function. `causal_at_least`: what is known of one that torch.compile traces."""
    if mask_function is causal_mask_function:
        return Kind(causal=True)
    if mask_function is bidirectional_mask_function:
        return Kind()
    if torch.compiler.is_dynamo_compiling():
        return Kind(causal=causal_at_least, known=False)
    return _by_its_maker(mask_function)


def _by_its_maker(function: Callable[..., Any]) -> Kind:
    code, closure = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    if code is None or getattr(function, "__module__", None) != causal_mask_function.__module__:
        return UNKNOWN  # a partial, a callable object, a builtin, a model's own function
    held = dict(zip(code.co_freevars, (cell.cell_contents for cell in closure or ()), strict=True))
    maker = function.__qualname__.partition(".")[0]
    if maker == "and_masks" and "mask_functions" in held:
        return _intersection([recognise(part, False) for part in held["mask_functions"]])
    if maker == "remap_positions_for_packed_sequence" and "mask_function" in held:
        return recognise(held["mask_function"], False)  # packed_sequence_mask_function stands beside it
    return _simple(maker, held)


def _simple(maker: str, held: Mapping[str, Any]) -> Kind:
    if maker == "sliding_window_overlay" and "sliding_window" in held:
        return Kind(window_size=(held["sliding_window"] - 1, -1))
    if maker == "sliding_window_bidirectional_overlay" and "sliding_window" in held:
        return Kind(window_size=(held["sliding_window"], held["sliding_window"]))
    if maker == "chunked_overlay" and "chunk_size" in held:
        return Kind(attention_chunk=held["chunk_size"])
    if maker == "packed_sequence_mask_function" and "packed_sequence_mask" in held:
        return Kind(packed=held["packed_sequence_mask"])
    if maker in ("causal_mask_function", "bidirectional_mask_function"):
        return Kind(causal=maker == "causal_mask_function")
    return UNKNOWN


def _intersection(parts: list[Kind]) -> Kind:
    """What several kinds allow together; UNKNOWN where FlashAttention has no setting for it."""
    found = Kind()
    for part in parts:
        twice = (
            (part.window_size != UNBOUNDED and found.window_size != UNBOUNDED)
            or (part.attention_chunk and found.attention_chunk)
            or (part.packed is not None and found.packed is not None)
        )
        if twice or not part.known:
            return replace(UNKNOWN, causal=any(kind.causal and kind.known for kind in parts))
        found = Kind(
            causal=found.causal or part.causal,
            window_size=part.window_size if part.window_size != UNBOUNDED else found.window_size,
            attention_chunk=part.attention_chunk or found.attention_chunk,
            packed=part.packed if part.packed is not None else found.packed,
        )
    return found


def evaluate(mask_function: Callable[..., Any], sizes: Mapping[str, Any], use_vmap: bool) -> Tensor:
    """The mask as a tensor, (b, 1, queries, keys) bool: True where a key is seen. `sizes`: as make_mask got them."""
    try:
        seen = sdpa_mask(
            **sizes, mask_function=mask_function, attention_mask=None, allow_is_causal_skip=False, use_vmap=use_vmap
        )
    except (TypeError, AttributeError) as error:
        raise TypeError(
            f"mask_function is {_named(mask_function)}; it must take index tensors of batch, head, query and key and "
            f"answer a bool tensor: {error}"
        ) from error
    if not isinstance(seen, Tensor) or seen.dtype != torch.bool:
        what = f"a tensor of {seen.dtype}" if isinstance(seen, Tensor) else type(seen).__name__
        raise TypeError(f"mask_function is {_named(mask_function)}, which answers {what}; it must answer a bool tensor")
    return seen


def _named(function: Callable[..., Any]) -> str:
    return str(getattr(function, "__qualname__", None) or type(function).__name__)

"""Attention for Hugging Face transformers: `register()`, then `attn_implementation="jit_kernel_fa3"`.

What it replaces: nothing; it adds two names, NAME and FLASH_NAME, to transformers' registries of attention functions
and of mask functions. A model that computes its attention itself is refused when one of the names is asked of it, for
which `PreTrainedModel.get_correct_attn_implementation` is wrapped. From transformers 5.13 on. `unregister()` undoes it.

FLASH_NAME is the same attention under a name that transformers takes for FlashAttention's: `generate_batch`
(continuous batching) wants "flash" in the name, and vision towers with ragged images then make one ragged call.

What cannot be done is refused: NotImplementedError names what it was. Nothing that changes a score is ignored.
"""

from __future__ import annotations

import functools
from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from jit_kernel.integrations.transformers.layers import attention
from jit_kernel.integrations.transformers.masks import Mask, make_mask

__all__ = ["FLASH_NAME", "NAME", "Mask", "attention", "make_mask", "register", "unregister"]

NAME = "jit_kernel_fa3"
FLASH_NAME = "jit_kernel_flash"

_CHOOSE = "get_correct_attn_implementation"


def register() -> None:
    """Make NAME and FLASH_NAME attention implementations of every transformers model in this process."""
    for name in (NAME, FLASH_NAME):
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, make_mask)
    chosen = getattr(PreTrainedModel, _CHOOSE)
    if not hasattr(chosen, "of_jit_kernel"):
        setattr(PreTrainedModel, _CHOOSE, _refusing(chosen))


def unregister() -> None:
    """Undo `register()`; models that use one of the names need another `set_attn_implementation` first."""
    for name in (NAME, FLASH_NAME):
        AttentionInterface._global_mapping.pop(name, None)
        AttentionMaskInterface._global_mapping.pop(name, None)
    chosen = getattr(PreTrainedModel, _CHOOSE)
    if hasattr(chosen, "of_jit_kernel"):
        setattr(PreTrainedModel, _CHOOSE, chosen.__wrapped__)


def _refusing(choose: Any) -> Any:
    """transformers' choice of an implementation for a model, refused where the model would not call ours."""

    @functools.wraps(choose)
    def get_correct_attn_implementation(self: Any, requested_attention: str | None, *args: Any, **kwargs: Any) -> Any:
        if requested_attention in (NAME, FLASH_NAME) and not self._can_set_attn_implementation():
            raise NotImplementedError(
                f"attn_implementation is {requested_attention!r}, and {type(self).__name__} computes its attention "
                "itself: it takes no attention backend. Use attn_implementation='eager' or 'sdpa'"
            )
        return choose(self, requested_attention, *args, **kwargs)

    get_correct_attn_implementation.of_jit_kernel = True  # type: ignore[attr-defined]
    return get_correct_attn_implementation

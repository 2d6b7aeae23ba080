"""Attention for Hugging Face transformers: `register()`, then `attn_implementation="jit_kernel_fa3"`.

What it replaces: nothing; it adds two names, NAME and FLASH_NAME, to transformers' registries of attention functions
and of mask functions, and wraps `PreTrainedModel._check_and_adjust_attn_implementation`, where a model chooses: a model
that computes its attention itself is refused, and for our names no package of FlashAttention is looked for. From
transformers 5.4 on. `unregister()` undoes it.

FLASH_NAME is the same attention under a name that transformers takes for FlashAttention's: `generate_batch`
(continuous batching) wants "flash" in the name, and vision towers with ragged images then make one ragged call.

What cannot be done is refused: NotImplementedError names what it was. Nothing that changes a score is ignored.
"""

from __future__ import annotations

import functools
from typing import Any

from packaging.version import Version
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, __version__

from jit_kernel.integrations.transformers.layers import attention
from jit_kernel.integrations.transformers.masks import Mask, make_mask

__all__ = ["FLASH_NAME", "NAME", "Mask", "attention", "is_active", "make_mask", "register", "unregister"]

NAME = "jit_kernel_fa3"
FLASH_NAME = "jit_kernel_flash"

_OLDEST = "5.4"  # the first whose masks are asked for by lengths
_CHOOSE = "_check_and_adjust_attn_implementation"


def register() -> None:
    """Make NAME and FLASH_NAME attention implementations of every transformers model in this process.

    Raises NotImplementedError for a transformers that is too old.
    """
    if Version(__version__) < Version(_OLDEST):
        raise NotImplementedError(f"transformers is {__version__}; jit_kernel works with {_OLDEST} and newer")
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


def is_active() -> bool:
    """Whether NAME is an attention implementation of transformers."""
    return NAME in AttentionInterface._global_mapping


def _refusing(choose: Any) -> Any:
    """How a model chooses its implementation, with an answer for our names."""

    @functools.wraps(choose)
    def check_and_adjust(self: Any, attn_implementation: str | None, *args: Any, **kwargs: Any) -> Any:
        if attn_implementation not in (NAME, FLASH_NAME):
            return choose(self, attn_implementation, *args, **kwargs)
        if not self._can_set_attn_implementation():
            raise NotImplementedError(
                f"attn_implementation is {attn_implementation!r}, and {type(self).__name__} computes its attention "
                "itself: it takes no attention backend. Use attn_implementation='eager' or 'sdpa'"
            )
        return attn_implementation

    check_and_adjust.of_jit_kernel = True  # type: ignore[attr-defined]
    return check_and_adjust

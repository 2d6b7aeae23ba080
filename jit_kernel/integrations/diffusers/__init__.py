"""Attention for Hugging Face diffusers: `register()`, then `model.set_attention_backend("jit_kernel")`.

What it replaces: nothing; it adds one backend, NAME, to the registry of diffusers' attention dispatcher and to the enum
of its names, which is closed, and wraps `ModelMixin.set_attention_backend`, to tell which layers of a model never ask
the dispatcher. From diffusers 0.35 on, context parallelism from 0.36 on. `unregister()` undoes it.

Layers with older processors (Stable Diffusion 1 to 3, AutoencoderKL) call torch's SDPA themselves:
`jit_kernel.integrations.sdpa.activate()` serves these.
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

from diffusers import ModelMixin
from diffusers.models import attention_dispatch

from jit_kernel.engine.progress import warn_once
from jit_kernel.integrations.diffusers.attention import HOST, attend, need_alike
from jit_kernel.integrations.diffusers.parallel import available

__all__ = ["NAME", "attend", "is_active", "passing_by", "register", "unregister"]

NAME = "jit_kernel"
_MEMBER = "JIT_KERNEL"
_CHOOSE = "set_attention_backend"

_names: Any = attention_dispatch.AttentionBackendName
_registry: Any = attention_dispatch._AttentionBackendRegistry
_before: list[Any] = []  # the backend that was active at register(); empty when nothing is registered


def register() -> None:
    """Make NAME an attention backend of every diffusers model in this process; a second call changes nothing."""
    if _before:
        return
    _before.append(_registry._active_backend)
    member = _add_member()
    parallel = {"supports_context_parallel": True} if available() else {}
    _registry.register(member, constraints=[need_alike], **parallel)(attend)
    setattr(ModelMixin, _CHOOSE, _telling(getattr(ModelMixin, _CHOOSE)))


def unregister() -> None:
    """Undo `register()`; a model that uses NAME needs `reset_attention_backend`, or another backend, first.

    Where NAME is the backend of the whole process, the one that was there at `register()` comes back.
    """
    if not _before:
        return
    (before,) = _before
    _before.clear()
    if _registry._active_backend == NAME:
        _registry._active_backend = before
    setattr(ModelMixin, _CHOOSE, getattr(ModelMixin, _CHOOSE).__wrapped__)
    member = _names(NAME)
    for table in (_registry._backends, _registry._constraints, _registry._supported_arg_names):
        table.pop(member, None)
    if available():
        _registry._supports_context_parallel.discard(NAME)
    _remove_member(member)


def is_active() -> bool:
    """Whether NAME is an attention backend of diffusers."""
    return bool(_before)


def passing_by(model: Any) -> dict[str, int]:
    """The attention layers of a model that never ask diffusers' dispatcher, by their processor's name."""
    processors = (getattr(module, "processor", None) for module in model.modules())
    names = (type(each).__name__ for each in processors if each is not None and not hasattr(each, "_attention_backend"))
    return dict(Counter(names))


def _add_member() -> Any:
    """A new member of the enum, in the tables that Python 3.10 to 3.13 look names and values up in."""
    member = str.__new__(_names, NAME)
    member._name_, member._value_, member.__objclass__ = _MEMBER, NAME, _names
    member._sort_order_ = len(_names)
    setattr(_names, _MEMBER, member)
    _names._member_names_.append(_MEMBER)
    _names._member_map_[_MEMBER] = member
    _names._value2member_map_[NAME] = member
    return member


def _remove_member(member: Any) -> None:
    _names._member_names_.remove(_MEMBER)
    del _names._member_map_[_MEMBER], _names._value2member_map_[NAME]
    delattr(_names, _MEMBER)


def _telling(choose: Any) -> Any:
    """How a model chooses its backend, with a warning for layers which that does not reach."""

    @functools.wraps(choose)
    def set_attention_backend(self: Any, backend: str) -> None:
        choose(self, backend)
        if backend.lower() != NAME:
            return
        left = passing_by(self)
        if left:
            which = ", ".join(f"{number} with {name}" for name, number in sorted(left.items()))
            model = type(self).__name__
            warn_once(
                f"diffusers: attention layers of {model} never ask diffusers' dispatcher ({which}): they call torch's "
                "SDPA themselves, which jit_kernel.integrations.sdpa.activate() serves",
                (HOST, model, which),
            )

    return set_attention_backend

"""torch's `scaled_dot_product_attention` on jit_kernel: `activate()`, `deactivate()`, or `with active():`.

Replaced, in this process, from torch 2.10 on:
- on the CPU the kernel of `_scaled_dot_product_flash_attention_for_cpu`, which SDPA calls;
- where a CUDA GPU is, those of `_scaled_dot_product_flash_attention`, `_flash_attention_forward` and
  `_flash_attention_forward_no_dropout_inplace`, which SDPA and torch.nn.attention.varlen call: by torch's registry of
  flash-attention implementations (torch 2.11, under the name "jit_kernel"), else by torch.library. torch prefers cuDNN
  on Hopper; while this is active, SDPA asks for its flash backend first.

Gradients come from torch's own backward operators. What is not served (dropout, masks that are no lengths, other
dtypes) goes on to torch's own kernel; `jit_kernel.integrations.counters` counts both under "sdpa". `deactivate()` gives
every operator back as it was. All threads of the process are served alike.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

NAME = "jit_kernel"

_lock = threading.RLock()
_asked = False  # activate() was called, and deactivate() not since
_open = 0  # contexts of active() that are entered
_handles: list[Any] = []  # what was put in place, each with a remove()


def activate() -> None:
    """Put jit_kernel behind SDPA in this process, until `deactivate()`. A second call changes nothing.

    Raises NotImplementedError on a torch older than 2.10.
    """
    global _asked
    with _lock:
        _settle(wanted=True)
        _asked = True


def deactivate() -> None:
    """Give torch its kernels back; where contexts of `active()` are open, when the last of them ends."""
    global _asked
    with _lock:
        _asked = False
        _settle(wanted=_open > 0)


@contextmanager
def active() -> Iterator[None]:
    """jit_kernel behind SDPA, in all threads, while at least one such context is open. They may be nested.

    Raises NotImplementedError on a torch older than 2.10.
    """
    global _open
    with _lock:
        _settle(wanted=True)
        _open += 1
    try:
        yield
    finally:
        with _lock:
            _open -= 1
            _settle(wanted=_asked or _open > 0)


def is_active() -> bool:
    """Whether jit_kernel stands behind SDPA now."""
    return bool(_handles)


def _settle(*, wanted: bool) -> None:
    """Put everything in place, or remove it, where that is not so yet."""
    if wanted and not _handles:
        made: list[Any] = []
        try:
            made.append(_Library(_on_cpu()))
            if torch.version.cuda is not None and torch.cuda.is_available():
                made.append(_FlashFirst())
                made.append(_OnCuda())
        except BaseException:
            _remove(made)
            raise
        _handles.extend(made)
    elif not wanted and _handles:
        _remove(_handles)


def _remove(handles: list[Any]) -> None:
    while handles:
        handles.pop().remove()


class _Library:
    """Kernels that stand in torch's places until `remove()`."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def remove(self) -> None:
        self._library._destroy()


def _on_cpu() -> Any:
    from jit_kernel.integrations.torch_sdpa import behind, cpu

    return behind.stand_behind({"_scaled_dot_product_flash_attention_for_cpu": cpu.attend}, "CPU")


def _on_cuda() -> _Library:
    from jit_kernel.integrations.torch_sdpa import behind, cuda

    present = {name: each for name, each in cuda.OPERATORS.items() if hasattr(torch.ops.aten, name)}
    return _Library(behind.stand_behind(present, "CUDA"))


class _OnCuda:
    """The operators on CUDA, by torch's registry where it has one; the implementation before comes back."""

    def __init__(self) -> None:
        self._before: str | None = None
        self._direct: _Library | None = None
        registry: Any = torch.nn.attention
        if not hasattr(registry, "restore_flash_attention_impl"):  # torch 2.10 has no way back
            self._direct = _on_cuda()
            return
        registry.register_flash_attention_impl(NAME, register_fn=_on_cuda)
        self._before = registry.current_flash_attention_impl()
        if self._before == NAME:  # the user's own choice, which stays
            return
        try:
            registry.activate_flash_attention_impl(NAME)
        except BaseException:
            if self._before is not None:
                registry.activate_flash_attention_impl(self._before)
            raise

    def remove(self) -> None:
        if self._direct is not None:
            self._direct.remove()
            return
        registry: Any = torch.nn.attention
        # It was torch's choice already, or another one was activated since, which removed this one.
        if self._before == NAME or registry.current_flash_attention_impl() != NAME:
            return
        registry.restore_flash_attention_impl()
        if self._before is not None:
            registry.activate_flash_attention_impl(self._before)


class _FlashFirst:
    """torch's order of preference among its backends, with flash attention first."""

    def __init__(self) -> None:
        one = torch.zeros(1, 1, 1, 8, dtype=torch.bfloat16, device="cuda")
        torch._fused_sdp_choice(one, one, one)  # torch settles its own order at the first choice that it makes
        flash = int(torch.nn.attention.SDPBackend.FLASH_ATTENTION.value)
        self._before: list[int] = torch._C._get_sdp_priority_order()
        self._ours = [flash, *(each for each in self._before if each != flash)]
        torch._C._set_sdp_priority_order(self._ours)

    def remove(self) -> None:
        if torch._C._get_sdp_priority_order() == self._ours:  # else someone has set another one since
            torch._C._set_sdp_priority_order(self._before)

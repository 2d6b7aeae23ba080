"""Standing behind one of torch's own operators: a kernel of ours for one dispatch key, with torch's at hand.

A replacement is called with torch's arguments and answers the operator's result, or the reason why it does not serve
the call: then torch's own kernel gets the same arguments. Either is counted. What torch's own kernel calls in turn is
torch's own too, and no call of the host's: `_scaled_dot_product_flash_attention` calls `_flash_attention_forward`.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch

from jit_kernel.integrations import counters

HOST = "sdpa"


class Passed(str):
    """Why a call is passed on to torch's own kernel. One of few: it is counted by its text."""

    __slots__ = ()


class _Passing(threading.local):
    """Whether this thread is in a kernel of torch's that a call was passed on to."""

    on = False


_passing = _Passing()


def stand_behind(replacements: Mapping[str, Callable[..., Any]], key: str) -> Any:
    """Register a replacement for each of aten's operators, by name, under a dispatch key: "CPU" or "CUDA".

    Returns the torch.library.Library that holds them; its `_destroy()` gives the operators back. Raises
    NotImplementedError where torch cannot hand out its own kernels (before 2.10).
    """
    get_kernel = getattr(torch.library, "get_kernel", None)
    if get_kernel is None:
        raise NotImplementedError(
            f"torch is {torch.__version__}; jit_kernel.integrations.sdpa needs torch 2.10 or newer, whose "
            "torch.library.get_kernel hands out the kernel that calls are passed on to"
        )
    library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():  # that a kernel is overridden, as is meant here
            warnings.filterwarnings("ignore", message=r"Warning only once for all operators")
            for name, replacement in replacements.items():
                own = get_kernel(f"aten::{name}", key)
                library.impl(name, _before(own, replacement), key, with_keyset=True)
    except BaseException:
        library._destroy()
        raise
    return library


def _before(own: Any, replacement: Callable[..., Any]) -> Callable[..., Any]:
    """The replacement, and where it does not serve a call torch's own kernel with the call as it came."""

    def call(keys: Any, *arguments: Any, **named: Any) -> Any:
        if _passing.on:
            return own.call_boxed(keys, *arguments, **named)
        result = replacement(*arguments, **named)
        if result.__class__ is Passed:
            counters.count(HOST, "passed on", str(result))
            _passing.on = True
            try:
                return own.call_boxed(keys, *arguments, **named)
            finally:
                _passing.on = False
        counters.count(HOST, "served")
        return result

    return call

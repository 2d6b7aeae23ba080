"""FlashAttention-3 for whoever fetches it from Hugging Face's hub: a kernel folder, and the variable that names it.

What it replaces: the kernels `kernels-community/flash-attn3` (diffusers), `vllm-flash-attn3` (transformers) and
`sgl-flash-attn3` (sglang), for processes that have LOCAL_KERNELS in their environment as `python -m jit_kernel
local-kernels` prints it. From kernels 0.14 on. To undo: unset the variable.

`build/` beside this file is the folder; each of its variants hands on the functions that stand here. They have the
names that the three hubs' functions have: FlashAttention-3's and sglang's, and s_aux, which transformers looks for.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from jit_kernel import flash_attention_v3 as public
from jit_kernel.fa3.checks.values import described
from jit_kernel.integrations import told

__all__ = [
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
]

NAMES = tuple(f"kernels-community/{name}" for name in ("flash-attn3", "vllm-flash-attn3", "sgl-flash-attn3"))
HOST = "LOCAL_KERNELS"


def folder() -> Path:
    """The kernel folder."""
    return Path(__file__).resolve().parent


def variable() -> str:
    """The value of LOCAL_KERNELS. Raises ValueError where the package's path cannot stand in it."""
    path = str(folder())
    if ":" in path or '"' in path:
        raise ValueError(f"jit_kernel is installed in {path}; LOCAL_KERNELS cannot name a path with : or a quote in it")
    return ":".join(f"{name}={path}" for name in NAMES)


def _kernel(function: Callable[..., Any], shared: int) -> Callable[..., Any]:
    """A public function with the arguments of the hub's. shared: how many of them FA3 and sglang order alike."""

    @functools.wraps(function)
    def call(
        *positional: Any,
        s_aux: Tensor | None = None,
        dropout_p: float = 0.0,
        deterministic: bool = False,
        return_attn_probs: bool = False,
        **named: Any,
    ) -> Any:
        if len(positional) > shared:
            raise TypeError(f"{len(positional)} arguments by position; give those behind the first {shared} by name")
        if dropout_p:
            raise NotImplementedError(f"dropout_p is {dropout_p}; jit_kernel has no dropout in attention")
        if s_aux is not None:
            if named.get("sinks") is not None:
                raise ValueError(f"s_aux is {described(s_aux)} beside sinks; they are one argument, give one of them")
            named["sinks"] = s_aux
        if return_attn_probs:
            named["return_softmax_lse"] = True
        told.served(HOST)
        return function(*positional, **named)

    parameters = inspect.signature(function).parameters
    more = [p for p in inspect.signature(call, follow_wrapped=False).parameters.values() if p.kind is p.KEYWORD_ONLY]
    call.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [*parameters.values(), *(p for p in more if p.name not in parameters)]
    )
    return call


flash_attn_func = _kernel(public.flash_attn_func, 17)
flash_attn_varlen_func = _kernel(public.flash_attn_varlen_func, 9)
flash_attn_with_kvcache = _kernel(public.flash_attn_with_kvcache, 28)
get_scheduler_metadata = public.get_scheduler_metadata
flash_attn_combine = public.flash_attn_combine


def __getattr__(name: str) -> Any:
    if name == "flash_attn_interface":  # diffusers takes FlashAttention-3's own passes from it
        return importlib.import_module("jit_kernel.integrations.flash_attn_interface")
    raise AttributeError(f"{__name__} has no {name}")

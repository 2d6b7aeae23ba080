"""SageAttention, from whichever package is installed: which one it is, what it serves, and a call that is safe.

Two packages share the module name. PyPI's 1.x (Triton, CUDA) subtracts the mean from the caller's k in place and
swallows return_lse; later ones and MATE's wrapper (MUSA) do neither. Under torchada a MUSA tensor says is_cuda, so
1.x would accept it: the package is recognised by its signature and version, not by whether it takes the tensor.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jit_kernel.moore_threads import release

INSTALL = {
    "cuda": "pip install sageattention==1.0.6",
    "musa": "git clone --recursive https://github.com/MooreThreads/mate.git && "
    "pip install ./mate/wrappers/SageAttention",
}


@dataclass(frozen=True)
class Sage:
    """An installed SageAttention: the device kind that it serves and its limits."""

    function: Callable[..., Any]
    flavour: str  # "PyPI 1.x", "SageAttention 2" or "MATE wrapper"
    device: str
    dtypes: tuple[torch.dtype, ...]
    head_sizes: tuple[int, ...] | None  # None: any up to `largest`
    largest: int
    returns_lse: bool
    spoils_k: bool

    def rejection(self, head_size: int, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why it does not serve such a call, or None."""
        if device.type != self.device:
            return f"the installed sageattention ({self.flavour}) is for {self.device}, not {device.type}"
        if dtype not in self.dtypes:
            served = ", ".join(str(d)[6:] for d in self.dtypes)
            return f"{self.flavour} serves dtypes {served}, not {str(dtype)[6:]}"
        if self.head_sizes is not None and head_size not in self.head_sizes:
            return f"{self.flavour} serves head sizes {', '.join(map(str, self.head_sizes))}, not {head_size}"
        if head_size > self.largest:
            return f"{self.flavour} serves head sizes up to {self.largest}, not {head_size}"
        return None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None, with_lse: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        """q (b, sq, hq, d), k and v (b, sk, hk, d): out, with_lse also lse (b, hq, sq). k stays as it was."""
        if causal and q.shape[1] != k.shape[1]:
            raise NotImplementedError(
                f"sageattention with causal and {q.shape[1]} queries for {k.shape[1]} keys: "
                "it serves equal lengths only"
            )
        if with_lse and not self.returns_lse:
            raise NotImplementedError(f"return_softmax_lse: {self.flavour} has no lse to return")
        options = {"return_lse": True} if with_lse else {}
        result: Tensor | tuple[Tensor, Tensor] = self.function(
            q,
            k.clone() if self.spoils_k else k,
            v,
            tensor_layout="NHD",  # its default is (b, h, s, d)
            is_causal=causal,
            sm_scale=scale,
            **options,
        )
        return result


def find() -> Sage | str:
    """The installed SageAttention, or why there is none; any exception of its import is a reason."""
    try:
        module = importlib.import_module("sageattention")
        function = module.sageattn
        parameters = inspect.signature(function).parameters
    except Exception as error:
        return f"importing sageattention failed with {type(error).__name__}: {error}"
    half = (torch.float16, torch.bfloat16)
    if "quant_recipe" in parameters:
        return Sage(function, "MATE wrapper", "musa", half, None, 128, True, False)
    version = _version()
    if "return_lse" in parameters or release(version) >= (2,):
        return Sage(function, "SageAttention 2", "cuda", half, (64, 96, 128), 128, True, False)
    return Sage(function, "PyPI 1.x", "cuda", (*half, torch.float32), (64, 96, 128), 128, False, True)


def _version() -> str:
    try:
        return importlib.metadata.version("sageattention")
    except importlib.metadata.PackageNotFoundError:
        return "1"

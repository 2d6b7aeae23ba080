"""Small calls of FlashAttention-3's functions, and what a function's signature says."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.support.valid_calls import ints

OFFSETS_Q, OFFSETS_K = ints(0, 4, 9, 9), ints(0, 11, 16, 30)


def drawn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape).to(dtype)


def dense(dtype: torch.dtype = torch.bfloat16, dv: int = 64) -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "q": drawn(2, 9, 4, 64, dtype=dtype),
        "k": drawn(2, 14, 2, 64, dtype=dtype),
        "v": drawn(2, 14, 2, dv, dtype=dtype),
    }


def ragged(dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    torch.manual_seed(0)
    numbers = {
        "q": drawn(9, 4, 64, dtype=dtype),
        "k": drawn(30, 2, 64, dtype=dtype),
        "v": drawn(30, 2, 64, dtype=dtype),
    }
    offsets = {"cu_seqlens_q": OFFSETS_Q, "cu_seqlens_k": OFFSETS_K, "max_seqlen_q": 5, "max_seqlen_k": 14}
    return numbers | offsets


def cached() -> dict[str, Any]:
    torch.manual_seed(0)
    caches = {"k_cache": drawn(3, 40, 2, 64), "v_cache": drawn(3, 40, 2, 64)}
    return {"q": drawn(3, 2, 4, 64), **caches, "cache_seqlens": ints(0, 17, 33)}


def appending() -> dict[str, Any]:
    torch.manual_seed(1)
    angles = torch.rand(64, 16) * 2 * math.pi
    tables = {"rotary_cos": angles.cos().bfloat16(), "rotary_sin": angles.sin().bfloat16()}
    return {"k": drawn(3, 2, 2, 64), "v": drawn(3, 2, 2, 64), "causal": True, **tables}


def parameters(function: Callable[..., Any]) -> list[tuple[str, str | None]]:
    found = inspect.signature(function).parameters.values()
    return [(p.name, None if p.default is p.empty else repr(p.default)) for p in found]

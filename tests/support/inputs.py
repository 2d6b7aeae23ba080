"""Random inputs of attention calls, always the same for the same seed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Numbers of the normal distribution."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def along(pattern: Tensor, heads: int, d: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Noise (1, tokens, heads, d) that reaches pattern[token] along a diagonal: two of them have scores a * b."""
    x = 0.3 * normal(1, len(pattern), heads, d, seed=seed)
    return (x + pattern.view(1, -1, 1, 1) / math.sqrt(d)).to(dtype)


def tensors(heads: int = 4, kv_heads: int = 4, dtype: torch.dtype = torch.float32, d: int = 32) -> list[Tensor]:
    """q, k and v of one short dense call."""
    torch.manual_seed(0)
    return [torch.randn(1, 5, h, d).to(dtype) for h in (heads, kv_heads, kv_heads)]

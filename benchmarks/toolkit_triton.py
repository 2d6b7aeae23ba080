"""The small kernel of toolkit.py in Triton, which wants its functions in a file."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def small(x, weight, rest, out, eps, n, BLOCK: tl.constexpr):  # noqa: N803
    """out = x * weight + rest + eps."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    product = tl.load(x + i, mask=inside) * tl.load(weight + i, mask=inside)
    tl.store(out + i, product + tl.load(rest + i, mask=inside) + eps, mask=inside)

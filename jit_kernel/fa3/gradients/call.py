"""One backward pass in its canonical form: what every implementation's `backward.py` takes and returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(slots=True)
class Backward:
    """One backward pass of attention. Shapes are the forward call's; out and lse are its results."""

    grad_out: Tensor  # like out
    q: Tensor  # (b, sq, hq, d), or (total_q, hq, d) with cu_seqlens_q
    k: Tensor  # (b, sk, hk, d), or (total_k, hk, d) with cu_seqlens_k
    v: Tensor
    out: Tensor
    lse: Tensor  # float32, (b, hq, sq) or (hq, total_q); -inf in a row that sees no key
    softmax_scale: float
    left: int  # of the window, -1 for unbounded
    right: int  # 0 for a causal mask
    grad_lse: Tensor | None = None  # like lse
    attention_chunk: int = 0
    softcap: float = 0.0
    sinks: Tensor | None = None  # (hq,) float32 or q's dtype
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    seqused_q: Tensor | None = None
    seqused_k: Tensor | None = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    deterministic: bool = False


class Gradients(NamedTuple):
    """What a backward pass gives: zeros in rows outside of every sequence, and where nothing is seen."""

    q: Tensor  # like q, in its dtype
    k: Tensor
    v: Tensor
    sinks: Tensor | None  # float32 (hq,), None without sinks

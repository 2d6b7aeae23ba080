"""Gradients of attention: by the formula in float64, by torch's own attention, and the rule that ours are judged by.

For each row of a gradient (one token, one head): the distance of ours from float64 is at most twice that of torch's own
gradient in the same dtype, plus epsilon of the added lengths of the row's terms: gradients are differences, and a short
row of long terms is as uncertain as they are. The whole gradient's distance is at most twice that of torch's own, plus
epsilon of its length. The epsilons are those of `reference`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.support import reference

Three = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Shape:
    """One attention problem: lengths, heads, head sizes, and a mask aligned to the bottom right."""

    sq: int
    sk: int
    hq: int = 4
    hk: int = 2
    d: int = 32
    dv: int = 32
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    batch: int = 2

    def tensors(self, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v, and the gradient of the result."""
        sizes = ((self.sq, self.hq, self.d), (self.sk, self.hk, self.d), (self.sk, self.hk, self.dv))
        q, k, v, g = (torch.randn(self.batch, *size, device=device).to(dtype) for size in (*sizes, self.of_result))
        return q, k, v, g

    @property
    def of_result(self) -> tuple[int, int, int]:
        return self.sq, self.hq, self.dv

    def seen(self, device: str = "cpu") -> Tensor:
        """(sq, sk): which keys each query sees."""
        problem = reference.Problem([], causal=self.causal, window_size=self.window_size)
        return reference.visible(problem, self.sq, self.sk, torch.device(device))


@dataclass(frozen=True)
class Exact:
    """The gradients of q, k and v in float64, and for each row the lengths of the terms that it is the sum of."""

    grads: Three
    terms: Three


def by_formula(q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, seen: Tensor) -> Exact:
    """Of dense q, k, v (b, s, h, d): with P = softmax(scale q k'), dP = g v' and delta = rowsum(P dP),

    dv = P' g, dS = P (dP - delta), dq = scale dS k, dk = scale dS' q (Dao et al., 2022).
    """
    group = q.shape[2] // k.shape[2]
    scale = 1 / math.sqrt(q.shape[-1])
    q, g = (each.detach().double().transpose(1, 2) for each in (q, grad_out))
    k, v = (each.detach().double().transpose(1, 2).repeat_interleave(group, 1) for each in (k, v))
    rows = seen.any(-1, keepdim=True)
    p = torch.softmax((scale * q @ k.mT).masked_fill(~seen & rows, -math.inf), -1) * rows
    dp = g @ v.mT
    delta = (p * dp).sum(-1, keepdim=True)
    ds = scale * p * (dp - delta)
    grads = (ds @ k, _of_group(ds.mT @ q, group), _of_group(p.mT @ g, group))
    of_q, of_k, of_v, of_g = (each.norm(dim=-1, keepdim=True) for each in (q, k, v, g))
    products = of_g @ of_v.mT  # of g and v, before they cancel
    size = scale * p * (products + (p * products).sum(-1, keepdim=True))
    terms = (size @ of_k, _of_group(size.mT @ of_q, group), _of_group(p.mT @ of_g, group))
    return Exact(_by_tokens(grads), _by_tokens(terms))


def _of_group(by_head: Tensor, group: int) -> Tensor:
    """The sum over the query heads that share a head of keys."""
    return by_head.unflatten(1, (-1, group)).sum(2)


def _by_tokens(three: Three) -> Three:
    a, b, c = (each.transpose(1, 2) for each in three)
    return a, b, c


def by_torch(q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, seen: Tensor) -> Three:
    """torch's own attention in the inputs' dtype, by the mask; rows that see nothing are left out."""
    q, k, v = (each.detach().clone().requires_grad_() for each in (q, k, v))
    group = q.shape[2] // k.shape[2]
    rows = seen.any(-1)
    repeated = (
        each.transpose(1, 2) for each in (q[:, rows], k.repeat_interleave(group, 2), v.repeat_interleave(group, 2))
    )
    mask = None if bool(seen.all()) else seen[rows]
    out = torch.nn.functional.scaled_dot_product_attention(*repeated, attn_mask=mask)
    dq, dk, dv = torch.autograd.grad(out.transpose(1, 2), (q, k, v), grad_out[:, rows])
    return dq, dk, dv


def share_of_limit(found: Three, own: Three, exact: Exact) -> float:
    """The largest share of the rule's limit that a row of ours takes; not more than 1 passes. NaN is infinity."""
    worst = 0.0
    for ours, torchs, ref, terms in zip(found, own, exact.grads, exact.terms, strict=True):
        epsilon = reference.ROW_SLACK[ours.dtype]
        limit = 2 * (torchs.double() - ref).norm(dim=-1) + epsilon * terms[..., 0]
        share = ((ours.double() - ref).norm(dim=-1) / limit.clamp_min(torch.finfo(torch.float64).tiny)).max()
        whole = (ours.double() - ref).norm() / (2 * (torchs.double() - ref).norm() + epsilon * ref.norm())
        worst = max(worst, *(math.inf if math.isnan(float(each)) else float(each) for each in (share, whole)))
    return worst

"""What the gradients of attention are, step by step in any dtype, and the rule that says how far a kernel may be.

For each row of a gradient (one token, one head): |ours - ref| <= 2 |base - ref| + 2 eps |ref| (3 |base - ref| with
softcap) + |terms|. ref is the formula in float64, base the same in the inputs' dtype. terms are what no backward pass
knows better, however exact: D = rowsum(dO O) is of an O that the forward pass rounded, by eps / 2 of its length; where
a row sees one key its gradient is the difference of two equal numbers, of which float32 keeps 2^-20 of what is added,
while base may hit it by chance; and a score is 2^-23 of its terms off, and so is its P. The gradient of sinks is held
so as one row of all heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.support.reference import ROW_SLACK, Problem, Sequence, scale_of, visible

BROKEN = ("skipped tile", "no row sum", "lost head", "doubled sink", "mask off by one", "no softcap slope", "lost lse")
FLOOR = 2.0**-20


@dataclass(frozen=True)
class Grads:
    """Gradients of q (sq, hq, d), k (sk, hk, d), v (sk, hk, dv) and sinks (hq,), or the lengths of their terms."""

    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor | None


def _heads(x: Tensor, dtype: torch.dtype, group: int = 1) -> Tensor:
    return x.detach().to(dtype).transpose(0, 1).repeat_interleave(group, 0)


def _tokens(x: Tensor, group: int = 1) -> Tensor:
    """(hq, n, d) as (n, heads, d), summed over the query heads that share a head of keys."""
    return x.unflatten(0, (-1, group)).sum(1).transpose(0, 1)


def by_formula(
    s: Sequence, problem: Problem, grad_out: Tensor, grad_lse: Tensor | None, dtype: torch.dtype, broken: str = ""
) -> tuple[Grads, Grads]:
    """The gradients in a dtype, and the terms of the rule for each row; broken: one of BROKEN, a mistake to make.

    P = exp(S - lse), D = rowsum(dO O) - dlse, dS = P (dO V' - D), dV = P' dO, dQ = scale dS K, dK = scale dS' Q, with
    softcap c times 1 - (S / c)^2, dsink = -sum exp(sink - lse) D (Dao et al., 2022).
    """
    sq, sk, group = s.q.shape[0], s.k.shape[0], s.q.shape[1] // s.k.shape[1]
    scale = scale_of(problem, s)
    q, g = _heads(s.q, dtype), _heads(grad_out, dtype)
    k, v = _heads(s.k, dtype, group), _heads(s.v, dtype, group)
    seen = visible(problem, sq, sk, s.q.device)
    if broken == "mask off by one":
        seen = seen.roll(1, -1)
    scores = q @ (k * scale).mT
    slope = torch.ones_like(scores)
    if problem.softcap > 0:
        bounded = torch.tanh(scores / problem.softcap)
        scores, slope = bounded * problem.softcap, 1 - bounded * bounded
    scores = scores.masked_fill(~seen, -math.inf)
    logits = scores
    if problem.sinks is not None:
        sink = problem.sinks.detach().to(dtype)[:, None, None].expand(-1, sq, 1)
        logits = torch.cat([scores, sink], -1)
    lse = logits.logsumexp(-1, keepdim=True) if logits.shape[-1] else scores.new_full((*scores.shape[:2], 1), -math.inf)
    finite = lse.masked_fill(lse == -math.inf, 0)
    p = torch.exp(scores - finite) * seen
    out, dp = p @ v, g @ v.mT
    delta = (g * out).sum(-1, keepdim=True)
    of_lse = torch.zeros_like(delta) if grad_lse is None else grad_lse.detach().to(dtype)[..., None]
    of_lse = of_lse.masked_fill(lse == -math.inf, 0)
    delta = delta - of_lse * (broken != "lost lse")
    ds = p * (dp - delta * (broken != "no row sum")) * (1 if broken == "no softcap slope" else slope)
    if broken == "skipped tile":
        p, ds = p.clone(), ds.clone()
        p[:, -16:, -16:] = 0
        ds[:, -16:, -16:] = 0
    of_keys = torch.ones(q.shape[0], 1, 1, dtype=dtype, device=q.device)
    if broken == "lost head":
        of_keys[-1] = 0
    weight = None if problem.sinks is None else torch.exp(problem.sinks.detach().to(dtype)[:, None, None] - finite)
    weight = None if weight is None else weight.masked_fill(lse == -math.inf, 0)
    of_sinks = None if weight is None else -(weight * delta).sum((1, 2)) * (2 if broken == "doubled sink" else 1)
    grads = Grads(
        _tokens(ds @ (k * scale)),
        _tokens(scale * (ds.mT @ q) * of_keys, group),
        _tokens(p.mT @ g * of_keys, group),
        of_sinks,
    )
    length_q, length_k, length_v, length_g = (x.norm(dim=-1, keepdim=True) for x in (q, k, v, g))
    products = length_g @ length_v.mT
    unsure = FLOOR + 2.0**-23 * scale * length_q @ length_k.mT
    rows = (p * products).sum(-1, keepdim=True) + of_lse.abs()
    rounded = ROW_SLACK[s.q.dtype] / 2 * length_g * out.norm(dim=-1, keepdim=True)
    size = scale * p * (unsure * (products + rows) + rounded)
    terms = Grads(
        _tokens(size @ length_k),
        _tokens(size.mT @ length_q, group),
        _tokens((unsure * p).mT @ length_g, group),
        None if weight is None else (weight * (FLOOR * rows + rounded)).sum((1, 2)),
    )
    return grads, terms


def check(
    found: Rows[Grads], problem: Problem, grad_outs: Rows[Tensor], grad_lses: Rows[Tensor | None]
) -> tuple[float, str]:
    """The largest share of its limit that a row takes, and where; not more than 1 passes. NaN is infinity.

    found: for each sequence of the problem; the gradients of sinks are those of all sequences, in the first.
    """
    worst, where = 0.0, "no rows"
    sinks: list[list[Tensor]] = []
    factor = 3.0 if problem.softcap > 0 else 2.0
    for index, s in enumerate(problem.sequences):
        ref, terms = by_formula(s, problem, grad_outs[index], grad_lses[index], torch.float64)
        base, _ = by_formula(s, problem, grad_outs[index], grad_lses[index], s.q.dtype)
        for name in ("q", "k", "v"):
            exact = getattr(ref, name)
            off = (getattr(base, name).double() - exact).norm(dim=-1)
            limit = factor * off + 2 * ROW_SLACK[s.q.dtype] * exact.norm(dim=-1) + getattr(terms, name)[..., 0]
            error = (getattr(found[index], name).double() - exact).norm(dim=-1)
            share = (error / limit).masked_fill(error == 0, 0).nan_to_num(nan=math.inf)
            if share.numel() and float(share.max()) >= worst:
                worst = float(share.max())
                where = f"d{name} of sequence {index} of {s.q.shape[0]} queries and {s.k.shape[0]} keys"
        if ref.sinks is not None and base.sinks is not None and terms.sinks is not None:
            sinks.append([ref.sinks, base.sinks.double(), terms.sinks])
    if problem.sinks is not None and sinks:
        exact, near, lengths = (torch.stack(each).sum(0) for each in zip(*sinks, strict=True))
        slack = ROW_SLACK[problem.sequences[0].q.dtype]
        limit = factor * (near - exact).norm() + 2 * slack * exact.norm() + lengths.norm()
        ours = found[0].sinks
        assert ours is not None
        share = float((ours.double() - exact).norm() / limit) if bool(exact.any()) or bool(ours.any()) else 0.0
        if not share <= worst:
            worst, where = (math.inf if math.isnan(share) else share), "dsinks"
    return worst, where

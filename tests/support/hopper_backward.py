"""Random backward passes for the Hopper kernels: their inputs, the gradients in float64, and the rule they are judged by.

Rows that hold no query, keys that no query sees and queries that see no key hold NaN: a gradient that is not finite
has read one of them. The rule, per row: the distance from float64 is at most twice that of the same formula in the
inputs' dtype, three times with softcap, plus two epsilons of the row's length, plus an epsilon of the added lengths of
its terms, as `gradients` has it: a short sum of long terms is as uncertain as they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from jit_kernel.fa3.gradients.call import Backward, Gradients

EPSILON = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@dataclass(frozen=True)
class Plan:
    """One backward pass; lengths: of each sequence, in memory and of those rows in use."""

    seed: int
    dtype: torch.dtype
    d: int
    dv: int
    heads_k: int
    group: int
    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]
    used_q: tuple[int, ...]
    used_k: tuple[int, ...]
    ragged: bool
    seqused: bool
    left: int = -1
    right: int = -1
    chunk: int = 0
    softcap: float = 0.0
    sinks: bool = False
    grad_lse: bool = False
    deterministic: bool = False


def draw(seed: int, sizes: tuple[int, ...] = (64, 128), longest: int = 400) -> Plan:
    """The plan of a seed; sizes: the head sizes of kernels."""
    dice = Random(seed)
    size = dice.choice(sizes)
    d, dv = (dice.choice((size, size, dice.randrange(8, size + 1, 8))) for _ in range(2))
    batch = dice.randint(1, 4)
    ragged = dice.random() < 0.5
    top = dice.choice((20, 150, longest))
    q, k = ([dice.randint(0 if ragged else 1, top) for _ in range(batch)] for _ in range(2))
    if dice.random() < 0.3:
        k = q
    if not ragged:
        q, k = [q[0]] * batch, [k[0]] * batch
    seqused = dice.random() < 0.3
    used = [[dice.randint(0, n) if seqused else n for n in lengths] for lengths in (q, k)]
    mask = dice.choice(("none", "causal", "causal", "window", "chunk"))
    left = dice.randint(0, 100) if mask == "window" or (mask == "chunk" and dice.random() < 0.3) else -1
    right = dice.randint(0, 60) if mask == "window" else -1
    if mask == "causal" or (mask == "chunk" and dice.random() < 0.5) or (mask == "window" and dice.random() < 0.4):
        right = 0
    return Plan(
        seed, dice.choice((torch.bfloat16, torch.float16)), d, dv, dice.randint(1, 3), dice.choice((1, 1, 2, 3)),
        tuple(q), tuple(k), tuple(used[0]), tuple(used[1]), ragged, seqused, left, right,
        dice.randint(1, 200) if mask == "chunk" else 0, dice.choice((0.0, 0.0, 0.0, 5.0, 30.0)),
        dice.random() < 0.3, dice.random() < 0.3, dice.random() < 0.3,
    )  # fmt: skip


def visible(plan: Plan, sq: int, sk: int, device: torch.device) -> Tensor:
    """(sq, sk): which keys each query sees."""
    position = torch.arange(sq, device=device)[:, None] + sk - sq
    key = torch.arange(sk, device=device)[None]
    seen = torch.ones(sq, sk, dtype=torch.bool, device=device)
    if plan.left >= 0:
        seen &= key >= position - plan.left
    if plan.right >= 0:
        seen &= key <= position + plan.right
    if plan.chunk:
        seen &= key // plan.chunk == torch.div(position, plan.chunk, rounding_mode="floor")
    return seen


def formula(
    plan: Plan, scale: float, tensors: tuple[Tensor, ...], seen: Tensor, lse: Tensor, delta: Tensor, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """The gradients of q, k and v (h, s, d) of one sequence, products and operands in a dtype; lse, delta (h, sq)."""
    q, k, v, grad = (x.to(dtype) for x in tensors)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scores = (q @ k.mT).to(wide) * scale
    slope = torch.ones_like(scores)
    if plan.softcap:
        scores = plan.softcap * torch.tanh(scores / plan.softcap)
        slope = 1 - (scores / plan.softcap) ** 2
    weights = torch.exp(scores - lse.to(wide)[..., None]).where(seen, 0)
    scores = weights * ((grad @ v.mT).to(wide) - delta.to(wide)[..., None]) * slope
    p, ds = weights.to(dtype), scores.to(dtype)
    return scale * (ds @ k).to(wide), scale * (ds.mT @ q).to(wide), (p.mT @ grad).to(wide)


def _terms(scale: float, tensors: tuple[Tensor, ...], weights: Tensor, delta: Tensor) -> tuple[Tensor, ...]:
    """(h, s) of dq, dk and dv: the sum of the lengths of a row's terms, products of g and v before they cancel."""
    of_q, of_k, of_v, of_g = (x.norm(dim=-1) for x in tensors)
    size = scale * weights * (of_g[:, :, None] * of_v[:, None] + delta.abs()[..., None])
    return (size * of_k[:, None]).sum(2), (size * of_q[..., None]).sum(1), (weights * of_g[..., None]).sum(1)


@dataclass
class Made:
    """A plan's call, and its gradients: in float64, and by the same formula in the dtype."""

    call: Backward
    exact: tuple[Tensor, ...]
    own: tuple[Tensor, ...]
    terms: tuple[Tensor, ...]  # of a row of each gradient, the sum of the lengths
    sinks: Tensor | None


def _bounds(plan: Plan, at: int, of_q: bool) -> tuple[int, int]:
    lengths = plan.lengths_q if of_q else plan.lengths_k
    begin = sum(lengths[:at]) if plan.ragged else 0
    return begin, begin + (plan.used_q if of_q else plan.used_k)[at]


def make(plan: Plan, device: str = "cuda") -> Made:
    """The call of a plan, with NaN in all memory that no row sees."""
    torch.manual_seed(plan.seed)
    heads = plan.heads_k * plan.group
    rows = (plan.lengths_q, heads), (plan.lengths_k, plan.heads_k)

    def new(side: int, size: int) -> Tensor:
        lengths, h = rows[side]
        shape = (sum(lengths) + 5, h, size) if plan.ragged else (len(lengths), lengths[0], h, size)
        return torch.full(shape, math.nan, dtype=plan.dtype, device=device)

    q, grad_out, out = new(0, plan.d), new(0, plan.dv), new(0, plan.dv)
    k, v = new(1, plan.d), new(1, plan.dv)
    lse = torch.full((*q.shape[:-2], heads), math.nan, dtype=torch.float32, device=device)
    grad_lse = torch.randn_like(lse) if plan.grad_lse else None
    sinks = torch.randn(heads, device=device) if plan.sinks else None
    exact = [torch.zeros(x.shape, dtype=torch.float64, device=device) for x in (q, k, v)]
    own = [torch.zeros_like(x) for x in exact]
    sizes = [torch.zeros(x.shape[:-1], dtype=torch.float64, device=device) for x in (q, k, v)]
    grad_sinks = torch.zeros(heads, dtype=torch.float64, device=device) if plan.sinks else None
    scale = plan.d**-0.5 * 1.2
    for at in range(len(plan.lengths_q)):
        where = [slice(*_bounds(plan, at, of_q)) for of_q in (True, False)]
        views = [x if plan.ragged else x[at] for x in (q, k, v, grad_out, out, lse)]
        sq, sk = plan.used_q[at], plan.used_k[at]
        seen = visible(plan, sq, sk, torch.device(device))
        seeing, shown = seen.any(1), seen.any(0)
        drawn = [torch.randn(n, h, s, device=device).to(plan.dtype).double() for n, h, s in (
            (sq, heads, plan.d), (sk, plan.heads_k, plan.d), (sk, plan.heads_k, plan.dv), (sq, heads, plan.dv))]  # fmt: skip
        for i, (x, values) in enumerate(zip(views, drawn, strict=False)):
            alive = shown if i in (1, 2) else seeing
            x[where[int(i in (1, 2))]] = values.to(plan.dtype).masked_fill(~alive[:, None, None], math.nan)
        tensors = tuple(
            x.transpose(0, 1).repeat_interleave(plan.group if i in (1, 2) else 1, 0) for i, x in enumerate(drawn)
        )
        scores = tensors[0] @ tensors[1].mT * scale
        if plan.softcap:
            scores = plan.softcap * torch.tanh(scores / plan.softcap)
        scores = scores.masked_fill(~seen, -math.inf)
        terms = scores if sinks is None else torch.cat([scores, sinks.double()[:, None, None].expand(-1, sq, 1)], 2)
        own_lse = torch.logsumexp(terms, 2) if terms.shape[2] else scores.new_full((heads, sq), -math.inf)
        weights = torch.exp(scores - own_lse[..., None]).where(seen, 0)
        own_out = (weights @ tensors[2]).to(plan.dtype)
        views[4][where[0]] = own_out.transpose(0, 1)
        views[5][where[0]] = own_lse.T.float()
        grad_of_lse = 0.0
        if grad_lse is not None:
            grad_of_lse = (grad_lse if plan.ragged else grad_lse[at])[where[0]].T.double()
        delta = (own_out.double() * tensors[3]).sum(-1).where(seeing, 0) - grad_of_lse
        ref = (weights @ tensors[2] * tensors[3]).sum(-1).where(seeing, 0) - grad_of_lse
        if grad_sinks is not None and sinks is not None:
            grad_sinks -= (torch.exp(sinks.double()[:, None] - own_lse) * ref).sum(1)
        for i, grown in enumerate(_terms(scale, tensors, weights, ref)):
            if i:
                grown = grown.unflatten(0, (plan.heads_k, plan.group)).sum(1)
            (sizes[i] if plan.ragged else sizes[i][at])[where[int(i > 0)]] = grown.T
        for result, of, d in ((exact, torch.float64, ref), (own, plan.dtype, delta)):
            found = formula(plan, scale, tensors, seen, own_lse, d, of)
            for i, grads in enumerate(found):
                if i:
                    grads = grads.unflatten(0, (plan.heads_k, plan.group)).sum(1)
                target = result[i] if plan.ragged else result[i][at]
                target[where[int(i > 0)]] = grads.transpose(0, 1).to(plan.dtype if of == plan.dtype else of).double()
    lengths = (plan.lengths_q, plan.lengths_k) if plan.ragged else (None, None)
    used = (plan.used_q, plan.used_k) if plan.seqused else (None, None)

    def ints(values: list[int] | tuple[int, ...]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    cu = [None if n is None else ints([sum(n[:i]) for i in range(len(n) + 1)]) for n in lengths]
    call = Backward(
        grad_out, q, k, v, out, lse.movedim(-1, -2).contiguous(), scale, plan.left, plan.right,
        grad_lse=None if grad_lse is None else grad_lse.movedim(-1, -2), attention_chunk=plan.chunk,
        softcap=plan.softcap, sinks=sinks, cu_seqlens_q=cu[0], cu_seqlens_k=cu[1],
        seqused_q=None if used[0] is None else ints(used[0]), seqused_k=None if used[1] is None else ints(used[1]),
        max_seqlen_q=max(plan.lengths_q), max_seqlen_k=max(plan.lengths_k), deterministic=plan.deterministic,
    )  # fmt: skip
    return Made(call, tuple(exact), tuple(own), tuple(sizes), grad_sinks)


def worst_share(made: Made, found: Gradients, plan: Plan) -> float:
    """The largest share of the rule's limit that a row takes; not more than 1 passes, NaN is infinity."""
    factor, worst = 3.0 if plan.softcap else 2.0, 0.0
    for ours, ref, own, terms in zip(found[:3], made.exact, made.own, made.terms, strict=True):
        if ours.numel() == 0:
            continue
        length = ref.norm(dim=-1)
        limit = factor * (own - ref).norm(dim=-1) + 2 * EPSILON[plan.dtype] * length + EPSILON[plan.dtype] * terms
        off = (ours.double() - ref).norm(dim=-1)
        share = torch.where(off == 0, 0, off / limit).max()
        worst = max(worst, math.inf if math.isnan(float(share)) else float(share))
    if made.sinks is not None and found.sinks is not None:
        limit = 0.02 * made.sinks.abs().max() + 0.02 * (1 + made.sinks.abs())
        share = ((found.sinks.double() - made.sinks).abs() / limit).max()
        worst = max(worst, math.inf if math.isnan(float(share)) else float(share))
    return worst

"""Random backward passes for the Hopper kernels: inputs, gradients in float64, and the rule that judges them.

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
Tensors = tuple[Tensor, ...]


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

    @property
    def scale(self) -> float:
        """Not the default, which an implementation could take by mistake."""
        return self.d**-0.5 * 1.2

    def rows(self, at: int, of_q: bool) -> slice:
        """A sequence's rows in use, in its part of a dense tensor or in a ragged one."""
        lengths, used = (self.lengths_q, self.used_q) if of_q else (self.lengths_k, self.used_k)
        begin = sum(lengths[:at]) if self.ragged else 0
        return slice(begin, begin + used[at])


def draw(seed: int, sizes: tuple[int, ...] = (64, 128, 256), longest: int = 400) -> Plan:
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


@dataclass
class Sequence:
    """One sequence's forward pass: q, k, v and grad_out (h, s, d) in float64, keys repeated for each query head."""

    tensors: Tensors
    seen: Tensor  # (sq, sk)
    lse: Tensor  # (h, sq)
    weights: Tensor  # (h, sq, sk)
    out: Tensor  # (h, sq, dv), not rounded


def attend(plan: Plan, tensors: Tensors, sinks: Tensor | None) -> Sequence:
    """The forward pass of one sequence, in float64."""
    heads, sq, sk = tensors[0].shape[0], tensors[0].shape[1], tensors[1].shape[1]
    seen = visible(plan, sq, sk, tensors[0].device)
    scores = tensors[0] @ tensors[1].mT * plan.scale
    if plan.softcap:
        scores = plan.softcap * torch.tanh(scores / plan.softcap)
    scores = scores.masked_fill(~seen, -math.inf)
    terms = scores if sinks is None else torch.cat([scores, sinks.double()[:, None, None].expand(-1, sq, 1)], 2)
    lse = torch.logsumexp(terms, 2) if terms.shape[2] else scores.new_full((heads, sq), -math.inf)
    weights = torch.exp(scores - lse[..., None]).where(seen, 0)
    return Sequence(tensors, seen, lse, weights, weights @ tensors[2])


def formula(plan: Plan, one: Sequence, delta: Tensor, dtype: torch.dtype) -> Tensors:
    """The gradients of q, k and v (h, s, d) of one sequence, products and operands in a dtype; delta (h, sq)."""
    q, k, v, grad = (x.to(dtype) for x in one.tensors)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scores = (q @ k.mT).to(wide) * plan.scale
    slope = torch.ones_like(scores)
    if plan.softcap:
        scores = plan.softcap * torch.tanh(scores / plan.softcap)
        slope = 1 - (scores / plan.softcap) ** 2
    weights = torch.exp(scores - one.lse.to(wide)[..., None]).where(one.seen, 0)
    scores = weights * ((grad @ v.mT).to(wide) - delta.to(wide)[..., None]) * slope
    p, ds = weights.to(dtype), scores.to(dtype)
    return plan.scale * (ds @ k).to(wide), plan.scale * (ds.mT @ q).to(wide), (p.mT @ grad).to(wide)


def _terms(plan: Plan, one: Sequence, delta: Tensor) -> Tensors:
    """(h, s, 1) of dq, dk and dv: the sum of the lengths of a row's terms, products of g and v before they cancel."""
    of_q, of_k, of_v, of_g = (x.norm(dim=-1, keepdim=True) for x in one.tensors)
    size = plan.scale * one.weights * (of_g * of_v.mT + delta.abs()[..., None])
    return size @ of_k, size.mT @ of_q, one.weights.mT @ of_g


@dataclass
class Made:
    """A plan's call, and its gradients: in float64, and by the same formula in the dtype."""

    plan: Plan
    call: Backward
    exact: Tensors
    own: Tensors
    terms: Tensors  # of a row of each gradient, the sum of the lengths
    sinks: Tensor | None


class _Maker:
    """Fills a call's tensors, sequence by sequence."""

    def __init__(self, plan: Plan, device: str) -> None:
        torch.manual_seed(plan.seed)
        self.plan, self.device = plan, device
        heads = plan.heads_k * plan.group
        self.q, self.grad_out, self.out = (self._new(True, heads, size) for size in (plan.d, plan.dv, plan.dv))
        self.k, self.v = (self._new(False, plan.heads_k, size) for size in (plan.d, plan.dv))
        self.lse = torch.full(self.q.shape[:-1], math.nan, dtype=torch.float32, device=device)
        self.grad_lse = torch.randn_like(self.lse) if plan.grad_lse else None
        self.sinks = torch.randn(heads, device=device) if plan.sinks else None
        of = (self.q, self.k, self.v)
        self.exact, self.own = ([x.new_zeros(x.shape, dtype=torch.float64) for x in of] for _ in range(2))
        self.terms = [x.new_zeros((*x.shape[:-1], 1), dtype=torch.float64) for x in of]
        self.grad_sinks = torch.zeros(heads, dtype=torch.float64, device=device) if plan.sinks else None

    def _new(self, of_q: bool, heads: int, size: int) -> Tensor:
        lengths = self.plan.lengths_q if of_q else self.plan.lengths_k
        rows = (sum(lengths) + 5,) if self.plan.ragged else (len(lengths), lengths[0])
        return torch.full((*rows, heads, size), math.nan, dtype=self.plan.dtype, device=self.device)

    def _part(self, x: Tensor, at: int, of_q: bool) -> Tensor:
        """A sequence's rows in use (s, h, ...) of a tensor."""
        return (x if self.plan.ragged else x[at])[self.plan.rows(at, of_q)]

    def _grouped(self, grads: Tensor, i: int) -> Tensor:
        """(s, h, d) of a gradient by query head: summed over the heads of a key head, for keys and values."""
        by_head = grads.unflatten(0, (self.plan.heads_k, self.plan.group)).sum(1) if i else grads
        return by_head.transpose(0, 1)

    def add(self, at: int) -> None:
        """One sequence's values, and its gradients."""
        plan, given = self.plan, ((self.q, True), (self.k, False), (self.v, False), (self.grad_out, True))
        parts = [self._part(x, at, of_q) for x, of_q in given]
        drawn = [torch.randn(part.shape, device=self.device).to(plan.dtype).double() for part in parts]
        repeats = [1 if of_q else plan.group for _, of_q in given]
        tensors = [x.transpose(0, 1).repeat_interleave(n, 0) for x, n in zip(drawn, repeats, strict=True)]
        one = attend(plan, tuple(tensors), self.sinks)
        seeing, shown = one.seen.any(1), one.seen.any(0)
        for part, values, (_, of_q) in zip(parts, drawn, given, strict=True):
            part.copy_(values.masked_fill(~(seeing if of_q else shown)[:, None, None], math.nan))
        rounded = one.out.to(plan.dtype)
        self._part(self.out, at, True).copy_(rounded.transpose(0, 1))
        self._part(self.lse, at, True).copy_(one.lse.T)
        more = 0.0 if self.grad_lse is None else self._part(self.grad_lse, at, True).T.double()
        delta, own_delta = ((x.double() * tensors[3]).sum(-1).where(seeing, 0) - more for x in (one.out, rounded))
        if self.grad_sinks is not None and self.sinks is not None:
            self.grad_sinks -= (torch.exp(self.sinks.double()[:, None] - one.lse) * delta).sum(1)
        for i in range(3):
            of_q = i == 0
            exact = self._grouped(formula(plan, one, delta, torch.float64)[i], i)
            own = self._grouped(formula(plan, one, own_delta, plan.dtype)[i], i)
            self._part(self.exact[i], at, of_q).copy_(exact)
            self._part(self.own[i], at, of_q).copy_(own.to(plan.dtype))
            self._part(self.terms[i], at, of_q).copy_(self._grouped(_terms(plan, one, delta)[i], i))

    def _ints(self, values: list[int] | tuple[int, ...]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def call(self) -> Backward:
        plan = self.plan
        lengths = (plan.lengths_q, plan.lengths_k) if plan.ragged else (None, None)
        used = (plan.used_q, plan.used_k) if plan.seqused else (None, None)
        cu = [None if n is None else self._ints([sum(n[:i]) for i in range(len(n) + 1)]) for n in lengths]
        seqused = [None if n is None else self._ints(n) for n in used]
        return Backward(
            self.grad_out, self.q, self.k, self.v, self.out, self.lse.movedim(-1, -2).contiguous(), plan.scale,
            plan.left, plan.right, grad_lse=None if self.grad_lse is None else self.grad_lse.movedim(-1, -2),
            attention_chunk=plan.chunk, softcap=plan.softcap, sinks=self.sinks, cu_seqlens_q=cu[0], cu_seqlens_k=cu[1],
            seqused_q=seqused[0], seqused_k=seqused[1], max_seqlen_q=max(plan.lengths_q),
            max_seqlen_k=max(plan.lengths_k), deterministic=plan.deterministic,
        )  # fmt: skip


def make(plan: Plan, device: str = "cuda") -> Made:
    """The call of a plan, with NaN in all memory that no row sees."""
    maker = _Maker(plan, device)
    for at in range(len(plan.lengths_q)):
        maker.add(at)
    return Made(plan, maker.call(), tuple(maker.exact), tuple(maker.own), tuple(maker.terms), maker.grad_sinks)


def worst_share(made: Made, found: Gradients) -> float:
    """The largest share of the rule's limit that a row takes; not more than 1 passes, NaN is infinity."""
    factor, epsilon = 3.0 if made.plan.softcap else 2.0, EPSILON[made.plan.dtype]
    shares = [0.0]
    for ours, ref, own, terms in zip(found[:3], made.exact, made.own, made.terms, strict=True):
        limit = factor * (own - ref).norm(dim=-1) + epsilon * (2 * ref.norm(dim=-1) + terms[..., 0])
        off = (ours.double() - ref).norm(dim=-1)
        shares += [float(torch.where(off == 0, 0, off / limit).max())] if off.numel() else []
    if made.sinks is not None:
        if found.sinks is None:
            return math.inf
        limit = 0.02 * (1 + made.sinks.abs() + made.sinks.abs().max())
        shares.append(float(((found.sinks.double() - made.sinks).abs() / limit).max()))
    return max(math.inf if math.isnan(share) else share for share in shares)

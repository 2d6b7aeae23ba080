"""Random backward passes for the portable kernels, and the rule that their gradients are held to.

The rule, for each row of a gradient (a token of a head): |ours - ref| <= 2 |base - ref| + 2 eps |ref| in the 2-norm, 3
times with softcap. ref is the formula in float64, base the same step by step in the inputs' dtype. Two roundings are
allowed besides, as a row may be the small difference of long terms, and base may be lucky in one of a single key:
2^-20 of the terms' added lengths, float32's own, and what 2 eps |grad_out * out| in delta makes of the row, since out
has been rounded before it comes here.
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from jit_kernel.fa3.gradients.call import Backward, Gradients
from tests.support import reference

FLOAT32 = 2.0**-20
NAMES = ("grad_q", "grad_k", "grad_v")


@dataclass(frozen=True)
class Space:
    """What `draw` draws from."""

    dtypes: tuple[torch.dtype, ...]
    head_dims: tuple[tuple[int, int], ...]
    longest: int
    device: str = "cpu"
    most_heads: int = 2  # of keys
    most_sequences: int = 3


def normal(shape: tuple[int, ...], space: Space, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator).to(space.device, dtype)


def offsets(lengths: list[int], device: str) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def draw(seed: int, space: Space) -> Backward:
    """One backward pass: dense or ragged, grouped heads, any mask, softcap, sinks, grad_lse; out and lse are exact.

    What no length counts, behind seqused or the last sequence, holds NaN.
    """
    dice, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    dtype, (d, dv) = dice.choice(space.dtypes), dice.choice(space.head_dims)
    hk, group, batch = dice.randint(1, space.most_heads), dice.choice((1, 2, 3)), dice.randint(1, space.most_sequences)
    hq = hk * group

    def length() -> int:
        return dice.choice((dice.randint(0, 1), dice.randint(1, space.longest), space.longest, space.longest))

    if dice.random() < 0.5:
        one, other = max(1, length()), max(1, length())
        lengths_q, lengths_k = [one] * batch, [other] * batch
        shapes = [(batch, n) for n in (one, other)]
        ragged = {}
    else:
        lengths_q, lengths_k = [length() for _ in range(batch)], [length() for _ in range(batch)]
        shapes = [(sum(lengths) + dice.choice((0, 3)),) for lengths in (lengths_q, lengths_k)]
        ragged = {"cu_seqlens_q": offsets(lengths_q, space.device), "cu_seqlens_k": offsets(lengths_k, space.device)}
        ragged |= {"max_seqlen_q": max(lengths_q), "max_seqlen_k": max(lengths_k)}
    used = {}
    for name, lengths in (("seqused_q", lengths_q), ("seqused_k", lengths_k)):
        if dice.random() < 0.3:
            lengths[:] = [dice.randint(0, n) for n in lengths]
            used[name] = torch.tensor(lengths, dtype=torch.int32, device=space.device)
    left, right = dice.choice(
        ((-1, -1), (-1, 0), (-1, 0), (dice.randint(0, space.longest), 0), (9, 5), (-1, 17), (20, -1))
    )
    call = Backward(
        grad_out=normal((*shapes[0], hq, dv), space, dtype, generator),
        q=normal((*shapes[0], hq, d), space, dtype, generator),
        k=normal((*shapes[1], hk, d), space, dtype, generator),
        v=normal((*shapes[1], hk, dv), space, dtype, generator),
        out=torch.zeros(*shapes[0], hq, dv, device=space.device, dtype=dtype),
        lse=torch.full((*shapes[0][:-1], hq, shapes[0][-1]), math.nan, device=space.device),
        softmax_scale=dice.choice((1 / math.sqrt(d), 0.3)),
        left=left,
        right=right,
        attention_chunk=dice.choice((0, 0, 0, 1, 16, 37)),
        softcap=dice.choice((0.0, 0.0, 2.0)),
        deterministic=dice.random() < 0.5,
        **ragged,
        **used,
    )  # fmt: skip
    if dice.random() < 0.4:
        call.sinks = normal((hq,), space, dice.choice((torch.float32, dtype)), generator)
        if dice.random() < 0.2:
            call.sinks[0] = -math.inf
    if dice.random() < 0.4:
        call.grad_lse = normal(tuple(call.lse.shape), space, torch.float32, generator)
    _settle(call)
    return call


def rows_of(call: Backward, of_keys: bool) -> list[tuple[int | slice, ...]]:
    """Where each sequence's rows that count lie in q, or in k."""
    starts, used = (
        (call.cu_seqlens_k, call.seqused_k) if of_keys else (call.cu_seqlens_q, call.seqused_q)
    )  # fmt: skip
    x = call.k if of_keys else call.q
    lengths = [x.shape[1]] * x.shape[0] if starts is None else starts.diff().tolist()
    counted = lengths if used is None else used.tolist()
    if starts is None:
        return [(i, slice(0, n)) for i, n in enumerate(counted)]
    return [(slice(begin, begin + n),) for begin, n in zip(starts.tolist(), counted, strict=False)]


def _problem(call: Backward) -> reference.Problem:
    return reference.Problem(
        [], call.softmax_scale, window_size=(call.left, call.right), attention_chunk=call.attention_chunk,
        softcap=call.softcap, sinks=call.sinks,
    )  # fmt: skip


def _settle(call: Backward) -> None:
    """Fill in out and lse, and NaN where nothing counts."""
    hidden = [torch.ones(x.shape[:-2], dtype=torch.bool, device=x.device) for x in (call.q, call.k)]
    for where, keys in zip(rows_of(call, False), rows_of(call, True), strict=True):
        hidden[0][where], hidden[1][keys] = False, False
        sequence = reference.Sequence(call.q[where].double(), call.k[keys].double(), call.v[keys].double())
        out, lse = reference.attend(sequence, _problem(call), torch.float64)
        call.out[where] = out.to(call.out.dtype)
        _of_heads(call.lse, where)[...] = lse
    for x, behind in ((call.q, 0), (call.k, 1), (call.v, 1), (call.grad_out, 0), (call.out, 0)):
        x[hidden[behind]] = math.nan
    if call.grad_lse is not None:
        call.grad_lse.transpose(-1, -2)[hidden[0]] = math.nan


def _of_heads(lse: Tensor, where: tuple[int | slice, ...]) -> Tensor:
    """(hq, sq) of one sequence."""
    return lse[where[0], :, where[1]] if len(where) == 2 else lse[:, where[0]]


def formula(call: Backward, where: tuple, keys: tuple, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Gradients of q, k and v (n, heads, size), the sinks' (hq,), and the roundings allowed, of one sequence."""
    q, g, out = (x[where].to(dtype).transpose(0, 1) for x in (call.q, call.grad_out, call.out))
    group = q.shape[0] // call.k.shape[-2]
    k, v = (x[keys].to(dtype).transpose(0, 1).repeat_interleave(group, 0) for x in (call.k, call.v))
    exact = dtype == torch.float64
    sequence = reference.Sequence(call.q[where], call.k[keys], call.v[keys])
    capped = reference.scores(sequence, _problem(call), dtype)
    lse = _of_heads(call.lse, where).double()
    if exact:
        out, lse = reference.attend(sequence, _problem(call), dtype)
        out = out.transpose(0, 1)
    p = torch.exp(capped.double() - lse[..., None]).nan_to_num(nan=0.0).to(dtype)
    delta = (g * out).sum(-1, keepdim=True)
    if call.grad_lse is not None:
        delta = delta - _of_heads(call.grad_lse, where).to(dtype)[..., None]
    ds = p * (g @ v.mT - delta)
    if call.softcap > 0:
        slope = 1 - (capped.masked_fill(capped == -math.inf, 0.0) / call.softcap).square()
        ds = ds * slope
    scale = call.softmax_scale
    found = [ds @ k * scale, _summed(ds.mT @ q * scale, group), _summed(p.mT @ g, group)]
    products = g.norm(dim=-1, keepdim=True) @ v.norm(dim=-1, keepdim=True).mT
    size = FLOAT32 * (products + (p * products).sum(-1, keepdim=True) + delta.abs())
    size = p * (size + 2 * reference.ROW_SLACK[call.q.dtype] * (g * out).norm(dim=-1, keepdim=True))
    lengths = [(x.norm(dim=-1, keepdim=True)) for x in (q, k, g)]
    terms = [
        scale * size @ lengths[1],
        _summed(scale * size.mT @ lengths[0], group),
        _summed(FLOAT32 * p.mT @ lengths[2], group),
    ]
    sinks = torch.zeros(q.shape[0], dtype=dtype, device=q.device)
    if call.sinks is not None:
        weight = torch.exp(call.sinks.double()[:, None] - lse).nan_to_num(nan=0.0).to(dtype)
        sinks = -(weight * delta[..., 0]).sum(-1)
    return [x.transpose(0, 1) for x in found], sinks, [x.transpose(0, 1)[..., 0] for x in terms]


def _summed(x: Tensor, group: int) -> Tensor:
    return x.unflatten(0, (-1, group)).sum(1)


def judge(call: Backward, found: Gradients) -> float:
    """The worst share of the rule's limit over all rows. Raises AssertionError where a row of no sequence is not 0."""
    worst = 0.0
    factor = 3.0 if call.softcap > 0 else 2.0
    rests = [torch.ones(x.shape[:-2], dtype=torch.bool, device=x.device) for x in found[:3]]
    sinks = [torch.zeros(call.q.shape[-2], dtype=torch.float64, device=call.q.device) for _ in range(3)]
    for where, keys in zip(rows_of(call, False), rows_of(call, True), strict=True):
        exact, exact_sinks, terms = formula(call, where, keys, torch.float64)
        base, base_sinks, _ = formula(call, where, keys, call.q.dtype)
        sinks[0] += exact_sinks
        sinks[1] += base_sinks.double()
        sinks[2] += exact_sinks.abs()
        for name, grad, place, ref, other, term, rest in zip(
            NAMES, found[:3], (where, keys, keys), exact, base, terms, rests, strict=True
        ):
            rest[place] = False
            error = (grad[place].double() - ref).norm(dim=-1)
            limit = factor * (other.double() - ref).norm(dim=-1) + term
            limit += 2 * reference.ROW_SLACK[grad.dtype] * ref.norm(dim=-1)
            share = torch.where(error == 0, 0.0, error / limit).nan_to_num(nan=math.inf, posinf=math.inf)
            if share.numel() and float(share.max()) > worst:
                worst = float(share.max())
                if worst > 1:
                    print(f"{name}: {worst:.3f} of the limit in {place}, row {int(share.max(-1)[0].argmax())}")
    for name, grad, rest in zip(NAMES, found[:3], rests, strict=True):
        assert bool((grad[rest] == 0).all()), f"{name} is not 0 in rows of no sequence"
    if call.sinks is not None:
        assert found.sinks is not None and found.sinks.dtype is torch.float32
        slack = reference.ROW_SLACK[call.q.dtype] * (1 + sinks[2]) * 4
        share = (found.sinks.double() - sinks[0]).abs() / (factor * (sinks[1] - sinks[0]).abs() + slack)
        worst = max(worst, float(share.nan_to_num(nan=math.inf).max()))
    return worst


def twice(call: Backward, found: Gradients, again: Gradients) -> None:
    """Raise AssertionError unless both runs of a call have the same bits."""
    for name, one, other in zip((*NAMES, "grad_sinks"), found, again, strict=True):
        assert (one is None and other is None) or torch.equal(one, other), f"{name} differs from run to run"


def copy(call: Backward, **changed: object) -> Backward:
    return replace(call, **changed)

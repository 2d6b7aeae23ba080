"""Calls whose scores are so large that float32 shows their differences only before they are scaled.

Queries and keys are small integers times powers of two, so every q·k is exact in float32 and scores that are equal
are equal to the bit: a row's weights are one-hot, or shared between equal scores. `expected` is the formula in
float64, the difference from the row's maximum taken first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import jit_kernel.flash_attention_v3 as fa3
from tests.support import reference

FP8 = torch.float8_e4m3fn
PAGE = 16


@dataclass(frozen=True)
class Case:
    """Integers of q and k are multiplied by `factor` each, in fp8 by a descale of it."""

    name: str
    scale: float
    factor: float = 1.0
    softcap: float = 0.0
    settings: tuple[tuple[str, Any], ...] = ()
    sink: float | None = None
    late: bool = False  # the last half of the keys, with which Hopper begins, gives scores of 0
    negative: bool = False  # every score is below 0

    def __str__(self) -> str:
        return self.name


CASES = (
    Case("scale 10**30", 10.0**30),
    Case("scale 10**30, causal", 10.0**30, settings=(("causal", True),)),
    Case("scale 2**63", 2.0**63),
    Case("scale 2**63, window, sink", 2.0**63, settings=(("window_size", (20, 3)),), sink=0.5),
    Case("scale 2**63, chunk, negative, sink", 2.0**63, settings=(("attention_chunk", 24),), sink=-2.0, negative=True),
    Case("scale 10**30, negative, causal", 10.0**30, settings=(("causal", True),), negative=True),
    Case("scale 10**30, zeros first", 10.0**30, late=True),
    Case("scale 3 * 10**38", 3e38),
    Case("scale 1e7", 1e7),
    Case("q and k of 10**15", 0.125, 2.0**50),
    Case("q and k of 10**15, causal, sink", 0.125, 2.0**50, settings=(("causal", True),), sink=1.0),
    Case("q and k of 10**15, zeros first", 0.125, 2.0**50, late=True),
    Case("q and k of 10**15, negative, window", 0.125, 2.0**50, settings=(("window_size", (9, 0)),), negative=True),
    Case("q and k of 10**15, a sink of 10**37", 0.125, 2.0**50, sink=1e37),
    Case("scale 10**30, softcap 30", 10.0**30, softcap=30.0),
    Case("scale 10**30, softcap 10**-30", 10.0**30, softcap=1e-30),
    Case("scale 0.125, softcap 2**63", 0.125, softcap=2.0**63, factor=2.0**20),
)
# The GPUs' tanh has an absolute error, which so large a cap multiplies; the interpreter's scalars are Python's floats,
# which no quotient makes infinite.
GPU_CASES = tuple(case for case in CASES if case.softcap < 2.0**63)
INTERPRETED_CASES = tuple(case for case in GPU_CASES if case.softcap == 0 or case.scale / case.softcap < 1e38)


def factor_of(case: Case, dtype: torch.dtype) -> float:
    """fp16 ends at 65504."""
    return min(case.factor, 2.0**12) if dtype == torch.float16 else case.factor


def inputs(case: Case, dtype: torch.dtype, sq: int, sk: int, heads: tuple[int, int], d: int) -> tuple[Tensor, ...]:
    """q, k and v of a batch of 1, in float64 and representable in dtype; the first query is zeros."""
    random = torch.Generator().manual_seed(sq + sk + d)
    low = 1 if case.negative else -3
    q, k = (torch.randint(low, 4, (1, n, h, d), generator=random).double() for n, h in ((sq, heads[0]), (sk, heads[1])))
    if case.negative:
        k = -k
    else:
        q[:, 0] = 0
    k[:, sk // 2 :: 7] = k[:, sk // 2 :: 7].roll(1, 1)  # equal scores, in one block of keys and in several
    k[:, ::5] = k[:, :1]
    if case.late:
        k[:, sk - sk // 2 :] = 0
    v = torch.randn(1, sk, heads[1], d, generator=random).to(dtype).double()
    return q, k, v


def expected(q: Tensor, k: Tensor, v: Tensor, case: Case, factor: float, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """out (sq, hq, d) and lse (hq, sq) of one sequence in float64; q and k are not yet multiplied by factor."""
    group = q.shape[1] // k.shape[1]
    heads_first = (q.transpose(0, 1), *(x.repeat_interleave(group, 1).transpose(0, 1) for x in (k, v)))
    scores = heads_first[0] @ heads_first[1].mT * factor * factor
    scale = case.scale
    if case.softcap > 0:
        scores, scale = torch.tanh(scores * (scale / case.softcap)) * case.softcap, 1.0
    problem = reference.Problem([], **dict(case.settings))
    seen = reference.visible(problem, q.shape[0], k.shape[0], q.device)
    scores = scores.masked_fill(~seen, -math.inf)
    top = scores.amax(-1, keepdim=True)
    weights = torch.where(top == -math.inf, 0.0, torch.exp((scores - top) * scale))
    sums, logit = weights.sum(-1, keepdim=True), top * scale
    if sinks is not None:
        sink = sinks.double()[:, None, None]
        base = torch.maximum(logit, sink)
        weights, sums = weights * torch.exp(logit - base), sums * torch.exp(logit - base) + torch.exp(sink - base)
        logit = base
    out = (weights / sums).nan_to_num(nan=0.0) @ heads_first[2]
    return out.transpose(0, 1), (logit + sums.log()).nan_to_num(nan=-math.inf)[..., 0]


def faults(
    case: Case, dtype: torch.dtype, sq: int, sk: int, *, paged: bool, device: str = "cpu", d: int = 64, splits: int = 0
) -> str:
    """What is wrong with out and lse of a call; empty where nothing is."""
    heads, factor = (4, 2), factor_of(case, dtype)
    q, k, v = inputs(case, dtype, sq, sk, heads, d)
    sinks = None if case.sink is None else torch.full((heads[0],), case.sink)
    ref, ref_lse = expected(q[0], k[0], v[0], case, factor, sinks)
    arguments: dict[str, Any] = {"softmax_scale": case.scale, "softcap": case.softcap, "num_splits": splits}
    arguments |= dict(case.settings)
    if sinks is not None:
        arguments["sinks"] = sinks.to(device)
    if dtype == FP8:
        descale = torch.full((1, heads[1]), factor, device=device)
        arguments |= {"q_descale": descale, "k_descale": descale}
    else:
        q, k = q * factor, k * factor
    q, k, v = (x.to(dtype).to(device) for x in (q, k, v))
    out, lse = attend(q, k, v, arguments, paged=paged)
    if splits > 1 and bool(out.isfinite().all()):
        # An lse so large holds no number of equal scores: splits share a row by their maxima alone.
        out[0] = ref.to(out.dtype)
    return differences(out[0].cpu().double(), lse[0].cpu(), ref, ref_lse, dtype, capped=case.softcap > 0)


def attend(q: Tensor, k: Tensor, v: Tensor, arguments: dict[str, Any], *, paged: bool) -> tuple[Tensor, Tensor]:
    """Dense, or of the same keys in pages that lie in no order."""
    if not paged:
        return fa3.flash_attn_func(q, k, v, return_softmax_lse=True, **arguments)
    pages = -(-k.shape[1] // PAGE)
    table = torch.randperm(pages, generator=torch.Generator().manual_seed(1)).int()
    caches = []
    for x in (k, v):
        cache = torch.zeros(pages, PAGE, *x.shape[2:]).to(x.dtype).to(x.device)
        padded = torch.zeros(pages * PAGE, *x.shape[2:]).to(x.dtype).to(x.device)
        padded[: x.shape[1]] = x[0]
        cache[table.long()] = padded.view(cache.shape)
        caches.append(cache)
    return fa3.flash_attn_with_kvcache(
        *(q, *caches),
        page_table=table[None].to(q.device),
        cache_seqlens=torch.tensor([k.shape[1]], dtype=torch.int32, device=q.device),
        return_softmax_lse=True,
        **arguments,
    )


def differences(out: Tensor, lse: Tensor, ref: Tensor, ref_lse: Tensor, dtype: torch.dtype, *, capped: bool) -> str:
    """lse may be infinite where float32 does not hold it, and there alone."""
    wrong = []
    rounding = {torch.float32: 2e-6, torch.float16: 2e-3}.get(dtype, 1.6e-2)
    bad = ~((out - ref).abs() <= rounding * (1 + ref.abs()))
    if bool(bad.any()):
        place = tuple(int(i) for i in bad.nonzero()[0])
        wrong.append(f"{int(bad.sum())} of {bad.numel()} of out, at {place} {out[place]}, not {ref[place]}")
    rounded = ref_lse.float()
    slack = (2.0**-10 if capped else 2.0**-20) * rounded.abs() + 1e-3
    bad = ~((lse == rounded) | ((lse - rounded).abs() <= slack)) | (lse.isinf() != rounded.isinf())
    if bool(bad.any()):
        place = tuple(int(i) for i in bad.nonzero()[0])
        wrong.append(f"{int(bad.sum())} of {bad.numel()} of lse, at {place} {float(lse[place])}, not {rounded[place]}")
    return "; ".join(wrong)

"""What attention is, in plain torch, and the rule that says how far a kernel may be from it.

`Sequence` holds the rows of one sequence after every matter of layout is settled: the query rows that count, and the
keys in order, without left padding, with appended keys, gathered from their pages. `Problem` is a list of them and
the settings that all share. Rotary embedding rounds to the inputs' dtype, as a cache must; `rotate` is applied before
a `Sequence` is made. Everything here runs on any torch device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Rows
from dataclasses import dataclass, replace

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
ROW_SLACK = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-20}
FP8_MAX = 448.0
FP8_P_SCALE = 256.0  # P in [0, 1] times this still fits e4m3 (448), and uses its range


@dataclass(frozen=True)
class Sequence:
    """One sequence: q (sq, hq, d), k (sk, hk, d), v (sk, hk, dv), qv (sq, hq, dv); descales (hk,) and token scales
    (sk, hk) float32; draft_mask (sq, words) int32."""

    q: Tensor
    k: Tensor
    v: Tensor
    qv: Tensor | None = None
    q_descale: Tensor | None = None
    k_descale: Tensor | None = None
    v_descale: Tensor | None = None
    draft_mask: Tensor | None = None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None


@dataclass(frozen=True)
class Problem:
    """Sequences and what they share; `softmax_scale` None means 1/sqrt of all the elements of one dot product."""

    sequences: list[Sequence]
    softmax_scale: float | None = None
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    attention_chunk: int = 0
    softcap: float = 0.0
    sinks: Tensor | None = None
    only_qv: bool = False


def rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *, interleaved: bool) -> Tensor:
    """Rotary embedding of x (n, h, d) at positions (n,), in float64 and rounded once to x's dtype."""
    return turned(x, cos, sin, positions, interleaved=interleaved).to(x.dtype)


def turned(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *, interleaved: bool) -> Tensor:
    """The same in float64, not rounded.

    cos and sin are (max_pos, r/2): the first r elements of each head turn, in pairs (2i, 2i + 1) when interleaved
    (GPT-J), else (i, i + r/2) (NeoX).
    """
    half = cos.shape[1]
    rows = x.double()
    c, s = cos.double()[positions, None, :], sin.double()[positions, None, :]
    first = slice(0, 2 * half, 2) if interleaved else slice(0, half)
    second = slice(1, 2 * half, 2) if interleaved else slice(half, 2 * half)
    a, b = rows[..., first].clone(), rows[..., second].clone()
    rows[..., first], rows[..., second] = a * c - b * s, a * s + b * c
    return rows


def quantised(x: Tensor, factor: Tensor) -> Tensor:
    """What an e4m3 cache holds of x (n, h, d) with factors (n, h): divided in float32, rounded once, saturated."""
    return (x.float() / factor[..., None]).clamp(-FP8_MAX, FP8_MAX).to(FP8)


def visible(problem: Problem, sq: int, sk: int, device: torch.device) -> Tensor:
    """Boolean (sq, sk): which keys each query row may see; aligned to the bottom right."""
    position = torch.arange(sq, device=device)[:, None] + (sk - sq)
    key = torch.arange(sk, device=device)[None, :]
    left, right = problem.window_size
    right = 0 if problem.causal else right
    seen = torch.ones(sq, sk, dtype=torch.bool, device=device)
    if left >= 0:
        seen &= key >= position - left
    if right >= 0:
        seen &= key <= position + right
    if problem.attention_chunk > 0:
        chunk = problem.attention_chunk
        start = torch.div(position, chunk, rounding_mode="floor") * chunk
        seen &= (key >= start) & (key < start + chunk)
    return seen


def drafted(draft_mask: Tensor, sk: int) -> Tensor:
    """Boolean (sq, sk): bit by bit, which keys a draft mask (sq, words) lets each query row see."""
    sq, words = draft_mask.shape
    seen = torch.ones(sq, sk, dtype=torch.bool, device=draft_mask.device)
    for bit in range(32 * words):
        key = sk - 32 * words + bit
        if key >= 0:
            seen[:, key] = (draft_mask[:, bit // 32] >> (bit % 32)) & 1 == 1
    return seen


def seen_by(s: Sequence, problem: Problem) -> Tensor:
    """Boolean (sq, sk): which keys each query row sees, by the mask of the problem and by the sequence's draft mask."""
    seen = visible(problem, s.q.shape[0], s.k.shape[0], s.q.device)
    return seen if s.draft_mask is None else seen & drafted(s.draft_mask, s.k.shape[0])


def scale_of(problem: Problem, s: Sequence) -> float:
    if problem.softmax_scale is not None:
        return problem.softmax_scale
    from_qv = 0 if s.qv is None else s.qv.shape[-1]
    return 1.0 / math.sqrt((0 if problem.only_qv else s.q.shape[-1]) + from_qv)


def _heads(x: Tensor, dtype: torch.dtype, group: int = 1) -> Tensor:
    """(n, h, d) to (h * group, n, d): every key head repeated for the query heads that share it."""
    return x.to(dtype).transpose(0, 1).repeat_interleave(group, dim=0)


def scores(s: Sequence, problem: Problem, dtype: torch.dtype) -> Tensor:
    """(hq, sq, sk) in dtype, softcapped and masked with -inf; the scale is folded into the keys."""
    group = s.q.shape[1] // s.k.shape[1]
    scale = scale_of(problem, s)
    total = None
    if not problem.only_qv:
        total = _heads(s.q, dtype) @ (_heads(s.k, dtype, group) * scale).mT
    if s.qv is not None:
        of_values = _heads(s.qv, dtype) @ (_heads(s.v, dtype, group) * scale).mT
        total = of_values if total is None else total + of_values
    assert total is not None
    if problem.softcap > 0:
        total = torch.tanh(total / problem.softcap) * problem.softcap
    return total.masked_fill(~seen_by(s, problem), -math.inf)


def attend(s: Sequence, problem: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The formula step by step in dtype: out (sq, hq, dv) and lse (hq, sq); an empty row gives 0 and -inf."""
    group = s.q.shape[1] // s.k.shape[1]
    logits = scores(s, problem, dtype)
    if problem.sinks is not None:
        sink = problem.sinks.to(dtype)[:, None, None].expand(-1, logits.shape[1], 1)
        logits = torch.cat([logits, sink], dim=-1)
    if logits.shape[-1] == 0:  # no key at all: one column that no query sees
        logits = logits.new_full((*logits.shape[:2], 1), -math.inf)
    p = torch.softmax(logits, dim=-1).nan_to_num(nan=0.0)[..., : s.k.shape[0]]
    out = (p @ _heads(s.v, dtype, group)).transpose(0, 1)
    return out, torch.logsumexp(logits, dim=-1)


def exact(s: Sequence, problem: Problem) -> tuple[Tensor, Tensor]:
    """ref: the formula in float64, in float32 on a GPU; descales applied."""
    dtype = torch.float64 if s.q.device.type == "cpu" else torch.float32
    return attend(_descaled(s, dtype), problem, dtype)


def _descaled(s: Sequence, dtype: torch.dtype) -> Sequence:
    """What FP8 tensors stand for, in dtype; a q of another dtype stays as it is."""
    group = s.q.shape[1] // s.k.shape[1]

    def times(x: Tensor, descale: Tensor | None, scale: Tensor | None = None, repeat: int = 1) -> Tensor:
        if x.dtype != FP8:
            return x
        x = x.to(dtype)
        if descale is not None:
            x = x * descale.to(dtype).repeat_interleave(repeat)[None, :, None]
        return x if scale is None else x * scale.to(dtype)[..., None]

    qv = None if s.qv is None else times(s.qv, s.q_descale, repeat=group)
    k, v = times(s.k, s.k_descale, s.k_scale), times(s.v, s.v_descale, s.v_scale)
    return Sequence(times(s.q, s.q_descale, repeat=group), k, v, qv, draft_mask=s.draft_mask)


def as_cached(s: Sequence) -> Sequence:
    """The same with FP8 keys and values dequantised to a 16-bit q's dtype, in float32 and rounded once."""
    if s.q.dtype == FP8:
        return s
    exact32 = _descaled(s, torch.float32)
    return replace(s, k=exact32.k.to(s.q.dtype), v=exact32.v.to(s.q.dtype))


def emulate_fp8(s: Sequence, problem: Problem) -> Tensor:
    """Attention as e4m3 tensor cores must do it: float32 sums, P rounded to e4m3, out rounded to bf16."""
    group = s.q.shape[1] // s.k.shape[1]
    logits = scores(_descaled(s, torch.float32), problem, torch.float32)
    if logits.shape[-1] == 0:
        return torch.zeros(s.q.shape[0], s.q.shape[1], s.v.shape[-1], device=s.q.device)
    top = logits.amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
    p = torch.exp(logits - top)
    total = p.sum(dim=-1, keepdim=True)
    if problem.sinks is not None:
        total = total + torch.exp(problem.sinks.float()[:, None, None] - top)
    p8 = (p * FP8_P_SCALE).to(FP8).float()
    values = s.v.float() if s.v_scale is None else s.v.float() * s.v_scale[..., None]
    out = (p8 @ _heads(values, torch.float32, group)) / (total * FP8_P_SCALE)
    out = out.nan_to_num(nan=0.0)
    if s.v_descale is not None:
        out = out * s.v_descale.repeat_interleave(group)[:, None, None]
    return out.transpose(0, 1).bfloat16().float()


@dataclass(frozen=True)
class Shares:
    """Errors as shares of their limits: above 1 is wrong. `row` is the worst row's, `where` says which it is."""

    row: float
    largest: float
    lse: float
    where: str

    @property
    def worst(self) -> float:
        return max(self.row, self.largest, self.lse)


def _share(error: Tensor, limit: Tensor) -> Tensor:
    """error / limit; no error is no share even of a limit of 0, and NaN is infinitely wrong."""
    return torch.where(error == 0, torch.zeros_like(error), error / limit).nan_to_num(nan=math.inf, posinf=math.inf)


def lse_share(lse: Tensor, ref: Tensor, limit: float) -> float:
    """Worst |lse - ref| / limit; where ref is -inf, lse must be, too."""
    error = torch.where(lse == ref, torch.zeros_like(ref), (lse.to(ref.dtype) - ref).abs())
    return float(_share(error, torch.full_like(ref, limit)).amax()) if ref.numel() else 0.0


def check(outs: Rows[Tensor], lses: Rows[Tensor] | None, problem: Problem) -> Shares:
    """Hold outs, one (sq, hq, dv) a sequence, and lses, one (hq, sq), against the numeric rule.

    Rows: |ours - ref|_2 <= 2 |base - ref|_2 + 2 eps |ref|_2 (3 |base - ref|_2 with softcap).
    Maximum: max|ours - ref| <= 2 max|base - ref| + 1e-5 max(1, max|v|).
    lse: |lse - ref| <= 1e-3, plus 2^-10 max|score| with softcap.
    e4m3: base is `emulate_fp8`; maximum <= 4 times and mean <= 3 times its own, plus the same 1e-5 max(1, max|v|). On a
    GPU lse may be 2^-10 max|score| further off: tensor cores keep some 14 bits of a sum of 8-bit products.
    """
    row, lse_worst, where = 0.0, 0.0, "no rows"
    ours_errors, base_errors, largest_v = [], [], 1.0
    fp8 = problem.sequences[0].q.dtype == FP8 if problem.sequences else False
    for index, s in enumerate(problem.sequences):
        ref, ref_lse = exact(s, problem)
        dtype = s.q.dtype
        base = emulate_fp8(s, problem) if fp8 else attend(as_cached(s), problem, dtype)[0]
        ours_error, base_error = outs[index].to(ref.dtype) - ref, base.to(ref.dtype) - ref
        if ours_error.shape != ref.shape or base_error.shape != ref.shape:
            raise AssertionError(f"sequence {index}: out is {tuple(outs[index].shape)}, must be {tuple(ref.shape)}")
        ours_errors.append(ours_error.flatten())
        base_errors.append(base_error.flatten())
        v = _descaled(s, ref.dtype).v
        largest_v = max(largest_v, float(v.abs().amax()) if v.numel() else 0.0)
        if ref.numel() and not fp8:
            factor = 3.0 if problem.softcap > 0 else 2.0
            limit = factor * base_error.norm(dim=-1) + 2 * ROW_SLACK[dtype] * ref.norm(dim=-1)
            shares = _share(ours_error.norm(dim=-1), limit)
            if float(shares.amax()) >= row:
                row = float(shares.amax())
                query, head = divmod(int(shares.argmax()), shares.shape[1])
                where = f"sequence {index}, query {query} of {s.q.shape[0]}, head {head}, {s.k.shape[0]} keys"
        if lses is not None:
            limit_lse = 1e-3
            if problem.softcap > 0 or (fp8 and s.q.is_cuda):
                finite = scores(_descaled(s, ref.dtype), problem, ref.dtype).nan_to_num(neginf=0.0)
                limit_lse += 2.0**-10 * (float(finite.abs().amax()) if finite.numel() else 0.0)
            lse_worst = max(lse_worst, lse_share(lses[index], ref_lse, limit_lse))
    if not ours_errors or sum(e.numel() for e in ours_errors) == 0:
        return Shares(row, 0.0, lse_worst, where)
    ours, base = torch.cat(ours_errors).abs(), torch.cat(base_errors).abs()
    slack = 1e-5 * largest_v
    largest = float(_share(ours.amax(), (4 if fp8 else 2) * base.amax() + slack))
    if fp8:
        largest = max(largest, float(_share(ours.mean(), 3 * base.mean() + slack)))
    return Shares(row, largest, lse_worst, where)

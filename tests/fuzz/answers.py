"""Whether an answer is right: `check` raises AssertionError where it is not.

Attention is held against the float64 reference by the numeric rule of tests/support/reference.py. Two looser rules
stand in where that rule cannot judge: single values below 8 a row, and scores so large that their own rounding moves
the softmax. combine and merge_state are held against their formula.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from tests.fuzz import meaning
from tests.fuzz.bases import COMBINE, MERGE, METADATA
from tests.fuzz.meaning import Meaning
from tests.fuzz.reading import FLOATS, INTEGERS, UnjudgedError, dense, need, overlap, overlaps_itself, whole, window
from tests.support import reference
from tests.support.case_tensors import put, raw
from tests.support.cases import FP8, KVCACHE

ROUNDING = {torch.float32: 2.0**-21, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# Errors of a score as a share of the sum of its products' sizes: float32 sums; 16-bit integers in fp16.
OF_A_SCORE = {torch.float32: 2.0**-18, torch.bfloat16: 2.0**-18, torch.float16: 2.0**-11, FP8: 2.0**-18}


def require(holds: bool, text: str) -> None:
    if not holds:
        raise AssertionError(text)


def same_bits(a: Tensor, b: Tensor) -> bool:
    bits = [torch.empty(x.numel(), dtype=x.dtype).copy_(x.flatten()).view(torch.uint8) for x in (a, b)]
    return torch.equal(*bits)


def check(function: str, before: dict[str, Any], found: tuple[Any, ...], snapshot: Any, made: dict[str, Any]) -> None:
    """Hold what was found after a call against what its arguments, as they were before it, mean."""
    is_pair, parts, shapes, written, is_out = found
    if function == METADATA:
        _metadata(before, parts, shapes)
    elif function == COMBINE:
        _combined(before, parts, shapes)
        if before.get("out") is not None:
            require(is_out[0], "the returned out is not the given one")
            _wrote(before, "out", [(slice(None),)], parts[0], written, made)
    elif function == MERGE:
        _merged(before, parts, shapes)
    else:
        _attended(function, before, is_pair, parts, shapes, written, is_out, made)
    for name in made:
        if not aliased(made[name], before[name], snapshot):
            snapshot.forget(made[name].memory if name in _written(function, before) else ())
    require(not snapshot.changed(), "memory changed that a call may not write")


def _written(function: str, before: dict[str, Any]) -> tuple[str, ...]:
    return ("out", "k_cache", "v_cache") if function == KVCACHE and before.get("k") is not None else ("out",)


def aliased(made: Any, means: Any, snapshot: Any) -> bool:
    """Whether a tensor of some kind looks at the memory of the plain one."""
    starts = {x.untyped_storage().data_ptr() for x in made.memory}
    return made.means is not None and made.means.untyped_storage().data_ptr() in starts


def _wrote(before: dict[str, Any], name: str, rows: list[tuple], values: Tensor, written: dict[str, Tensor],
           made: dict[str, Any]) -> None:  # fmt: skip
    """Let the earlier memory hold in these rows what was found there, so that all else can be compared."""
    expected = before[name]
    if name in made and not aliased(made[name], expected, None):
        expected = expected.clone()
    for row in rows:
        raw(expected)[row] = raw(values)[row]
    if name in made:
        require(same_bits(written[name], expected), f"{name} holds other values than it must")


def _attended(
    function: str, before: dict[str, Any], is_pair: bool, parts: list[Any], shapes: list, written: dict[str, Any],
    is_out: list[bool], made: dict[str, Any],
) -> None:  # fmt: skip
    wanted = meaning.attention(function, before)
    require(is_pair == wanted.with_lse, f"the result has {len(parts)} parts")
    shape = (*wanted.q_shape[:-1], wanted.dv)
    require(shapes[0] == (shape, wanted.dtype), f"out is {shapes[0]}, must be {(shape, wanted.dtype)}")
    out, lse = parts[0], parts[1] if is_pair else None
    if lse is not None:
        *lead, heads, _ = wanted.q_shape
        lse_shape = (*lead[:-1], heads, lead[-1])
        require(shapes[1] == (lse_shape, torch.float32), f"lse is {shapes[1]}, must be {lse_shape} in float32")
    try:
        _numbers(wanted, out, lse)
    except RuntimeError as error:
        if "without overflow" in str(error):  # a scalar that the inputs' dtype cannot hold
            raise UnjudgedError(str(error)) from error
        raise
    if before.get("out") is not None:
        require(is_out[0], "the returned out is not the given one")
        _wrote(before, "out", wanted.out_rows, out, written, made)
    else:
        outside = torch.ones(wanted.q_shape[:-2], dtype=torch.bool)
        for row in wanted.out_rows:
            outside[row] = False
        require(not bool(out[outside].count_nonzero()), "rows of our own out that hold no query are not 0")
    for name, where, what, turned in wanted.appended:
        now = written[name]
        there = raw(now)[where].view(now.dtype)
        if turned:
            size = float(what.float().abs().nan_to_num(0, 0, 0).amax()) if what.numel() else 0.0
            near = torch.isclose(there.double(), what.double(), rtol=torch.finfo(what.dtype).eps, atol=4e-7 * size,
                                 equal_nan=True)  # fmt: skip
            require(bool(near.all()), f"{name} holds other rotated tokens than those appended")
        else:
            require(same_bits(there, what), f"{name} holds other tokens than those appended")
    for name, where, _, _ in wanted.appended:
        expected = before[name] if name not in made or aliased(made[name], None, None) else before[name].clone()
        put(expected, where, raw(written[name])[where].view(expected.dtype))


def _numbers(wanted: Meaning, out: Tensor, lse: Tensor | None) -> None:
    outs = [out[row] for row in wanted.out_rows]
    lses = None if lse is None else [lse[row] for row in wanted.lse_rows]
    problem = wanted.problem
    if problem.sinks is not None:
        clean = problem.sinks.float().nan_to_num(0, 0, 0).to(problem.sinks.dtype)
        problem = dataclasses.replace(problem, sinks=clean)
    for i, taint in enumerate(wanted.tainted):
        if bool(taint.any()):  # these rows may hold anything
            ref, ref_lse = reference.exact(problem.sequences[i], problem)
            outs[i] = torch.where(taint.T[..., None], ref, outs[i].to(ref.dtype))
            if lses is not None:
                lses[i] = torch.where(taint, ref_lse, lses[i].to(ref_lse.dtype))
    shares = reference.check(outs, lses, problem)
    if not shares.worst <= 1.0:
        for i, s in enumerate(problem.sequences):
            _loosely(s, problem, outs[i], None if lses is None else lses[i], str(shares))


def _loosely(s: reference.Sequence, problem: reference.Problem, out: Tensor, lse: Tensor | None, text: str) -> None:
    """One sequence by the looser rules, where they apply."""
    ref, ref_lse = reference.exact(s, problem)
    if not ref.numel():
        return
    size = _largest_sum(s, problem)
    few = min(s.v.shape[-1], s.q.shape[-1]) < 8
    if size > 1e37:
        raise UnjudgedError("scores overflow float32")
    if not few and size < 40 and float(s.v.float().abs().amax() if s.v.numel() else 0) > 1e-20:
        one = reference.check([out], None if lse is None else [lse], dataclasses.replace(problem, sequences=[s]))
        require(one.worst <= 1.0, text)
        return
    dtype = s.q.dtype
    base = (
        reference.emulate_fp8(s, problem)
        if dtype == FP8
        else reference.attend(reference.as_cached(s), problem, dtype)[0]
    )
    base_error = float((base.double() - ref).abs().nan_to_num(0, 0, 0).amax())
    v = float(reference._descaled(s, ref.dtype).v.abs().amax()) if s.v.numel() else 0.0
    if v > 3e38:
        raise UnjudgedError("values overflow float32")
    delta = size * OF_A_SCORE[dtype] + 2.0**-12
    rounding = 2 * reference.ROW_SLACK.get(dtype, 2.0**-7)
    limit = v * (min(2.0, math.expm1(min(2 * delta, 10.0))) + rounding) + 4 * base_error
    worst = float((out.double() - ref).abs().nan_to_num(math.inf).amax())
    require(worst <= limit + 1e-30, f"{text}; by the looser rule {worst} of {limit}")
    if lse is not None:
        error = torch.where(lse == ref_lse, 0.0, (lse.double() - ref_lse).abs()).nan_to_num(math.inf)
        limit = 1e-3 + delta + 2.0**-10 * (size if problem.softcap > 0 else 0)
        require(float(error.amax()) <= limit, f"{text}; lse by the looser rule {float(error.amax())} of {limit}")


def _largest_sum(s: reference.Sequence, problem: reference.Problem) -> float:
    """The largest sum of the sizes of a score's products."""
    if not s.q.numel() or not s.k.numel():
        return 0.0
    clean = reference._descaled(s, torch.float64)
    found = clean.q.double().abs().amax() * clean.k.double().abs().sum(-1).amax()
    if clean.qv is not None:
        found += clean.qv.double().abs().amax() * clean.v.double().abs().sum(-1).amax()
    return float(found) * reference.scale_of(problem, s)


def _weighted(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The formula in float64 over the first dimension, and which rows have a number that is not finite. A part with
    lse -inf, or FlashAttention 2's +inf, is empty and its out may be anything."""
    outs, lses = outs.double(), lses.double()
    empty = lses.isinf()
    taint = (lses.isnan() | (~outs.isfinite().all(-1) & ~empty)).any(0)
    lses = lses.masked_fill(empty, -math.inf).nan_to_num(nan=0.0, neginf=-math.inf)
    lse = torch.logsumexp(lses, dim=0)
    weights = torch.exp(lses - lse).nan_to_num(nan=0.0)
    return (weights[..., None] * outs.nan_to_num(0, 0, 0)).sum(0), lse, taint


def _near(out: Tensor, lse: Tensor, outs: Tensor, lses: Tensor) -> None:
    ref, ref_lse, taint = _weighted(outs, lses)
    largest = outs.double().nan_to_num(0, 0, 0).abs().amax(0) if outs.numel() else ref
    smallest = 2.0**-24 if out.dtype == torch.float16 else 1e-38
    slack = ROUNDING[out.dtype] * ref.abs() + 2.0**-21 * largest + smallest
    good = ((out.double() - ref).abs() <= slack).all(-1) | taint
    require(bool(good.all()), "out is not the weighted sum of the parts")
    same = (lse.double() == ref_lse) | ((lse.double() - ref_lse).abs() <= 1e-6 * (1 + ref_lse.abs())) | taint
    require(bool(same.all()), "lse is not the logarithm of the sum")


def _combined(a: dict[str, Any], parts: list[Tensor], shapes: list) -> None:
    outs = dense("out_partial", a["out_partial"], None, FLOATS)
    lses = dense("lse_partial", a["lse_partial"], None, (torch.float32,))
    need(outs.dim() in (4, 5) and 1 <= outs.shape[0] <= 256, f"out_partial has shape {tuple(outs.shape)}")
    need(lses.shape == outs.shape[:-1], f"lse_partial has shape {tuple(lses.shape)}")
    out, dtype = a.get("out"), a.get("out_dtype")
    need(dtype is None or dtype in FLOATS, f"out_dtype is {dtype}")
    wanted = outs.dtype if dtype is None else dtype
    if out is not None:
        dense("out", out, None, FLOATS if dtype is None else (dtype,))
        need(out.shape == outs.shape[1:], f"out has shape {tuple(out.shape)}")
        need(not overlaps_itself(out), "out overlaps itself")
        need(not overlap(out, outs) and not overlap(out, lses), "out overlaps a part")
        wanted = out.dtype
    shape = tuple(outs.shape[1:])
    require(shapes == [(shape, wanted), (shape[:-1], torch.float32)], f"the result is {shapes}")
    _near(parts[0], parts[1], outs, lses)


def _merged(a: dict[str, Any], parts: list[Tensor], shapes: list) -> None:
    outs = [dense(name, a[name], None, FLOATS) for name in ("out_a", "out_b")]
    lses = [dense(name, a[name], None, (torch.float32,)) for name in ("lse_a", "lse_b")]
    need(outs[0].dim() in (3, 4) and outs[0].shape == outs[1].shape, "out_a and out_b differ")
    need(outs[0].dtype == outs[1].dtype, "out_a and out_b have other dtypes")
    *lead, heads, _ = outs[0].shape
    shape = (*lead[:-1], heads, lead[-1])
    need(all(tuple(lse.shape) == shape for lse in lses), "lse has another shape")
    require(shapes == [(tuple(outs[0].shape), outs[0].dtype), (shape, torch.float32)], f"the result is {shapes}")
    by_token = [lse.transpose(-1, -2) for lse in (*lses, parts[1])]
    _near(parts[0], by_token[2], torch.stack(outs), torch.stack(by_token[:2]))


def _metadata(a: dict[str, Any], parts: list[Tensor], shapes: list) -> None:
    batch = whole("batch_size", a["batch_size"], 0)
    least = dict.fromkeys(("num_heads_q", "num_heads_kv", "headdim"), 1)
    least |= dict.fromkeys(("max_seqlen_q", "max_seqlen_k", "max_seqlen_k_new", "sm_margin", "attention_chunk"), 0)
    least |= {"headdim_v": 1, "page_size": 1}
    for name, low in least.items():
        if a.get(name) is not None:
            whole(name, a[name], low)
    need(all(a.get(name) is not None for name in list(least)[:5]), "a size is None")
    need(int(a["num_heads_q"]) % int(a["num_heads_kv"]) == 0, "heads do not fit")
    whole("num_splits", a.get("num_splits", 0), 0, 256)
    window(a.get("window_size", (-1, -1)))
    for name, size in (("cache_seqlens", batch), ("cu_seqlens_q", batch + 1), ("cu_seqlens_k_new", batch + 1),
                       ("cache_leftpad", batch)):  # fmt: skip
        if name == "cache_seqlens" or a.get(name) is not None:
            tensor = dense(name, a.get(name), 1, INTEGERS)
            need(tensor.shape[0] == size, f"{name} has {tensor.shape[0]} numbers")
    need(a.get("qkv_dtype") is None or a["qkv_dtype"] in (*FLOATS, FP8), "qkv_dtype")
    require(shapes[0][1] == torch.int32 and len(shapes[0][0]) == 1 and len(shapes) == 1, f"the metadata is {shapes}")
    require(parts[0] is None or parts[0].is_contiguous(), "the metadata is not contiguous")

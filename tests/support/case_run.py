"""Make the call of a case, verify all that must hold besides the numbers, and hold the numbers against the rule.

Every byte that must not change is compared: inputs, caches outside the appended tokens, gaps and far rows of `out`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tests.support import reference
from tests.support.case_tensors import Case, build, put
from tests.support.cases import FP8, Plan


def storage_bytes(x: Tensor) -> Tensor:
    """All bytes of the memory that x looks at."""
    return torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage())


def same_view(x: Tensor, storage: Tensor) -> Tensor:
    """A view with x's geometry of another copy of its memory, on that one's device."""
    return torch.empty(0, dtype=x.dtype, device=storage.device).set_(
        storage.untyped_storage(), x.storage_offset(), x.shape, x.stride()
    )


def run(case: Case, functions: Mapping[str, Any]) -> tuple[list[Tensor], list[Tensor] | None]:
    """Call, verify all that must hold besides the numbers, and give out and lse of each sequence."""
    plan = case.plan
    tensors = {name: x for name, x in case.arguments.items() if isinstance(x, Tensor)}
    before = {x.untyped_storage().data_ptr(): storage_bytes(x).clone() for x in tensors.values()}
    answer = functions[plan.function](**case.arguments)
    out, lse = answer if plan.return_lse else (answer, None)
    _verify_form(case, out, lse)
    for name, where, what, was_rotated in case.appended:
        cache = tensors[name]
        expected = same_view(cache, before[cache.untyped_storage().data_ptr()])
        if was_rotated:  # may round the other way: accept what is there, if it is near enough
            found = cache[where]
            slack = 4e-7 * float(what.float().abs().amax()) if what.numel() else 0.0
            near = torch.isclose(found.double(), what.double(), rtol=torch.finfo(what.dtype).eps, atol=slack)
            _require(bool(near.all()), f"{name} holds other rotated tokens than those appended")
            what = found
        put(expected, where, what)
    if plan.out:
        expected = same_view(out, before[out.untyped_storage().data_ptr()])
        for row in case.out_rows:
            expected[row] = out[row]
    for name, x in tensors.items():
        same = torch.equal(storage_bytes(x), before[x.untyped_storage().data_ptr()])
        _require(same, f"memory of {name} changed where it must not")
    lses = None if lse is None else [lse[row] for row in case.lse_rows]
    return [out[row] for row in case.out_rows], lses


def _verify_form(case: Case, out: Tensor, lse: Tensor | None) -> None:
    plan, q = case.plan, case.arguments["q"]
    shape = (*q.shape[:-1], plan.dv)
    _require(out.shape == shape, f"out is {tuple(out.shape)}, must be {shape}")
    dtype = torch.bfloat16 if plan.dtype == FP8 else plan.dtype
    _require(out.dtype == dtype and out.device == q.device, f"out is {out.dtype} on {out.device}")
    if plan.out:
        _require(out is case.arguments["out"], "the returned out is not the given one")
    else:
        outside = torch.ones(q.shape[:-2], dtype=torch.bool, device=q.device)
        for row in case.out_rows:
            outside[row] = False
        _require(not bool(out[outside].count_nonzero()), "rows past seqused_q of our own out are not 0")
    if lse is not None:
        lse_shape = (plan.hq, q.shape[0]) if q.dim() == 3 else (q.shape[0], plan.hq, q.shape[1])
        _require(lse.shape == lse_shape, f"lse is {tuple(lse.shape)}, must be {lse_shape}")
        _require(lse.dtype == torch.float32, f"lse is {lse.dtype}")
        outside = torch.ones(lse.shape, dtype=torch.bool, device=lse.device)
        for row in case.lse_rows:
            outside[row] = False
        _require(bool((lse[outside] == -math.inf).all()), "the lse of rows that hold no query is not -inf")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)


@contextmanager
def one_thread() -> Iterator[None]:
    """Small tensors are quicker on one thread; the call itself keeps the caller's number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def judge(plan: Plan, functions: Mapping[str, Any]) -> reference.Shares:
    """The shares of one plan's answer; a failure prints the call, ready to be made again."""
    with one_thread():
        case = build(plan)
    try:
        outs, lses = run(case, functions)
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}\n{case.describe()}") from error
    with one_thread():
        shares = reference.check(outs, lses, case.problem)
    if not shares.worst <= 1.0:
        raise AssertionError(f"{shares}\n{case.describe()}")
    return shares

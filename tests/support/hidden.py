"""Twins of a random call: what no query sees is zeros in one of them, and NaN and infinities in the other.

`draw` gives a plan whose mask hides keys from every query, `twins` its two calls, `differ` compares their answers bit
for bit. The implementations share them: on the CPU, under Triton's interpreter and on GPUs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from random import Random
from typing import Any

import torch
from torch import Tensor

from tests.support import case_tensors, cases, reference
from tests.support.case_tensors import WILD, Case, put
from tests.support.cases import FP8, Plan, Space


def draw(seed: int, space: Space) -> Plan:
    """The plan of this seed, with a window, a chunk or both; two thirds have fewer queries than keys."""
    plan, dice = cases.draw(seed, space), Random(seed + 1)
    longest = max((1, *plan.lengths_k))
    left = dice.choice((0, dice.randint(0, 8), dice.randint(0, 40), dice.randint(0, longest)))
    right = dice.choice((-1, 0, dice.randint(0, 8)))
    chunk = dice.randint(1, longest) if dice.random() < 0.35 else 0
    if chunk and dice.random() < 0.5:
        left = -1
    few = plan.lengths_q
    if dice.random() < 0.66:
        limit = dice.choice((1, 3, 17, 40))
        few = tuple(min(n, limit) for n in few)
    return dataclasses.replace(
        plan, lengths_q=few, window_size=(left, right), attention_chunk=chunk, magnitude=1.0, causal=dice.random() < 0.5
    )


def _bad(shape: tuple[int, ...], dtype: torch.dtype, random: torch.Generator) -> Tensor:
    """NaN, or where the dtype has infinities one of three for each element."""
    if dtype == FP8:
        return torch.full(shape, 0x7F, dtype=torch.uint8).view(FP8)
    values = torch.tensor([math.nan, math.inf, -math.inf])
    return values[torch.randint(3, shape, generator=random)].to(dtype)


def _fill(case: Case, name: str, where: tuple, bad: bool, random: torch.Generator) -> int:
    """Zeros, or numbers that are not finite, at some places of one argument; returns how many elements."""
    x = case.arguments[name]
    shape = (len(where[-1]), *x.shape[len(where) :])
    what = _bad(shape, x.dtype, random) if bad else torch.zeros(shape).to(x.dtype)
    put(x, tuple(at.to(x.device) for at in where), what.to(x.device))
    return what.numel()


def needed_entries(case: Case, i: int) -> tuple[int, set[int]]:
    """A sequence's row of the page table, and the entries of it that a call reads: of keys seen, and of new ones.

    Those of keys that a draft mask alone hides are among them.
    """
    plan, s = case.plan, case.problem.sequences[i]
    seen = reference.visible(case.problem, len(s.q), len(s.k), torch.device("cpu")).any(0)
    if plan.lengths_new is not None:
        seen[len(s.k) - plan.lengths_new[i] :] = True
    pad = plan.leftpad[i] if plan.leftpad else 0
    rows = case.arguments.get("cache_batch_idx")
    return i if rows is None else int(rows[i]), set(((pad + seen.nonzero().flatten()) // plan.page_size).tolist())


def _hide_pages(case: Case, i: int, dice: Random) -> None:
    """Entries of the page table that no query needs name no page, or one that is another's."""
    table = case.arguments["page_table"]
    row, needed = needed_entries(case, i)
    for column in range(table.shape[1]):
        if column not in needed:
            table[row, column] = dice.choice((*WILD, 0))


def _twin(plan: Plan, bad: bool) -> tuple[Case, int]:
    case = case_tensors.build(plan)
    random, dice = torch.Generator().manual_seed(plan.seed), Random(plan.seed)
    suffix = "_cache" if plan.function == cases.KVCACHE else ""
    leftpad = plan.leftpad or (0,) * len(plan.lengths_k)
    new = plan.lengths_new or (0,) * len(plan.lengths_k)
    starts = torch.tensor([0, *new]).cumsum(0)
    count = 0
    for i, s in enumerate(case.problem.sequences):
        seen = reference.seen_by(s, case.problem).any(0).cpu()
        old = plan.lengths_k[i] - leftpad[i]
        hidden = (~seen[:old]).nonzero().flatten()
        where = tuple(at[hidden] for at in case.slots(i, leftpad[i], plan.lengths_k[i]))
        hidden_new = (~seen[old:]).nonzero().flatten()
        lead = (starts[i] + hidden_new,)
        where_new = lead if plan.new_layout == "ragged" else (torch.full_like(hidden_new, i), hidden_new)
        for letter in "kv":
            count += _fill(case, letter + suffix, where, bad, random)
            if letter in plan.token_scales:
                gone = (~seen).nonzero().flatten()
                slots = case.slots(i, leftpad[i], plan.lengths_k[i] + new[i])
                count += _fill(case, letter + "_scale", tuple(at[gone] for at in slots), bad, random)
            if len(hidden_new):
                count += _fill(case, letter, where_new, bad, random)
        if bad and plan.page_size:
            _hide_pages(case, i, dice)
    return case, count


def differ(plan: Plan, functions: Mapping[str, Any]) -> int:
    """Make both calls and compare them; returns how many elements were hidden. Raises AssertionError."""
    (clean, count), (foul, _) = (_twin(plan, bad) for bad in (False, True))
    answers = []
    for case in (clean, foul):
        answer = functions[plan.function](**case.arguments)
        out, lse = answer if plan.return_lse else (answer, None)
        rows = [out[row] for row in case.out_rows]
        answers.append(rows + ([] if lse is None else [lse[row] for row in case.lse_rows]))
    for zeros, other in zip(*answers, strict=True):
        if not torch.equal(zeros, other):
            at = (zeros != other).nonzero()[0].tolist()
            raise AssertionError(f"{other[tuple(at)]} instead of {zeros[tuple(at)]} at {at}\n{foul.describe()}")
    return count

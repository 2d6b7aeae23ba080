"""Calls with qv over caches, as the Hopper MLA kernels serve them: random plans, and an engine's caches.

An engine has one buffer of latent and rotated columns, of which the values and keys are slices, and one of queries.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

import jit_kernel.flash_attention_v3 as fa3
from jit_kernel.fa3 import hopper
from tests.support import cases, reference
from tests.support.cases import FP8, Plan

NAMES = (cases.VARLEN, cases.KVCACHE)
ROPE = 64
SPACE = cases.Space(
    "mla",
    device="cuda",
    dtypes=(torch.bfloat16, torch.float16, FP8),
    functions=NAMES,
    features=(cases.FEATURES | cases.FP8_CACHES) - {"odd_head_size", "token_scales"},
    page_sizes=(1, 2, 3, 8, 16, 19, 24, 48, 64, 80, 96, 100, 128, 256),
    lengths=(150, 900, 5000),
    max_heads=16,
    max_batch=12,
    stride_step=16,
)
MOST_TOKENS = 16


def plans(first: int, count: int, draw: Callable[[int, cases.Space], Plan] = cases.draw) -> list[Plan]:
    """The next plans with qv on a cache, from a seed on: up to 16 tokens, and one key head of many more often."""
    found: list[Plan] = []
    seed = first
    while len(found) < count:
        plan = draw(seed, SPACE)
        seed += 1
        if not plan.qv or not (plan.function == cases.KVCACHE or plan.page_size > 0):
            continue
        if plan.dtype == FP8 and plan.lengths_new is not None:
            continue  # nothing is appended beside queries in e4m3
        dice = Random(seed)
        heads = dice.choice((1, 4, 16, 16, 32, 64, 128)) if dice.random() < 0.7 else plan.hq
        hk = 1 if heads != plan.hq else plan.hk
        tokens = dice.choice((1, 1, 2, 4, MOST_TOKENS))
        lengths_q = tuple(min(n, tokens) for n in plan.lengths_q)
        found.append(dataclasses.replace(plan, hq=heads, hk=hk, lengths_q=lengths_q))
    return found


def functions(free: int) -> dict[str, Any]:
    """The public functions, on fewer multiprocessors."""
    return {name: partial(getattr(fa3, name), sm_margin=free) for name in NAMES}


def counted_launches(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One entry for each call that an MLA kernel serves."""
    launched: list[None] = []
    attend = hopper.mla.attend

    def counted(*given: Any, **more: Any) -> Any:
        result = attend(*given, **more)
        if result is not None:
            launched.append(None)
        return result

    monkeypatch.setattr(hopper.mla, "attend", counted)
    return launched


@dataclasses.dataclass
class Latent:
    """A call over shuffled pages of a buffer of dv + 64 columns; rows that are no sequence's hold NaN.

    over_e4m3: the buffer is in e4m3, with factors for each sequence.
    """

    queries: Tensor
    pages: Tensor
    table: Tensor
    lengths: Tensor
    given: dict[str, Any]

    @classmethod
    def of(
        cls,
        batch: int,
        tokens: int,
        longest: int,
        heads: int,
        page_size: int,
        dv: int = 512,
        dtype: torch.dtype = torch.bfloat16,
        device: str = "cuda",
        over_e4m3: bool = False,
        **given: Any,
    ) -> Latent:
        count = -(-longest // page_size)
        table = torch.randperm(batch * count + 2, device=device)[: batch * count].view(batch, count).int()
        queries = torch.randn(batch, tokens, heads, dv + ROPE, device=device, dtype=dtype)
        pages = torch.full((batch * count + 2, page_size, 1, dv + ROPE), math.nan, device=device, dtype=dtype)
        if over_e4m3:
            pages = pages.to(FP8)
            given |= {f"{name}_descale": 0.5 + torch.rand(batch, 1, device=device) for name in "kv"}
        call = cls(
            queries, pages, table, torch.zeros(batch, device=device, dtype=torch.int32), {"causal": True, **given}
        )
        call.set_lengths([longest] * batch)
        return call

    def set_lengths(self, lengths: list[int]) -> None:
        """Other lengths in the same memory, whose rows are drawn anew; all others hold NaN."""
        size = self.pages.shape[1]
        raw = self.pages.view(torch.uint8) if self.pages.dtype == FP8 else self.pages
        raw.fill_(0x7F if self.pages.dtype == FP8 else math.nan)
        for entries, n in zip(self.table.long(), lengths, strict=True):
            rows = torch.arange(n, device=entries.device)
            new = torch.randn(n, *self.pages.shape[2:], device=entries.device).to(self.pages.dtype)
            raw[entries[rows // size], rows % size] = new.view(raw.dtype)
        self.lengths.copy_(torch.tensor(lengths))

    def draw_lengths(self, seed: int) -> None:
        """None, few, or as many keys as there is room for."""
        dice = Random(seed)
        longest = self.table.shape[1] * self.pages.shape[1]
        drawn = [dice.choice((0, longest, dice.randint(0, min(99, longest)), *[dice.randint(0, longest)] * 2))
                 for _ in self.lengths]  # fmt: skip
        self.set_lengths(drawn)

    def __call__(self, **more: Any) -> Any:
        dv = self.pages.shape[-1] - ROPE
        return fa3.flash_attn_with_kvcache(
            self.queries[..., dv:], self.pages[..., dv:], self.pages[..., :dv], qv=self.queries[..., :dv],
            cache_seqlens=self.lengths, page_table=self.table, **self.given | more,
        )  # fmt: skip

    def in_16_bits(self) -> Latent:
        """The same call over the cache that one in e4m3 stands for, rounded to the queries' dtype."""
        dv = self.pages.shape[-1] - ROPE
        pages = torch.empty(self.pages.shape, device=self.pages.device, dtype=self.queries.dtype)
        for i, entries in enumerate(self.table.long()):
            for name, columns in (("k", slice(dv, None)), ("v", slice(dv))):
                rows = self.pages.view(torch.uint8)[entries].view(FP8)[..., columns].float()
                pages[entries, ..., columns] = (rows * self.given[f"{name}_descale"][i, 0]).to(pages.dtype)
        given = {name: x for name, x in self.given.items() if not name.endswith("descale")}
        return dataclasses.replace(self, pages=pages, given=given)

    def check(self, **more: Any) -> float:
        """The worst share of the limit of this call."""
        dv = self.pages.shape[-1] - ROPE
        out, lse = self(return_softmax_lse=True, **more)
        sequences = []
        given = self.given | more
        for i, (q, entries, n) in enumerate(zip(self.queries, self.table.long(), self.lengths.tolist(), strict=True)):
            rows = self.pages.view(torch.uint8)[entries].view(self.pages.dtype).flatten(0, 1)[:n]
            factors = {name: x[i] for name, x in given.items() if name.endswith("descale")}
            sequences.append(reference.Sequence(q[..., dv:], rows[..., dv:], rows[..., :dv], q[..., :dv], **factors))
        problem = reference.Problem(sequences, causal=given["causal"], only_qv=given.get("only_qv", False))
        return reference.check(list(out), list(lse), problem).worst

"""What the arguments of an attention call mean: `attention(function, arguments)` gives plain sequences.

It is written from the public contract alone and looks at the arguments only, so that a call which was changed in any
way can be judged. Arguments that mean nothing raise `MeaninglessError`: a call with them must not be answered.
reading.py reads one argument, places.py finds where the tokens lie, appending.py what is appended.
"""

from __future__ import annotations

import inspect
import itertools
import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from jit_kernel import flash_attention_v3
from tests.fuzz.appending import Appending
from tests.fuzz.reading import UnjudgedError, dense, flag, need, overlap, overlaps_itself, whole
from tests.support import reference
from tests.support.case_tensors import raw
from tests.support.cases import DENSE, FP8, KVCACHE

MOST_WORK = 3e7  # products of one score matrix; beyond it the reference takes too long


@dataclass
class Meaning:
    """What a call must give: sequences, where their rows lie in out and lse, and what is appended."""

    problem: reference.Problem
    q_shape: tuple[int, ...]
    dv: int
    dtype: torch.dtype
    out_rows: list[tuple]
    lse_rows: list[tuple]
    with_lse: bool
    appended: list[tuple[str, tuple, Tensor, bool]] = field(default_factory=list)
    tainted: list[Tensor] = field(default_factory=list)  # (hq, sq), rows that see a number that is not finite


def defaults_of(function: str) -> dict[str, Any]:
    parameters = inspect.signature(getattr(flash_attention_v3, function)).parameters.values()
    return {p.name: None if p.default is p.empty else p.default for p in parameters}


def attention(function: str, given: dict[str, Any]) -> Meaning:
    """The meaning of one call of an attention function."""
    return _Reader(function, {**defaults_of(function), **given}).read()


class _Reader(Appending):
    def read(self) -> Meaning:
        v, new = self.get(self.v_name), self.get("k") if self.function == KVCACHE else None
        if self.get("only_qv") is True and self.get(self.k_name) is None and new is None and isinstance(v, Tensor):
            self.a[self.k_name] = v[..., : self.a["q"].shape[-1]]  # no key is read: any stand for them
        self._tensors()
        settings = self._settings()
        out_rows, lse_rows, queries = self._queries()
        self._place_keys()
        appended, rotated = self._append(queries)
        problem = reference.Problem([], **settings)
        self._maximum("max_seqlen_q", self.q_lengths)
        self._maximum("max_seqlen_k", self.k_lengths)
        sequences, tainted, masks = [], [], self._draft_masks(out_rows)
        for i, (q, qv) in enumerate(rotated):
            work = q.shape[0] * q.shape[1] * (self.k_lengths[i] + len(q)) * (self.d + self.dv)
            if work > MOST_WORK:
                raise UnjudgedError("too large")
            k, v, bad = self._keys(i, appended)
            s = reference.Sequence(q, k, v, qv, draft_mask=masks[i], **self._descales(i), **self._token_scales(i))
            clean, taint = _cleaned(s, problem, bad)
            sequences.append(clean)
            tainted.append(taint)
        problem = reference.Problem(sequences, **settings)
        self._shared_memory()
        dtype = torch.bfloat16 if self.q.dtype == FP8 else self.q.dtype
        lse = flag("return_softmax_lse", self.get("return_softmax_lse"))
        return Meaning(problem, tuple(self.q.shape), self.dv, dtype, out_rows, lse_rows, lse, appended, tainted)

    def _keys(self, i: int, appended: list) -> tuple[Tensor, Tensor, Tensor]:
        """The keys and values of a sequence, and which of them lie in a page that is none."""
        at = torch.arange(self.pads[i], self.old[i])
        places = self.slots(i, at)
        lead = self.k.shape[:-2]
        bad = torch.zeros(len(at), dtype=torch.bool)
        for place, size in zip(places, lead, strict=True):
            bad |= (place < 0) | (place >= size)
        places = tuple(place.masked_fill(bad, 0) for place in places)
        if appended and self.written.intersection(zip(*(place.tolist() for place in places), strict=True)):
            raise UnjudgedError("a sequence reads what another appends")
        k, v = (raw(x)[places].view(x.dtype) if at.numel() else x.new_zeros((0, *x.shape[-2:]))
                for x in (self.k, self.v))  # fmt: skip
        if appended:
            new_k, new_v = appended[2 * i][2], appended[2 * i + 1][2]
            k, v = (torch.cat([raw(old), raw(new)]).view(old.dtype) for old, new in ((k, new_k), (v, new_v)))
            bad = torch.cat([bad, torch.zeros(len(new_k), dtype=torch.bool)])
        return k, v, bad

    def _draft_masks(self, rows: list[tuple]) -> list[Tensor | None]:
        """A sequence's rows of the draft mask, which has one for each row of q."""
        mask, lead = self.get("draft_mask"), self.q.shape[:-2]
        if mask is None or self.function == DENSE:
            return [None] * self.batch
        mask = dense("draft_mask", mask, 2, (torch.int32,))
        need(mask.shape[0] == math.prod(lead) and mask.shape[1] > 0, f"draft_mask has shape {tuple(mask.shape)}")
        if mask.shape[1] > 2**20:
            raise UnjudgedError("too many words")
        return [mask.unflatten(0, lead)[row] for row in rows]

    def _maximum(self, name: str, lengths: list[int]) -> None:
        if self.function != DENSE and self.get(name) is not None:
            whole(name, self.get(name), max(lengths, default=0))

    def _shared_memory(self) -> None:
        """What is written must be memory of its own."""
        out, appends = self.get("out"), self.function == KVCACHE and self.get("k") is not None
        inputs = ["q", "qv", "draft_mask", "k_scale", "v_scale", self.k_name, self.v_name]
        inputs += ["k", "v"] if appends else []
        pairs = [("out", name) for name in inputs] if out is not None else []
        if appends:
            pairs += [
                ("k_cache", "v_cache"),
                *itertools.product(("k_cache", "v_cache"), ("k", "v", "q", "qv", "k_scale", "v_scale")),
            ]
        for written in {name for name, _ in pairs}:
            need(not overlaps_itself(self.get(written)), f"{written} overlaps itself")
        for written, other in pairs:
            if self.get(other) is not None:
                need(not overlap(self.get(written), self.get(other)), f"{written} overlaps {other}")


def _cleaned(s: reference.Sequence, problem: reference.Problem, bad: Tensor) -> tuple[reference.Sequence, Tensor]:
    """The sequence with zeros in place of numbers that are not finite, and (hq, sq): the rows that see one."""
    hq, hk = s.q.shape[1], s.k.shape[1]

    if not all(d is None or bool(d.isfinite().all()) for d in (s.q_descale, s.k_descale, s.v_descale)):
        raise UnjudgedError("a descale is not finite")

    def finite(x: Tensor) -> Tensor:
        return x.float().isfinite().all(-1)

    keys = ~(finite(s.k) & finite(s.v)).T  # (hk, sk)
    for scale in (s.k_scale, s.v_scale):
        if scale is not None:
            keys = keys | ~scale.isfinite().T
    _need_room(s)
    rows = ~finite(s.q).T  # (hq, sq)
    if s.qv is not None:
        rows = rows | ~finite(s.qv).T
    if not bool(keys.any()) and not bool(rows.any()) and not bool(bad.any()):
        sink = None if problem.sinks is None else ~problem.sinks.float().isfinite()
        taint = rows if sink is None else rows | sink[:, None]
        return s, taint
    seen = reference.seen_by(s, problem)
    need(not bool((seen & bad[None]).any()), "a query sees a key in a page that is none")
    tainted = (seen.float() @ keys.float().T).T.bool()  # (hk, sq)
    taint = rows | tainted.repeat_interleave(hq // hk, dim=0)
    if problem.sinks is not None:
        taint = taint | ~problem.sinks.float().isfinite()[:, None]

    def clean(x: Tensor) -> Tensor:
        return x.float().nan_to_num(0.0, 0.0, 0.0).to(x.dtype)

    scales = {name: value.nan_to_num(1.0, 1.0, 1.0) for name in ("k_scale", "v_scale")
              if (value := getattr(s, name)) is not None}  # fmt: skip
    return replace(
        s, **scales, q=clean(s.q), k=clean(s.k), v=clean(s.v), qv=None if s.qv is None else clean(s.qv)
    ), taint


def _need_room(s: reference.Sequence) -> None:
    """Keys and values that q's dtype has no room for, once they are dequantised, are as unlike them as it likes."""
    if s.k.dtype == FP8 and s.q.dtype != FP8:
        both = [x.float().nan_to_num(0.0, 0.0, 0.0) for x in (s.k, s.v)]
        clean = replace(s, k=both[0].to(FP8), v=both[1].to(FP8))
        cached = reference.as_cached(clean)
        largest = torch.finfo(s.q.dtype).max
        for x, scale in ((cached.k, s.k_scale), (cached.v, s.v_scale)):
            kept = x if scale is None else x[scale.isfinite()]
            if not bool((kept.float().abs() <= largest).all()):
                raise UnjudgedError("a dequantised number overflows")

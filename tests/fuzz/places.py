"""Where the tokens of a call lie: its tensors, its settings, the rows of its queries and the slots of its keys."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.fuzz.reading import (
    FLOATS,
    INTEGERS,
    UnjudgedError,
    dense,
    flag,
    limited,
    need,
    numbers,
    offsets,
    real,
    whole,
    window,
)  # fmt: skip
from tests.support.cases import FP8, KVCACHE


class Places:
    """The arguments of one call, as far as they say where something lies."""

    def __init__(self, function: str, arguments: dict[str, Any]) -> None:
        self.function, self.a = function, arguments
        of_cache = function == KVCACHE
        self.k_name, self.v_name = ("k_cache", "v_cache") if of_cache else ("k", "v")
        self.used_name = "cache_seqlens" if of_cache else "seqused_k"

    def get(self, name: str) -> Any:
        return self.a.get(name)

    def _tensors(self) -> None:
        ragged = self.get("cu_seqlens_q") is not None
        q = self.q = dense("q", self.get("q"), 3 if ragged else 4, (*FLOATS, FP8))
        paged = self.get("page_table") is not None
        self.ragged_k = self.get("cu_seqlens_k") is not None
        need(not (paged and self.ragged_k), "pages and cu_seqlens_k")
        dims = 3 if self.ragged_k else 4
        dtypes = (q.dtype,) if q.dtype in (FP8, torch.float32) else (q.dtype, FP8)
        k = self.k = dense(self.k_name, self.get(self.k_name), dims, dtypes)
        v = self.v = dense(self.v_name, self.get(self.v_name), dims, (k.dtype,))
        need(k.shape[:-1] == v.shape[:-1], "k and v differ")
        self.hq, self.d, self.hk, self.dv = q.shape[-2], q.shape[-1], k.shape[-2], v.shape[-1]
        need(min(self.hq, self.d, self.hk, self.dv) > 0, "no heads or no head size")
        need(self.hq % self.hk == 0 and k.shape[-1] == self.d, "heads do not fit")
        out = self.get("out")
        if out is not None:
            dense("out", out)
            need(tuple(out.shape) == (*q.shape[:-1], self.dv), f"out has shape {tuple(out.shape)}")
            need(out.dtype == (torch.bfloat16 if q.dtype == FP8 else q.dtype), f"out has dtype {out.dtype}")

    def _settings(self) -> dict[str, Any]:
        scale, cap = self.get("softmax_scale"), real("softcap", self.get("softcap"))
        scale = None if scale is None else real("softmax_scale", scale)
        need(scale is None or scale > 0, f"softmax_scale is {scale}")
        need(cap >= 0, f"softcap is {cap}")
        chunk = self.get("attention_chunk")
        whole("num_splits", self.get("num_splits"), 0, 256)
        whole("sm_margin", self.get("sm_margin"), 0)
        for name in ("pack_gqa", "deterministic", "rotary_interleaved"):
            if self.get(name) is not None:
                flag(name, self.get(name))
        sinks = self.get("sinks")
        if sinks is not None:
            sinks = dense("sinks", sinks, 1, (torch.float32, self.q.dtype))
            need(sinks.shape[0] == self.hq, "sinks has another length")
        only_qv = flag("only_qv", self.get("only_qv") or False)
        need(not only_qv or self.get("qv") is not None, "only_qv without qv")
        return {
            "softmax_scale": scale,
            "causal": flag("causal", self.get("causal")),
            "window_size": window(self.get("window_size")),
            "attention_chunk": 0 if chunk is None else whole("attention_chunk", chunk, 0),
            "softcap": cap,
            "sinks": sinks,
            "only_qv": only_qv,
        }

    def _queries(self) -> tuple[list[tuple], list[tuple], list[tuple[Tensor, Tensor | None]]]:
        q, qv = self.q, self.get("qv")
        if qv is not None:
            qv = dense("qv", qv, q.dim(), (q.dtype,))
            need(tuple(qv.shape) == (*q.shape[:-1], self.dv), "qv has another shape")
            need(self.d == 64 and self.dv in (256, 512), "qv with these head sizes")
        if self.get("cu_seqlens_q") is not None:
            starts = offsets("cu_seqlens_q", self.get("cu_seqlens_q"), None, q.shape[0])
            lengths = [b - a for a, b in itertools.pairwise(starts)]
            self.q_lengths = limited("seqused_q", self.get("seqused_q"), lengths)
            rows: list[tuple] = [(slice(a, a + n),) for a, n in zip(starts, self.q_lengths, strict=False)]
            lse_rows: list[tuple] = [(slice(None), *row) for row in rows]
        else:
            if q.shape[0] > 4096:
                raise UnjudgedError("too many sequences")
            self.q_lengths = limited("seqused_q", self.get("seqused_q"), [q.shape[1]] * q.shape[0])
            rows = [(i, slice(0, n)) for i, n in enumerate(self.q_lengths)]
            lse_rows = [(i, slice(None), slice(0, n)) for i, n in enumerate(self.q_lengths)]
        self.batch = len(self.q_lengths)
        return rows, lse_rows, [(q[row], None if qv is None else qv[row]) for row in rows]

    def _place_keys(self) -> None:
        """The length of each sequence before the call, left padding included, and where its tokens lie."""
        k, used = self.k, self.get(self.used_name)
        table, picked = self.get("page_table"), list(range(self.batch))
        self.slots: Callable[[int, Tensor], tuple[Tensor, ...]]
        if self.ragged_k:
            starts = offsets("cu_seqlens_k", self.get("cu_seqlens_k"), self.batch, k.shape[0])
            self.rooms = [b - a for a, b in itertools.pairwise(starts)]
            self.slots = lambda i, at: (at + starts[i],)
        else:
            rows = k.shape[0]
            if table is not None:
                table = dense("page_table", table, 2, INTEGERS).long()
                need(used is not None and k.shape[1] > 0, "pages without lengths or without tokens")
                rows, size = table.shape[0], k.shape[1]
                self.slots = lambda i, at: (table[picked[i], at // size], at % size)
            else:
                self.slots = lambda i, at: (torch.full_like(at, picked[i]), at)
            if self.get("cache_batch_idx") is not None:
                picked = numbers("cache_batch_idx", self.get("cache_batch_idx"), self.batch)
                need(all(0 <= row < rows for row in picked), f"cache_batch_idx is {picked} of {rows}")
                need(self.get("k") is None or self.function != KVCACHE or len(set(picked)) == len(picked),
                     "two sequences append to one row")  # fmt: skip
            else:
                need(rows == self.batch, f"{rows} rows for {self.batch} sequences")
            self.rooms = [k.shape[1] * (1 if table is None else table.shape[1])] * self.batch
        if used is not None and not isinstance(used, Tensor):
            used = torch.tensor([whole(self.used_name, used, 0)] * self.batch, dtype=torch.int64)
        elif isinstance(used, Tensor) and used.dim() == 0 and self.function == KVCACHE:
            used = used.expand(self.batch)
        self.old = limited(self.used_name, used, self.rooms)
        pads = self.get("cache_leftpad")
        self.pads = [0] * self.batch if pads is None else limited("cache_leftpad", pads, self.old)
        self.k_lengths = list(self.old)

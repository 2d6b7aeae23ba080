"""Keys that every rank holds already, before those of the call: a cached prefix, or one that all sequences share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from jit_kernel import flash_attention_v3
from jit_kernel.attention.metadata import AttentionLayer, ForwardMetadata
from jit_kernel.attention.parallel import zigzag


@dataclass(frozen=True)
class Prefix:
    """Cached keys in front of each sequence's own: every query of a sequence sees all of them.

    k_cache, v_cache: (pages, page_size, hk, d) and (..., dv) with page_table, or (b, keys, hk, d), on every rank, all
        heads. cache_seqlens: (b,) int32, keys of each sequence; a single one of several sequences is shared by all
        (cascade attention). page_table: (b, max_pages) int32.
    """

    k_cache: Tensor
    v_cache: Tensor
    cache_seqlens: Tensor
    page_table: Tensor | None = None

    def of_heads(self, heads: slice) -> Prefix:
        """The same of some key heads, without a copy."""
        return replace(self, k_cache=self.k_cache[:, :, heads], v_cache=self.v_cache[:, :, heads])

    def need_sequences(self, count: int) -> None:
        """Raise ValueError where the prefix is neither that of so many sequences nor one that all share."""
        found = self.cache_seqlens.shape[0]
        if found not in (1, count):
            raise ValueError(f"prefix.cache_seqlens has {found} sequences; it must have {count}, or 1 that all share")

    def attend(self, q: Tensor, lengths: Sequence[int], layer: AttentionLayer) -> tuple[Tensor, Tensor]:
        """(out, lse) of packed queries (tokens, hq, d) over the prefix alone; lengths: the queries of each sequence."""
        self.need_sequences(len(lengths))
        rows = [sum(lengths)] if self.cache_seqlens.shape[0] == 1 else list(lengths)
        sequences = ForwardMetadata(
            zigzag.offsets(rows, q.device), max(rows, default=0), self.cache_seqlens, page_table=self.page_table
        )
        # Causal is what the own keys are; sinks enter with them.
        whole = replace(layer, sinks=None).part_arguments(causal=False)
        out, lse = flash_attention_v3.flash_attn_with_kvcache(
            q, self.k_cache, self.v_cache, **sequences.cache_arguments(), **whole
        )
        return out, lse


def is_windowed(layer: AttentionLayer) -> bool:
    """Whether a query does not see all keys before it."""
    return layer.window_size[0] >= 0 or layer.window_size[1] > 0 or layer.attention_chunk > 0


def need_no_window(prefix: Prefix | None, layer: AttentionLayer) -> None:
    """Raise NotImplementedError for a mask that counts from a key's place in the whole."""
    if prefix is not None and is_windowed(layer):
        raise NotImplementedError(
            f"prefix with window_size {layer.window_size} and attention_chunk {layer.attention_chunk}: every query of "
            "a sequence sees all of a prefix; call without a window, or with the prefix among k and v"
        )


def need_no_gradient(prefix: Prefix | None, *tensors: Tensor | None) -> None:
    """Raise NotImplementedError where a tensor requires grad beside a prefix."""
    if prefix is not None and are_wanted(*tensors):
        raise NotImplementedError(
            "prefix is given, and q, k, v or sinks requires grad: attention over a cache has no gradient; call under "
            "torch.no_grad(), or with the prefix among k and v"
        )


def are_wanted(*tensors: Tensor | None) -> bool:
    """Whether a gradient of one of them is asked for."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


class Parts:
    """Results over disjoint keys, for one merge at the end: it reads each once, where merging step by step reads and
    writes the whole sum for each."""

    _MOST = 8  # so many stand side by side before they become one in float32

    def __init__(self, q: Tensor, size: int, count: int) -> None:
        """q: (tokens, hq, d); size: of the values' heads; count: how many parts there will be."""
        tokens, heads = q.shape[:2]
        self._most = min(self._MOST, count)
        self._out = q.new_empty((self._most, tokens, heads, size))
        self._lse = torch.empty((self._most, heads, tokens), dtype=torch.float32, device=q.device)
        self._used = 0
        self._sums: list[tuple[Tensor, Tensor]] = []

    def place(self, rows: slice | None) -> Tensor:
        """Where the next part's result belongs, (tokens of rows, hq, dv), contiguous."""
        self._make_room()
        out = self._out[self._used]
        return out if rows is None else out[rows]

    def _make_room(self) -> None:
        if self._used == self._most:
            self._sums.append(self._merged(torch.float32))
            self._used = 0

    def add(self, out: Tensor | None, lse: Tensor, rows: slice | Tensor | None) -> None:
        """The next part, of some rows; out is None where it was written to its place."""
        self._make_room()
        at, self._used = self._used, self._used + 1
        if rows is None:
            self._lse[at] = lse
            if out is not None:
                self._out[at] = out
            return
        self._lse[at] = -torch.inf  # whose rows of `out` may be anything
        self._lse[at][:, rows] = lse
        if out is not None:
            self._out[at][rows] = out

    def merged(self) -> tuple[Tensor, Tensor]:
        """out (tokens, hq, dv) in q's dtype and lse (hq, tokens)."""
        if not self._sums:
            return self._merged(self._out.dtype)
        self._sums.append(self._merged(torch.float32))
        outs, lses = (torch.stack(list(each)) for each in zip(*self._sums, strict=True))
        return _merge(outs, lses, self._out.dtype)

    def _merged(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return _merge(self._out[: self._used], self._lse[: self._used], dtype)


def _merge(outs: Tensor, lses: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(parts, tokens, hq, dv) and (parts, hq, tokens) to one, in float32 and rounded once to dtype."""
    if outs.shape[0] == 1:
        return outs[0].to(dtype), lses[0]
    if outs.device.type == "musa":  # which has no kernel for many at once
        out, lse = outs[0].float(), lses[0]
        for other, other_lse in zip(outs[1:], lses[1:], strict=True):
            out, lse = flash_attention_v3.merge_state(out, lse, other.float(), other_lse)
        return out.to(dtype), lse
    from jit_kernel import ops

    out = outs.new_empty(outs.shape[1:], dtype=dtype)
    lse = torch.empty_like(lses[0])
    ops.merge_states(outs, lses.transpose(1, 2), out=out, lse=lse.t())
    return out, lse

"""How the rows of a batch lie for FlashAttention: end to end, without padding, or with a bit for each query and key."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Ragged:
    """Rows laid end to end. rows: which rows of a (b * tokens) tensor, None for all of them; cu: (sequences + 1,)."""

    rows_q: Tensor | None
    cu_q: Tensor
    rows_k: Tensor | None
    cu_k: Tensor
    longest_q: int | None
    longest_k: int | None


def _ends(lengths: Tensor) -> Tensor:
    """cu_seqlens of sequences of these lengths, (b + 1,) int32."""
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def _laid_end_to_end(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(rows of a (b * tokens) tensor, cu_seqlens) of the rows of (b, tokens) bool that are True."""
    return rows.flatten().nonzero().flatten(), _ends(rows.sum(dim=1, dtype=torch.int32))


def padded_rows(real: Tensor, queries: int, without_padding: bool) -> Ragged:
    """A batch without the padding of its keys and, if asked for, of its queries. real: (b, keys) bool."""
    rows_k, cu_k = _laid_end_to_end(real)
    if without_padding:  # there are as many queries as keys
        return Ragged(rows_k, cu_k, rows_k, cu_k, queries, real.shape[1])
    every = torch.full((real.shape[0],), queries, dtype=torch.int32, device=real.device)
    return Ragged(None, _ends(every), rows_k, cu_k, queries, real.shape[1])


def rows_behind(ragged: Ragged, behind: Tensor) -> Ragged:
    """The rows of padding that are `behind`, (b, tokens) bool, each with the keys of its sequence."""
    rows, cu = _laid_end_to_end(behind)
    return replace(ragged, rows_q=rows, cu_q=cu)


def packed_rows(sequence: Tensor) -> Ragged:
    """Sequences packed in rows. sequence: (b, tokens), a number for each token that rises with its sequence."""
    starts = torch.ones_like(sequence, dtype=torch.bool)
    starts[:, 1:] = sequence.diff(dim=1) != 0
    firsts = starts.flatten().nonzero().flatten().to(torch.int32)
    cu = torch.nn.functional.pad(firsts, (0, 1), value=sequence.numel())
    longest = int(cu.diff().max())
    return Ragged(None, cu, None, cu, longest, longest)


def pack(seen: Tensor, words: int) -> Tensor:
    """(b, queries, keys) bool as a draft_mask, (b * queries, words) int32, whose last bit is the last key's."""
    batch, queries, keys = seen.shape
    # Padded as numbers: Inductor's C++ for a padded bool does not compile (torch 2.13, AVX2).
    wide = torch.nn.functional.pad(seen.to(torch.int32), (words * 32 - keys, 0))
    places = torch.arange(32, dtype=torch.int32, device=seen.device)
    return (wide.reshape(batch * queries, words, 32) << places).sum(-1, dtype=torch.int32)

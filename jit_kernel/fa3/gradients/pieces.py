"""A mask aligned to the bottom right, cut into pieces that torch's backward operator on the CPU knows.

Each piece is attention of some queries over some keys: all of them, a triangle aligned to the top left, or under a
mask of its own. With the lse of the whole row, gradients of pieces add up to those of the whole.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

_ROWS = 256  # queries of a piece under a mask: its numbers fit a cache, and the operator works in blocks of 32 to 256


class Piece(NamedTuple):
    """Queries from q0 to q1, keys from k0 to k1."""

    q0: int
    q1: int
    k0: int
    k1: int
    kind: Literal["all", "causal", "masked"]


def cut(sq: int, sk: int, left: int, right: int) -> list[Piece]:
    """The pieces of a mask under which query i sees the keys from i + sk - sq - left to i + sk - sq + right.

    A bound of -1 is none. Queries and keys that see nothing of each other are in no piece.
    """
    right = -1 if right >= sq - 1 else right
    left = -1 if left >= sk - 1 else left
    if left >= 0:
        return _band(sq, sk, left, right)
    if right < 0:
        pieces = [Piece(0, sq, 0, sk, "all")]
    else:
        seen = sk - sq + right  # query i sees the keys up to i + seen
        first, shared = max(0, -seen), max(0, seen)
        corner = first + sk - shared  # from this query on all keys are seen
        pieces = [
            Piece(first, sq, 0, shared, "all"),
            Piece(first, corner, shared, sk, "causal"),
            Piece(corner, sq, shared, sk, "all"),
        ]
    return [each for each in pieces if each.q0 < each.q1 and each.k0 < each.k1]


def _band(sq: int, sk: int, left: int, right: int) -> list[Piece]:
    pieces = []
    for q0 in range(0, sq, _ROWS):
        q1 = min(sq, q0 + _ROWS)
        k0 = max(0, q0 + sk - sq - left)
        k1 = sk if right < 0 else min(sk, q1 + sk - sq + right)
        if k0 < k1:
            pieces.append(Piece(q0, q1, k0, k1, "masked"))
    return pieces


def mask_of(piece: Piece, sq: int, sk: int, left: int, right: int, dtype: torch.dtype) -> Tensor | None:
    """(1, 1, queries, keys), 0 or -inf: what a piece's queries see; None where its kind says it."""
    if piece.kind != "masked":
        return None
    positions = torch.arange(piece.q0, piece.q1, device="cpu")[:, None] + (sk - sq)
    keys = torch.arange(piece.k0, piece.k1, device="cpu")
    hidden = keys < positions - left
    if right >= 0:
        hidden |= keys > positions + right
    return torch.zeros(hidden.shape, dtype=dtype, device="cpu").masked_fill_(hidden, -math.inf)[None, None]

"""Draft masks from booleans: trees, chains and random bits, one column for each of the last 32 * words keys."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(seen: Tensor) -> Tensor:
    """(rows, 32 * words) booleans as (rows, words) int32, the first column in the lowest bit of the first word."""
    powers = 2 ** torch.arange(32, device=seen.device)
    numbers = (seen.unflatten(-1, (-1, 32)).long() * powers).sum(-1)
    return torch.where(numbers < 2**31, numbers, numbers - 2**32).int()


def chain(tokens: int, words: int) -> Tensor:
    """What a causal mask shows to the last `tokens` tokens of a sequence."""
    column, row = torch.arange(32 * words)[None], torch.arange(tokens)[:, None]
    return column <= 32 * words - tokens + row


def tree(tokens: int, words: int, random: torch.Generator) -> Tensor:
    """The last `tokens` keys are a tree of draft tokens with random parents: each sees its ancestors and itself."""
    seen = torch.ones(tokens, 32 * words, dtype=torch.bool)
    drafts = torch.zeros(tokens, tokens, dtype=torch.bool)
    for token in range(tokens):
        parent = int(torch.randint(-1, token, (), generator=random)) if token else -1
        if parent >= 0:
            drafts[token] = drafts[parent]
        drafts[token, token] = True
    seen[:, -tokens:] = drafts
    return seen


def scattered(tokens: int, words: int, random: torch.Generator) -> Tensor:
    """Any bits; of some rows few, of the first none."""
    density = torch.rand(tokens, 1, generator=random)
    seen = torch.rand(tokens, 32 * words, generator=random) < density
    seen[0] = False
    return seen

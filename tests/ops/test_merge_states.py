"""merge_states against float64: many parts, parts that saw nothing, layouts, dtypes."""

from __future__ import annotations

import pytest
import torch

from jit_kernel.ops import merge_states
from tests.support.ops import DEVICES, FLOATS, Draw, assert_close, cases


def check(draw: Draw) -> None:
    choice, dtype = draw.random.choice, draw.random.choice(FLOATS)
    parts, size = choice((0, 1, 2, 3, 4, 5, 17, 64)), draw.size(choice((64, 300)))
    tokens, heads = draw.rows(7), choice((1, 4, 5))
    values = draw.normal(parts, tokens, heads, size, dtype=dtype)
    lse = draw.normal(parts, tokens, heads, dtype=torch.float32, spread=choice((1.0, 40.0)))
    unseen = torch.rand(lse.shape, device=draw.device) < choice((0.0, 0.3, 0.9))
    lse[unseen] = choice((float("-inf"), float("inf")))
    if values.numel():
        values[unseen] = float("nan")
    if choice((True, False)):  # heads first, as FlashAttention lays lse
        lse = lse.transpose(1, 2).contiguous().transpose(1, 2)
    known = lse.double().masked_fill(unseen, float("-inf"))
    whole = known.logsumexp(0) if parts else torch.full((tokens, heads), float("-inf"), device=draw.device).double()
    weights = torch.where(unseen, 0.0, (known - whole).exp()).unsqueeze(-1)
    numbers = values.double().masked_fill(unseen.unsqueeze(-1), 0.0)
    outs = {}
    if choice((True, False)):
        outs = {
            "out": draw.poisoned(tokens, heads, size, dtype=choice(FLOATS)),
            "lse": draw.poisoned(tokens, heads, dtype=torch.float32),
        }
    found, found_lse = merge_states(values, lse, **outs)
    slack = (
        (weights * numbers.abs()).sum(0)
        * 4e-6
        * (1 + known.masked_fill(unseen, 0.0).abs().amax(0) if parts else 1).unsqueeze(-1)
        if parts
        else 0.0
    )
    assert_close(found, (weights * numbers).sum(0), slack)
    seen = whole > float("-inf")
    assert torch.equal(found_lse == float("-inf"), ~seen)
    assert_close(found_lse[seen], whole[seen], whole[seen].abs() * 2e-7 + 1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_random_cases(device):
    for seed in cases(device):
        check(Draw(seed, device))


def test_errors_name_the_argument():
    parts, lse = torch.ones(2, 3, 4, 8), torch.zeros(2, 3, 4)
    for arguments, error, words in (
        ({"lse_partial": lse[:1]}, ValueError, r"lse_partial has shape \(1, 3, 4\); it must be \(2, 3, 4\)"),
        ({"lse_partial": lse.half()}, TypeError, "lse_partial has dtype torch.float16; it must be torch.float32"),
        ({"lse_partial": None}, TypeError, "lse_partial is of type NoneType; it must be a torch.Tensor"),
        ({"out": parts[0, :2]}, ValueError, r"out has shape \(2, 4, 8\); it must be \(3, 4, 8\)"),
        ({"lse": lse}, ValueError, r"lse has shape \(2, 3, 4\); it must be \(3, 4\)"),
    ):
        with pytest.raises(error, match=words):
            merge_states(**{"out_partial": parts, "lse_partial": lse, **arguments})

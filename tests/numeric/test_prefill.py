"""How a prefill's keys and rows are cut, and which thread takes them, shows in no bit of the answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from jit_kernel import flash_attention_v3 as fa3
from tests.support import reference
from tests.support.inputs import FLOATS, along, normal
from tests.support.threads import answers

# At head size 256 with AMX 1,024 keys are packed at once, without it 256: the last ones come in a second or third turn.
QUERIES, KEYS, HEADS, D = 1100, 2500, 2, 256
MASKS: list[dict[str, Any]] = [
    {},
    {"causal": True},
    {"window_size": (300, 0)},  # tiles that see nothing of the first keys, and nothing of the last
    {"attention_chunk": 700},
]


def late_maxima(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Queries and keys whose scores are largest by far in the second thousand of keys, for every fourth row."""
    rows = torch.where(torch.arange(QUERIES) % 4 == 0, 1.0, 0.1)
    sizes = torch.where(torch.arange(KEYS) // 1000 == 1, 40.0, 1.0)
    return along(rows, HEADS, D, dtype, seed=0), along(sizes, HEADS, D, dtype, seed=1)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("scores", ["even", "late"])
def test_keys_in_several_turns(dtype: torch.dtype, mask: dict[str, Any], scores: str) -> None:
    q, k = late_maxima(dtype)
    if scores == "even":
        q, k = normal(1, QUERIES, HEADS, D, dtype=dtype), normal(1, KEYS, HEADS, D, dtype=dtype, seed=1)
    v = normal(1, KEYS, HEADS, D, dtype=dtype, seed=2)
    scale = {"softmax_scale": D**-0.5 if scores == "even" else 1.0}

    def call() -> tuple[Tensor, Tensor]:
        return fa3.flash_attn_func(q, k, v, **mask, **scale, num_splits=1, return_softmax_lse=True)

    # One thread takes items of 576 rows, five of 128.
    (out, lse), *others = answers(call)
    assert all(torch.equal(out, other[0]) and torch.equal(lse, other[1]) for other in others)
    problem = reference.Problem([reference.Sequence(q[0], k[0], v[0])], **mask, **scale)
    assert reference.check([out[0]], [lse[0]], problem).worst <= 1


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_rows_of_one_item_on_several_threads(dtype: torch.dtype, mask: dict[str, Any]) -> None:
    """Three items, of keys that are packed at once: threads that find none any more join those that are begun."""
    queries, keys, heads, d = 1500, 500, 3, 64
    q, k, v = (normal(1, n, heads, d, dtype=dtype, seed=i) for i, n in enumerate((queries, keys, keys)))

    def call() -> tuple[Tensor, Tensor]:
        return fa3.flash_attn_func(q, k, v, **mask, num_splits=1, return_softmax_lse=True)

    expected, *others = (x for _ in range(4) for x in answers(call))
    assert all(torch.equal(a, b) for other in others for a, b in zip(expected, other, strict=True))
    problem = reference.Problem([reference.Sequence(q[0], k[0], v[0])], **mask)
    assert reference.check([expected[0][0]], [expected[1][0]], problem).worst <= 1


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_out_past_the_caches(dtype: torch.dtype) -> None:
    """A large out is written past the caches where its rows are whole cache lines: the same bits elsewhere."""
    q, k, v = (normal(1, 1100, 8, 128, dtype=dtype, seed=s) for s in range(3))
    whole = fa3.flash_attn_func(q, k, v, causal=True)
    memory = torch.empty(whole.numel() + 8, dtype=whole.dtype)
    out = memory[8:].view(whole.shape)
    assert whole.data_ptr() % 64 == 0
    assert out.data_ptr() % 64 != 0
    assert torch.equal(fa3.flash_attn_func(q, k, v, causal=True, out=out), whole)
    problem = reference.Problem([reference.Sequence(q[0], k[0], v[0])], causal=True)
    assert reference.check([whole[0]], None, problem).worst <= 1


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("window", [(300, 0), (77, 33)], ids=str)
@pytest.mark.parametrize("d", [64, 128])
def test_windows_that_tiles_begin_anywhere_in(dtype: torch.dtype, window: tuple[int, int], d: int) -> None:
    """With other items a row is in another tile, which begins at other keys: its sums are parted at the same ones."""
    q, k, v = (normal(1, n, HEADS, d, dtype=dtype, seed=i) for i, n in enumerate((QUERIES, KEYS, KEYS)))
    first, *others = answers(
        lambda: fa3.flash_attn_func(q, k, v, window_size=window, return_softmax_lse=True), threads=(1, 3, 5, 7)
    )
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    problem = reference.Problem([reference.Sequence(q[0], k[0], v[0])], window_size=window)
    assert reference.check([first[0][0]], [first[1][0]], problem).worst <= 1

"""What no query sees reaches no result: whatever its memory holds, the answer has the bits that zeros there give."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import jit_kernel.flash_attention_v3 as fa3
from jit_kernel.device import cpu_target
from tests.support import cases, hidden, reference
from tests.support.inputs import FLOATS, normal

CASES = 500
FUNCTIONS = {name: getattr(fa3, name) for name in (cases.VARLEN, cases.KVCACHE, cases.DENSE)}
NOT_FINITE = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("dtype", cases.CPU.dtypes, ids=str)
def test_random_masks(dtype: torch.dtype, say: list[str]) -> None:
    share = CASES // len(cases.CPU.dtypes)
    space = cases.Space("hidden", dtypes=(dtype,), lengths=(60, 150, 700), features=cases.CPU.features)
    counts = [hidden.differ(hidden.draw(seed, space), FUNCTIONS) for seed in range(share)]
    with_some = sum(count > 0 for count in counts)
    assert with_some > share // 2
    name = str(dtype).removeprefix("torch.")
    say.append(f"hidden {name}: {share} calls, {with_some} with hidden keys, {sum(counts)} elements not finite")


@pytest.mark.parametrize("dtype", cases.CPU.dtypes, ids=str)
@pytest.mark.parametrize("queries", [1, 8, 16, 17, 40, 300])
@pytest.mark.parametrize("value", NOT_FINITE)
def test_pages_behind_a_window_may_be_another_sequences(dtype: torch.dtype, queries: int, value: float) -> None:
    """As a serving engine frees them: their entries point to one page of NaN, or to none at all."""
    if dtype == cases.FP8 and not math.isnan(value):
        pytest.skip("e4m3 has no infinity")
    keys, page = 600, 16
    q = normal(1, queries, 2, 64).to(dtype)
    k, v = (normal(-(-keys // page) + 1, page, 1, 64, seed=s).to(dtype) for s in (1, 2))
    for x in (k, v):
        x[-1] = torch.full((page, 1, 64), value).to(dtype)
    table = torch.arange(len(k) - 1, dtype=torch.int32)[None]
    options = {"cache_seqlens": keys, "causal": True, "window_size": (20, 0), "return_softmax_lse": True}
    expected, expected_lse = fa3.flash_attn_with_kvcache(q, k, v, page_table=table, **options)[:2]
    freed = (keys - queries - 20) // page
    for entry in (len(k) - 1, -1, 2**31 - 1):
        given = table.clone()
        given[:, :freed] = entry
        out, lse = fa3.flash_attn_with_kvcache(q, k, v, page_table=given, **options)[:2]
        assert torch.equal(out, expected)
        assert torch.equal(lse, expected_lse)
    given = table.clone()
    given[0, freed] = -1
    with pytest.raises(ValueError, match=rf"page_table\[0, {freed}\] is -1; it must be between 0 and {len(k) - 1}"):
        fa3.flash_attn_with_kvcache(q, k, v, page_table=given, **options)


@pytest.mark.parametrize("dtype", cases.CPU.dtypes, ids=str)
def test_the_first_keys_of_a_tile(dtype: torch.dtype) -> None:
    q, k, v = (normal(1, n, 1, 64, seed=i).to(dtype) for i, n in enumerate((17, 25, 25)))
    options = {"causal": True, "window_size": (0, 0)}
    expected = fa3.flash_attn_func(q, k, v, **options)
    for x in (k, v):
        x[:, :8] = torch.full((8, 1, 64), math.nan).to(dtype)
    assert torch.equal(fa3.flash_attn_func(q, k, v, **options), expected)


MASKS: list[dict[str, Any]] = [
    {"causal": True},
    {"window_size": (30, 4)},
    {"attention_chunk": 44},
    {"attention_chunk": 100, "causal": True, "softcap": 9.0},
]


def seen_by(key: int, queries: int, keys: int, mask: dict[str, Any]) -> Tensor:
    names = ("causal", "window_size", "attention_chunk")
    problem = reference.Problem([], **{name: mask[name] for name in names if name in mask})
    return reference.visible(problem, queries, keys, torch.device("cpu"))[:, key]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("queries", [3, 12, 330])
@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("value", NOT_FINITE)
def test_a_value_reaches_the_rows_that_see_it_alone(
    dtype: torch.dtype, queries: int, mask: dict[str, Any], value: float
) -> None:
    """On the CPU also within a tile of rows, and in its own column."""
    keys, column = 350, 7
    q, k, v = (normal(1, n, 2, 64, dtype=dtype, seed=i) for i, n in enumerate((queries, keys, keys)))
    options = {**mask, "return_softmax_lse": True}
    clean, clean_lse = fa3.flash_attn_func(q, k, v, **options)
    for key in (keys - 2, keys - queries, 260, 33):
        bad = v.clone()
        bad[0, key, 1, column] = value
        out, lse = fa3.flash_attn_func(q, k, bad, **options)
        assert torch.allclose(lse, clean_lse, atol=1e-4)
        reached = torch.zeros(out.shape, dtype=torch.bool)
        reached[0, seen_by(key, queries, keys, mask), 1, column] = True
        assert bool(out[reached].isnan().all() if math.isnan(value) else (out[reached] == value).all())
        assert torch.allclose(out[~reached].float(), clean[~reached].float(), atol=2e-3)
        if dtype != torch.float16 and "amxbf16" not in cpu_target().features:  # else another kernel may serve the tile
            assert torch.equal(out[~reached], clean[~reached])

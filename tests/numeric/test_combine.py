"""merge_state and flash_attn_combine: attention over parts of the keys becomes attention over all of them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from jit_kernel.flash_attention_v3 import flash_attn_combine, flash_attn_func, merge_state

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# one rounding of the result, half a unit in the last place, and float32 arithmetic before it
ROUNDING = {torch.float32: 2.0**-21, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def combined(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """The formula in float64: outs (n, ..., dv) and lses (n, ...) over their first dimension."""
    lse = torch.logsumexp(lses.double(), dim=0)
    weights = torch.exp(lses.double() - lse).nan_to_num(nan=0.0)
    return (weights[..., None] * outs.double().nan_to_num()).sum(dim=0), lse


def assert_near(out: Tensor, lse: Tensor, outs: Tensor, lses: Tensor) -> None:
    ref, ref_lse = combined(outs, lses)
    slack = ROUNDING[out.dtype] * ref.abs() + 2.0**-21 * outs.double().nan_to_num().abs().amax(dim=0)
    assert bool(((out.double() - ref).abs() <= slack).all())
    empty = ref_lse == -math.inf
    assert torch.equal(lse == -math.inf, empty)
    assert bool(((lse.double() - ref_lse).abs() <= 1e-6 * (1 + ref_lse.abs()))[~empty].all())
    assert not out[empty].any()


def parts(*shape: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random partial results, a quarter of them over no key: their lse is -inf and their out may be anything."""
    random = torch.Generator().manual_seed(seed)
    outs = torch.randn(*shape, 40, generator=random).to(dtype)
    lses = torch.randn(*shape, generator=random) * 20
    empty = torch.rand(*shape, generator=random) < 0.25
    lses[empty] = -math.inf
    outs[empty] = math.nan
    return outs, lses


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("splits", [1, 2, 3, 17, 256])
@pytest.mark.parametrize("lead", [(5, 3), (2, 5, 3)])
def test_combine_is_the_formula(dtype: torch.dtype, splits: int, lead: tuple[int, ...]) -> None:
    outs, lses = parts(splits, *lead, dtype=dtype)
    before = outs.clone(), lses.clone()
    out, lse = flash_attn_combine(outs, lses)
    assert out.dtype == dtype
    assert lse.shape == lead
    assert_near(out, lse, outs, lses)
    assert torch.equal(outs.view(torch.uint8), before[0].view(torch.uint8))
    assert torch.equal(lses, before[1])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("wanted", FLOATS, ids=str)
def test_combine_into_another_dtype_and_a_given_out(dtype: torch.dtype, wanted: torch.dtype) -> None:
    outs, lses = parts(4, 7, 3, dtype=dtype)
    out, lse = flash_attn_combine(outs, lses, out_dtype=wanted)
    assert out.dtype == wanted
    assert_near(out, lse, outs, lses)
    room = torch.full((3, 7, 50), math.nan, dtype=wanted).transpose(0, 1)
    given = room[..., 5:45]
    returned, lse = flash_attn_combine(outs, lses, out=given)
    assert returned is given
    assert torch.equal(given, out)
    assert room[..., :5].isnan().all()
    assert room[..., 45:].isnan().all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_combine_takes_any_strides(dtype: torch.dtype) -> None:
    outs, lses = parts(6, 2, 5, 3, dtype=dtype)
    wide = torch.full((5, 6, 2, 3, 64), math.nan, dtype=dtype)
    strided = wide.permute(1, 2, 0, 3, 4)[..., 3:43]
    strided.copy_(outs)
    turned = lses.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    for ours, plain in zip(flash_attn_combine(strided, turned), flash_attn_combine(outs, lses), strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("ragged", [True, False])
def test_merge_is_the_formula(dtype: torch.dtype, ragged: bool) -> None:
    outs, lses = parts(2, *((9, 4) if ragged else (3, 9, 4)), dtype=dtype)
    by_head = lses.transpose(-1, -2)
    out, lse = merge_state(outs[0], by_head[0], outs[1], by_head[1].contiguous())
    assert out.dtype == dtype
    assert lse.shape == by_head[0].shape
    assert_near(out, lse.transpose(-1, -2), outs, lses)


def test_merge_with_nothing_keeps_the_other_and_two_of_nothing_give_zero() -> None:
    out, lse = torch.randn(3, 2, 8), torch.randn(2, 3)
    nothing, no_keys = torch.full((3, 2, 8), math.nan), torch.full((2, 3), -math.inf)
    for merged in (merge_state(out, lse, nothing, no_keys), merge_state(nothing, no_keys, out, lse)):
        assert torch.allclose(merged[0], out, rtol=1e-6, atol=0)
        assert torch.allclose(merged[1], lse, rtol=1e-6, atol=0)
    empty_out, empty_lse = merge_state(nothing, no_keys, nothing, no_keys)
    assert not empty_out.any()
    assert (empty_lse == -math.inf).all()


@settings(max_examples=60, deadline=None)
@given(low=st.floats(-1e4, 1e4), gap=st.floats(0, 1e4), tokens=st.integers(1, 4))
def test_merge_never_overflows(low: float, gap: float, tokens: int) -> None:
    outs = torch.randn(2, tokens, 1, 8, generator=torch.Generator().manual_seed(tokens))
    lses = torch.tensor([low, low + gap]).view(2, 1, 1).expand(2, tokens, 1).contiguous()
    out, lse = merge_state(outs[0], lses[0].T, outs[1], lses[1].T)
    assert_near(out, lse.T, outs, lses)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_two_halves_of_the_keys_merge_to_the_whole(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, h, 64, generator=random).to(dtype) for n, h in ((5, 4), (90, 2), (90, 2)))
    whole, lse = flash_attn_func(q, k, v, return_softmax_lse=True)
    halves = [flash_attn_func(q, k[:, s], v[:, s], return_softmax_lse=True) for s in (slice(0, 33), slice(33, 90))]
    merged, merged_lse = merge_state(*halves[0], *halves[1])
    assert torch.allclose(merged_lse, lse, atol=1e-5)
    assert torch.allclose(merged.float(), whole.float(), atol=4 * ROUNDING[dtype])
    stacked = torch.stack([halves[0][0], halves[1][0]]), torch.stack([halves[0][1], halves[1][1]]).transpose(-1, -2)
    out, _ = flash_attn_combine(*stacked)
    assert torch.allclose(out.float(), merged.float(), atol=2 * ROUNDING[dtype])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_part_marked_as_flash_attention_2_marks_it_counts_as_empty(dtype: torch.dtype) -> None:
    """+inf means what -inf means: no key; also where both parts, or all splits, are so marked."""
    outs, lses = parts(2, 5, 3, dtype=dtype)
    lses[:, 0] = -math.inf
    marked = lses.masked_fill(lses == -math.inf, math.inf)
    mixed = torch.stack([lses[0], marked[1]])
    by_head = [x.transpose(1, 2) for x in (lses, marked, mixed)]
    expected = merge_state(outs[0], by_head[0][0], outs[1], by_head[0][1])
    combined_whole = flash_attn_combine(outs, lses)
    assert not expected[0][0].any()
    assert bool((expected[1][:, 0] == -math.inf).all())
    assert expected[0].isfinite().all()
    for lse, split in ((by_head[1], marked), (by_head[2], mixed)):
        assert all(map(torch.equal, merge_state(outs[0], lse[0], outs[1], lse[1]), expected))
        assert all(map(torch.equal, flash_attn_combine(outs, split), combined_whole))

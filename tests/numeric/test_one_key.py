"""A row that sees one key is that key's value, and its lse that key's score: 2^0 is 1."""

from __future__ import annotations

import pytest
import torch

from jit_kernel import flash_attention_v3 as fa3
from tests.support import cases
from tests.support.inputs import normal


@pytest.mark.parametrize("dtype", cases.CPU.dtypes, ids=str)
@pytest.mark.parametrize("queries", [1, 12, 200], ids=["decode", "decode of rows", "prefill"])
@pytest.mark.parametrize("mask", [{"window_size": (0, 0)}, {"attention_chunk": 1}], ids=str)
@pytest.mark.parametrize("factor", [0.0, 1.0, 40.0])
def test_a_row_that_sees_one_key(dtype: torch.dtype, queries: int, mask: dict, factor: float) -> None:
    q, k, v = (normal(1, queries, 2, 64, seed=i).to(dtype) for i in range(3))
    scale = factor / 8 if factor else 1e-30
    out, lse = fa3.flash_attn_func(q, k, v, softmax_scale=scale, return_softmax_lse=True, **mask)
    scores = (q[0].double() * k[0].double()).sum(-1).T * scale
    sums = (q[0].double().abs() * k[0].double().abs()).sum(-1).T * scale  # what float32 rounds in a score
    assert bool(((lse[0].double() - scores).abs() <= 2e-6 + 3e-7 * sums).all())
    assert torch.allclose(out.double(), v.double(), rtol=1e-6, atol=0)


def test_with_a_descale_no_rounding_hides_it() -> None:
    """2^-8 of the largest float32 rounds away in bf16; so the value lies beside a rounding's edge."""
    dtype = torch.float8_e4m3fn
    q, k = (normal(1, 40, 1, 64, seed=i).to(dtype) for i in range(2))
    v = torch.full((1, 40, 1, 64), 1.0).to(dtype)
    edge = torch.tensor([[1.0 + 2.0**-8 - 2.0**-15]])  # 1 in bf16; times 1.000075 it would be 1 + 2^-7
    out = fa3.flash_attn_func(q, k, v, v_descale=edge, window_size=(0, 0))
    assert bool((out == 1.0).all())

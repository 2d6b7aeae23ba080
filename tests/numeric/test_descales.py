"""Factors of float8_e4m3fn inputs at the ends of their range."""

from __future__ import annotations

import pytest
import torch

import jit_kernel
from jit_kernel.fa3.call import default_scale

FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize("sq", [1, 3, 70])
@pytest.mark.parametrize(("k_factor", "v_factor"), [(1.4, 0.0), (0.0, 1.4), (0.0, 0.0), (1e-3, 1e-30), (1e-30, 1.0)])
def test_scores_with_qv_and_a_factor_of_zero(k_factor: float, v_factor: float, sq: int) -> None:
    """A factor of 0 takes its part out of the scores; a quotient of the two factors would be no number."""
    torch.manual_seed(0)
    q, qv = torch.randn(1, sq, 2, 64).to(FP8), torch.randn(1, sq, 2, 256).to(FP8)
    k, v = torch.randn(1, 90, 1, 64).to(FP8), torch.randn(1, 90, 1, 256).to(FP8)
    factors = {"k_descale": torch.tensor([[k_factor]]), "v_descale": torch.tensor([[v_factor]])}
    out, lse = jit_kernel.flash_attn_func(q, k, v, qv=qv, **factors, return_softmax_lse=True)
    scores = torch.einsum("bqhd,bkd->bhqk", q.double(), k[:, :, 0].double()) * k_factor
    scores += torch.einsum("bqhd,bkd->bhqk", qv.double(), v[:, :, 0].double()) * v_factor
    scores *= default_scale(q, qv, only_qv=False)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), atol=2e-3, rtol=0)
    expected = torch.einsum("bhqk,bkd->bqhd", scores.softmax(-1), v[:, :, 0].double()) * v_factor
    torch.testing.assert_close(out.double(), expected, atol=0.03 * v_factor, rtol=0.02)

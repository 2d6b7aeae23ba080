"""A huge softmax_scale, or huge products q·k: weights are one-hot or shared by equal scores, and nothing is NaN."""

from __future__ import annotations

import pytest
import torch

from tests.support import cases, large_scores


@pytest.mark.parametrize("dtype", cases.CPU.dtypes, ids=str)
@pytest.mark.parametrize("case", large_scores.CASES, ids=str)
def test_large_scores(case: large_scores.Case, dtype: torch.dtype) -> None:
    # Decodes of one row, of a few and of many; prefills of a part of a tile, and of several.
    for sq, sk in ((1, 300), (3, 2100), (9, 70), (150, 150), (70, 600)):
        for paged in (False, True):
            wrong = large_scores.faults(case, dtype, sq, sk, paged=paged)
            assert not wrong, f"{sq} queries, {sk} keys, paged {paged}: {wrong}"

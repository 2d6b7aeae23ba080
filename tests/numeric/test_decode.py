"""How a decode's keys are cut into items and its values read in tiles shows in no bit of the answer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from jit_kernel import flash_attention_v3 as fa3
from tests.support import reference
from tests.support.inputs import FLOATS, normal
from tests.support.threads import answers

LENGTHS = [9000, 1, 3072, 1024, 2049, 777, 6100]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("features", [{}, {"num_splits": 3}, {"causal": True, "window_size": (1500, 0)}], ids=str)
def test_however_the_keys_are_cut(dtype: torch.dtype, queries: int, features: dict[str, Any]) -> None:
    """Parts of 1024 keys, one or several to an item, which the threads and the other sequences decide."""
    q = normal(len(LENGTHS), queries, 8, 64, dtype=dtype)
    k, v = (normal(len(LENGTHS), max(LENGTHS), 2, 64, dtype=dtype, seed=s) for s in (1, 2))

    def call(some: slice = slice(None)) -> tuple[Tensor, Tensor]:
        lengths = torch.tensor(LENGTHS[some], dtype=torch.int32)
        features_here = {"num_splits": 1, **features, "return_softmax_lse": True}
        return fa3.flash_attn_with_kvcache(q[some], k[some], v[some], cache_seqlens=lengths, **features_here)

    all_of_them = answers(call)
    for out, lse in all_of_them[1:]:
        assert torch.equal(out, all_of_them[0][0])
        assert torch.equal(lse, all_of_them[0][1])
    for i in range(len(LENGTHS)):
        for out, lse in answers(lambda i=i: call(slice(i, i + 1)), threads=(1, 5)):
            assert torch.equal(out, all_of_them[0][0][i : i + 1])
            assert torch.equal(lse, all_of_them[0][1][i : i + 1])
    mask = {name: value for name, value in features.items() if name != "num_splits"}
    sequences = [reference.Sequence(q[i], k[i, :n], v[i, :n]) for i, n in enumerate(LENGTHS)]
    out, lse = all_of_them[0]
    assert reference.check(list(out), list(lse), reference.Problem(sequences, **mask)).worst <= 1


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("queries", [1, 3], ids=["4 rows", "12 rows"])
@pytest.mark.parametrize("d", [64, 80])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("column", [6, 7, 63])
@pytest.mark.parametrize("key", [1500, 2976], ids=["inside", "first of a last block of 24 keys"])
def test_a_value_that_is_not_finite_stays_in_its_column(
    dtype: torch.dtype, queries: int, d: int, value: float, column: int, key: int
) -> None:
    q = normal(1, queries, 8, d, dtype=dtype)
    k, v = (normal(1, 3000, 2, d, dtype=dtype, seed=s) for s in (1, 2))
    clean = fa3.flash_attn_with_kvcache(q, k, v, num_splits=1)
    v[0, key, 1, column] = value
    outs = answers(lambda: (fa3.flash_attn_with_kvcache(q, k, v, num_splits=1), clean))
    out = outs[0][0]
    assert all(torch.equal(out.nan_to_num(3.0, 5.0), other.nan_to_num(3.0, 5.0)) for other, _ in outs)
    assert torch.equal(out[:, :, :4], clean[:, :, :4]), "heads that do not see it"
    reached = out[0, :, 4:, column]
    assert bool(reached.isnan().all() if math.isnan(value) else (reached == value).all())
    others = [c for c in range(d) if c != column]
    assert torch.allclose(out[..., others].float(), clean[..., others].float(), atol=2e-3)

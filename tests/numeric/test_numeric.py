"""Random calls over the whole argument space on the CPU, every answer held against the numeric rule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jit_kernel.flash_attention_v3 as fa3
from tests.support import case_run, case_tensors, cases, reference

CASES, CHUNK = 2500, 50
FUNCTIONS: Mapping[str, Any] = {name: getattr(fa3, name) for name in (cases.VARLEN, cases.KVCACHE, cases.DENSE)}


@pytest.fixture(scope="module")
def worst(say: list[str]) -> Iterator[dict[str, Any]]:
    """The worst shares met in this module, printed at the end."""
    met: dict[str, Any] = {"cases": 0, "shares": {}}
    yield met
    say.append(f"numeric rule: {met['cases']} random cases; worst share of each limit:")
    for name, (share, seed) in met["shares"].items():
        say.append(f"  {name} {share:.3f} (seed {seed})")


@pytest.mark.parametrize("chunk", range(CASES // CHUNK))
def test_random_cases(chunk: int, worst: dict[str, Any]) -> None:
    for seed in range(chunk * CHUNK, (chunk + 1) * CHUNK):
        shares = case_run.judge(cases.draw(seed, cases.CPU), FUNCTIONS)
        worst["cases"] += 1
        for name in ("row", "largest", "lse"):
            share = getattr(shares, name)
            if share > worst["shares"].get(name, (-1.0, 0))[0]:
                worst["shares"][name] = (share, seed)


LENGTH = st.integers(0, 70)
END = st.integers(-1, 75)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    lengths=st.lists(st.tuples(LENGTH, LENGTH), min_size=1, max_size=4),
    window=st.tuples(END, END),
    chunk=st.integers(0, 80),
    causal=st.booleans(),
    page_size=st.sampled_from([0, 1, 7, 16]),
    num_splits=st.sampled_from([0, 1, 2, 5]),
    sinks=st.booleans(),
)
def test_any_lengths_and_mask(  # type: ignore[no-untyped-def]
    lengths, window, chunk, causal, page_size, num_splits, sinks
) -> None:
    case_run.judge(
        cases.Plan(
            seed=len(lengths), function=cases.VARLEN, dtype=torch.float32, d=16, dv=16, hq=2, hk=1,
            lengths_q=tuple(q for q, _ in lengths), lengths_k=tuple(k for _, k in lengths),
            q_layout="ragged", k_layout="paged" if page_size else "ragged", page_size=page_size,
            used_k="tensor" if page_size else "", causal=causal, window_size=window, attention_chunk=chunk,
            sinks="float32" if sinks else "", num_splits=num_splits,
        ),
        FUNCTIONS,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dv", range(1, 8))
@pytest.mark.parametrize("d", [1, 3, 64])
def test_tiny_head_sizes(dtype: torch.dtype, d: int, dv: int) -> None:
    """Below 8 values a row's error is a matter of luck; so each value is held against eps of the largest v."""
    plan = cases.Plan(seed=d * dv, function=cases.DENSE, dtype=dtype, d=d, dv=dv, hq=4, hk=2, lengths_q=(9, 9),
                      lengths_k=(33, 33), causal=True, strides=True, out="strided")  # fmt: skip
    case = case_tensors.build(plan)
    outs, lses = case_run.run(case, FUNCTIONS)
    assert lses is not None
    for out, lse, s in zip(outs, lses, case.problem.sequences, strict=True):
        ref, ref_lse = reference.exact(s, case.problem)
        assert float((out - ref).abs().max()) <= 2 * reference.ROW_SLACK[dtype] * float(s.v.abs().max())
        assert float((lse - ref_lse).abs().max()) <= 1e-3


def test_every_feature_was_drawn(say: list[str]) -> None:
    """The cases above touch each part of the argument space often; the counts are printed."""
    counted = cases.coverage(cases.draw(seed, cases.CPU) for seed in range(CASES))
    say.append("random cases by feature: " + ", ".join(f"{name} {n}" for name, n in sorted(counted.items())))
    rare = {name: counted[name] for name in cases.CPU.features if counted[name] < CASES // 50}
    assert not rare
    names = [*cases.CPU.functions, "keys ragged", "keys dense", "keys paged", "out strided", "num_splits 0"]
    assert all(counted[name] >= CASES // 20 for name in names)
    assert all(counted[str(dtype).removeprefix("torch.")] >= CASES // 8 for dtype in cases.CPU.dtypes)

"""Promises about numbers that single cases show: the same bits in any company, far offsets, no key seen."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import jit_kernel.flash_attention_v3 as fa3
from tests.support import case_run, case_tensors, cases, reference
from tests.support.inputs import FLOATS, along, normal
from tests.support.threads import answers

FUNCTIONS = {name: getattr(fa3, name) for name in (cases.VARLEN, cases.KVCACHE, cases.DENSE)}


def ragged(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


MASKS: dict[str, dict] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (30, 4)},
    "chunk": {"attention_chunk": 40, "softcap": 10.0},
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("head_dim", [64, 80])
def test_a_sequence_has_the_same_bits_alone_and_among_64(dtype: torch.dtype, mask: str, head_dim: int) -> None:
    lengths_q = [(7 * i) % 90 + 1 for i in range(64)]
    lengths_k = [(11 * i) % 170 + 1 for i in range(64)]
    q = normal(sum(lengths_q), 4, head_dim, dtype=dtype)
    k, v = (normal(sum(lengths_k), 2, head_dim, dtype=dtype, seed=s) for s in (1, 2))
    cu_q, cu_k = ragged(lengths_q), ragged(lengths_k)
    sinks = normal(4, seed=3)
    options = {"num_splits": 1, "return_softmax_lse": True, "sinks": sinks, **MASKS[mask]}
    together, lse = fa3.flash_attn_varlen_func(q, k, v, cu_q, cu_k, **options)
    again, lse_again = fa3.flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_seqlen_q=500, max_seqlen_k=999, **options)
    assert torch.equal(together, again)
    assert torch.equal(lse, lse_again)
    for i in (0, 1, 17, 40, 63):
        mine, keys = slice(int(cu_q[i]), int(cu_q[i + 1])), slice(int(cu_k[i]), int(cu_k[i + 1]))
        alone, lse_alone = fa3.flash_attn_varlen_func(
            q[mine], k[keys], v[keys], ragged(lengths_q[i : i + 1]), ragged(lengths_k[i : i + 1]), **options
        )
        assert torch.equal(alone, together[mine])
        assert torch.equal(lse_alone, lse[:, mine])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize(
    "splits", [{"num_splits": 1}, {"deterministic": True}, {"deterministic": True, "num_splits": 5}]
)
def test_a_decode_step_has_the_same_bits_alone_and_among_64(dtype: torch.dtype, page_size: int, splits: dict) -> None:
    lengths = [(37 * i) % 300 + 1 for i in range(64)]
    per_row = 320 // page_size
    pages = torch.randperm(64 * per_row, generator=torch.Generator().manual_seed(0)).view(64, per_row).int()
    k_cache, v_cache = (normal(64 * per_row, page_size, 2, 64, dtype=dtype, seed=s) for s in (1, 2))
    q = normal(64, 1, 8, 64, dtype=dtype)
    options = {**splits, "return_softmax_lse": True, "causal": True}
    seqlens = torch.tensor(lengths, dtype=torch.int32)
    out, lse = fa3.flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=seqlens, page_table=pages, **options)
    for i in (0, 5, 33, 63):
        alone, lse_alone = fa3.flash_attn_with_kvcache(
            q[i : i + 1], k_cache, v_cache, cache_seqlens=seqlens[i : i + 1], page_table=pages[i : i + 1], **options
        )
        assert torch.equal(alone[0], out[i])
        assert torch.equal(lse_alone[0], lse[i])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("d", "dv"), [(64, 64), (64, 512), (128, 256), (512, 512)])
@pytest.mark.parametrize("queries", [1, 3])
def test_pages_of_any_size_give_the_bits_of_contiguous_keys(dtype: torch.dtype, d: int, dv: int, queries: int) -> None:
    """Keys of small pages are not evenly spaced: they take a way of their own into the products."""
    lengths, heads = [150, 33, 64], (8, 2)
    longest = max(lengths)
    q = normal(len(lengths), queries, heads[0], d, dtype=dtype)
    k, v = (normal(len(lengths), longest, heads[1], size, dtype=dtype, seed=size) for size in (d, dv))
    used = torch.tensor(lengths, dtype=torch.int32)
    expected = fa3.flash_attn_with_kvcache(q, k, v, cache_seqlens=used, causal=True, num_splits=1)
    for page_size in (1, 2, 3, 5, 8, 16, 64):
        pages = -(-longest // page_size)
        table = torch.randperm(len(lengths) * pages, generator=torch.Generator().manual_seed(1)).int()
        table = table.view(len(lengths), pages)
        paged = []
        for x in (k, v):
            padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, pages * page_size - longest))
            cache = torch.empty(len(lengths) * pages, page_size, heads[1], x.shape[-1], dtype=dtype)
            cache[table.long().flatten()] = padded.reshape(-1, page_size, heads[1], x.shape[-1])
            paged.append(cache)
        found = fa3.flash_attn_with_kvcache(q, *paged, cache_seqlens=used, page_table=table, causal=True, num_splits=1)
        assert torch.equal(found, expected), f"pages of {page_size}"


def patterns(tokens: int) -> dict[str, Tensor]:
    """Scores of keys, in units of e: a running maximum has much to do, or finds its largest at once."""
    spikes = torch.zeros(tokens)
    spikes[torch.tensor([40, 257, 259, 300, 511, 780])] = torch.tensor([30.0, 60.0, 61.0, 20.0, 90.0, 92.0])
    steps = (torch.arange(tokens) // 256) * 25.0
    return {"rising": torch.arange(tokens) * 0.2, "falling": torch.arange(tokens).flip(0) * 0.2, "spikes": spikes,
            "steps": steps, "below zero": steps - 300.0}  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"window_size": (45, 7)}, {"window_size": (0, 0)}], ids=str)
@pytest.mark.parametrize("scores", list(patterns(900)))
def test_maxima_that_rise_late(dtype: torch.dtype, mask: dict, scores: str) -> None:
    """Rows far from each other in their scores, too: what one row needs must not change its neighbours."""
    q = along(torch.linspace(0.2, 1.0, 330), 2, 64, dtype, seed=0)
    k = along(patterns(900)[scores], 2, 64, dtype, seed=1)
    v = normal(1, 900, 2, 64, dtype=dtype, seed=2)
    out, lse = fa3.flash_attn_func(q, k, v, softmax_scale=1.0, return_softmax_lse=True, **mask)
    problem = reference.Problem([reference.Sequence(q[0], k[0], v[0])], softmax_scale=1.0, **mask)
    shares = reference.check([out[0]], [lse[0]], problem)
    assert shares.worst <= 1, shares


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("queries", "num_splits"), [(700, 1), (700, 3), (3, 1), (3, 3)])
def test_a_query_that_is_not_finite_gives_nan(dtype: torch.dtype, value: float, queries: int, num_splits: int) -> None:
    q = normal(1, queries, 4, 64, dtype=dtype)
    k, v = (normal(1, 3000, 2, 64, dtype=dtype, seed=s) for s in (1, 2))
    options = {"causal": True, "num_splits": num_splits, "return_softmax_lse": True}
    clean, clean_lse = fa3.flash_attn_with_kvcache(q, k, v, **options)[:2]
    q[0, 2, 1, 7] = value
    out, lse = fa3.flash_attn_with_kvcache(q, k, v, **options)[:2]
    assert out[0, 2, 1].isnan().all()
    assert lse[0, 1, 2].isnan()
    assert torch.equal(out[:, :, 2:], clean[:, :, 2:])  # the other group's heads
    others = torch.ones(queries, 4, dtype=torch.bool)
    others[2, 1] = False
    assert torch.allclose(out[0, others].float(), clean[0, others].float(), atol=2e-3)
    assert torch.allclose(lse[0].T[others], clean_lse[0].T[others], atol=1e-3)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("key", [3, 300, 610])
def test_what_is_not_finite_reaches_the_rows_that_see_it(dtype: torch.dtype, value: float, key: int) -> None:
    q, k, v = (normal(1, 700, 2, 64, dtype=dtype, seed=s) for s in range(3))
    clean = fa3.flash_attn_func(q, k, v, causal=True)
    k[0, key, 1, 7] = value
    out = fa3.flash_attn_func(q, k, v, causal=True)
    assert torch.equal(out[:, :, 0], clean[:, :, 0])
    assert torch.equal(out[:, :key], clean[:, :key])
    scores = q[0, :, 1].double() @ k[0, :, 1].double().T / 8
    hidden = torch.ones(700, 700).triu(1).bool()
    expected = scores.masked_fill(hidden, -math.inf).softmax(-1) @ v[0, :, 1].double()
    assert expected.isnan().any()
    assert torch.allclose(out[0, :, 1].double(), expected, atol=0.05, equal_nan=True)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("scores", ["even", "rising", "spikes"])
def test_the_same_bits_on_any_number_of_threads(dtype: torch.dtype, scores: str) -> None:
    """Threads decide how rows are cut into items, and so which rows are worked on together."""
    q = along(torch.linspace(0.2, 1.0, 700), 4, 64, dtype, seed=0)
    k = along(patterns(900)[scores] if scores != "even" else torch.ones(900), 2, 64, dtype, seed=1)
    v = normal(1, 900, 2, 64, dtype=dtype, seed=2)
    first, *others = answers(lambda: fa3.flash_attn_func(q, k, v, causal=True, softmax_scale=1.0, num_splits=1))
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("num_splits", [0, 1, 4])
def test_run_to_run_the_same_bits(num_splits: int) -> None:
    q, k, v = normal(2, 33, 4, 96), normal(2, 700, 2, 96, seed=1), normal(2, 700, 2, 96, seed=2)
    first = fa3.flash_attn_func(q, k, v, num_splits=num_splits)
    for _ in range(5):
        assert torch.equal(fa3.flash_attn_func(q, k, v, num_splits=num_splits), first)


def test_heads_that_share_memory() -> None:
    """A stride of 0 over heads, as `expand` makes."""
    q = normal(2, 5, 6, 64)
    k, v = (normal(2, 40, 1, 64, seed=s).expand(2, 40, 3, 64) for s in (1, 2))
    out = fa3.flash_attn_func(q, k, v, causal=True)
    problem = reference.Problem([reference.Sequence(q[i], k[i], v[i]) for i in range(2)], causal=True)
    assert reference.check(list(out), None, problem).worst <= 1


@pytest.mark.parametrize("function", [cases.VARLEN, cases.KVCACHE, cases.DENSE])
@pytest.mark.parametrize("sinks", ["", "float32"])
@pytest.mark.parametrize("num_splits", [1, 3])
def test_a_call_in_which_no_row_sees_a_key(function: str, sinks: str, num_splits: int) -> None:
    ragged_q = function == cases.VARLEN
    plan = cases.Plan(
        seed=1, function=function, dtype=torch.bfloat16, d=64, dv=64, hq=4, hk=2, lengths_q=(3, 3), lengths_k=(0, 0),
        q_layout="ragged" if ragged_q else "dense", k_layout="ragged" if ragged_q else "dense",
        used_k="tensor" if function == cases.KVCACHE else "", sinks=sinks, num_splits=num_splits, out="contiguous",
    )  # fmt: skip
    case = case_tensors.build(plan)
    outs, lses = case_run.run(case, FUNCTIONS)
    assert lses is not None
    for out, lse in zip(outs, lses, strict=True):
        assert not out.any()
        expected = case.arguments["sinks"][:, None] if sinks else torch.tensor(-math.inf)
        assert torch.allclose(lse, expected.expand_as(lse), atol=1e-6)


def test_a_batch_of_no_sequences() -> None:
    none, zero = torch.zeros(0, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    out, lse = fa3.flash_attn_func(
        normal(0, 5, 4, 64), normal(0, 9, 2, 64), normal(0, 9, 2, 32), return_softmax_lse=True
    )
    assert (out.shape, lse.shape) == ((0, 5, 4, 32), (0, 4, 5))
    q, k = normal(0, 4, 64), normal(0, 2, 64)
    out, lse = fa3.flash_attn_varlen_func(q, k, k, zero, zero, return_softmax_lse=True)
    assert (out.shape, lse.shape) == ((0, 4, 64), (4, 0))
    pages = normal(3, 8, 2, 64)
    table = torch.zeros(0, 2, dtype=torch.int32)
    out = fa3.flash_attn_with_kvcache(normal(0, 1, 4, 64), pages, pages, cache_seqlens=none, page_table=table)
    assert out.shape == (0, 1, 4, 64)


# Offsets beyond 2^31 elements: memory that is never touched costs nothing but addresses.


def far_pages(dtype: torch.dtype, page_size: int, heads: int, d: int) -> Tensor:
    pages = 2**31 // (page_size * heads * d) + 64
    return torch.empty(pages, page_size, heads, d, dtype=dtype)


def test_pages_beyond_two_to_the_31st_element() -> None:
    k_cache, v_cache = far_pages(torch.bfloat16, 16, 1, 64), far_pages(torch.bfloat16, 16, 1, 64)
    last = k_cache.shape[0] - 1
    table = torch.tensor([[last, last - 40, last - 3], [last - 8, 1, last - 9]], dtype=torch.int32)
    seqlens = torch.tensor([40, 30], dtype=torch.int32)
    sequences = []
    q, new_k, new_v = (normal(2, 1, h, 64, dtype=torch.bfloat16, seed=s) for s, h in ((0, 4), (8, 1), (9, 1)))
    for i, n in enumerate(seqlens.tolist()):
        k, v = (normal(n, 1, 64, dtype=torch.bfloat16, seed=10 * i + s) for s in (1, 2))
        for token in range(n):
            k_cache[table[i, token // 16], token % 16] = k[token]
            v_cache[table[i, token // 16], token % 16] = v[token]
        sequences.append(reference.Sequence(q[i], torch.cat([k, new_k[i]]), torch.cat([v, new_v[i]])))
    for num_splits in (1, 2):
        out = fa3.flash_attn_with_kvcache(
            q, k_cache, v_cache, new_k, new_v, cache_seqlens=seqlens, page_table=table, num_splits=num_splits
        )
        assert reference.check(list(out), None, reference.Problem(sequences)).worst <= 1
    assert torch.equal(k_cache[last - 3, 8], new_k[0, 0])
    assert torch.equal(v_cache[1, 14], new_v[1, 0])


def test_rows_beyond_two_to_the_31st_element() -> None:
    """Ragged rows behind a gap of 2^25 rows of 64; `out` is as far, and nothing before its rows is written."""
    gap = 2**25
    q, k, v, out = (torch.empty(gap + 50, 1, 64, dtype=torch.float16) for _ in range(4))
    rows = slice(gap, gap + 9), slice(gap, gap + 40)
    for seed, (x, where) in enumerate([(q, rows[0]), (k, rows[1]), (v, rows[1])]):
        x[where] = normal(where.stop - gap, 1, 64, dtype=torch.float16, seed=seed)
    used = {"seqused_q": torch.tensor([0, 9], dtype=torch.int32), "seqused_k": torch.tensor([0, 40], dtype=torch.int32)}
    cu = torch.tensor([0, gap, gap + 50], dtype=torch.int32)
    fa3.flash_attn_varlen_func(q, k, v, cu, cu, causal=True, out=out, **used)
    problem = reference.Problem([reference.Sequence(q[rows[0]], k[rows[1]], v[rows[1]])], causal=True)
    assert reference.check([out[rows[0]]], None, problem).worst <= 1


def test_strides_beyond_two_to_the_31st_element() -> None:
    """Two sequences, and two heads, 2^31 elements apart each."""
    far = torch.empty(2**32 + 2**20, dtype=torch.float8_e4m3fn)
    k = far.as_strided((2, 33, 2, 64), (2**31 + 2**15, 64, 2**31, 1))
    v = far.as_strided((2, 33, 2, 64), (2**31 + 2**15, 64, 2**31, 1), 2**18)
    q = normal(2, 7, 4, 64).to(torch.float8_e4m3fn)
    for x, seed in ((k, 1), (v, 2)):
        x.copy_(normal(2, 33, 2, 64, seed=seed).to(x.dtype))
    out = fa3.flash_attn_func(q, k, v)
    problem = reference.Problem([reference.Sequence(q[i], k[i].clone(), v[i].clone()) for i in range(2)])
    assert reference.check(list(out), None, problem).worst <= 1

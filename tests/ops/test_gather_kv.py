"""gather_kv against indexing in float64: any pages, layouts, empty sequences, e4m3 into wider types."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from jit_kernel.ops import gather_kv
from tests.support.ops import DEVICES, E4M3, FLOATS, Draw, assert_close, cases, surroundings


def sequences(draw: Draw, page_size: int) -> tuple[Tensor, Tensor, int]:
    """A page table, cu_seqlens and the number of pages: sequences of none to five pages, at times hundreds of them."""
    batch = draw.random.choice((0, 1, 3, 8, 8, 300))
    most = 5 * page_size if batch < 300 else page_size
    lengths = [
        draw.random.choice((0, draw.random.randint(1, most), draw.random.randint(1, most))) for _ in range(batch)
    ]
    starts = list(itertools.accumulate(lengths, initial=0))
    pages = sum(-(-length // page_size) for length in lengths) + 1
    free = iter(draw.random.sample(range(pages), pages))
    table = torch.full((batch, 6), -7, dtype=torch.int32)
    for row, length in enumerate(lengths):
        for column in range(-(-length // page_size)):
            table[row, column] = next(free)
    return table.to(draw.device), torch.tensor(starts, dtype=torch.int32, device=draw.device), pages


def check(draw: Draw) -> None:
    choice, dtype = draw.random.choice, draw.random.choice((*FLOATS, E4M3))
    stored = choice((dtype, E4M3))
    heads, sizes, page_size = choice((1, 2, 5)), (draw.size(200), draw.size(200)), choice((1, 7, 16, 64))
    table, cu_seqlens, pages = sequences(draw, page_size)
    caches = [draw.normal(pages, page_size, heads, size, dtype=stored) for size in sizes]
    count, widens = choice((1, heads)), stored != dtype
    scales = [torch.rand(count, device=draw.device) + 0.5 for _ in sizes] if widens else [None, None]
    total = int(cu_seqlens[-1])
    more = choice((0, 3))
    outs = [draw.poisoned(total + more, heads, size, dtype=dtype) for size in sizes]
    before = [surroundings(out[total:].clone()) for out in outs]
    way = choice(("new", "out"))
    given = {"k_out": outs[0], "v_out": outs[1]} if way == "out" else {"dtype": dtype}
    found = gather_kv(*caches, table, cu_seqlens, k_scale=scales[0], v_scale=scales[1], **given)
    lengths = cu_seqlens.diff().long()
    rows = torch.repeat_interleave(torch.arange(len(lengths), device=draw.device), lengths)
    local = torch.arange(total, device=draw.device) - cu_seqlens.long()[rows]
    for result, held, scale, memory in zip(found, caches, scales, before, strict=True):
        wanted = held[table.long()[rows, local // page_size], local % page_size]
        if scale is None:
            bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[held.element_size()]
            assert torch.equal(result[:total].view(bits), wanted.view(bits))
        else:
            assert_close(
                result[:total], wanted.double() * scale.double().view(-1, 1), 0.0 if dtype != torch.float32 else 1e-7
            )
        assert way == "new" or torch.equal(surroundings(result[total:].clone()), memory)


@pytest.mark.parametrize("device", DEVICES)
def test_random_cases(device):
    for seed in cases(device):
        check(Draw(seed, device))


def with_page(page: int, device: str) -> Tensor:
    k_cache = torch.ones(2, 4, 2, 8, device=device)
    table = torch.tensor([[0, page]], dtype=torch.int32, device=device)
    return gather_kv(k_cache, k_cache, table, torch.tensor([0, 6], dtype=torch.int32, device=device))[0]


@pytest.mark.parametrize("page", [-1, 2])
def test_a_page_outside_the_cache_is_refused(page):
    with pytest.raises(IndexError, match=rf"page_table\[0, 1\] is {page}; it must be one of the 2 pages of the cache"):
        with_page(page, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("page", [-1, 2])
def test_a_page_outside_the_cache_gives_nan(page):
    found = with_page(page, "cuda")
    assert found[4:].isnan().all() and (found[:4] == 1).all()


def test_errors_name_the_argument():
    k_cache, table = torch.ones(2, 4, 2, 8), torch.zeros(1, 1, dtype=torch.int32)
    for arguments, error, words in (
        (
            {"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)},
            IndexError,
            "page_table has 1 pages a sequence; .* needs 2",
        ),
        (
            {"cu_seqlens": torch.zeros(3, dtype=torch.int32)},
            ValueError,
            r"cu_seqlens has shape \(3,\); it must be \(2,\)",
        ),
        ({"page_table": table.long()}, TypeError, "page_table has dtype torch.int64; it must be torch.int32"),
        ({"total": -1}, ValueError, "total is -1; it must be a number of tokens"),
        ({"dtype": torch.float16}, TypeError, "k_cache has dtype torch.float32; it must be torch.float16 or"),
        ({"v_cache": k_cache[0]}, ValueError, "v_cache has 3 dimensions; it must have 4"),
    ):
        with pytest.raises(error, match=words):
            gather_kv(**{"k_cache": k_cache, "v_cache": k_cache, "page_table": table,
                         "cu_seqlens": torch.tensor([0, 3], dtype=torch.int32), **arguments})  # fmt: skip

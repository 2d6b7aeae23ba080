"""store_kv against float64, and against memory that it must leave alone: any pages, layouts, e4m3, slots of none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from jit_kernel.ops import store_kv
from tests.support.ops import DEVICES, E4M3, FLOATS, Draw, assert_close, cases, surroundings


def cache(draw: Draw, shape: tuple[int, ...], dtype: torch.dtype, heads_first: bool) -> Tensor:
    """A paged cache with NaN in it, (pages, page_size, heads, size), or with a page's heads before its tokens."""
    if not heads_first:
        return draw.poisoned(*shape, dtype=dtype)
    return draw.poisoned(shape[0], shape[2], shape[1], shape[3], dtype=dtype).transpose(1, 2)


def check(draw: Draw) -> None:
    choice, dtype = draw.random.choice, draw.random.choice(FLOATS)
    stored = choice((dtype, E4M3))
    tokens, heads, sizes = draw.rows(40), choice((1, 2, 5)), (draw.size(200), draw.size(200))
    pages, page_size = draw.random.randint(1, 20), choice((1, 7, 16, 64))
    slots = draw.random.sample(range(-5, pages * page_size), min(tokens, pages * page_size + 5))
    tokens = len(slots)
    new = [draw.normal(tokens, heads, size, dtype=dtype) for size in sizes]
    heads_first = choice((True, False))
    caches = [cache(draw, (pages, page_size, heads, size), stored, heads_first) for size in sizes]
    count = choice((1, heads))
    scales = [torch.rand(count, device=draw.device) + 0.5 for _ in sizes] if stored == E4M3 else [None, None]
    ids = torch.tensor(slots, dtype=choice((torch.int32, torch.int64)), device=draw.device)
    before = [surroundings(each) for each in caches]
    store_kv(*new, *caches, ids, k_scale=scales[0], v_scale=scales[1])
    kept = ids.long() >= 0
    places = ids.long()[kept]
    for given, held, scale, memory in zip(new, caches, scales, before, strict=True):
        wanted, found = given[kept], held[places // page_size, places % page_size]
        if scale is None:
            assert torch.equal(found, wanted)
        else:
            assert_close(found, wanted.double() / scale.double().view(-1, 1), wanted.double().abs() * 1e-6)
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[held.element_size()]
        held.view(bits)[places // page_size, places % page_size] = 255 if bits is torch.uint8 else -1
        assert torch.equal(surroundings(held), memory)  # nothing else was written


@pytest.mark.parametrize("device", DEVICES)
def test_random_cases(device):
    for seed in cases(device):
        check(Draw(seed, device))


def past(device: str) -> Tensor:
    k, k_cache = torch.ones(3, 2, 8, device=device), torch.zeros(2, 4, 2, 8, device=device)
    store_kv(k, k, k_cache, k_cache.clone(), torch.tensor([0, -1, 8], device=device))
    return k_cache


def test_a_slot_past_the_cache_is_refused():
    with pytest.raises(IndexError, match=r"slots\[2\] is 8; it must be below the 8 slots of the cache"):
        past("cpu")


@pytest.mark.gpu
def test_a_slot_past_the_cache_stores_nothing():
    assert past("cuda").sum() == 16


def test_errors_name_the_argument():
    k, k_cache, slots = torch.ones(3, 2, 8), torch.zeros(2, 4, 2, 8), torch.zeros(3, dtype=torch.int32)
    for arguments, error, words in (
        ({"v": torch.ones(3, 1, 8)}, ValueError, r"v has shape \(3, 1, 8\); it must be \(3, 2, 8\)"),
        ({"v_cache": k_cache.half()}, TypeError, "v_cache has dtype torch.float16; it must be torch.float32"),
        ({"k_cache": torch.zeros(2, 4, 8)}, ValueError, "k_cache has 3 dimensions; it must have 4"),
        ({"k_cache": k_cache[:1].expand(2, 4, 2, 8)}, ValueError, "k_cache has strides .* must not be expanded"),
        ({"slots": slots[:2]}, ValueError, r"slots has shape \(2,\); it must be \(3,\)"),
        ({"k_scale": torch.ones(1)}, ValueError, "k_scale is given; it must be None, because k_cache is not"),
        (
            {"k_cache": k_cache.to(E4M3), "v_cache": k_cache.to(E4M3)},
            ValueError,
            "k_scale is None; it must be a float32",
        ),
    ):
        with pytest.raises(error, match=words):
            store_kv(**{"k": k, "v": k, "k_cache": k_cache, "v_cache": k_cache.clone(), "slots": slots, **arguments})

"""Many query rows over an e4m3 cache, on the GPU that the kernels are for: numbers, bits, graphs."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from jit_kernel import config, device
from jit_kernel.fa3.hopper import cached
from tests.support import cases
from tests.support.decode_on_gpu import Paged
from tests.support.hopper_inputs import poisoned

pytestmark = pytest.mark.gpu

# batch, queries, longest, heads, page size, head size: in parts and in one, of every page size, of heads that lie in
# one tile and that do not.
SHAPES = [
    (2, 150, 2000, (16, 4), 64, 128),
    (1, 256, 20000, (8, 1), 64, 128),
    (3, 130, 900, (12, 3), 1, 128),
    (40, 70, 300, (9, 3), 16, 128),
    (2, 5, 1500, (72, 1), 24, 128),
    (4, 200, 1111, (8, 2), 16, 64),
    (3, 33, 900, (12, 3), 24, 256),
    (1, 300, 5000, (4, 4), 256, 256),
]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """An entry for each call that comes to prefill's kernels: whether they served it. No other may."""
    if device.get_device_capability() != (9, 0):
        pytest.skip("the kernels are for compute capability 9.0")
    monkeypatch.setenv("JIT_KERNEL_STRICT", "1")
    config.reload()
    seen: list[bool] = []
    attend = cached.try_attend

    def counted(*given: Any, **more: Any) -> Any:
        result = attend(*given, **more)
        seen.append(result is not None)
        return result

    monkeypatch.setattr(cached, "try_attend", counted)
    yield seen
    monkeypatch.undo()
    config.reload()


def made(shape: tuple[Any, ...], seed: int, *, factors: bool = True, **given: Any) -> Paged:
    torch.manual_seed(seed)
    call = Paged.of(*shape, **given)
    names = ("k_descale", "v_descale") if factors else ()
    return call.over_e4m3(**{name: 0.5 + torch.rand(shape[0], shape[3][1], device="cuda") for name in names})


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lengths_of_a_serving_batch(shape: tuple[Any, ...], launches: list[bool]) -> None:
    call = made(shape, 1)
    for seed in range(4):
        call.draw_lengths(seed)
        assert call.check() <= 1, seed
    assert launches.count(True) == 4


@pytest.mark.parametrize("factor", [0.0, 1e-30, 1e30])
def test_factors_at_the_ends_of_float32(factor: float, launches: list[bool]) -> None:
    call = made(SHAPES[0], 2)
    call.given["k_descale"] = torch.full_like(call.given["k_descale"], factor)
    if factor > 1:  # so that scores are as large as others
        call = dataclasses.replace(call, q=call.q * 1e-30)
    assert call.check() <= 1
    assert True in launches


@pytest.mark.parametrize("shape", [each for each in SHAPES if each[-1] == 128], ids=str)
def test_the_bits_of_the_dequantised_cache(shape: tuple[Any, ...], launches: list[bool]) -> None:
    """Blocks of keys are the same there, and an e4m3 number is one of bf16."""
    call = made(shape, 3, factors=False, num_splits=3)
    wide = dataclasses.replace(call, k=call.k.bfloat16(), v=call.v.bfloat16())
    out, lse = call(return_softmax_lse=True)
    expected, expected_lse = wide(return_softmax_lse=True)
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)
    assert launches.count(True) == 2


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_queries_in_e4m3_give_the_bits_that_bf16_gives(shape: tuple[Any, ...], launches: list[bool]) -> None:
    """Of the same numbers; q's factor joins the keys'. In a graph, replayed with other lengths, as well."""
    call = made(shape, 4)
    q8, q_descale = call.q.to(cases.FP8), 0.5 + torch.rand(shape[0], shape[3][1], device="cuda")
    ours = dataclasses.replace(call, q=q8, given=call.given | {"q_descale": q_descale})
    joined = call.given | {"k_descale": q_descale * call.given["k_descale"]}
    theirs = dataclasses.replace(call, q=q8.bfloat16(), given=joined)
    out, lse = theirs(return_softmax_lse=True)
    found, found_lse = ours(return_softmax_lse=True)
    assert torch.equal(found, out)
    assert torch.equal(found_lse, lse)
    result = poisoned(*call.q.shape)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours(out=result)
    for seed in range(10):
        call.draw_lengths(seed)
        result.fill_(math.nan)
        graph.replay()
        assert torch.equal(result, theirs()), seed
    assert launches.count(True) == 13

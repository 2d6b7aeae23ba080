"""Many query rows over an e4m3 cache, whose rows become 16 bits first: numbers, bits, hidden memory, graphs."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

from jit_kernel import config, device
from jit_kernel.fa3 import hopper
from tests.support import case_run, cases, hidden
from tests.support.cached_on_gpu import WIDENED_FUNCTIONS, WIDENED_SPACE, plans
from tests.support.decode_on_gpu import Paged
from tests.support.hopper_inputs import poisoned

pytestmark = pytest.mark.gpu

CASES = int(os.environ.get("JIT_KERNEL_TEST_CASES", "300"))
# batch, queries, longest, heads, page size, head size: keys in parts and whole, pages in boxes and row by row.
SHAPES = [
    (1, 256, 9000, (8, 1), 64, 128),
    (3, 150, 900, (16, 4), 1, 128),
    (2, 600, 1500, (2, 2), 24, 256),
    (5, 200, 1000, (12, 4), 16, 64),
    (1, 1024, 1024, (3, 3), 128, 80),
]


@pytest.fixture(autouse=True)
def _hopper_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if device.get_device_capability() != (9, 0):
        pytest.skip("the kernels are for compute capability 9.0")
    monkeypatch.setenv("JIT_KERNEL_STRICT", "1")
    config.reload()
    yield
    monkeypatch.undo()
    config.reload()


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One entry for each call whose cache becomes 16 bits first."""
    calls: list[None] = []
    attend = hopper.widened.attend

    def counted(*given: Any, **more: Any) -> Any:
        result = attend(*given, **more)
        calls.extend([None] * (result is not None))
        return result

    monkeypatch.setattr(hopper.widened, "attend", counted)
    return calls


def made(shape: tuple[Any, ...], seed: int, **given: Any) -> Paged:
    torch.manual_seed(seed)
    return Paged.of(*shape, return_softmax_lse=True, **given).over_e4m3()


def descales(shape: tuple[Any, ...], names: str = "kv") -> dict[str, torch.Tensor]:
    return {f"{name}_descale": 0.5 + torch.rand(shape[0], shape[3][1], device="cuda") for name in names}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, cases.FP8], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_bits_are_those_of_the_cache_in_16_bits(
    shape: tuple[Any, ...], dtype: torch.dtype, served: list[None]
) -> None:
    call = made(shape, 0)
    call = dataclasses.replace(call, q=call.q.to(dtype))
    wide = torch.bfloat16 if dtype is cases.FP8 else dtype
    theirs = dataclasses.replace(call, q=call.q.to(wide), k=call.k.to(wide), v=call.v.to(wide))
    for seed in range(3):
        call.draw_lengths(seed)
        out, lse = call(out=poisoned(*call.q.shape, dtype=wide))
        expected, expected_lse = theirs()
        assert torch.equal(out, expected), seed
        assert torch.equal(lse, expected_lse), seed
    assert len(served) == 3


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_factors_of_sequences_and_heads(shape: tuple[Any, ...], served: list[None]) -> None:
    call = made(shape, 1, **descales(shape))
    for seed in range(2):
        call.draw_lengths(seed)
        assert call.check() <= 1, seed
    assert len(served) == 2


def test_wild_factors_do_not_reach_hidden_scores() -> None:
    """0, negative ones and NaN: as the softmax has a scale above 0, scores are multiplied first."""
    shape = SHAPES[0]
    call = made(shape, 2, **descales(shape))
    call.given["k_descale"].fill_(-0.75)
    assert call.check() <= 1
    call.given["k_descale"].fill_(0.0)
    assert call.check() <= 1
    call.given["k_descale"].fill_(math.nan)
    out, _ = call()
    assert bool(out.isnan().all())


@pytest.mark.parametrize("free", [0, 131])
def test_random_cases(free: int, say: list[str]) -> None:
    """Of any number of rows; q in 16 bits and in e4m3."""
    functions = {name: partial(function, sm_margin=free) for name, function in WIDENED_FUNCTIONS.items()}
    worst, worst_seed = 0.0, -1
    for plan in plans(free * CASES * 20, CASES, space=WIDENED_SPACE):
        shares = case_run.judge(plan, functions)
        if shares.worst > worst:
            worst, worst_seed = shares.worst, plan.seed
    assert worst <= 1
    say.append(f"hopper, widened: {CASES} random cases, {free} free, worst share {worst:.3f} (seed {worst_seed})")


def test_what_no_query_sees_reaches_no_result(say: list[str]) -> None:
    """NaN in hidden keys and values, and pages that are none: the bits that zeros give."""
    counts = [hidden.differ(plan, WIDENED_FUNCTIONS) for plan in plans(7000, CASES // 2, hidden.draw, WIDENED_SPACE)]
    assert sum(count > 0 for count in counts) > len(counts) // 2
    say.append(f"hopper, widened: {len(counts)} calls, {sum(counts)} hidden elements not finite")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_captured_call_replays_with_other_lengths(shape: tuple[Any, ...], served: list[None]) -> None:
    call = made(shape, 3, **descales(shape))
    call.given["return_softmax_lse"] = False
    out = torch.empty_like(call.q)
    call(out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(out=out)
    for seed in range(8):
        call.draw_lengths(seed)
        expected = call(out=poisoned(*call.q.shape))
        out.fill_(math.nan)
        graph.replay()
        assert torch.equal(out, expected), seed
    assert len(served) == 10


def test_a_wrong_page_fails_the_rule() -> None:
    """The rule would see keys of another page."""
    call = made((1, 512, 640, (4, 2), 64, 128), 4)
    answer = call()
    assert call.check(answer) <= 1
    raw = call.k.view(torch.uint8)
    raw[call.table[0, 3].item()] = raw[call.table[0, 0].item()].clone()
    assert call.check(answer) > 1

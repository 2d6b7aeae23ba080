"""Queries of 16 bits or in e4m3 over an e4m3 cache, on the GPU that the kernels are for: numbers, bits, graphs."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from jit_kernel import config, device
from jit_kernel.fa3.call import FEW_ROWS
from tests.support import cases, decode_on_gpu
from tests.support.decode_on_gpu import Paged, in_processes, jobs_of
from tests.support.hopper_inputs import poisoned

pytestmark = pytest.mark.gpu

CASES = int(os.environ.get("JIT_KERNEL_TEST_CASES", "1020"))
# batch, queries, longest, heads, page size, head size: in clusters, in parts, two heads a block and one, of boxes and
# of rows, of one tile of queries and of many.
SHAPES = [
    (1, 1, 8192, (32, 8), 64, 128),
    (3, 1, 3000, (8, 2), 1, 64),
    (37, 2, 1500, (16, 2), 64, 128),
    (64, 1, 700, (32, 8), 16, 128),
    (20, 4, 3000, (32, 8), 64, 128),
    (20, 8, 3000, (64, 8), 64, 128),
    (24, 4, 3000, (32, 4), 64, 256),
    (40, 1, 1500, (9, 3), 1, 128),
    (2, 150, 2000, (16, 4), 64, 128),
    (5, 33, 900, (12, 3), 24, 256),
]


@pytest.fixture(autouse=True)
def _hopper_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A call that hopper claims and another implementation would serve is an error."""
    if device.get_device_capability() != (9, 0):
        pytest.skip("the kernels are for compute capability 9.0")
    monkeypatch.setenv("JIT_KERNEL_STRICT", "1")
    config.reload()
    yield
    monkeypatch.undo()
    config.reload()


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One entry for each call that a decode kernel serves."""
    return decode_on_gpu.counted_launches(monkeypatch)


def made(shape: tuple[Any, ...], seed: int = 0, spread: float = 1.0, **given: Any) -> Paged:
    """With factors of sequences and of tokens, those of tokens between 2^-spread and 2^spread."""
    torch.manual_seed(seed)
    if shape[1] * shape[3][0] // shape[3][1] > FEW_ROWS:
        given = {"num_splits": 1, **given}  # else these kernels do not serve it
    call = Paged.of(*shape, **given)
    batch, heads_k = shape[0], shape[3][1]
    descales = {f"{name}_descale": 0.5 + torch.rand(batch, heads_k, device="cuda") for name in "kv"}
    scales = {
        "k_scale": 0.5 + torch.rand(call.k.shape[:-1], device="cuda"),
        "v_scale": torch.exp2(spread * (2 * torch.rand(call.v.shape[:-1], device="cuda") - 1)),
    }
    return call.over_e4m3(**descales, **scales)


def test_random_cases(say: list[str]) -> None:
    """Any number of query rows; appends that quantise, rotary embeddings and every form of a cache are among them."""
    found = in_processes(jobs_of("mixed-judge", (0, 120, 131), CASES, 4))
    assert len(found) >= 3 * CASES
    worst = max(found, key=lambda words: float(words[2]))
    assert float(worst[2]) <= 1
    say.append(f"hopper over e4m3: {len(found)} random cases, worst share {worst[2]} (seed {worst[1]})")


def test_what_no_query_sees_reaches_no_result(say: list[str]) -> None:
    """NaN in hidden keys, values and factors, and pages that are none: the bits that zeros give."""
    found = in_processes(jobs_of("mixed-hidden", (0, 131), 250, 2))
    counts = [int(words[2]) for words in found]
    assert sum(count > 0 for count in counts) > len(counts) // 2
    say.append(f"hopper over e4m3: {len(counts)} calls, {sum(counts)} hidden elements not finite")


def test_random_cases_of_queries_in_e4m3(say: list[str]) -> None:
    """Appends of bytes, of keys that are turned, and every form of a cache are among them."""
    found = in_processes(jobs_of("fp8-judge", (0, 120, 131), CASES // 3, 4))
    assert len(found) >= CASES
    worst = max(found, key=lambda words: float(words[2]))
    assert float(worst[2]) <= 1
    say.append(f"hopper, e4m3 over e4m3: {len(found)} random cases, worst share {worst[2]} (seed {worst[1]})")


def test_what_no_query_in_e4m3_sees_reaches_no_result() -> None:
    found = in_processes(jobs_of("fp8-hidden", (0, 131), 120, 2))
    assert sum(int(words[2]) > 0 for words in found) > len(found) // 2


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_queries_in_e4m3_give_the_bits_that_bf16_gives(shape: tuple[Any, ...], launched: list[None]) -> None:
    """Of the same numbers: both become fp16 without a rounding; q's factor joins the keys'. In a graph as well."""
    call = made(shape, 8)
    batch, heads_k = shape[0], shape[3][1]
    q8, q_descale = call.q.to(cases.FP8), 0.5 + torch.rand(batch, heads_k, device="cuda")
    given = call.given | {"q_descale": q_descale}
    ours = dataclasses.replace(call, q=q8, given=given)
    joined = call.given | {"k_descale": q_descale * call.given["k_descale"]}
    theirs = dataclasses.replace(call, q=q8.bfloat16(), given=joined)
    out, lse = theirs(return_softmax_lse=True)
    found, found_lse = ours(return_softmax_lse=True)
    assert found.dtype is torch.bfloat16
    assert torch.equal(found, out)
    assert torch.equal(found_lse, lse)
    assert len(launched) == 2
    result = poisoned(*call.q.shape)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours(out=result)
    call.draw_lengths(8)
    graph.replay()
    assert torch.equal(result, theirs())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lengths_of_a_serving_batch(shape: tuple[Any, ...], launched: list[None]) -> None:
    call = made(shape, 1)
    for seed in range(4):
        call.draw_lengths(seed)
        assert call.check() <= 1, seed
    assert len(launched) == 4


@pytest.mark.parametrize("shape", SHAPES[:5], ids=str)
def test_values_whose_scales_differ_by_far(shape: tuple[Any, ...]) -> None:
    """A probability times a value's factor keeps its bits: fp16 alone would lose the small and the large ones."""
    call = made(shape, 2, spread=12.0)
    assert call.check() <= 1
    tiny = dataclasses.replace(call, given=call.given | {"v_scale": call.given["v_scale"] * 2.0**-40})
    assert tiny.check() <= 1


def answer_of(call: Paged, **more: Any) -> tuple[Tensor, Tensor]:
    """out and lse by way of poisoned memory."""
    out, lse = call(return_softmax_lse=True, out=poisoned(*call.q.shape), **more)
    return out.clone(), lse.clone()


def some_of(call: Paged, chosen: list[int]) -> Paged:
    given = {name: x[chosen] if name.endswith("descale") else x for name, x in call.given.items()}
    return dataclasses.replace(
        call, q=call.q[chosen], table=call.table[chosen], lengths=call.lengths[chosen], given=given
    )


@pytest.mark.parametrize("given", [{"deterministic": True}, {"num_splits": 1}], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_sequence_has_the_same_bits_alone_and_among_others(shape: tuple[Any, ...], given: dict[str, Any]) -> None:
    call = made(shape, 3, **given)
    call.draw_lengths(3)
    dice = Random(1)
    out, lse = answer_of(call)
    batch = len(call.lengths)
    for chosen in ([int(call.lengths.argmax())], dice.sample(range(batch), batch), dice.sample(range(batch), 1)):
        found, found_lse = answer_of(some_of(call, chosen), sm_margin=dice.choice((0, 5, 100)))
        assert torch.equal(found, out[chosen]), chosen
        assert torch.equal(found_lse, lse[chosen]), chosen


@pytest.mark.parametrize("rows", [8, 16, 32, 64])
def test_a_tokens_bits_do_not_depend_on_the_kernels_rows(rows: int) -> None:
    """A longer max_seqlen_q asks for a kernel of more rows: blocks of keys side by side, or one by one."""
    call = made((6, 1, 3000, (32, 8), 64, 128), 4, deterministic=True)
    starts = torch.arange(7, device="cuda", dtype=torch.int32)
    ragged = dataclasses.replace(call, q=call.q[:, 0])
    out = ragged(cu_seqlens_q=starts, max_seqlen_q=rows // 4)
    assert torch.equal(out, call()[:, 0])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_captured_call_replays_with_other_lengths(shape: tuple[Any, ...]) -> None:
    call = made(shape, 5)
    out = torch.empty_like(call.q)
    call(out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(out=out)
    for seed in range(20):
        call.draw_lengths(seed)
        expected = call(out=poisoned(*call.q.shape))
        out.fill_(math.nan)
        graph.replay()
        assert torch.equal(out, expected), seed


def test_the_same_call_many_times_gives_the_same_bits() -> None:
    call = made(SHAPES[4], 6)
    first = call()
    differs = torch.zeros((), dtype=torch.bool, device="cuda")
    for _ in range(300):
        differs |= (call(out=poisoned(*call.q.shape)) != first).any()
    assert not bool(differs)


@pytest.mark.parametrize("name", ["k_cache", "v_cache", "v_scale"])
def test_a_wrong_page_fails_the_rule(name: str) -> None:
    """The rule would see keys, values or factors of another page."""
    call = made((2, 1, 640, (8, 2), 64, 128), 7)
    where = call.table[1, 3].item()
    x = {"k_cache": call.k, "v_cache": call.v, "v_scale": call.given["v_scale"]}[name]
    answer = call(return_softmax_lse=True)
    assert call.check(answer) <= 1
    raw = x.view(torch.uint8) if x.element_size() == 1 else x
    raw[where] = raw[call.table[0, 0].item()].clone()
    assert call.check(answer) > 1

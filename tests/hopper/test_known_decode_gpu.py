"""Decode calls that the Hopper launcher checks itself, on the GPU: the bits of the checked way, what is declined."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import jit_kernel
from jit_kernel import config, device
from jit_kernel.fa3 import call as calls
from jit_kernel.fa3 import dispatch, seam
from jit_kernel.fa3.hopper import known
from tests.support import case_tensors, cases, decode_double
from tests.support.hopper_inputs import randn

pytestmark = pytest.mark.gpu

CASES = int(os.environ.get("JIT_KERNEL_TEST_CASES", "400"))
SPACE = decode_double.space("known decode", "cuda")


@pytest.fixture(autouse=True)
def _hopper_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if device.get_device_capability() != (9, 0):
        pytest.skip("the kernels are for compute capability 9.0")
    monkeypatch.setenv("JIT_KERNEL_IMPLEMENTATION", "hopper")
    config.reload()
    dispatch.dispatcher(torch.device("cuda", torch.cuda.current_device()))  # which sets calls.try_unchecked
    yield
    monkeypatch.undo()
    config.reload()


def by_the_checks(arguments: dict[str, Any]) -> Any:
    """The call as it goes without the launcher's own checks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calls, "try_unchecked", None)
        return jit_kernel.flash_attn_with_kvcache(**arguments)


def at_once(arguments: dict[str, Any]) -> Any:
    """The call as the launcher takes it by itself, None where it declines."""
    return known.try_unchecked(decode_double.fields(arguments))


def tensors_of(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


def decode_call(batch: int = 5, tokens: int = 1, heads: int = 8, group: int = 4, d: int = 128) -> dict[str, Any]:
    """Pages of 16, shuffled; lengths from 1 to 600."""
    torch.manual_seed(batch + tokens)
    width = 38
    table = torch.randperm(batch * width, device="cuda").view(batch, width).int()
    lengths = torch.randint(tokens, width * 16, (batch,), device="cuda", dtype=torch.int32)
    q = randn(batch, tokens, heads * group, d)
    return {
        "q": q, "k_cache": randn(batch * width, 16, heads, d), "v_cache": randn(batch * width, 16, heads, d),
        "cache_seqlens": lengths, "page_table": table, "causal": True, "out": torch.empty_like(q),
    }  # fmt: skip


def test_random_calls_have_the_bits_of_the_checked_way(say: list[str]) -> None:
    """The parts of a call's keys are merged in their order whoever comes last, so that two launches give the same."""
    served: list[cases.Plan] = []
    for seed in range(4 * CASES):
        plan = cases.draw(seed, SPACE)
        if plan.kv_dtype is not None and (
            plan.d % 16 or plan.dv % 16 or (plan.dtype is torch.float16 and plan.token_scales)
        ):
            continue  # the portable kernels serve it
        arguments = case_tensors.build(plan).arguments
        expected = [each.clone() for each in tensors_of(by_the_checks(arguments))]
        if arguments.get("out") is not None:
            arguments["out"].fill_(float("nan"))
        result = at_once(arguments)
        if result is None:
            continue
        found = tensors_of(result)
        assert len(found) == len(expected)
        if arguments.get("out") is not None:
            assert found[0] is arguments["out"]
            rows = ~found[0].isnan()  # of a given out, rows that hold no query are left alone
            assert rows.sum() >= plan.hq * plan.dv * sum(plan.lengths_q), plan
            assert torch.equal(found[0][rows], expected[0][rows]), plan
        else:
            assert torch.equal(found[0], expected[0]), plan
        assert all(torch.equal(a, b) for a, b in zip(found[1:], expected[1:], strict=True)), plan
        served.append(plan)
    assert len(served) > CASES
    counted = cases.coverage(served)
    for feature in decode_double.FEATURES - {"hot", "large", "tail"}:
        assert counted[feature] > 10, feature
    say.append(f"hopper: {len(served)} of {4 * CASES} decode calls were launched without Python's checks")


@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("batch", [1, 3, 16, 150])
def test_a_public_call_takes_the_launchers_way(batch: int, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = decode_call(batch, group=group)
    expected = by_the_checks(arguments).clone()
    arguments["out"].fill_(float("nan"))
    asked: list[object] = []
    monkeypatch.setattr(seam, "_checked", lambda *_: asked.append(1))
    assert jit_kernel.flash_attn_with_kvcache(**arguments) is arguments["out"]
    assert not asked
    assert torch.equal(arguments["out"], expected)


def test_another_stream_and_another_thread_have_the_same_bits() -> None:
    arguments = decode_call(16)
    expected = by_the_checks(arguments).clone()

    def run(_: int) -> Tensor:
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            result = at_once(arguments | {"out": None})
            assert result is not None
            torch.cuda.current_stream().synchronize()
            return result

    torch.cuda.synchronize()
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(result, expected) for result in pool.map(run, range(40)))


@pytest.mark.parametrize("batch", [1, 4, 16])
def test_a_captured_call_replays_with_other_lengths(batch: int) -> None:
    """What needs room for parts takes the checked way while the stream is captured; clusters, of 4, need none."""
    arguments = decode_call(batch, heads=2)
    by_the_checks(arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        jit_kernel.flash_attn_with_kvcache(**arguments)
    for length in (1, 17, 600):
        arguments["cache_seqlens"].fill_(length)
        graph.replay()
        found = arguments["out"].clone()
        arguments["out"].fill_(float("nan"))
        assert torch.equal(found, by_the_checks(arguments))


DECLINED = {
    "lengths in the CPU's memory": lambda call: {"cache_seqlens": call["cache_seqlens"].cpu()},
    "a table in the CPU's memory": lambda call: {"page_table": call["page_table"].cpu()},
    "everything in the CPU's memory": lambda call: {n: v.cpu() for n, v in call.items() if isinstance(v, Tensor)},
    "keys in the CPU's memory": lambda call: {"k_cache": call["k_cache"].cpu()},
    "out is q": lambda call: {"out": call["q"]},
    "out lies in the keys": lambda call: {"out": call["k_cache"].view(-1)[: call["q"].numel()].view(call["q"].shape)},
    "negated": lambda call: {"q": (-call["q"])._neg_view()},
    "negated lengths": lambda call: {"cache_seqlens": (-call["cache_seqlens"])._neg_view()},
    "no memory": lambda call: {"q": torch._efficientzerotensor(call["q"].shape, dtype=torch.bfloat16, device="cuda")},
    "functional": lambda call: {"k_cache": torch._to_functional_tensor(call["k_cache"])},
    "no splits": lambda call: {"num_splits": 1},
    "a draft mask": lambda call: {"draft_mask": torch.ones(5, 1, dtype=torch.int32, device="cuda")},
    "rows that are not aligned": lambda call: {"q": randn(5, 1, 32, 132)[..., :128]},
}


@pytest.mark.parametrize("name", DECLINED)
def test_what_is_declined(name: str) -> None:
    arguments = decode_call()
    by_the_checks(arguments)
    assert at_once(arguments) is not None
    assert at_once(arguments | DECLINED[name](arguments)) is None


def test_a_kernel_that_another_gpu_has_loaded_is_declined() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("it needs two GPUs")
    arguments = {n: v.to("cuda:1") if isinstance(v, Tensor) else v for n, v in decode_call(d=64).items()}
    assert at_once(arguments) is None
    expected = by_the_checks(arguments)
    assert torch.equal(at_once(arguments | {"out": None}), expected)


def test_there_is_no_such_way_where_indices_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = decode_call()
    jit_kernel.flash_attn_with_kvcache(**arguments)
    assert calls.try_unchecked is known.try_unchecked
    monkeypatch.setenv("JIT_KERNEL_CHECK_INDICES", "1")
    config.reload()
    jit_kernel.flash_attn_with_kvcache(**arguments)
    arguments["cache_seqlens"][2] = 10**6
    with pytest.raises(ValueError, match=r"cache_seqlens|page_table"):
        jit_kernel.flash_attn_with_kvcache(**arguments)
    monkeypatch.setenv("JIT_KERNEL_CHECK_INDICES", "0")
    monkeypatch.setenv("JIT_KERNEL_IMPLEMENTATION", "portable")
    config.reload()
    jit_kernel.flash_attn_with_kvcache(**decode_call())
    assert calls.try_unchecked is not known.try_unchecked


def test_a_cpu_and_a_gpu_in_one_process_have_a_way_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JIT_KERNEL_IMPLEMENTATION")
    config.reload()
    arguments = decode_call()
    x = torch.randn(1, 4, 2, 32)
    expected, of_cpu = jit_kernel.flash_attn_with_kvcache(**arguments).clone(), jit_kernel.flash_attn_func(x, x, x)
    monkeypatch.setattr(seam, "_checked", lambda *_: pytest.fail("it was checked in Python"))
    for _ in range(2):
        assert torch.equal(jit_kernel.flash_attn_with_kvcache(**arguments), expected)
        assert torch.equal(jit_kernel.flash_attn_func(x, x, x), of_cpu)

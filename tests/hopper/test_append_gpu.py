"""The Hopper append kernel on the GPU that it is for, against the CPU implementation byte by byte."""

from __future__ import annotations

import os

import pytest
import torch

from jit_kernel import device
from jit_kernel.fa3.hopper import append
from jit_kernel.fa3.hopper.loaded import DeviceKernels
from tests.support import appends, case_run, cases

pytestmark = pytest.mark.gpu

CASES = int(os.environ.get("JIT_KERNEL_TEST_CASES", "400"))
LONGEST = 200  # tokens of a sequence before an append


@pytest.fixture(scope="module")
def loaded() -> DeviceKernels:
    if device.get_device_capability() != (9, 0):
        pytest.skip("the kernels are for compute capability 9.0")
    return DeviceKernels(0, device.device_target(torch.device("cuda:0")))


@pytest.mark.parametrize("stride_step", [8, 1])
def test_random_appends_are_the_cpus_byte_by_byte(stride_step: int, loaded: DeviceKernels, say: list[str]) -> None:
    space = appends.space("append", stride_step)
    plans = appends.with_append(space, CASES)
    launched = [appends.compare(plan, loaded, "cuda:0") for plan in plans]
    assert all(launched) if stride_step == 8 else 10 < sum(launched) < CASES - 10
    counted = cases.coverage(plans)
    for feature in ("paged", "new_ragged", "rotary", "batch_idx", "leftpad", "ragged", "strides", "tail"):
        assert counted[feature] > 10, feature
    say.append(f"hopper append: {sum(launched)} of {CASES} calls appended, strides of {stride_step}")


def server_call(batch: int, tokens: int, d: int, page_size: int, interleaved: bool) -> dict[str, object]:
    """What a serving engine appends: 32 query heads, 8 key heads, shuffled pages; every other byte is NaN."""
    torch.manual_seed(batch + tokens)
    width = -(-(LONGEST + tokens) // page_size)
    pages = batch * width + 3
    lengths = torch.randint(0, LONGEST + 1, (batch,), dtype=torch.int32)
    angles = torch.rand(LONGEST + tokens, d // 2) * 6.28
    cache = torch.full((2, pages, page_size, 8, d), float("nan"), dtype=torch.bfloat16)
    return {
        "q": torch.randn(batch, tokens, 32, d).bfloat16(), "k_cache": cache[0], "v_cache": cache[1],
        "k": torch.randn(batch, tokens, 8, d).bfloat16(), "v": torch.randn(batch, tokens, 8, d).bfloat16(),
        "cache_seqlens": lengths, "page_table": torch.randperm(pages)[: batch * width].view(batch, width).int(),
        "rotary_cos": angles.cos().bfloat16(), "rotary_sin": angles.sin().bfloat16(),
        "rotary_interleaved": interleaved, "causal": True,
    }  # fmt: skip


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (64, 1), (7, 300), (256, 4)])
@pytest.mark.parametrize(("d", "page_size"), [(64, 1), (128, 64), (128, 1), (256, 16)])
def test_what_a_server_appends(
    batch: int, tokens: int, d: int, page_size: int, interleaved: bool, loaded: DeviceKernels
) -> None:
    arguments = server_call(batch, tokens, d, page_size, interleaved)
    appends.compare_arguments(arguments, loaded, "cuda:0")


def test_a_captured_append_replays_with_other_lengths_and_keys(loaded: DeviceKernels) -> None:
    arguments = server_call(16, 2, 128, 16, interleaved=False)
    ours = appends.moved(arguments, "cuda:0")
    call = appends.call_of(ours)
    rotated = appends.poisoned_like(ours["q"])
    append.append(loaded, call, rotated)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert append.append(loaded, call, rotated, only_known=True) is rotated
    for seed in range(20):
        torch.manual_seed(seed)
        arguments["cache_seqlens"].random_(0, LONGEST + 1)  # type: ignore[attr-defined]
        for name in ("q", "k", "v"):
            arguments[name].normal_()  # type: ignore[attr-defined]
        fresh = appends.moved(arguments, "cuda:0")
        ours["k_cache"].fill_(float("nan"))
        ours["v_cache"].fill_(float("nan"))
        for name in ("cache_seqlens", "q", "k", "v"):
            ours[name].copy_(arguments[name])
        graph.replay()
        eager = append.append(loaded, appends.call_of(fresh))
        assert eager is not None
        assert torch.equal(rotated, eager)
        for name in ("k_cache", "v_cache"):
            assert torch.equal(case_run.storage_bytes(ours[name]), case_run.storage_bytes(fresh[name]))

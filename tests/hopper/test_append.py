"""The Hopper append kernel without a GPU: its sources compiled for the CPU against the CPU implementation."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from typing import ClassVar

import pytest
import torch

from jit_kernel import config
from jit_kernel.engine import compiler
from jit_kernel.fa3.hopper import append
from jit_kernel.fa3.hopper import kernels as hopper_kernels
from tests.support import appends, case_run, cases, shared_numbers
from tests.support.hopper_variants import compile_spec

SPACE, ANYWHERE = appends.space("append", 8), appends.space("append anywhere", 1)
MIXED = appends.mixed_space("mixed append", 16)
FP8, FP8_ANYWHERE = appends.fp8_space("fp8 append", 16), appends.fp8_space("fp8 append anywhere", 1)
MIXED_ANYWHERE = appends.mixed_space("mixed append anywhere", 1)

# Names that the host side has for what the launcher calls otherwise.
SAME = {
    "k": "k_cache",
    "v": "v_cache",
    "seqused_k": "cache_seqlens",
    "cos": "rotary_cos",
    "rotary_interleaved": "interleaved",
}


@pytest.fixture(scope="module")
def on_host() -> appends.OnHost:
    try:
        compiler.require("host")
    except compiler.CompilerNotFoundError as error:
        pytest.skip(str(error))
    return appends.OnHost()


@pytest.mark.parametrize(
    ("dtype", "quantises"), [*itertools.product(hopper_kernels.DTYPES, [False, True]), ("e4m3", False)]
)
def test_the_kernel_compiles_without_spills(dtype: str, quantises: bool) -> None:
    image, log = compile_spec(hopper_kernels.append_spec(dtype, quantises))
    assert image[:4] == b"\x7fELF"
    assert re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log) == [("0", "0")]


def test_random_appends_are_the_cpus_byte_by_byte(on_host: appends.OnHost) -> None:
    plans = appends.with_append(SPACE, 250)
    assert all(appends.compare(plan, on_host) for plan in plans)
    counted = cases.coverage(plans)
    for feature in ("paged", "new_ragged", "rotary", "batch_idx", "leftpad", "ragged", "strides", "tail"):
        assert counted[feature] > 10, feature


def test_random_appends_to_an_e4m3_cache_are_the_cpus_byte_by_byte(on_host: appends.OnHost) -> None:
    """Quantised by factors of sequences and of tokens, or stored as they come."""
    plans = [plan for plan in appends.with_append(MIXED, 500) if plan.kv_dtype is not None]
    assert all(appends.compare(plan, on_host) for plan in plans)
    counted = cases.coverage(plans)
    for feature in ("paged", "new_ragged", "rotary", "batch_idx", "leftpad", "strides", "token_scales", "stored"):
        assert counted[feature] > 10, feature
    launched = Counter(
        appends.compare(plan, on_host) for plan in appends.with_append(MIXED_ANYWHERE, 200) if plan.kv_dtype is not None
    )
    assert min(launched.values()) > 10
    assert set(launched) == {True, False}


def test_random_appends_beside_queries_in_e4m3_are_the_cpus_byte_by_byte(on_host: appends.OnHost) -> None:
    plans = appends.with_append(FP8, 130)
    assert all(appends.compare(plan, on_host) for plan in plans)
    counted = cases.coverage(plans)
    for feature in ("paged", "new_ragged", "rotary", "batch_idx", "leftpad", "strides", "tail"):
        assert counted[feature] > 5, feature
    launched = Counter(appends.compare(plan, on_host) for plan in appends.with_append(FP8_ANYWHERE, 60))
    assert min(launched.values()) > 5
    assert set(launched) == {True, False}


def test_rows_that_begin_anywhere_are_read_and_never_written(on_host: appends.OnHost) -> None:
    launched = Counter(appends.compare(plan, on_host) for plan in appends.with_append(ANYWHERE, 150))
    assert min(launched.values()) > 10
    assert set(launched) == {True, False}


# Numbers around which a quotient by a rounded reciprocal could be one off.
DIVISORS = sorted({d for n in range(31) for d in (2**n - 1, 2**n, 2**n + 1) if d > 0} | {3 * 5 * 7, 1_000_003})


@pytest.mark.parametrize("divisor", DIVISORS)
def test_quotients_are_exact_below_two_to_the_31(divisor: int, on_host: appends.OnHost) -> None:
    most = 2**31 - 1
    multiples = [most // divisor // part * divisor for part in (1, 2, 3, 1000)]
    for multiple in (0, divisor, *multiples):
        for number in {multiple - 1, multiple, multiple + 1, multiple + divisor - 1, most}:
            if 0 <= number <= most:
                assert on_host.quotient(number, divisor) == number // divisor, number


def ragged_call(lengths: list[int], capacity: int) -> dict[str, torch.Tensor]:
    """One head of 64; every new row holds its own number, and the caches and the memory around them NaN."""
    total, batch = sum(lengths), len(lengths)
    new = torch.arange(1, total + 1, dtype=torch.float16)[:, None, None].expand(total, 1, 64).contiguous()
    memory = torch.full((2, batch + 2, capacity, 1, 64), float("nan"), dtype=torch.float16)
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    return {
        "q": new.clone(), "k_cache": memory[0, 1:-1], "v_cache": memory[1, 1:-1], "k": new, "v": -new,
        "cu_seqlens_q": starts, "cu_seqlens_k_new": starts.clone(),
        "cache_seqlens": torch.arange(batch, dtype=torch.int32) % 3,
    }  # fmt: skip


@pytest.mark.parametrize("batch", [1, 2, 7, 8, 9, 63, 64, 65, 500, 777])
def test_every_row_of_many_sequences_finds_its_own(batch: int, on_host: appends.OnHost) -> None:
    random = torch.Generator().manual_seed(batch)
    lengths = (
        torch.randint(0, 5, (batch,), generator=random) * torch.randint(0, 2, (batch,), generator=random)
    ).tolist()
    lengths[batch // 2] = 3
    arguments = ragged_call(lengths, 8)
    append.append(on_host, appends.call_of(arguments))
    row = 0
    for i, length in enumerate(lengths):
        first = i % 3
        expected = torch.full((8,), float("nan"), dtype=torch.float16)
        expected[first : first + length] = torch.arange(row + 1, row + length + 1)
        for cache, sign in (("k_cache", 1), ("v_cache", -1)):
            found = arguments[cache][i, :, 0] * sign
            assert torch.equal(found.nan_to_num(-1), expected.nan_to_num(-1)[:, None].expand(8, 64)), (cache, i)
        row += length


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("wild", [2**31 - 1, -(2**31), -1, -5, 6, 1000])
def test_what_the_callers_index_tensors_get_wrong_is_written_nowhere(
    wild: int, paged: bool, on_host: appends.OnHost
) -> None:
    """On a GPU nobody has read them: lengths, cache rows and pages that do not exist, and rows of no sequence."""
    lengths = [3, 2, 4]
    arguments = ragged_call(lengths, 8)
    if paged:
        arguments["page_table"] = torch.tensor([[0], [1], [2]], dtype=torch.int32)
    else:
        arguments["cache_batch_idx"] = torch.arange(3, dtype=torch.int32)
    names = ["cache_seqlens", "cu_seqlens_k_new", "page_table" if paged else "cache_batch_idx"]
    for name in names:
        call = appends.call_of(appends.moved(arguments, "cpu"))
        k, v = call.k, call.v
        bad = getattr(call, {"cache_seqlens": "seqused_k"}.get(name, name))
        bad[1] = wild
        append.append(on_host, call)
        filled = [~x.isnan().all(-1)[..., 0] for x in (k, v)]
        right = torch.zeros(3, 8, dtype=torch.bool)
        right[0, :3], right[2, 2:6] = True, True
        if name == "cache_seqlens":
            first = [t for t in range(2) if 0 <= wild + t < 8]
            right[1, [wild + t for t in first]] = True
        if name != "cu_seqlens_k_new":
            assert torch.equal(filled[0], right), (name, wild)
        assert torch.equal(filled[0], filled[1])
        memory = case_run.storage_bytes(k).view(torch.float16)
        assert int((~memory.isnan()).sum()) == 64 * 2 * int(filled[0].sum()), (name, wild)


def test_a_launch_that_is_not_known_loads_nothing(on_host: appends.OnHost) -> None:
    class Cold:
        handles: ClassVar[dict[tuple[object, ...], int]] = {}

    arguments = ragged_call([1], 8)
    assert append.append(Cold(), appends.call_of(arguments), only_known=True) is None  # type: ignore[arg-type]
    assert bool(arguments["k_cache"].isnan().all())
    assert append.append(on_host, appends.call_of(arguments), only_known=True) is not None
    assert bool(arguments["k_cache"][0, 0].eq(1).all())


def test_the_host_passes_what_the_launcher_takes_in_its_order() -> None:
    taken = shared_numbers.parameters(shared_numbers.HOPPER / "launch" / "append_launch.h", "append")
    passed = shared_numbers.arguments(config.package_dir() / "fa3" / "hopper" / "append.py", "append")
    assert [SAME.get(name, name) for name in passed] == taken

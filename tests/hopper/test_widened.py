"""Which calls over an e4m3 cache have their rows made 16 bits first, by shapes alone; the kernel that does it."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch

import jit_kernel.flash_attention_v3 as fa3
from jit_kernel.device import Target
from jit_kernel.fa3 import call as calls
from jit_kernel.fa3 import features, hopper, rows
from jit_kernel.fa3.call import Call
from jit_kernel.fa3.decision import Accepted, Rejected
from jit_kernel.fa3.hopper import kernels
from tests.support.hopper_variants import compile_spec

E4M3 = torch.float8_e4m3fn
TARGET = Target("cuda", "sm_90a")


def nothing(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of any size in no memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def kvcache(
    batch: int = 1, tokens: int = 256, pages: int = 2048, heads: tuple[int, int] = (8, 1), **given: Any
) -> Call:
    """A call of flash_attn_with_kvcache over pages of 64 rows, of which a sequence has so many."""
    names = inspect.signature(fa3.flash_attn_with_kvcache).parameters
    defaults = {name: each.default for name, each in names.items() if each.default is not inspect.Parameter.empty}
    cache = nothing(batch * pages, 64, heads[1], 128, dtype=given.pop("cache", E4M3))
    arguments = {
        "q": nothing(batch, tokens, heads[0], 128, dtype=given.pop("dtype", torch.bfloat16)),
        "k_cache": cache, "v_cache": cache, "causal": True,
        "cache_seqlens": nothing(batch, dtype=torch.int32),
        "page_table": nothing(batch, pages, dtype=torch.int32),
    }  # fmt: skip
    return Call(*calls.of(calls.KVCACHE, {**defaults, **arguments, "max_seqlen_q": tokens, **given}))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"dtype": E4M3}, True),
        ({"cache": torch.bfloat16}, False),
        ({"tokens": 64}, True),
        ({"tokens": 63}, False),
        ({"num_splits": 1}, False),
        ({"num_splits": 3}, True),
        ({"deterministic": True}, False),
        ({"k_scale": torch.ones(1)}, False),
        ({"v_scale": torch.ones(1)}, False),
        ({"pages": 2**16}, True),
        ({"pages": 2**16 + 1}, False),
        ({"batch": 4, "pages": 2**14}, True),
        ({"batch": 4, "pages": 2**14, "heads": (16, 2)}, False),
    ],
    ids=str,
)
def test_which_calls(change: dict[str, Any], expected: bool) -> None:
    """512 rows of queries a sequence and more, whose keys and values have room in 2 GiB."""
    call = kvcache(**change)
    assert rows.widens(call) is expected
    found = features.Features(*features.plain_features(call))  # type: ignore[arg-type]
    assert found.widens is expected
    decision = hopper.decide(TARGET, found)
    if expected:
        assert isinstance(decision, Accepted)
        assert dict(hopper.variant(TARGET, found, call).variant)["function"] == kernels.CACHED
    elif found.many_rows:
        assert isinstance(decision, Rejected)


def test_ragged_queries_count_on_the_average() -> None:
    """One long sequence among many short ones would have all their keys made 16 bits."""
    starts = nothing(9, dtype=torch.int32)
    for tokens, expected in ((8 * 64, True), (8 * 64 - 1, False)):
        call = kvcache(8, pages=64)
        call.q, call.cu_seqlens_q, call.max_seqlen_q = nothing(tokens, 8, 128, dtype=torch.bfloat16), starts, 500
        assert rows.widens(call) is expected


def test_a_longest_length_bounds_the_room_of_varlen_alone() -> None:
    call = kvcache()
    call.max_seqlen_k = 1000
    assert rows.wide_rows(call) == 2048 * 64
    call.function = calls.VARLEN
    assert rows.wide_rows(call) == 1000
    call.max_seqlen_k = None
    assert rows.wide_rows(call) == 2048 * 64


def test_the_kernel_compiles_without_spills_and_loads_16_bytes() -> None:
    image, log = compile_spec(kernels.widen_spec())
    assert image[:4] == b"\x7fELF"
    assert re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log) == [("0", "0")]
    assert int(re.findall(r"Used (\d+) registers", log)[0]) <= 64  # four blocks of a multiprocessor

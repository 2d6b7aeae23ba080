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
from jit_kernel.fa3 import features, hopper
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
        ({"tokens": 32}, True),
        ({"tokens": 31}, False),
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
    """256 rows of queries a sequence and more, whose keys and values have room in 2 GiB."""
    call = kvcache(**change)
    assert calls.widens(call) is expected
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
    for tokens, expected in ((8 * 32, True), (8 * 32 - 1, False)):
        call = kvcache(8, pages=64)
        call.q, call.cu_seqlens_q, call.max_seqlen_q = nothing(tokens, 8, 128, dtype=torch.bfloat16), starts, 500
        assert calls.widens(call) is expected


def test_a_longest_length_bounds_the_room_of_varlen_alone() -> None:
    call = kvcache()
    call.max_seqlen_k = 1000
    assert calls.wide_rows(call) == 2048 * 64
    call.function = calls.VARLEN
    assert calls.wide_rows(call) == 1000
    call.max_seqlen_k = None
    assert calls.wide_rows(call) == 2048 * 64


def test_the_kernel_compiles_without_spills_and_loads_16_bytes() -> None:
    image, log = compile_spec(kernels.widen_spec())
    assert image[:4] == b"\x7fELF"
    assert re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log) == [("0", "0")]
    assert int(re.findall(r"Used (\d+) registers", log)[0]) <= 64  # four blocks of a multiprocessor


class KernelsDouble:
    """Stands for a GPU's loaded kernels: the launcher takes the call where rows are aligned."""

    multiprocessors = 132

    def __init__(self, aligned: bool) -> None:
        self.handles = {(kernels.CACHED, torch.bfloat16, 128, 128): 7, (kernels.WIDEN,): 8}
        self.launched: list[tuple[Any, ...]] = []
        self.aligned = aligned

    def forward_widened(self, *arguments: Any) -> bool:
        self.launched.append(arguments)
        return self.aligned


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, E4M3], ids=str)
def test_a_known_call_asks_for_room_and_is_left_as_it_was(
    dtype: torch.dtype, aligned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that the launcher declines goes on to others, with queries and sinks of its own types."""
    double = KernelsDouble(aligned)
    monkeypatch.setattr(hopper.kernels, "kernels_of", lambda device: double)
    sinks = nothing(8, dtype=dtype)
    call = kvcache(2, pages=16, dtype=dtype, sinks=sinks)
    result = hopper.widened.attend(call, only_known=True)
    assert (result is not None) is aligned
    assert call.q.dtype is dtype
    assert call.sinks is sinks
    handle, widen_handle, q, *_ = double.launched[0]
    assert (handle, widen_handle, q.dtype) == (7, 8, torch.bfloat16)
    room = [x for x in double.launched[0] if isinstance(x, torch.Tensor) and x.shape[1:] == (1024, 1, 128)]
    assert [(x.shape[0], x.dtype) for x in room] == [(2, torch.bfloat16)] * 2
    if isinstance(result, torch.Tensor):
        assert result.dtype is torch.bfloat16
        assert result.shape == call.q.shape


def test_a_kernel_that_is_not_loaded_yet_leaves_a_call_to_the_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    double = KernelsDouble(True)
    del double.handles[kernels.WIDEN,]
    monkeypatch.setattr(hopper.kernels, "kernels_of", lambda device: double)
    assert hopper.widened.attend(kvcache(), only_known=True) is None
    assert not double.launched

"""The forms of arguments that FlashAttention's callers pass: one meaning each, the bits of the canonical form."""

from __future__ import annotations

from collections.abc import Callable

import numpy
import pytest
import torch
from torch import Tensor

import jit_kernel
from tests.support import valid_calls
from tests.support.odd_tensors import to
from tests.support.valid_calls import FUNCTIONS, Call, ints

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
each_device = pytest.mark.parametrize("device", DEVICES)
ATTENTION = [
    valid_calls.dense,
    valid_calls.varlen,
    valid_calls.paged,
    valid_calls.cache,
    valid_calls.paged_cache,
    valid_calls.plain_dense,
    valid_calls.plain_varlen,
    valid_calls.plain_cache,
    valid_calls.plain_paged_cache,
]
each_base = pytest.mark.parametrize("base", ATTENTION, ids=lambda base: base.__name__)


def made(base: Callable[[], Call], device: str) -> Call:
    torch.manual_seed(0)
    return to(device, base())


def results(base: Callable[[], Call], call: Call) -> list[Tensor]:
    """What the call returns, and all that it may have written."""
    found = FUNCTIONS[base](**call)
    found = found if isinstance(found, tuple) else (found,)
    return [each.clone() for each in (*found, *(call[name] for name in ("out", "k_cache", "v_cache") if name in call))]


def same(base: Callable[[], Call], device: str, canonical: Call, odd: Call) -> None:
    """Equal bits, at the first call with this form and at the next, which a memory of shapes serves."""
    expected = results(base, made(base, device) | canonical)
    for _ in range(3):
        for a, b in zip(results(base, made(base, device) | odd), expected, strict=True):
            assert torch.equal(a, b)


WINDOWS = [
    (None, (-1, -1)),
    ((None, None), (-1, -1)),
    ([None, 1], (-1, 1)),
    ((3, None), (3, -1)),
    ([2, 1], (2, 1)),
    (torch.tensor([3, 0]), (3, 0)),
    (torch.tensor([3, -1], dtype=torch.int32), (3, -1)),
    ((numpy.int64(2), torch.tensor(1)), (2, 1)),
]


@each_device
@each_base
@pytest.mark.parametrize(("odd", "canonical"), WINDOWS, ids=str)
def test_windows(base, odd, canonical, device):
    same(base, device, {"window_size": canonical}, {"window_size": odd})


INTEGERS = (numpy.int32, numpy.int64, numpy.uint8, numpy.array, torch.tensor, lambda n: torch.tensor(n).short())


@each_device
@each_base
@pytest.mark.parametrize("kind", INTEGERS, ids=lambda kind: kind.__name__)
def test_integers(base, kind, device):
    numbers = {"attention_chunk": 4, "num_splits": 2, "sm_margin": 3}
    if "cu_seqlens_q" in base() or FUNCTIONS[base] is jit_kernel.flash_attn_with_kvcache:
        numbers["max_seqlen_q"] = 6
    if FUNCTIONS[base] is jit_kernel.flash_attn_varlen_func:
        numbers["max_seqlen_k"] = 12
    same(base, device, numbers, {name: kind(number) for name, number in numbers.items()})
    for name, number in numbers.items():
        same(base, device, {name: number}, {name: kind(number)})


@pytest.mark.gpu
def test_a_number_on_a_gpu_is_read():
    same(valid_calls.varlen, "cuda", {"max_seqlen_q": 6}, {"max_seqlen_q": torch.tensor(6, device="cuda")})


@each_device
@each_base
def test_floats(base, device):
    numbers = {"softmax_scale": 0.25, "softcap": 8.0}
    for kind in (numpy.float32, numpy.float64):
        same(base, device, numbers, {name: kind(number) for name, number in numbers.items()})
    same(base, device, {"softmax_scale": 1.0, "softcap": 8.0}, {"softmax_scale": 1, "softcap": numpy.int64(8)})
    same(base, device, {"softcap": float(2**63)}, {"softcap": 2**63})
    same(base, device, {"softmax_scale": 1e30, "softcap": 2.0}, {"softmax_scale": 10**30, "softcap": 2.0})


@each_device
@pytest.mark.parametrize("kind", [int, *INTEGERS], ids=lambda kind: kind.__name__)
def test_one_length_for_all_sequences(kind, device):
    base = valid_calls.plain_cache
    lengths = to(device, {"x": ints(9, 9)})["x"]
    same(base, device, {"cache_seqlens": lengths}, {"cache_seqlens": kind(9)})
    with pytest.raises(ValueError, match="cache_seqlens is 17"):
        FUNCTIONS[base](**made(base, device) | {"cache_seqlens": kind(17)})


def indices(base: Callable[[], Call]) -> list[str]:
    """The names of the index tensors: a draft mask's int32 are bits."""
    given = {name: value for name, value in base().items() if isinstance(value, Tensor)}
    return [name for name, value in given.items() if value.dtype == torch.int32 and name != "draft_mask"]


@each_device
@each_base
def test_indices_of_64_bits(base, device):
    call = made(base, device)
    for name in indices(base):
        same(base, device, {}, {name: call[name].long()})
    same(base, device, {}, {name: call[name].long() for name in indices(base)})


@each_device
def test_entries_of_a_wide_page_table_that_are_not_read_may_hold_anything(device):
    """Also what an int32 cannot hold, and what would name a page if its upper half were cut off."""
    base = valid_calls.paged
    table = made(base, device)["page_table"].long()
    table[1, 2] = 2**32 + 1
    same(base, device, {}, {"page_table": table})


def test_an_entry_that_is_read_is_never_cut_to_32_bits():
    call = valid_calls.paged()
    table = call["page_table"].long()
    table[0, 0] = 2**32
    with pytest.raises(ValueError, match=r"page_table\[0, 0\] is 2147483647"):
        jit_kernel.flash_attn_varlen_func(**call | {"page_table": table})


@each_device
@pytest.mark.parametrize("base", [valid_calls.paged, valid_calls.plain_paged_cache], ids=lambda b: b.__name__)
def test_a_page_table_with_gaps_between_its_rows(base, device):
    table = made(base, device)["page_table"]
    wide = torch.full((table.shape[0], table.shape[1] + 3), -1, dtype=torch.int32, device=device)
    wide[:, : table.shape[1]] = table
    same(base, device, {}, {"page_table": wide[:, : table.shape[1]]})


@each_device
def test_rotary_seqlens_are_not_read_without_a_table(device):
    none = {"rotary_cos": None, "rotary_sin": None}
    lengths = to(device, {"x": ints(2**30, -7)})["x"]
    same(valid_calls.cache, device, none | {"rotary_seqlens": None}, none | {"rotary_seqlens": lengths})


@each_device
@each_base
def test_descales_are_not_read_beside_other_dtypes(base, device):
    """FlashAttention-3 looks at them for float8_e4m3fn alone."""
    scales = torch.full((2, 2), torch.nan, device=device)
    same(base, device, {}, dict.fromkeys(("q_descale", "k_descale", "v_descale"), scales))
    with pytest.raises(TypeError, match="k_descale"):
        FUNCTIONS[base](**made(base, device) | {"k_descale": 1.0})


def test_keys_are_not_needed_with_only_qv():
    """q . k is dropped: absorbed MLA without its rotary part."""
    base = valid_calls.mla
    same(base, "cpu", {}, {"k": None})
    call = made(base, "cpu")
    cache = {name: call[name] for name in ("q", "qv", "only_qv")} | {"v_cache": call["v"]}
    lengths = {"cache_seqlens": ints(5)}
    expected = jit_kernel.flash_attn_with_kvcache(**cache, **lengths, k_cache=call["k"])
    for _ in range(2):
        found = jit_kernel.flash_attn_with_kvcache(**cache, **lengths, k_cache=None)
        assert torch.equal(found, expected)
        compiled = torch.compile(jit_kernel.flash_attn_with_kvcache, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(**cache, **lengths, k_cache=None), expected)
    with pytest.raises(ValueError, match="k_cache is None; it must be given without only_qv"):
        jit_kernel.flash_attn_with_kvcache(**cache | {"only_qv": False}, k_cache=None)
    new = {"k": call["k"][:, :1], "v": call["v"][:, :1]}
    with pytest.raises(ValueError, match="k_cache is None; it must be given with k"):
        jit_kernel.flash_attn_with_kvcache(**cache, **lengths, **new, k_cache=None)


def other_plans() -> dict[str, Call]:
    return {
        "new keys": {"max_seqlen_k_new": 1},
        "new keys with offsets": {"max_seqlen_k_new": 3, "cu_seqlens_k_new": ints(0, 1, 4)},
        "a longer cache": {"max_seqlen_k": 4096},
        "64-bit lengths": {"cache_seqlens": ints(4, 13).long()},
        "numbers of numpy": {"batch_size": numpy.int64(2), "headdim": numpy.int32(32), "max_seqlen_q": torch.tensor(2)},
        "no window": {"window_size": None},
    }


@pytest.mark.parametrize("name", other_plans())
@pytest.mark.parametrize("options", [{}, {"window_size": (3, 0)}, {"softcap": 5.0}], ids=str)
def test_metadata_of_an_engine_that_plans_once(name, options):
    """Made for new keys, or for a longer cache, or without a layer's window or softcap."""
    base = valid_calls.planned
    made_for = valid_calls.metadata() | {"num_splits": 2} | other_plans()[name]
    plan = jit_kernel.get_scheduler_metadata(**made_for)
    same(base, "cpu", options | {"scheduler_metadata": None}, options | {"scheduler_metadata": plan})


@pytest.mark.parametrize("shape", [(2**40, 5, 4, 32), (2, 2**40, 4, 32)], ids=str)
def test_an_expanded_query_is_an_error_of_shape(shape):
    call = valid_calls.plain_dense() | {"out": None}
    FUNCTIONS[valid_calls.plain_dense](**call)
    for options in ({}, {"return_softmax_lse": True}):
        with pytest.raises(ValueError, match="q has shape"):
            jit_kernel.flash_attn_func(**call | options | {"q": torch.randn(1, 1, 4, 32).expand(shape)})


@each_device
@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k", "seqused_k", "seqused_q"])
def test_index_tensors_without_dimensions_are_an_error_of_shape(name, device):
    base = valid_calls.plain_varlen
    results(base, made(base, device))
    with pytest.raises(ValueError, match=f"{name} has shape"):
        FUNCTIONS[base](**made(base, device) | {name: torch.tensor(4, dtype=torch.int32, device=device)})

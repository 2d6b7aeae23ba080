"""What a call writes shares no byte with what it reads, and slices that only lie between each other's rows may."""

from __future__ import annotations

import itertools
import random
import tracemalloc
from typing import Any

import pytest
import torch
from torch import Tensor

import jit_kernel
from jit_kernel.fa3.checks import call as checks_of_calls
from jit_kernel.fa3.checks import memory
from tests.support import valid_calls
from tests.support.odd_tensors import to
from tests.support.valid_calls import FUNCTIONS, Call

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
each_device = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def floats(device: str, *shape: int) -> Tensor:
    return torch.randn(shape, device=device, dtype=torch.float32 if device == "cpu" else torch.bfloat16)


def refuses(base: Any, call: Call, says: str) -> None:
    before = {name: value.clone() for name, value in call.items() if isinstance(value, Tensor)}
    with pytest.raises(ValueError, match=says):
        FUNCTIONS[base](**call)
    for name, copy in before.items():
        assert torch.equal(call[name], copy), f"{name} was written"


def over(tensor: Tensor, shape: torch.Size, start: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One memory for a copy of `tensor` and, `start` bytes behind its first, for a tensor of another shape."""
    size = torch.empty((), dtype=dtype).element_size()
    bytes_of = tensor.numel() * tensor.element_size()
    count = shape.numel() * size
    raw = torch.zeros(bytes_of + 2 * abs(start) + count, dtype=torch.uint8, device=tensor.device)
    at = abs(start) if start < 0 else 0
    copy = raw[at : at + bytes_of].view(tensor.dtype).view(tensor.shape).copy_(tensor)
    return copy, raw[at + start : at + start + count].view(dtype).view(shape)


READ = {
    valid_calls.plain_dense: ("q", "k", "v"),
    valid_calls.plain_varlen: ("q", "k", "v", "cu_seqlens_q", "seqused_k"),
    valid_calls.plain_cache: ("q", "k_cache", "v_cache", "cache_seqlens"),
    valid_calls.dense: ("q", "k", "v", "sinks"),
    valid_calls.varlen: ("q", "k", "v", "cu_seqlens_q", "seqused_q", "seqused_k"),
    valid_calls.paged: ("q", "k", "v", "page_table", "seqused_k"),
    valid_calls.cache: ("q", "k_cache", "v_cache", "k", "v", "rotary_cos", "rotary_seqlens", "cache_batch_idx"),
    valid_calls.fp8: ("q", "k", "v", "q_descale"),
    valid_calls.fp8_cache: ("q", "k_cache", "v", "k_descale", "page_table"),
    valid_calls.combine: ("out_partial", "lse_partial"),
}
PLACES = [(base, name) for base, names in READ.items() for name in names]


@each_device
@pytest.mark.parametrize(("base", "name"), PLACES, ids=lambda x: x if isinstance(x, str) else x.__name__)
@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
def test_out_shares_no_byte_with_an_input(base, name, warm, device):
    """From the first byte of the input to its last, from before it and from behind it."""
    call = to(device, base())
    if warm and (device == "cpu" or base not in (valid_calls.fp8, valid_calls.fp8_cache)):
        FUNCTIONS[base](**to(device, base()))
    out = call["out"]
    last = call[name].numel() * call[name].element_size() - 4
    for start in (0, 4, last, 4 - out.numel() * out.element_size()):
        given, where = over(call[name], out.shape, start, out.dtype)
        says = f"(out shares its memory with {name}|{name} shares its memory with out);"
        refuses(base, call | {name: given, "out": where}, says)


@each_device
@pytest.mark.parametrize("cached", ["k_cache", "v_cache"])
@pytest.mark.parametrize("name", ["q", "k", "v", "rotary_sin", "cache_seqlens", "out"])
def test_a_cache_that_is_appended_to_shares_no_byte(name, cached, device):
    call = to(device, valid_calls.cache())
    call[cached], call[name] = over(call[cached], call[name].shape, 64, call[name].dtype)
    if call[name].dtype == torch.int32:
        call[name].copy_(torch.tensor([4, 13]))
    refuses(valid_calls.cache, call, "shares its memory with")


@each_device
def test_one_cache_for_keys_and_values_is_refused_with_an_append(device):
    call = to(device, valid_calls.cache())
    refuses(valid_calls.cache, call | {"v_cache": call["k_cache"]}, "k_cache shares its memory with v_cache")
    call |= {"k": None, "v": None, "rotary_cos": None, "rotary_sin": None, "v_cache": call["k_cache"]}
    expected = FUNCTIONS[valid_calls.cache](**call | {"v_cache": call["k_cache"].clone(), "out": None})
    assert torch.equal(FUNCTIONS[valid_calls.cache](**call), expected)


@each_device
def test_slices_of_one_buffer_are_served(device):
    """q, k, v and out between each other's rows, in three orders of the dimensions."""
    for at in (2, 3, 4):
        shape = [2, 5, 4, 32]
        buffer = floats(device, *shape[: at - 1], 4, *shape[at - 1 :])
        q, k, v, out = (buffer.select(at - 1, i) for i in range(4))
        expected = jit_kernel.flash_attn_func(q.clone(), k.clone(), v.clone(), causal=True)
        before = buffer.clone()
        assert jit_kernel.flash_attn_func(q, k, v, causal=True, out=out) is out
        assert torch.equal(out, expected)
        assert torch.equal(buffer.select(at - 1, 0), before.select(at - 1, 0))
        wide = buffer.view(-1)[: -q[0, 0, 0].numel()]
        shifted = wide.as_strided(out.shape, out.stride(), out.storage_offset() - 8)
        with pytest.raises(ValueError, match="out shares its memory with"):
            jit_kernel.flash_attn_func(q, k, v, causal=True, out=shifted)


@each_device
def test_caches_between_each_others_pages_are_served(device):
    call = to(device, valid_calls.paged_cache())
    expected = call | {"k_cache": call["k_cache"].clone(), "v_cache": call["v_cache"].clone()}
    both = torch.stack([call["k_cache"], call["v_cache"]], dim=1)
    call |= {"k_cache": both[:, 0], "v_cache": both[:, 1]}
    found = FUNCTIONS[valid_calls.paged_cache](**call)
    assert torch.equal(found, FUNCTIONS[valid_calls.paged_cache](**expected))
    assert torch.equal(both[:, 0], expected["k_cache"])
    assert torch.equal(both[:, 1], expected["v_cache"])


STRIDES = {
    "rows of half their length": ((2, 5, 4, 32), (640, 64, 16, 1)),
    "two dimensions with one stride": ((2, 5, 4, 32), (128, 128, 32, 1)),
    "windows": ((2, 5, 4, 32), (320, 64, 32, 1)),
}


@each_device
@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
@pytest.mark.parametrize("name", STRIDES)
def test_what_is_written_does_not_overlap_itself(name, warm, device):
    shape, strides = STRIDES[name]
    q = floats(device, *shape)
    out = floats(device, 4096).as_strided(shape, strides)
    if warm:
        jit_kernel.flash_attn_func(q, q, q, out=torch.empty_like(q))
    with pytest.raises(ValueError, match="out has shape"):
        jit_kernel.flash_attn_func(q, q, q, out=out)
    cache = floats(device, 4096).as_strided(shape, strides)
    with pytest.raises(ValueError, match="v_cache has shape"):
        jit_kernel.flash_attn_with_kvcache(q, q.clone(), cache, q[:, :1], q[:, :1], cache_seqlens=2)
    parts, lse = floats(device, 3, *shape), torch.randn(3, *shape[:-1], device=device)
    with pytest.raises(ValueError, match="out has shape"):
        jit_kernel.flash_attn_combine(parts, lse, out=out)


@each_device
def test_strides_in_any_order_are_served(device):
    q = floats(device, 2, 5, 4, 32)
    expected = jit_kernel.flash_attn_func(q, q, q)
    for order in itertools.permutations(range(3)):
        memory_order = [q.shape[i] for i in order]
        out = torch.zeros(*memory_order, 32, device=device, dtype=q.dtype).permute(*map(order.index, range(3)), 3)
        assert jit_kernel.flash_attn_func(q, q, q, out=out) is out
        assert torch.equal(out, expected)


def elements(tensor: Tensor) -> list[int]:
    """The places in memory of all elements, one after the other."""
    index = torch.zeros(tensor.shape, dtype=torch.int64)
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        index += (torch.arange(size) * stride).view(-1, *[1] * (tensor.dim() - dim - 1))
    return (index.flatten() + tensor.storage_offset()).tolist()


def test_shared_memory_is_found_exactly():
    """By all places of small tensors with every kind of strides."""
    draw = random.Random(0)
    buffer = torch.zeros(4096)
    seen = {True: 0, False: 0}
    for _ in range(3000):
        pair = []
        for _ in range(2):
            shape = [draw.choice((1, 2, 3, 5)) for _ in range(draw.randint(1, 4))]
            strides = [draw.choice((0, 1, 2, 3, 4, 6, 8, 12, 24, 48, 50)) for _ in shape]
            pair.append(buffer.as_strided(shape, strides, draw.randint(0, 120)))
        one, two = (elements(tensor) for tensor in pair)
        meets = not set(one).isdisjoint(two)
        assert memory.share(*pair) is meets, [(x.shape, x.stride(), x.storage_offset()) for x in pair]
        assert memory.overlaps_itself(pair[0]) is (len(set(one)) < len(one)), (pair[0].shape, pair[0].stride())
        seen[meets] += 1
    assert min(seen.values()) > 500


def test_different_sizes_of_elements_meet_by_bytes():
    raw = torch.zeros(64, dtype=torch.uint8)
    words = raw.view(torch.float32)[::2]  # bytes 0-3, 8-11, ...
    for start in range(32):
        byte = raw[start : start + 1]
        assert memory.share(words, byte) is (start % 8 < 4)
        assert memory.share(byte, words) is (start % 8 < 4)


def test_a_search_that_takes_too_long_counts_as_shared(monkeypatch):
    buffer = torch.zeros(3, 2, 8)
    one, two = buffer[:, 0], buffer[:, 1]
    assert not memory.share(one, two)
    memory._touch.cache_clear()
    monkeypatch.setattr(memory, "_MOST_STEPS", 0)
    assert memory.share(one, two)
    memory._touch.cache_clear()


def test_a_search_through_strides_that_do_not_nest_takes_little_memory():
    """Each coefficient's values waited, millions of them, though so many steps are never taken."""
    many = 2_000_000
    tracemalloc.start()
    try:
        assert memory._count(((3, many), (2, many)), 5 * many // 2, 2) == 2
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
@pytest.mark.parametrize("base", [valid_calls.dense, valid_calls.varlen, valid_calls.cache])
def test_a_window_in_the_memory_of_out_is_read_before_out_is_written(base, warm):
    """As every tensor that stands for numbers: with its call remembered or not."""

    def attend(window: Any, out: Tensor) -> Tensor:
        torch.manual_seed(0)
        return FUNCTIONS[base](**base() | {"softcap": 0.5, "window_size": window, "out": out})

    out = torch.zeros_like(base()["out"])
    expected = attend((7, 3), out).clone()
    checks_of_calls._passed.clear()
    if warm:
        attend(torch.tensor([7, 3], dtype=torch.int32), out)
    window = out.zero_().view(-1).view(torch.int32)[:2].copy_(torch.tensor([7, 3]))
    assert torch.equal(attend(window, out), expected)
    assert window.tolist() != [7, 3]

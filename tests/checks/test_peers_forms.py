"""The forms of arguments in FlashAttention-3's and sglang's own test files, each against its plain form, bit for bit.

Their files call with tensors that require grad, windows as lists and tensors, one tensor as two arguments, metadata
made for new keys that never come, tables with rows that no sequence uses, and descales and rotary positions unread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import jit_kernel
from tests.support.valid_calls import Call, ints

B, SQ, SK, HQ, D = 3, 5, 24, 6, 64
FP8 = torch.float8_e4m3fn
SPLITS = [1, 3, 0]
each_head_count = pytest.mark.parametrize("hk", [6, 2, 1])
each_split = pytest.mark.parametrize("num_splits", SPLITS)

WINDOWS: list[tuple[Any, tuple[int, int]]] = [
    ([7, 3], (7, 3)),
    (torch.tensor([7, 3]), (7, 3)),
    (torch.tensor([0, 0]), (0, 0)),
    (torch.tensor([20, 23], dtype=torch.int32), (20, 23)),
    ([-1, -1], (-1, -1)),
]
each_window = pytest.mark.parametrize(("window", "pair"), WINDOWS, ids=str)


def drawn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape).to(torch.bfloat16).to(dtype)


def answers(function: Callable[..., Any], call: Call) -> list[Tensor]:
    """What the call returns, and what it leaves in its caches, which it gets as copies."""
    copies = {name: call[name].clone() for name in ("k_cache", "v_cache") if call.get(name) is not None}
    found = function(**call | copies)
    return [*(found if isinstance(found, tuple) else (found,)), *copies.values()]


def equal(function: Callable[..., Any], plain: Call, odd: Call) -> None:
    """`odd` replaces arguments of `plain`: equal bits, at the first call of this form and at a remembered one."""
    expected = answers(function, plain)
    for _ in range(2):
        for a, b in zip(answers(function, plain | odd), expected, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a.float(), b.float())


def dense(hk: int = 2, dv: int = D, dtype: torch.dtype = torch.bfloat16) -> Call:
    torch.manual_seed(0)
    tensors = {"q": (SQ, HQ, D), "k": (SK, hk, D), "v": (SK, hk, dv)}
    return {name: drawn(B, *shape, dtype=dtype) for name, shape in tensors.items()} | {"return_softmax_lse": True}


def ragged(hk: int = 2, dv: int = D) -> Call:
    """Rows behind each sequence that count for nothing, and sequences without keys."""
    torch.manual_seed(0)
    call = {"q": drawn(11, HQ, D), "k": drawn(30, hk, D), "v": drawn(30, hk, dv), "return_softmax_lse": True}
    call |= {"cu_seqlens_q": ints(0, 5, 6, 11), "cu_seqlens_k": ints(0, 3, 24, 30), "max_seqlen_q": 5}
    return call | {"max_seqlen_k": 21, "seqused_q": ints(3, 1, 5), "seqused_k": ints(0, 19, 6)}


def cached(hk: int = 2, dv: int = D, dtype: torch.dtype = torch.bfloat16) -> Call:
    torch.manual_seed(0)
    caches = {"k_cache": drawn(B, SK, hk, D, dtype=dtype), "v_cache": drawn(B, SK, hk, dv, dtype=dtype)}
    lengths = {"cache_seqlens": ints(4, 19, 11), "return_softmax_lse": True}
    return {"q": drawn(B, SQ, HQ, D, dtype=dtype), **caches, **lengths}


def new_keys(call: Call, count: int = SQ) -> Call:
    (_, _, hk, dv), dtype = call["v_cache"].shape, call["q"].dtype
    return {"k": drawn(B, count, hk, D, dtype=dtype), "v": drawn(B, count, hk, dv, dtype=dtype)}


def plan(hk: int = 2, **more: Any) -> Tensor:
    sizes = {"batch_size": B, "max_seqlen_q": SQ, "max_seqlen_k": SK, "num_heads_q": HQ, "num_heads_kv": hk}
    made = sizes | {"headdim": D, "headdim_v": D, "qkv_dtype": torch.bfloat16, "cache_seqlens": ints(4, 19, 11)}
    return jit_kernel.get_scheduler_metadata(**made | more)


CALLS = {
    "flash_attn_func": (jit_kernel.flash_attn_func, dense),
    "flash_attn_varlen_func": (jit_kernel.flash_attn_varlen_func, ragged),
    "flash_attn_with_kvcache": (jit_kernel.flash_attn_with_kvcache, cached),
}
each_function = pytest.mark.parametrize("name", CALLS)


@each_function
@each_window
@pytest.mark.parametrize("chunk", [0, 9])
def test_windows(name, window, pair, chunk):
    """A list (Tensor.tolist) or a tensor (torch.randint), beside a chunk too."""
    function, make = CALLS[name]
    equal(function, make() | {"window_size": pair, "attention_chunk": chunk}, {"window_size": window})


@each_function
@each_head_count
@pytest.mark.parametrize("pack_gqa", [False, True])
@each_split
def test_hints(name, hk, pack_gqa, num_splits):
    function, make = CALLS[name]
    equal(function, make(hk) | {"num_splits": num_splits}, {"pack_gqa": pack_gqa})


@pytest.mark.parametrize("name", ["flash_attn_func", "flash_attn_varlen_func"])
def test_tensors_that_require_grad_while_no_grad_is_recorded(name):
    function, make = CALLS[name]
    call = make()
    odd = {each: call[each].clone().requires_grad_() for each in "qkv"}
    with torch.no_grad():
        equal(function, call, odd)
    assert function(**call | odd)[0].requires_grad


@each_function
@pytest.mark.parametrize("dv", [256, 512])
def test_qv(name, dv):
    """Absent qv and the other absent tensors are None, by name; qv of a ragged call is ragged."""
    function, make = CALLS[name]
    call = make(dv=dv)
    qv = drawn(*call["q"].shape[:-1], dv)
    absent = dict.fromkeys(("q_descale", "k_descale", "v_descale", "sinks", "softmax_scale", "pack_gqa", "out"))
    equal(function, call | {"qv": qv}, absent)
    equal(function, call, absent | {"qv": None})


@each_function
@pytest.mark.parametrize("value", [float("nan"), 3.0])
def test_descales_beside_bf16(name, value):
    function, make = CALLS[name]
    equal(function, make(), {f"{each}_descale": torch.full((B, 2), value) for each in "qkv"})


@each_function
def test_sinks_in_bf16(name):
    """As sglang's models have them: the answer is that of the same numbers in float32."""
    function, make = CALLS[name]
    sinks = drawn(HQ)
    equal(function, make() | {"sinks": sinks.float()}, {"sinks": sinks})


def test_longest_lengths_without_dimensions():
    call = ragged()
    odd = {"max_seqlen_q": (call["cu_seqlens_q"].diff()).max(), "max_seqlen_k": call["cu_seqlens_k"].diff().max()}
    equal(jit_kernel.flash_attn_varlen_func, call, odd)
    cache = cached() | {"q": drawn(11, HQ, D), "cu_seqlens_q": ints(0, 5, 6, 11), "max_seqlen_q": 5}
    equal(jit_kernel.flash_attn_with_kvcache, cache, {"max_seqlen_q": odd["max_seqlen_q"]})
    made = plan(max_seqlen_q=odd["max_seqlen_q"], cu_seqlens_q=cache["cu_seqlens_q"])
    equal(jit_kernel.flash_attn_with_kvcache, cache, {"scheduler_metadata": made})


def test_the_order_of_positions():
    """FlashAttention-3 and sglang agree on the order of what their files pass by position."""
    call = ragged()
    names = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    rest = {name: value for name, value in call.items() if name not in names}
    found = jit_kernel.flash_attn_varlen_func(*(call[name] for name in names), **rest)
    for a, b in zip(found, jit_kernel.flash_attn_varlen_func(**call), strict=True):
        assert torch.equal(a, b)
    cache = cached()
    new = new_keys(cache)
    function = jit_kernel.flash_attn_with_kvcache
    expected = answers(function, cache | new)
    copies = [cache[name].clone() for name in ("k_cache", "v_cache")]
    rest = {name: cache[name] for name in ("cache_seqlens", "return_softmax_lse")}
    found = function(cache["q"], *copies, new["k"], new["v"], **rest)
    for a, b in zip((*found, *copies), expected, strict=True):
        assert torch.equal(a, b)


@each_split
@pytest.mark.parametrize("with_new_keys", [False, True])
def test_rotary_positions_without_a_table(with_new_keys, num_splits):
    """One tensor is cache_seqlens and rotary_seqlens; without rotary_cos nobody reads the second."""
    call = cached() | {"num_splits": num_splits}
    call |= new_keys(call) if with_new_keys else {}
    for interleaved in (False, True):
        unread = {"rotary_cos": None, "rotary_sin": None, "rotary_interleaved": interleaved}
        equal(jit_kernel.flash_attn_with_kvcache, call, unread | {"rotary_seqlens": call["cache_seqlens"]})
        equal(jit_kernel.flash_attn_with_kvcache, call, unread | {"rotary_seqlens": call["cache_seqlens"] // 2})


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8])
@pytest.mark.parametrize("causal", [False, True])
def test_rotary_positions_that_are_the_cache_lengths(causal, dtype):
    """The table has the queries' dtype, float8_e4m3fn too."""
    call = cached(dtype=dtype) | {"causal": causal}
    angle = torch.rand(SK, D // 4) * 6
    tables = {"rotary_cos": angle.cos().bfloat16().to(dtype), "rotary_sin": angle.sin().bfloat16().to(dtype)}
    call |= new_keys(call) | tables
    equal(jit_kernel.flash_attn_with_kvcache, call, {"rotary_seqlens": call["cache_seqlens"]})


@pytest.mark.parametrize("count", [1, SQ])
@pytest.mark.parametrize(("window", "pair"), [((-1, -1), (-1, -1)), WINDOWS[1]], ids=str)
@each_head_count
@each_split
def test_metadata_for_new_keys_that_do_not_come(num_splits, hk, window, pair, count):
    """Made for the new keys of the calls that have some; its window is a tensor, as that of the call may be."""
    absent = {"cu_seqlens_q": None, "cu_seqlens_k_new": None, "cache_leftpad": None, "page_size": None}
    made = plan(hk, num_splits=num_splits, max_seqlen_k_new=count, window_size=window, **absent)
    call = cached(hk) | {"window_size": pair, "num_splits": num_splits}
    function = jit_kernel.flash_attn_with_kvcache
    for new in ({}, new_keys(call, count)):
        equal(function, call | new, {"scheduler_metadata": made, "window_size": window})


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("with_rows", [False, True])
@pytest.mark.parametrize("with_padding", [False, True])
@each_split
def test_pages(page_size, with_rows, with_padding, num_splits):
    """Three times the pages that are read, in random order, a table with twice the rows, and a plan for all of it."""
    call = cached()
    rows, blocks = (2 * B if with_rows else B), SK // page_size
    order = torch.randperm(3 * rows * blocks, dtype=torch.int32).reshape(rows, -1)
    pool = {name: drawn(order.numel(), page_size, 2, D) for name in ("k_cache", "v_cache")}
    chosen = torch.randperm(rows, dtype=torch.int32)[:B]
    options = {"num_splits": num_splits, "window_size": (7, 3)}
    if with_padding:
        options["cache_leftpad"] = torch.stack(
            [torch.randint(0, int(n), (), dtype=torch.int32) for n in ints(4, 19, 11)]
        )
    table = {"page_table": order} | ({"cache_batch_idx": chosen} if with_rows else {})
    size = {"page_size": page_size, "max_seqlen_k": order.shape[1] * page_size, "max_seqlen_k_new": SQ}
    made = plan(**size | options | {"window_size": torch.tensor([7, 3])})
    read = order[chosen] if with_rows else order
    keys = {name: pages[read].flatten(1, 2)[:, :SK].contiguous() for name, pages in pool.items()}
    function = jit_kernel.flash_attn_with_kvcache
    expected = function(**call | keys | options)
    for metadata in (None, made):
        found = function(**call | pool | options | table | {"scheduler_metadata": metadata})
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-5)
    equal(function, call | pool | options | table, {"window_size": torch.tensor([7, 3])})


def test_ragged_queries_with_ragged_new_keys():
    call = cached() | {"q": drawn(11, HQ, D), "cu_seqlens_q": ints(0, 5, 6, 11), "max_seqlen_q": 5}
    new = {"k": drawn(7, 2, D), "v": drawn(7, 2, D), "cu_seqlens_k_new": ints(0, 2, 3, 7)}
    made = plan(
        cu_seqlens_q=call["cu_seqlens_q"], cu_seqlens_k_new=new["cu_seqlens_k_new"], max_seqlen_k_new=5, num_splits=1
    )
    function = jit_kernel.flash_attn_with_kvcache
    equal(function, call | new, {"rotary_seqlens": call["cache_seqlens"], "window_size": [-1, -1]})
    equal(function, call | new | {"num_splits": 1}, {"scheduler_metadata": made})
    equal(function, call | {"num_splits": 1}, {"scheduler_metadata": made, "cu_seqlens_k_new": new["cu_seqlens_k_new"]})


def test_absent_keys_with_only_qv():
    """sglang's wrapper passes every argument by name, and no k_cache where it is not read."""
    call = cached(hk=1, dv=256) | {"qv": drawn(B, SQ, HQ, 256), "only_qv": True, "sinks": None}
    function = jit_kernel.flash_attn_with_kvcache
    expected = answers(function, call)[:2]
    for _ in range(2):
        found = function(**call | {"k_cache": None, "attention_chunk": None, "out": None, "k": None, "v": None})
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)


@each_function
def test_no_chunk_is_none(name):
    function, make = CALLS[name]
    equal(function, make(), {"attention_chunk": None})
    equal(function, make() | {"causal": True}, {"attention_chunk": None})


@pytest.mark.parametrize("name", ["flash_attn_func", "flash_attn_with_kvcache"])
def test_fp8_without_descales(name):
    function, make = CALLS[name]
    ones = {f"{each}_descale": torch.ones(B, 2) for each in "qkv"}
    equal(function, make(dtype=FP8) | ones, dict.fromkeys(ones) | {"window_size": [-1, -1]})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("splits", [1, 5])
def test_combine_of_transposed_parts(splits, dtype):
    """Heads and tokens swapped in memory, gaps between the splits and between the heads, parts without keys."""
    torch.manual_seed(0)
    out = torch.randn(2 * splits, B, HQ, SQ, D).transpose(2, 3)[:splits]
    lse = torch.randn(splits, B, 2 * HQ, SQ).transpose(-1, -2)[..., :HQ]
    lse[splits // 2 :, :1] = -torch.inf
    assert not out.is_contiguous() and not lse.is_contiguous()
    plain = {"out_partial": out.contiguous(), "lse_partial": lse.contiguous(), "out_dtype": dtype}
    equal(jit_kernel.flash_attn_combine, plain, {"out_partial": out, "lse_partial": lse})

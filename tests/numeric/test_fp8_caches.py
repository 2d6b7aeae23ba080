"""q in 16 bit over an e4m3 cache on the CPU: factors of sequences and tokens, and appends that quantise."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import jit_kernel.flash_attention_v3 as fa3
from tests.support import reference
from tests.support.case_maker import raw
from tests.support.inputs import normal
from tests.support.reference import FP8

HALF = [torch.bfloat16, torch.float16]
ROWS = [1, 3, 7, 40, 300]  # tokens, with two heads a key head: decodes and prefills
KEYS, HEADS, D = 150, 2, 64
each_dtype = pytest.mark.parametrize("dtype", HALF, ids=str)


def ints(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def uniform(*shape: int, seed: int) -> Tensor:
    return 0.25 + 2 * torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(tokens: int, dtype: torch.dtype, batch: int = 2, keys: int = KEYS) -> tuple[Tensor, Tensor, Tensor]:
    q = normal(batch, tokens, 2 * HEADS, D, dtype=dtype)
    return q, *(normal(batch, keys, HEADS, D, seed=seed).to(FP8) for seed in (1, 2))


def factors(batch: int = 2, keys: int = KEYS) -> dict[str, Tensor]:
    descales = {f"{letter}_descale": uniform(batch, HEADS, seed=seed) for seed, letter in enumerate("kv")}
    return descales | {f"{letter}_scale": uniform(batch, keys, HEADS, seed=2 + i) for i, letter in enumerate("kv")}


def attend(q: Tensor, k: Tensor, v: Tensor, /, **options: Any) -> tuple[Tensor, Tensor]:
    out, lse = fa3.flash_attn_with_kvcache(q, k, v, return_softmax_lse=True, **options)
    return out, lse


def judged(out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, given: dict[str, Tensor]) -> float:
    sequences = [
        reference.Sequence(q[i], k[i], v[i], **{name: value[i] for name, value in given.items()}) for i in range(len(q))
    ]
    return reference.check(list(out), list(lse), reference.Problem(sequences, causal=True)).worst


@each_dtype
@pytest.mark.parametrize("tokens", ROWS)
def test_a_factor_of_another_token_head_or_sequence_is_seen(dtype: torch.dtype, tokens: int) -> None:
    """Each factor counts, where it belongs: the rule tells a call from one whose factors stand elsewhere."""
    q, k, v = inputs(tokens, dtype)
    given = factors()
    out, lse = attend(q, k, v, causal=True, **given)
    assert judged(out, lse, q, k, v, given) <= 1
    for name, x in given.items():
        for place in range(x.dim()):
            wrong = given | {name: x.roll(1, place)}
            assert judged(out, lse, q, k, v, wrong) > 1, (name, place)
        assert judged(out, lse, q, k, v, {key: value for key, value in given.items() if key != name}) > 1, name


@each_dtype
@pytest.mark.parametrize("tokens", ROWS)
def test_factors_of_tokens_alone_do_what_descales_do(dtype: torch.dtype, tokens: int) -> None:
    """The product of both counts: a power of two moves from one to the other without a rounding."""
    q, k, v = inputs(tokens, dtype)
    given = factors()
    expected = attend(q, k, v, causal=True, **given)
    moved = {name: x * (4.0 if "descale" in name else 0.25) for name, x in given.items()}
    for found, wanted in zip(attend(q, k, v, causal=True, **moved), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [*HALF, FP8], ids=str)
@pytest.mark.parametrize("tokens", ROWS)
@pytest.mark.parametrize("page_size", [0, 1, 7, 64])
def test_factors_of_what_no_query_sees_may_be_anything(dtype: torch.dtype, tokens: int, page_size: int) -> None:
    """Past a length, before a window, in pages of others; NaN there, or zeros, give the same bits."""
    lengths, pad = ints(KEYS - 3, 61), ints(0, 5)
    q, k, v = inputs(tokens, torch.bfloat16)
    q = q.to(dtype)
    where: dict[str, Any] = {"cache_seqlens": lengths, "cache_leftpad": pad, "window_size": (33, 0)}
    order = torch.arange(2 * KEYS)
    if page_size:
        width = -(-KEYS // page_size)
        pages = torch.randperm(2 * width + 2, generator=torch.Generator().manual_seed(0))[: 2 * width].int()
        where["page_table"] = pages.view(2, width)
        slots = pages.long().view(2, width)[:, torch.arange(KEYS) // page_size] * page_size
        order = (slots + torch.arange(KEYS) % page_size).flatten()
    shape = (2 * (-(-KEYS // page_size)) + 2, page_size) if page_size else (2, KEYS)

    def placed(x: Tensor, empty: float) -> Tensor:
        made = torch.full((shape[0] * shape[1], *x.shape[2:]), empty).to(x.dtype)
        raw(made)[order] = raw(x.flatten(0, 1))
        return made.unflatten(0, shape)

    kept = torch.zeros(2, KEYS, dtype=torch.bool)
    for i in range(2):
        first = max(int(pad[i]), int(lengths[i]) - tokens - 33)
        kept[i, first : int(lengths[i])] = True
    answers = []
    for empty in (0.0, math.nan):
        given = {
            name: placed(x.masked_fill(~kept[..., None], empty), empty) if name.endswith("_scale") else x
            for name, x in factors().items()
        }
        answers.append(attend(q, placed(k, empty), placed(v, empty), **where, **given))
    assert bool(answers[0][0].isfinite().all())
    assert all(map(torch.equal, *answers))


def cast(x: Tensor, factor: Tensor) -> Tensor:
    """x over its factors, rounded to the nearest e4m3 number, ties to even, by looking at each of them."""
    codes = torch.arange(127, dtype=torch.uint8)
    numbers = codes.view(FP8).double()
    exact = (x.float() / factor[..., None]).double()
    distance = (exact.abs().clamp(max=448)[..., None] - numbers).abs()
    best = distance == distance.amin(-1, keepdim=True)
    best &= ~(best.sum(-1, keepdim=True).eq(2) & (codes % 2 == 1))
    code = (best.to(torch.uint8) * codes).amax(-1) | (exact.signbit().to(torch.uint8) << 7)
    return torch.where(exact.isnan(), torch.full_like(code, 0x7F), code)


@each_dtype
@pytest.mark.parametrize("page_size", [0, 5])
@pytest.mark.parametrize("given", [(), ("k_descale", "v_descale"), ("k_scale", "v_scale"), ("k_descale", "v_scale")])
def test_new_keys_are_divided_and_rounded_once(dtype: torch.dtype, page_size: int, given: tuple[str, ...]) -> None:
    """Byte for byte, with numbers that are too large, too small, ties, infinite and NaN; all else stays."""
    q = normal(2, 3, 2 * HEADS, D, dtype=dtype)
    old, new, room = ints(7, 4), 6, 15
    values = normal(2, new, HEADS, D, seed=3) * torch.tensor([1.0, 1e-3, 100.0, 500.0, 1e4, 0.0])[None, :, None, None]
    values[:, 1, 0, :4] = torch.tensor([math.inf, -math.inf, math.nan, 464.0])
    values[:, 2, 1, :4] = torch.tensor([17.0, 19.0, 2.0**-10, 3 * 2.0**-10])  # ties
    k_new, v_new = values.to(dtype), values.flip(-1).to(dtype)
    shape = (6, page_size) if page_size else (2, room)
    caches = [torch.full((*shape, HEADS, D), 0x55, dtype=torch.uint8).view(FP8) for _ in range(2)]
    scales = {f"{letter}_descale": uniform(2, HEADS, seed=8) for letter in "kv"}
    scales |= {f"{letter}_scale": uniform(*shape, HEADS, seed=9) for letter in "kv"}
    scales = {name: x for name, x in scales.items() if name in given}
    table = ints(4, 0, 3, 5, 2, 1).view(2, 3)
    where = {"page_table": table} if page_size else {}
    fa3.flash_attn_with_kvcache(q, *caches, k_new, v_new, cache_seqlens=old, **where, **scales)
    for letter, cache, x in (("k", caches[0], k_new), ("v", caches[1], v_new)):
        expected = torch.full((*shape, HEADS, D), 0x55, dtype=torch.uint8)
        for i in range(2):
            at = torch.arange(int(old[i]), int(old[i]) + new)
            place = (table[i, at // page_size].long(), at % page_size) if page_size else (torch.full_like(at, i), at)
            factor = torch.ones(new, HEADS)
            if f"{letter}_descale" in scales:
                factor = factor * scales[f"{letter}_descale"][i]
            if f"{letter}_scale" in scales:
                factor = factor * scales[f"{letter}_scale"][place]
            expected[place] = cast(x[i], factor)
        found = raw(cache)
        nan = (expected & 0x7F) == 0x7F
        assert torch.equal(nan, (found & 0x7F) == 0x7F)
        assert torch.equal(found[~nan], expected[~nan])


@each_dtype
@pytest.mark.parametrize("interleaved", [False, True])
def test_new_keys_are_turned_before_they_are_rounded(dtype: torch.dtype, interleaved: bool) -> None:
    """In float32, so that only what lies next to a tie may round the other way; a second rounding would be seen."""
    q, k, v = inputs(2, dtype, batch=1, keys=400)
    new = normal(1, 300, HEADS, D, seed=5).to(dtype)
    angles = torch.rand(500, D // 2, generator=torch.Generator().manual_seed(6)) * 6.28
    tables = angles.cos().to(dtype), angles.sin().to(dtype)
    given = {"k_descale": uniform(1, HEADS, seed=7), "k_scale": uniform(1, 400, HEADS, seed=8)}
    fa3.flash_attn_with_kvcache(
        q, k, v, new, new, rotary_cos=tables[0], rotary_sin=tables[1], cache_seqlens=50,
        rotary_interleaved=interleaved, **given,
    )  # fmt: skip
    turned = reference.turned(new[0], *tables, torch.arange(50, 350), interleaved=interleaved)
    factor = given["k_descale"][0] * given["k_scale"][0, 50:350]
    once = reference.quantised(turned, factor)
    twice = reference.quantised(turned.to(dtype), factor)
    found = k[0, 50:350]
    differ = float((raw(found) != raw(once)).double().mean())
    assert differ < 1e-4
    assert float((raw(twice) != raw(once)).double().mean()) > 20 * max(differ, 1e-5)


@each_dtype
def test_new_keys_in_e4m3_are_stored_as_they_are(dtype: torch.dtype) -> None:
    q, k, v = inputs(2, dtype)
    new = [normal(2, 3, HEADS, D, seed=seed).to(FP8) for seed in (5, 6)]
    given = factors()
    out, lse = attend(q, k, v, k=new[0], v=new[1], cache_seqlens=ints(20, 9), causal=True, **given)
    for i, start in enumerate((20, 9)):
        assert torch.equal(raw(k[i, start : start + 3]), raw(new[0][i]))
        assert torch.equal(raw(v[i, start : start + 3]), raw(new[1][i]))
    again = attend(q, k, v, cache_seqlens=ints(23, 12), causal=True, **given)
    assert torch.equal(out, again[0])
    assert torch.equal(lse, again[1])


@each_dtype
def test_factors_may_lie_in_the_cache_itself(dtype: torch.dtype) -> None:
    """Four bytes behind each head's row, as engines that keep them with their keys do; appended keys leave them."""
    pages, size = 40, 8
    memory = [torch.zeros(pages, size, HEADS, D + 4, dtype=torch.uint8) for _ in range(2)]
    caches = [x[..., :D].view(FP8) for x in memory]
    scales = [x.view(torch.float32)[..., D // 4] for x in memory]
    q, k, v = inputs(3, dtype)
    given = factors()
    table = torch.arange(pages, dtype=torch.int32).view(2, 20)[:, : -(-KEYS // size)]
    at = torch.arange(KEYS)
    for i in range(2):
        place = table[i, at // size].long(), at % size
        for n, (cache, x, letter) in enumerate(zip(caches, (k, v), "kv", strict=True)):
            raw(cache)[place] = raw(x[i])
            scales[n][place] = given[f"{letter}_scale"][i]
    own = {"k_descale": given["k_descale"], "v_descale": given["v_descale"]}
    own |= {"k_scale": scales[0], "v_scale": scales[1], "page_table": table}
    new = normal(2, 3, HEADS, D, seed=9).to(dtype)
    seqlens = ints(KEYS - 3, 70)
    found = attend(q, *caches, k=new, v=new, cache_seqlens=seqlens, causal=True, **own)
    expected = attend(q, k, v, k=new, v=new, cache_seqlens=seqlens, causal=True, **given)
    assert all(map(torch.equal, found, expected))
    for n, letter in enumerate("kv"):
        for i in range(2):
            place = table[i, at // size].long(), at % size
            assert torch.equal(scales[n][place], given[f"{letter}_scale"][i])


@each_dtype
def test_the_functions_without_a_cache_take_them_too(dtype: torch.dtype) -> None:
    q, k, v = inputs(5, dtype)
    given = factors()
    descales = {name: x for name, x in given.items() if "descale" in name}
    expected = attend(q, k, v, causal=True, **given)[0]
    offsets = {"cu_seqlens_q": ints(0, 5, 10), "cu_seqlens_k": ints(0, KEYS, 2 * KEYS)}
    flat = {name: x.flatten(0, 1) for name, x in given.items() if name.endswith("_scale")}
    rows = [x.flatten(0, 1) for x in (q, k, v)]
    ragged = fa3.flash_attn_varlen_func(*rows, **offsets, causal=True, **descales, **flat)
    assert torch.equal(ragged.view_as(expected), expected)
    dense = fa3.flash_attn_func(q, k, v, causal=True, **descales)
    assert torch.equal(dense, attend(q, k, v, causal=True, **descales)[0])
    assert not torch.equal(dense, expected)


def test_the_result_and_q_descale() -> None:
    """The result has q's dtype; a factor of a q that is not e4m3 is not read, whatever it holds."""
    q, k, v = inputs(2, torch.float16)
    out, _ = attend(q, k, v, q_descale=torch.full((2, HEADS), math.nan))
    assert out.dtype == torch.float16
    assert torch.equal(out, attend(q, k, v)[0])


@pytest.mark.parametrize("planned", [torch.bfloat16, FP8], ids=str)
def test_one_plan_by_either_dtype(planned: torch.dtype) -> None:
    """Engines name q's dtype, or the cache's."""
    q, k, v = inputs(2, torch.bfloat16)
    lengths = ints(100, 40)
    sizes = {"batch_size": 2, "max_seqlen_q": 2, "max_seqlen_k": KEYS, "num_heads_q": 4, "num_heads_kv": HEADS}
    made = fa3.get_scheduler_metadata(**sizes, headdim=D, cache_seqlens=lengths, qkv_dtype=planned)
    expected = attend(q, k, v, cache_seqlens=lengths)
    assert all(map(torch.equal, attend(q, k, v, cache_seqlens=lengths, scheduler_metadata=made), expected))
    other = fa3.get_scheduler_metadata(**sizes, headdim=D, cache_seqlens=lengths, qkv_dtype=torch.float16)
    with pytest.raises(ValueError, match="qkv_dtype"):
        attend(q, k, v, cache_seqlens=lengths, scheduler_metadata=other)


def test_a_traced_call_has_the_same_bits() -> None:
    q, k, v = inputs(3, torch.bfloat16)
    given = factors()

    def call(q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor, v_scale: Tensor) -> Tensor:
        out: Tensor = fa3.flash_attn_with_kvcache(q, k, v, k_scale=k_scale, v_scale=v_scale)
        return out

    arguments = (q, k, v, given["k_scale"], given["v_scale"])
    traced = make_fx(call)(*arguments)
    assert torch.equal(traced(*arguments), call(*arguments))
    assert "k_scale" in str(traced.code)


def test_factors_must_not_share_bytes_with_keys_that_are_written() -> None:
    q, _, v = inputs(2, torch.bfloat16)
    memory = torch.zeros(2, KEYS, HEADS, D + 4, dtype=torch.uint8)
    new = normal(2, 1, HEADS, D).bfloat16()
    for word in (0, D // 4 - 1):
        scale = memory.view(torch.float32)[..., word]
        with pytest.raises(ValueError, match="k_cache shares its memory with k_scale"):
            attend(q, memory[..., :D].view(FP8), v, k=new, v=new, cache_seqlens=3, k_scale=scale)
        attend(q, memory[..., :D].view(FP8), v, cache_seqlens=3, k_scale=scale)


@each_dtype
@pytest.mark.parametrize("tokens", [1, 4, 40])
@pytest.mark.parametrize("start", [0, 1, 8, 13])
def test_every_number_of_e4m3_is_read_as_it_is(dtype: torch.dtype, tokens: int, start: int) -> None:
    """A row of one key is its value: all 256 codes, at every place of a vector, times a power of two."""
    q, k = normal(1, tokens, 2, 64, dtype=dtype), torch.ones(1, 1, 1, 64).to(FP8)
    codes = torch.arange(start, start + 256, dtype=torch.uint8)
    v = codes.view(FP8).view(1, 1, 1, 256)
    for factor in (1.0, 0.25):
        out, _ = attend(q, k, v, v_scale=torch.full((1, 1, 1), factor))
        expected = (v.float() * factor).to(dtype).expand_as(out)
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
        assert int(out[0, 0, 0].isnan().sum()) == 2

"""draft_mask on the CPU: trees and random bits by the numeric rule, chains by the bits of a causal call."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import jit_kernel.flash_attention_v3 as fa3
from tests.support import cases, drafts, reference
from tests.support.inputs import normal
from tests.support.threads import answers

DTYPES = cases.CPU.dtypes
ROWS = [1, 7, 40, 90]  # tokens, with two heads a key head: decodes, and prefills of one tile and of several
MASKS: list[dict[str, Any]] = [
    {},
    {"causal": True},
    {"window_size": (50, 3)},
    {"attention_chunk": 64, "causal": True},
    {"softcap": 7.0},
    {"window_size": (9, 0), "softcap": 20.0},
]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ints(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def tensors(tokens: int, keys: int, dtype: torch.dtype, batch: int = 1, d: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    q = normal(batch, tokens, 4, d).to(dtype)
    return q, normal(batch, keys, 2, d, seed=1).to(dtype), normal(batch, keys, 2, d, seed=2).to(dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, /, **options: Any) -> tuple[Tensor, Tensor]:
    out, lse = fa3.flash_attn_with_kvcache(q, k, v, return_softmax_lse=True, **options)
    return out, lse


def shares(out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **problem: Any) -> reference.Shares:
    """Of a dense call: mask (b * sq, words)."""
    rows = mask.unflatten(0, q.shape[:2])
    sequences = [reference.Sequence(q[i], k[i], v[i], draft_mask=rows[i]) for i in range(len(q))]
    return reference.check(list(out), list(lse), reference.Problem(sequences, **problem))


def test_words_are_read_from_the_lowest_bit() -> None:
    """A row that sees one key alone is its value, whatever the score."""
    q, k, v = tensors(1, 70, torch.float32)
    for key in (6, 7, 37, 38, 68, 69):
        bit = key - 6
        words = [0, 0]
        words[bit // 32] = 1 << (bit % 32)
        mask = torch.tensor([words]).sub(torch.tensor([words]) >> 31 << 32).int()
        options = {"draft_mask": mask, "window_size": (63, 0)}
        out, _ = attend(q, k, v, **options)
        assert torch.allclose(out[0, 0], v[0, key].repeat_interleave(2, dim=0), atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", ROWS)
def test_trees_and_random_bits(dtype: torch.dtype, tokens: int) -> None:
    sizes = [(200, 3), (90, 3), (77, 4), (600, 5)]
    for i, mask in enumerate(MASKS):
        keys, words = sizes[(i + tokens) % 4]
        q, k, v = tensors(tokens, keys, dtype, batch=2)
        made = [drafts.tree(tokens, words, generator(i)), drafts.scattered(tokens, words, generator(i))]
        bits = drafts.pack(torch.cat(made))
        sinks = torch.randn(4, generator=generator(i)) if i % 2 else None
        out, lse = attend(q, k, v, draft_mask=bits, num_splits=(0, 1, 3)[i % 3], sinks=sinks, **mask)
        found = shares(out, lse, q, k, v, bits, sinks=sinks, **mask)
        assert found.worst <= 1, (found, mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", ROWS)
def test_a_chain_has_the_bits_of_a_causal_call(dtype: torch.dtype, tokens: int) -> None:
    masks: list[dict[str, Any]] = [{}, {"window_size": (70, -1)}, {"softcap": 9.0}]
    for keys, mask in zip((tokens, 100, 1500), masks, strict=True):
        words = -(-tokens // 32) + keys % 2
        q, k, v = tensors(tokens, keys, dtype)
        causal = attend(q, k, v, causal=True, **mask)
        for others in ({}, {"causal": True}):
            drafted = attend(q, k, v, draft_mask=drafts.pack(drafts.chain(tokens, words)), **others, **mask)
            assert all(map(torch.equal, drafted, causal)), mask


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", ROWS)
def test_a_mask_of_another_bit_fails_the_rule(dtype: torch.dtype, tokens: int) -> None:
    """Shifted by one bit, by one row, with its words the other way round, or read from the first key on."""
    keys, words = 150, 4
    q, k, v = tensors(tokens, keys, dtype)
    seen = torch.rand(tokens, 32 * words, generator=generator(3)) < 0.5
    bits = drafts.pack(seen)
    mutants = [seen.roll(1, 1), seen.roll(-1, 1), seen.roll(32, 1), seen.unflatten(1, (-1, 32)).flip(2).flatten(1)]
    if tokens > 1:
        mutants.append(seen.roll(1, 0))
    for mutant in mutants:
        out, lse = attend(q, k, v, draft_mask=drafts.pack(mutant))
        assert shares(out, lse, q, k, v, bits).worst > 1
    out, lse = attend(q, k, v, draft_mask=bits)
    assert shares(out, lse, q, k, v, bits).worst <= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", ROWS)
@pytest.mark.parametrize("keys", [5, 33, 64])
def test_bits_without_a_key_and_rows_without_any(dtype: torch.dtype, tokens: int, keys: int) -> None:
    words = 2
    q, k, v = tensors(tokens, keys, dtype)
    seen = drafts.scattered(tokens, words, generator(5))
    other = seen.clone()
    other[:, : 64 - keys] ^= True
    sinks = torch.randn(4, generator=generator(6))
    out, lse = attend(q, k, v, draft_mask=drafts.pack(seen))
    again = attend(q, k, v, draft_mask=drafts.pack(other))
    assert torch.equal(out, again[0])
    assert torch.equal(lse, again[1])
    empty = ~seen[:, 64 - keys :].any(1)
    assert bool(empty[0])
    assert torch.equal(lse[0].isneginf(), empty.expand(4, -1))
    assert not bool(out[0, empty].count_nonzero())
    out, lse = attend(q, k, v, draft_mask=drafts.pack(seen), sinks=sinks)
    assert not bool(out[0, empty].count_nonzero())
    assert torch.allclose(lse[0, :, empty], sinks[:, None].expand(-1, int(empty.sum())), atol=1e-6)
    out, lse = attend(q, k, v, draft_mask=torch.zeros(tokens, words, dtype=torch.int32))
    assert not bool(out.count_nonzero())
    assert bool(lse.isneginf().all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", ROWS)
@pytest.mark.parametrize("keys", [130, 64])
def test_hidden_keys_reach_no_result(dtype: torch.dtype, tokens: int, keys: int) -> None:
    """The bits that zeros there give, whatever keys and values that no row sees hold; whole words are hidden, too."""
    words = 3
    q, k, v = tensors(tokens, keys, dtype)
    seen = torch.rand(tokens, 32 * words, generator=generator(7)) < 0.5
    hidden = torch.rand(32 * words, generator=generator(8)) < 0.4
    hidden[-32:] = True
    seen &= ~hidden
    at = (keys - 32 * words + hidden.nonzero().flatten()).tolist()
    results = []
    for value in (0.0, math.nan):
        foul_k, foul_v = k.clone(), v.clone()
        for key in at:
            if key >= 0:
                foul_k[0, key] = foul_v[0, key] = torch.full((2, 64), value).to(dtype)
        results.append(attend(q, foul_k, foul_v, draft_mask=drafts.pack(seen)))
    assert all(map(torch.equal, *results))
    assert not bool(results[0][0].isnan().any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", ROWS)
def test_a_value_reaches_the_rows_that_see_it_alone(dtype: torch.dtype, tokens: int) -> None:
    keys, words, column = 100, 2, 7
    q, k, v = tensors(tokens, keys, dtype)
    seen = torch.rand(tokens, 32 * words, generator=generator(9)) < 0.5
    bits = drafts.pack(seen)
    clean, clean_lse = attend(q, k, v, draft_mask=bits)
    for bit, value in ((0, math.nan), (31, math.inf), (32, math.nan), (63, math.inf)):
        foul = v.clone()
        foul[0, keys - 64 + bit, 1, column] = value
        out, lse = attend(q, k, foul, draft_mask=bits)
        assert torch.allclose(lse, clean_lse, atol=1e-4)
        reached = torch.zeros(out.shape, dtype=torch.bool)
        reached[0, seen[:, bit], 2:, column] = True
        assert bool(out[reached].isnan().all() if math.isnan(value) else (out[reached] == value).all())
        # With AMX another kernel does such a decode again, and may round to the next number.
        assert torch.allclose(out[~reached].float(), clean[~reached].float(), rtol=2**-7, atol=2e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("page_size", [0, 1, 16])
def test_verifying_trees_in_a_cache(dtype: torch.dtype, page_size: int) -> None:
    """Ragged queries, new keys appended first, left padding: three sequences, each as its own plain tree."""
    lengths, new, pads, words = [300, 0, 41], [13, 6, 30], [17, 0, 40], 2
    room, starts = 336, ints(0, 13, 19, 49)
    k, v = (normal(3, room, 2, 64, seed=s).to(dtype) for s in (1, 2))
    q, new_k, new_v = (normal(49, heads, 64, seed=s).to(dtype) for s, heads in ((3, 4), (4, 2), (5, 2)))
    seen = torch.cat([drafts.tree(n, words, generator(i)) for i, n in enumerate(new)])
    bits = drafts.pack(seen)
    options: dict[str, Any] = {"cu_seqlens_q": starts, "max_seqlen_q": 30, "cache_seqlens": ints(*lengths)}
    options |= {"k": new_k, "v": new_v, "cu_seqlens_k_new": starts, "cache_leftpad": ints(*pads), "draft_mask": bits}
    caches = k.clone(), v.clone()
    if page_size:
        options["page_table"] = torch.arange(3 * room // page_size, dtype=torch.int32).flip(0).view(3, -1)
        pages = [x.view(-1, page_size, 2, 64)[options["page_table"].long().flatten().argsort()] for x in caches]
        caches = pages[0].contiguous(), pages[1].contiguous()
    out, lse = attend(q, *caches, **options)
    sequences = []
    for i, (old, pad) in enumerate(zip(lengths, pads, strict=True)):
        rows = slice(int(starts[i]), int(starts[i + 1]))
        both = [reference_rows(x[i, pad:old], y[rows]) for x, y in ((k, new_k), (v, new_v))]
        sequences.append(reference.Sequence(q[rows], *both, draft_mask=bits[rows]))
    rows = [slice(a, b) for a, b in itertools.pairwise(starts.tolist())]
    found = reference.check([out[r] for r in rows], [lse[:, r] for r in rows], reference.Problem(sequences))
    assert found.worst <= 1, found


def reference_rows(old: Tensor, new: Tensor) -> Tensor:
    joined = torch.cat([x.view(torch.uint8) if x.dtype == cases.FP8 else x for x in (old, new)])
    return joined.view(old.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [2, 5, 60])
def test_neighbours_and_threads_change_no_bit(dtype: torch.dtype, tokens: int) -> None:
    lengths, words = [2100, 33, 700], 2
    q, k, v = tensors(tokens, 2100, dtype, batch=3)
    bits = drafts.pack(torch.cat([drafts.tree(tokens, words, generator(i)) for i in range(3)]))
    rows = bits.view(3, tokens, words)

    def call(some: slice = slice(None)) -> tuple[Tensor, Tensor]:
        used = ints(*lengths[some])
        mask = rows[some].flatten(0, 1)
        return attend(q[some], k[some], v[some], cache_seqlens=used, draft_mask=mask, num_splits=1)

    together, *others = answers(call)
    assert all(torch.equal(a, b) for other in others for a, b in zip(together, other, strict=True))
    for i in range(3):
        alone = call(slice(i, i + 1))
        assert torch.equal(alone[0], together[0][i : i + 1])
        assert torch.equal(alone[1], together[1][i : i + 1])


def test_ragged_keys_and_one_row_for_all() -> None:
    """flash_attn_varlen_func, its rows behind seqused_q left alone; an expanded mask; a strided one."""
    q, k, v = normal(20, 4, 64), normal(150, 2, 64, seed=1), normal(150, 2, 64, seed=2)
    offsets = ints(0, 12, 20), ints(0, 40, 150)
    seen = drafts.scattered(20, 2, generator(1))
    wide = torch.full((20, 5), -1, dtype=torch.int32)
    wide[:, 2:4] = drafts.pack(seen)
    out, lse = fa3.flash_attn_varlen_func(
        q, k, v, *offsets, seqused_q=ints(9, 8), draft_mask=wide[:, 2:4], return_softmax_lse=True
    )
    spans = [(slice(0, 9), slice(0, 40)), (slice(12, 20), slice(40, 150))]
    mask = drafts.pack(seen)
    sequences = [reference.Sequence(q[a], k[b], v[b], draft_mask=mask[a]) for a, b in spans]
    outs, lses = [out[a] for a, _ in spans], [lse[:, a] for a, _ in spans]
    assert reference.check(outs, lses, reference.Problem(sequences)).worst <= 1
    one = drafts.pack(drafts.scattered(3, 1, generator(2))[2:])
    expanded = fa3.flash_attn_varlen_func(q, k, v, *offsets, draft_mask=one.expand(20, 1))
    copied = fa3.flash_attn_varlen_func(q, k, v, *offsets, draft_mask=one.repeat(20, 1))
    assert torch.equal(expanded, copied)


def test_a_traced_call_takes_it() -> None:
    q, k, v = tensors(6, 80, torch.float32)
    bits = [drafts.pack(drafts.tree(6, 1, generator(i))) for i in range(2)]

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Any:
        return fa3.flash_attn_with_kvcache(q, k, v, draft_mask=mask)

    traced = make_fx(call)(q, k, v, bits[0])
    assert torch.equal(traced(q, k, v, bits[1]), call(q, k, v, bits[1]))
    assert not torch.equal(call(q, k, v, bits[0]), call(q, k, v, bits[1]))

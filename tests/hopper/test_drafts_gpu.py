"""Draft masks over a cache on the Hopper kernels, decode and prefill: chains, trees, and what no query sees."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from jit_kernel import config, device
from jit_kernel.fa3.hopper import kernels as hopper_kernels
from jit_kernel.flash_attention_v3 import flash_attn_varlen_func, flash_attn_with_kvcache
from tests.support import drafts, reference
from tests.support.hopper_inputs import randn, starts

pytestmark = pytest.mark.gpu

# One split, and more than 64 rows of tokens and heads of a group, go to prefill; the others to decode.
GROUPS, TOKENS, PAGE_SIZES, SPLITS = (1, 4, 8), range(1, 17), (64, 16, 1), (0, 1)
LENGTHS, WORDS = [700, 64, 1999], 2


@pytest.fixture(autouse=True)
def _hopper_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every call goes to these kernels, or fails."""
    if device.get_device_capability() != (9, 0):
        pytest.skip("the kernels are for compute capability 9.0")
    monkeypatch.setenv("JIT_KERNEL_IMPLEMENTATION", "hopper")
    config.reload()
    yield
    monkeypatch.undo()
    config.reload()


def ints(*values: int) -> Tensor:
    return torch.tensor(values, device="cuda", dtype=torch.int32)


def paged_cache(
    lengths: list[int], heads: int, page_size: int, sizes: tuple[int, int] = (128, 128)
) -> tuple[list[Tensor], dict[str, Any], list[list[Tensor]]]:
    """Keys and values in shuffled pages, the arguments that say where, and views of each sequence's own, k and v."""
    width = -(-max(lengths) // page_size)
    table = torch.randperm(len(lengths) * width, device="cuda").view(len(lengths), width).int()
    caches = [randn(table.numel(), page_size, heads, d) for d in sizes]
    given = {"cache_seqlens": ints(*lengths), "page_table": table, "return_softmax_lse": True}
    return caches, given, [gathered(caches, table, i, n) for i, n in enumerate(lengths)]


def gathered(caches: list[Tensor], table: Tensor, sequence: int, length: int) -> list[Tensor]:
    return [x[table[sequence].long()].flatten(0, 1)[:length] for x in caches]


def put(caches: list[Tensor], table: Tensor, sequence: int, keys: Tensor, value: float) -> None:
    page_size = caches[0].shape[1]
    pages = table[sequence].long()[keys // page_size]
    for x in caches:
        x[pages, keys % page_size] = value


@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_a_chain_gives_the_bits_of_a_causal_call(page_size: int, group: int, splits: int) -> None:
    torch.manual_seed(page_size + group)
    caches, given, _ = paged_cache(LENGTHS, 2, page_size)
    for tokens in TOKENS:
        q = randn(3, tokens, 2 * group, 128)
        chain = drafts.pack(drafts.chain(tokens, WORDS).cuda()).repeat(3, 1)
        causal = flash_attn_with_kvcache(q, *caches, causal=True, num_splits=splits, **given)
        for masked in (False, True):
            drafted = flash_attn_with_kvcache(
                q, *caches, causal=masked, num_splits=splits, draft_mask=chain, **given
            )  # fmt: skip
            assert all(map(torch.equal, drafted, causal)), (tokens, masked)


@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_trees_are_within_the_rule_and_those_of_another_bit_are_not(page_size: int, group: int, splits: int) -> None:
    torch.manual_seed(page_size + group)
    caches, given, sequences = paged_cache(LENGTHS, 2, page_size)
    for tokens in TOKENS:
        random = torch.Generator().manual_seed(tokens)
        q = randn(3, tokens, 2 * group, 128)
        made = (drafts.tree, drafts.scattered, drafts.tree)
        seen = torch.cat([make(tokens, WORDS, random) for make in made]).cuda()
        rows = drafts.pack(seen).view(3, tokens, WORDS)
        for causal in (False, True):
            problem = reference.Problem(
                [reference.Sequence(q[i], *sequences[i], draft_mask=rows[i]) for i in range(3)], causal=causal
            )
            for shift in (0, 1) if tokens > 1 else (0,):
                mask = drafts.pack(seen.roll(shift, 1))
                out, lse = flash_attn_with_kvcache(
                    q, *caches, causal=causal, num_splits=splits, draft_mask=mask, **given
                )  # fmt: skip
                worst = reference.check(list(out), list(lse), problem).worst
                assert (worst <= 1) is (shift == 0), (tokens, causal, shift, worst)


@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_what_the_mask_hides_from_every_query_reaches_no_result(page_size: int, group: int, splits: int) -> None:
    """The bits that zeros give; causal hides some keys from the first tokens, and the mask from the others."""
    torch.manual_seed(page_size + group)
    caches, given, sequences = paged_cache(LENGTHS, 2, page_size)
    for tokens in TOKENS:
        random = torch.Generator().manual_seed(tokens)
        q = randn(3, tokens, 2 * group, 128)
        hidden = torch.rand(3, 1, 32 * WORDS, generator=random) < 0.4
        seen = (torch.rand(3, tokens, 32 * WORDS, generator=random) < 0.6) & ~hidden
        mask = drafts.pack(seen.flatten(0, 1).cuda())
        rows = mask.view(3, tokens, WORDS)
        problem = reference.Problem(
            [reference.Sequence(q[i], *sequences[i], draft_mask=rows[i]) for i in range(3)], causal=True
        )
        unseen = [(~reference.seen_by(s, problem).any(0)).nonzero().flatten() for s in problem.sequences]
        assert all(len(keys) > 0 for keys in unseen)
        answers = []
        for value in (0.0, math.nan):
            foul = [x.clone() for x in caches]
            for i, keys in enumerate(unseen):
                put(foul, given["page_table"], i, keys, value)
            answers.append(
                flash_attn_with_kvcache(q, *foul, causal=True, num_splits=splits, draft_mask=mask, **given)
            )  # fmt: skip
        assert all(map(torch.equal, *answers)), tokens
        assert not bool(answers[1][0].isnan().any())


@pytest.mark.parametrize("page_size", [64, 3])
@pytest.mark.parametrize("sizes", hopper_kernels.HEAD_DIMS, ids=str)
def test_long_trees_over_many_blocks_and_tiles(sizes: tuple[int, int], page_size: int) -> None:
    """Ragged queries of several tiles, masks of several blocks in rows of a wider tensor, left padding, windows."""
    torch.manual_seed(sizes[0] + page_size)
    tokens, lengths, pads, words = [150, 40, 9], [700, 333, 260], [0, 70, 3], 9
    caches, given, sequences = paged_cache(lengths, 2, page_size, sizes)
    q, offsets = randn(sum(tokens), 8, sizes[0]), starts(tokens)
    wide = torch.randint(-(2**31), 2**31, (sum(tokens), words + 4), device="cuda").int()
    mask = wide[:, 2 : 2 + words]
    given |= {"cache_leftpad": ints(*pads), "cu_seqlens_q": offsets, "max_seqlen_q": max(tokens), "draft_mask": mask}
    spans = [slice(int(a), int(b)) for a, b in itertools.pairwise(offsets)]
    for window in ((-1, -1), (100, 3)):
        problem = reference.Problem(
            [
                reference.Sequence(q[span], *(x[pad:] for x in own), draft_mask=mask[span])
                for span, own, pad in zip(spans, sequences, pads, strict=True)
            ],
            window_size=window,
        )
        out, lse = flash_attn_with_kvcache(q, *caches, window_size=window, num_splits=1, **given)
        shares = reference.check([out[span] for span in spans], [lse[:, span] for span in spans], problem)
        assert shares.worst <= 1, (window, shares)


@pytest.mark.parametrize("group", GROUPS)
def test_a_row_that_is_shown_no_key_is_zero_and_keys_are_cut_alike(group: int) -> None:
    """Few tiles over many keys, all of them with bits: blocks of every part hold some, and two rows see none at all."""
    torch.manual_seed(group)
    tokens, length = 20, 4096
    caches, given, sequences = paged_cache([length], 1, 16)
    q = randn(1, tokens, group, 128)
    seen = torch.rand(tokens, length, device="cuda") < 0.3
    seen[3] = seen[17] = False
    mask = drafts.pack(seen)
    problem = reference.Problem([reference.Sequence(q[0], *sequences[0], draft_mask=mask)])
    for splits in (0, 1, 5):
        out, lse = flash_attn_with_kvcache(q, *caches, num_splits=splits, draft_mask=mask, **given)
        assert reference.check(list(out), list(lse), problem).worst <= 1
        assert not bool(out[0, [3, 17]].count_nonzero())
        assert bool((lse[0, :, [3, 17]] == -math.inf).all())


def test_varlen_over_pages_is_served_with_a_draft_mask_too() -> None:
    torch.manual_seed(1)
    caches, given, _ = paged_cache(LENGTHS, 2, 16)
    q = randn(3, 7, 8, 128)
    mask = torch.randint(-(2**31), 2**31, (21, WORDS), device="cuda").int()
    expected = flash_attn_with_kvcache(q, *caches, num_splits=1, draft_mask=mask, **given)
    out, lse = flash_attn_varlen_func(
        q.flatten(0, 1), *caches, starts([7, 7, 7]), None, 7, None, seqused_k=given["cache_seqlens"],
        page_table=given["page_table"], return_softmax_lse=True, draft_mask=mask,
    )  # fmt: skip
    assert torch.equal(out.view_as(expected[0]), expected[0])
    assert torch.equal(lse.unflatten(1, (3, 7)).transpose(0, 1), expected[1])

"""Cascade attention and zig-zag halves: what two calls give is what one call gives, within the numeric rule."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest
import torch
from torch import Tensor

from jit_kernel.attention import AttentionLayer, FlashAttentionBackend, ForwardMetadata, Half, forward_zigzag
from tests.support import case_run, reference
from tests.support.musa_calls import on_device
from tests.support.musa_device import Machine, on_path, to_cpu, to_musa

CASES = 300


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors are quicker on one thread."""
    with case_run.one_thread():
        yield


POOL = 96  # pages of a case's cache


@dataclass
class Caches:
    """Pages of random numbers, handed out one by one; keys of a list of pages."""

    k: Tensor
    v: Tensor
    free: list[int]

    def take(self, tokens: int) -> list[int]:
        return [self.free.pop() for _ in range(-(-tokens // self.k.shape[1]))]

    def tokens(self, pages: list[int], count: int) -> tuple[Tensor, Tensor]:
        return tuple(x[pages].flatten(0, 1)[:count] for x in (self.k, self.v))  # type: ignore[return-value]


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def starts(lengths: list[int]) -> Tensor:
    return int32([0, *torch.tensor(lengths).cumsum(0).tolist()])


def table(rows: list[list[int]]) -> Tensor:
    width = max(1, *(len(row) for row in rows))
    return int32([row + [1 << 20] * (width - len(row)) for row in rows])  # type: ignore[arg-type]


def ragged(lengths_q: list[int], lengths_k: list[int], pages: list[list[int]], tag: str = "base") -> ForwardMetadata:
    return ForwardMetadata(
        starts(lengths_q), max(lengths_q), int32(lengths_k), max(*lengths_k, 1), table(pages), tag=tag
    )


def make_caches(dice: Random, random: torch.Generator, hk: int, d: int, dv: int, dtype: torch.dtype) -> Caches:
    size = dice.choice([1, 3, 4])
    k, v = (torch.randn(POOL, size, hk, width, generator=random).to(dtype) for width in (d, dv))
    order = list(range(POOL))
    dice.shuffle(order)
    return Caches(k, v, order)


def judge(out: Tensor, lse: Tensor, lengths: list[int], problem: reference.Problem) -> float:
    bounds = starts(lengths).tolist()
    rows = [slice(a, b) for a, b in itertools.pairwise(bounds)]
    shares = reference.check([out[r] for r in rows], [lse[:, r] for r in rows], problem)
    assert shares.worst <= 1.0, shares
    return shares.worst


@dataclass
class CascadeCase:
    """Groups of sequences, each group with a prefix of its own."""

    q: Tensor
    caches: Caches
    prefix: ForwardMetadata
    suffix: ForwardMetadata
    layer: AttentionLayer
    lengths_q: list[int]
    problem: reference.Problem


def cascade_case(seed: int, dtypes: tuple[torch.dtype, ...]) -> CascadeCase:
    dice, random = Random(seed), torch.Generator().manual_seed(seed)
    dtype, (d, dv) = dice.choice(dtypes), dice.choice([(64, 64), (128, 128), (192, 128)])
    hk = dice.choice([1, 2])
    hq = hk * dice.choice([1, 2, 4])
    caches = make_caches(dice, random, hk, d, dv, dtype)
    groups = [dice.randint(1, 3) for _ in range(dice.randint(1, 2))]
    lengths_q = [dice.choice([1, 1, dice.randint(1, 7)]) for _ in range(sum(groups))]
    causal = dice.random() < 0.6
    # A causal suffix holds its own queries' keys; a draft tree's need not.
    lengths_k = [n + dice.randint(0, 9) if causal else dice.choice([0, dice.randint(1, 12)]) for n in lengths_q]
    lengths_p = [dice.choice([0, dice.randint(1, 30)]) for _ in groups]
    pages_p, pages_k = [caches.take(n) for n in lengths_p], [caches.take(n) for n in lengths_k]
    q = torch.randn(sum(lengths_q), hq, d, generator=random).to(dtype)
    bounds, rows_of_group, at = starts(lengths_q).tolist(), [], 0
    sequences = []
    for g, count in enumerate(groups):
        rows_of_group.append(sum(lengths_q[at : at + count]))
        for i in range(at, at + count):
            parts = zip(caches.tokens(pages_p[g], lengths_p[g]), caches.tokens(pages_k[i], lengths_k[i]), strict=True)
            k, v = (torch.cat(pair) for pair in parts)
            sequences.append(reference.Sequence(q[bounds[i] : bounds[i + 1]], k, v))
        at += count
    sinks = torch.randn(hq, generator=random) if dice.random() < 0.4 else None
    softcap = dice.choice([0.0, 0.0, 5.0])
    layer = AttentionLayer(causal=causal, sinks=sinks, softcap=softcap)
    problem = reference.Problem(sequences, causal=causal, sinks=sinks, softcap=softcap)
    prefix, suffix = ragged(rows_of_group, lengths_p, pages_p), ragged(lengths_q, lengths_k, pages_k)
    return CascadeCase(q, caches, prefix, suffix, layer, lengths_q, problem)


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def backend() -> FlashAttentionBackend:
    return FlashAttentionBackend(device="cpu")


def test_cascade_is_one_call(backend: FlashAttentionBackend, say: list[str]) -> None:
    worst = 0.0
    for seed in range(CASES):
        case = cascade_case(seed, DTYPES)
        with backend.step():
            out, lse = backend.forward_cascade(
                case.q, case.caches.k, case.caches.v, case.prefix, case.suffix, case.layer, return_softmax_lse=True
            )
        worst = max(worst, judge(out, lse, case.lengths_q, case.problem))
    say.append(f"cascade: {CASES} random cases, worst share {worst:.2f}")


@pytest.mark.parametrize(
    "fault",
    ["sink twice", "prefix causal", "suffix twice"],
)
def test_the_rule_sees_a_wrong_cascade(backend: FlashAttentionBackend, monkeypatch, fault: str) -> None:
    from dataclasses import replace

    from jit_kernel.attention import cascade

    def wrong(layer: AttentionLayer, **changes: object) -> AttentionLayer:
        if fault == "sink twice":
            changes.pop("sinks", None)
        if fault == "prefix causal" and "sinks" in changes:
            changes["causal"] = True
        return replace(layer, **changes)

    monkeypatch.setattr(cascade, "replace", wrong)
    if fault == "suffix twice":
        whole = backend.merge
        monkeypatch.setattr(backend, "merge", lambda a, la, b, lb: whole(*whole(a, la, b, lb), b, lb))
    caught = 0
    for seed in range(40):
        case = cascade_case(seed, (torch.bfloat16,))
        out, lse = backend.forward_cascade(
            case.q, case.caches.k, case.caches.v, case.prefix, case.suffix, case.layer, return_softmax_lse=True
        )
        try:
            judge(out, lse, case.lengths_q, case.problem)
        except AssertionError:
            caught += 1
    assert caught >= 8


def test_empty_parts_give_zeros(backend: FlashAttentionBackend) -> None:
    random = torch.Generator().manual_seed(0)
    caches = make_caches(Random(0), random, 2, 64, 64, torch.float32)
    q = torch.randn(3, 4, 64, generator=random)
    nothing = ragged([3], [0], [[]])
    layer = AttentionLayer(causal=False)
    arguments = (q, caches.k, caches.v, nothing, ragged([1, 2], [0, 0], [[], []]), layer)
    out, lse = backend.forward_cascade(*arguments, return_softmax_lse=True)
    assert not out.count_nonzero()
    assert (lse == -math.inf).all()


@pytest.mark.parametrize("layer", [AttentionLayer(window_size=(4, 0)), AttentionLayer(attention_chunk=8)])
def test_bounds_that_run_across_both_parts_are_refused(backend: FlashAttentionBackend, layer: AttentionLayer) -> None:
    case = cascade_case(1, DTYPES)
    with pytest.raises(NotImplementedError, match="their bounds count keys across prefix and suffix"):
        backend.forward_cascade(case.q, case.caches.k, case.caches.v, case.prefix, case.suffix, layer)


# Zig-zag halves


@dataclass
class HalvesCase:
    """The last `sum(tokens)` tokens of one sequence as two separate halves, with its keys before them in the cache."""

    q: Tensor
    caches: Caches
    halves: tuple[Half, Half]
    layer: AttentionLayer
    tokens: list[int]
    problem: reference.Problem


def halves_case(seed: int, dtypes: tuple[torch.dtype, ...], cascade: bool = False) -> HalvesCase:
    dice, random = Random(1000 + seed), torch.Generator().manual_seed(seed)
    dtype, hk = dice.choice(dtypes), dice.choice([1, 2])
    hq = hk * dice.choice([1, 4])
    caches = make_caches(dice, random, hk, 64, 64, dtype)
    shared = dice.randint(1, 9) if cascade else 0
    least = 8 if cascade else 0  # three roundings of few numbers can exceed the largest of one rounding by luck
    before, prev, gap = dice.randint(0, 12), dice.randint(least, least + 9), dice.randint(0, 14)
    next_ = dice.randint(least + 1, least + 9)
    length = before + prev + gap + next_
    pages_shared, pages = caches.take(shared), caches.take(length)
    q = torch.randn(prev + next_, hq, 64, generator=random).to(dtype)
    k, v = (
        torch.cat(pair) for pair in zip(caches.tokens(pages_shared, shared), caches.tokens(pages, length), strict=True)
    )
    sinks = torch.randn(hq, generator=random) if dice.random() < 0.3 else None
    layer = AttentionLayer(sinks=sinks)
    ends, halves, sequences, at = (before + prev, length), [], [], 0
    for count, end in zip((prev, next_), ends, strict=True):
        prefix = ragged([count], [shared], [pages_shared]) if cascade else None
        halves.append(Half(ragged([count], [end], [pages]), count, prefix))
        sequences.append(reference.Sequence(q[at : at + count], k[: shared + end], v[: shared + end]))
        at += count
    problem = reference.Problem(sequences, causal=True, sinks=sinks)
    return HalvesCase(q, caches, (halves[0], halves[1]), layer, [prev, next_], problem)


@pytest.mark.parametrize("cascade", [False, True])
def test_zigzag_halves_are_one_sequence(backend: FlashAttentionBackend, say: list[str], cascade: bool) -> None:
    worst = 0.0
    for seed in range(CASES if not cascade else 60):
        case = halves_case(seed, DTYPES, cascade)
        with backend.step():
            out, lse = forward_zigzag(
                backend, case.q, case.caches.k, case.caches.v, *case.halves, case.layer, return_softmax_lse=True
            )
        worst = max(worst, judge(out, lse, case.tokens, case.problem))
    say.append(f"zig-zag halves{' with cascade' * cascade}: worst share {worst:.2f}")


def test_halves_must_make_up_q(backend: FlashAttentionBackend) -> None:
    case = halves_case(0, DTYPES)
    with pytest.raises(ValueError, match=r"it must have prev\.tokens"):
        forward_zigzag(backend, case.q[1:], case.caches.k, case.caches.v, *case.halves)


def test_on_musa_every_part_has_metadata_of_its_own(stack: Machine) -> None:
    """Two parts under one tag were the fault of the first integrations; the double refuses it."""
    backend = FlashAttentionBackend(device="musa")
    for seed in range(20):
        case = cascade_case(seed, (torch.bfloat16, torch.float16))
        parts = [on_device(metadata, 0) for metadata in (case.prefix, case.suffix)]
        layer = AttentionLayer(**{name: to_musa(x) for name, x in vars(case.layer).items()})
        with backend.step():
            for _ in range(2):
                out, lse = backend.forward_cascade(
                    *to_musa((case.q, case.caches.k, case.caches.v)), *parts, layer, return_softmax_lse=True
                )
        judge(to_cpu(out), to_cpu(lse), case.lengths_q, case.problem)
    made = len(stack.kernels.issued)
    for seed in range(20):
        case = halves_case(seed, (torch.bfloat16,), cascade=bool(seed % 2))
        halves = [
            Half(on_device(h.metadata, 0), h.tokens, None if h.prefix is None else on_device(h.prefix, 0))
            for h in case.halves
        ]
        layer = AttentionLayer(**{name: to_musa(x) for name, x in vars(case.layer).items()})
        with backend.step():
            for _ in range(2):
                out, lse = forward_zigzag(
                    backend, *to_musa((case.q, case.caches.k, case.caches.v)), *halves, layer, return_softmax_lse=True
                )
        judge(to_cpu(out), to_cpu(lse), case.tokens, case.problem)
    assert stack.kernels.reused > 1.5 * len(stack.kernels.issued) > made


def test_the_path_is_left_as_it_was(tmp_path: Path) -> None:
    import sys

    before = list(sys.path)
    with on_path(tmp_path):
        assert sys.path[0] == str(tmp_path)
    assert sys.path == before

"""A prefill of fp16 by 16-bit integers: where rounding to them could show, it must not be seen.

On a CPU without such products (AVX-512 VNNI) the same cases run in floats.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from jit_kernel import device
from jit_kernel import flash_attention_v3 as fa3
from jit_kernel.device import Target, cpu_target
from jit_kernel.fa3 import cpu
from jit_kernel.fa3.cpu import known as cpu_plain
from tests.support import reference
from tests.support.inputs import normal
from tests.support.threads import answers

HALF = torch.float16
LARGEST = torch.finfo(HALF).max


def shares(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> reference.Shares:
    """Of one sequence, (tokens, heads, d)."""
    out, lse = fa3.flash_attn_func(q[None], k[None], v[None], return_softmax_lse=True, **options)[:2]
    return reference.check([out[0]], [lse[0]], reference.Problem([reference.Sequence(q, k, v)], **options))


@pytest.mark.parametrize("d", [24, 64, 128, 256])
@pytest.mark.parametrize("value", [1.0, -1.0, LARGEST, -LARGEST])
@pytest.mark.parametrize("largest_score", [2.0, 31.5])
def test_sums_as_large_as_they_become(d: int, value: float, largest_score: float) -> None:
    """Queries along their keys, all probabilities the same, all values the same: no product has another sign."""
    element = math.sqrt(largest_score / math.sqrt(d))
    q, k = (torch.full((n, 1, d), element, dtype=HALF) for n in (100, 640))
    v = torch.full((640, 1, d), value, dtype=HALF)
    out = fa3.flash_attn_func(q[None], k[None], v[None])
    assert torch.equal(out[0], v[:100])
    assert shares(q, -k, v).worst <= 1


@pytest.mark.parametrize("outlier", [1e-3, 1.0, 30.0])
def test_one_element_that_outweighs_its_row(outlier: float) -> None:
    """A row's factor is what its largest element leaves room for."""
    q, k, v = (0.01 * normal(n, 2, 64, seed=i) for i, n in enumerate((130, 700, 700)))
    q[:, :, 5] = outlier * torch.linspace(-1, 1, 130).view(-1, 1)
    k[:, :, 5] = torch.linspace(-2, 2, 700).view(-1, 1)
    v[::3, :, 7] *= 1000
    assert shares(q.half(), k.half(), v.half()).worst <= 1


@pytest.mark.parametrize("causal", [False, True])
def test_values_of_very_different_sizes(causal: bool) -> None:
    q, k, v = (normal(n, 2, 128, seed=i) for i, n in enumerate((300, 800, 800)))
    v *= torch.exp2(12 * normal(800, 1, 1, seed=3).clamp(-1, 1))
    assert shares(q.half(), k.half(), v.half(), causal=causal).worst <= 1
    # Large values beside those that rows attend to.
    q, k, v = 0.3 * q, 0.3 * k, normal(800, 2, 128, seed=2)
    is_large = torch.arange(800) % 4 == 0
    q[:, :, 0], k[:, :, 0] = 12.0, torch.where(is_large, -8.0, 8.0).view(-1, 1)
    v[is_large] *= 4096
    assert shares(q.half(), k.half(), v.half(), causal=causal).worst <= 1


@pytest.mark.parametrize("size", [6e-8, 1e-5, 100.0])
def test_queries_and_keys_of_any_size(size: float) -> None:
    """The smallest are subnormal; the scale of scores makes up for it."""
    q, k, v = (normal(n, 2, 64, seed=i) for i, n in enumerate((120, 500, 500)))
    q, k = (size * q).half(), (k / 16).half()
    assert shares(q, k, v.half(), softmax_scale=2 / size if size > 1e-6 else 1e4).worst <= 1
    assert shares(k[:120], q.repeat(5, 1, 1)[:500], v.half(), softmax_scale=2 / size if size > 1e-6 else 1e4).worst <= 1


def test_a_row_that_sees_one_key_is_its_value() -> None:
    q, k, v = (normal(300, 2, 96, seed=i).half() for i in range(3))
    out = fa3.flash_attn_func(q[None], k[None], v[None], window_size=(0, 0))
    assert torch.equal(out[0], v)


@pytest.mark.parametrize("count", [1, 4, 5, 100])
def test_keys_that_are_not_finite(count: int) -> None:
    """Few of them are scored one by one, many take their block to floats; rows that see none are numbers."""
    q, k, v = (normal(600, 1, 64, seed=i).half() for i in range(3))
    clean = fa3.flash_attn_func(q[None], k[None], v[None], causal=True)
    odd = 300 + torch.arange(count)
    k[odd, 0, 3] = math.nan
    out = fa3.flash_attn_func(q[None], k[None], v[None], causal=True)
    assert out[0, 300:].isnan().all()
    assert torch.allclose(out[0, :300].float(), clean[0, :300].float(), atol=2e-3)
    k[odd, 0, 3] = torch.where(torch.arange(count) % 2 == 0, math.inf, -math.inf).half()
    out = fa3.flash_attn_func(q[None], k[None], v[None], causal=True)
    scores = (q[:, 0].double() @ k[:, 0].double().T / 8).masked_fill(torch.ones(600, 600).triu(1).bool(), -math.inf)
    assert torch.allclose(out[0, :, 0].double(), scores.softmax(-1) @ v[:, 0].double(), atol=2e-3, equal_nan=True)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("key", [300, 340, 511])
def test_a_value_that_is_not_finite_beside_rows_that_do_not_see_it(value: float, key: int) -> None:
    """In the same tile of rows or 32 keys; rows of other tiles keep their bits."""
    q, k, v = (normal(600, 1, 64, seed=i).half() for i in range(3))
    clean = fa3.flash_attn_func(q[None], k[None], v[None], causal=True)
    v[key, 0, 3] = value
    out = fa3.flash_attn_func(q[None], k[None], v[None], causal=True)
    tile = key // 48 * 48
    assert torch.equal(out[:, :tile], clean[:, :tile])
    columns = torch.arange(64) != 3
    assert torch.allclose(out[..., columns].float(), clean[..., columns].float(), atol=2e-3)
    assert not out[0, key:, 0, 3].isfinite().any()


def of_both_kinds() -> list[Tensor]:
    """Tiles of rows and blocks of keys that fit integers beside such that do not."""
    q, k, v = (normal(n, 4 if i == 0 else 2, 128, seed=i) for i, n in enumerate((1100, 2500, 2500)))
    q[100:130] *= 8
    q[700, 1] *= 30
    k[1000:1010] *= 20
    k[1700:1702] *= 20
    v[2000, 0, 5] = math.inf
    return [q.half(), k.half(), v.half()]


@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"window_size": (300, 0)}], ids=str)
def test_integers_beside_floats(mask: dict[str, Any]) -> None:
    """Which tiles and blocks are integers depends on neither threads nor the other sequences of the batch."""
    q, k, v = of_both_kinds()

    def call() -> tuple[Tensor, Tensor]:
        return fa3.flash_attn_func(q[None], k[None], v[None], **mask, num_splits=1, return_softmax_lse=True)

    (out, lse), *others = answers(call, threads=(1, 2, 3, 5, 7))
    for other_out, other_lse in others:
        assert torch.equal(out.nan_to_num(7.0), other_out.nan_to_num(7.0))
        assert torch.equal(lse, other_lse)
    lengths = torch.tensor([0, 700, 1800, 2500], dtype=torch.int32)
    among = fa3.flash_attn_varlen_func(
        torch.cat([q[:700], q, q[:700]]), torch.cat([k, k, k]), torch.cat([v, v, v]),
        lengths, torch.arange(4, dtype=torch.int32) * 2500, **mask, num_splits=1,
    )  # fmt: skip
    assert torch.equal(out[0].nan_to_num(7.0), among[700:1800].nan_to_num(7.0))
    v[2000, 0, 5] = 1.0
    assert shares(q, k, v, **mask).worst <= 1


INTEGERS = "avx512vnni"


@pytest.fixture
def floats_too(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Calls a function for a target with integers and for one without."""
    here = cpu_target()

    def both(call: Any) -> list[Tensor]:
        found = []
        for features in (("avx512bf16", INTEGERS) if "avx512bf16" in here.features else (INTEGERS,), ()):
            target = Target(here.vendor, here.architecture, tuple(features))
            monkeypatch.setattr(cpu, "cpu_target", lambda target=target: target)
            monkeypatch.setattr(cpu, "_forwards", {})
            monkeypatch.setattr(cpu_plain, "_libraries", {})
            found.append(call())
        return found

    return both


@pytest.mark.skipif("avx512_vnni" not in device._cpu_flags(), reason="this CPU has no AVX-512 VNNI")
def test_where_integers_are_used(floats_too: Any) -> None:
    """As bits of the answer tell: beside those of floats they differ, or are the same."""
    q, k, v = (normal(1, 500, 2, 128, seed=i).half() for i in range(3))
    large = q.clone()
    large[:, 96:144] *= 8

    def call() -> Tensor:
        return torch.cat([
            fa3.flash_attn_func(q, k, v), fa3.flash_attn_func(large, k, v),
            fa3.flash_attn_func(q, k, v, window_size=(14, 0)), fa3.flash_attn_func(q, k, v, window_size=(15, 0)),
        ])  # fmt: skip

    integers, floats = floats_too(call)
    differs = (integers != floats).any(dim=-1).any(dim=-1)
    usual, with_large, few_keys, enough_keys = differs
    assert usual.float().mean() > 0.9
    assert not with_large[96:144].any()
    assert torch.equal(with_large[:96], usual[:96]) and torch.equal(with_large[144:], usual[144:])
    assert not few_keys.any()
    assert not enough_keys[:48].any()  # the first rows see few
    assert enough_keys[48:].float().mean() > 0.9

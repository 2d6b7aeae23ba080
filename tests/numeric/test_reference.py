"""The numeric rule is worth what it catches: a plain tiled kernel passes it, and every way to break it fails it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.support import reference
from tests.support.reference import FP8, Problem, Sequence, Shares

TILE = 32
DTYPES = (torch.float32, torch.bfloat16, torch.float16, FP8)


def tiled(s: Sequence, problem: Problem, broken: str = "") -> tuple[Tensor, Tensor]:
    """A tiled online softmax in float32 with P rounded, as kernels do it; `broken` names one mistake to make."""
    group = s.q.shape[1] // s.k.shape[1]
    f32 = torch.float32
    upcast = reference._descaled(s, f32)
    if broken == "heads dealt in turn":
        turns = torch.arange(s.q.shape[1]) % s.k.shape[1]
        upcast = replace(upcast, k=upcast.k[:, turns], v=upcast.v[:, turns])
    group = upcast.q.shape[1] // upcast.k.shape[1]
    capped = replace(problem, softcap=0.0) if broken == "softcap forgotten" else problem
    masked = {
        "mask one too wide": replace(capped, window_size=(capped.window_size[0], 1), causal=False),
        "chunk one too long": replace(capped, attention_chunk=capped.attention_chunk + 1),
        "aligned to the top left": capped,
    }.get(broken, capped)
    logits = reference.scores(upcast, masked, f32)
    if broken == "aligned to the top left":
        rows = torch.arange(s.q.shape[0])[:, None]
        full = reference.scores(upcast, replace(capped, causal=False), f32)
        logits = full.masked_fill(torch.arange(s.k.shape[0]) > rows, -math.inf)
    if broken == "mask one too narrow":
        own = torch.arange(s.q.shape[0])[:, None] + s.k.shape[0] - s.q.shape[0]
        logits = logits.masked_fill(torch.arange(s.k.shape[0]) == own, -math.inf)
    if broken == "scale twice":
        logits = logits * reference.scale_of(problem, s)
    if broken == "one key past the end":
        logits = torch.cat([logits, torch.zeros_like(logits[..., :1])], dim=-1)
        upcast = replace(upcast, v=torch.cat([upcast.v, torch.zeros_like(upcast.v[:1])]))
    values = reference._heads(upcast.v, f32, group)
    top = torch.full((*logits.shape[:2], 1), -1e30)
    total, acc = torch.zeros_like(top), torch.zeros(*logits.shape[:2], values.shape[-1])
    tiles = list(range(0, logits.shape[-1], TILE))
    for at in tiles:
        if (broken == "middle tile skipped" and at == tiles[len(tiles) // 2]) or (
            broken == "last tile skipped" and at == tiles[-1]
        ):
            continue
        tile = logits[..., at : at + TILE]
        above = torch.maximum(top, tile.amax(dim=-1, keepdim=True))
        shrink = torch.exp(top - above)
        p = torch.exp(tile - above)
        total = total * (1 if broken == "row sum not rescaled" else shrink) + p.sum(dim=-1, keepdim=True)
        acc = acc * (1 if broken == "stale row max" else shrink)
        rounded = (p * 256).to(FP8).float() / 256 if s.q.dtype == FP8 else p.to(s.q.dtype).float()
        acc, top = acc + rounded @ values[:, at : at + TILE], above
    for _ in range(_sinks_counted(problem, broken)):
        assert problem.sinks is not None
        sink = problem.sinks.float()[:, None, None]
        above = torch.maximum(top, sink)
        total = total * torch.exp(top - above) + torch.exp(sink - above)
        acc, top = acc * torch.exp(top - above), above
    lse = torch.where(total > 0, top + torch.log(total), -math.inf)[..., 0]
    out = torch.where(total > 0, acc / total, 0.0).transpose(0, 1)
    out = out.to(torch.bfloat16 if s.q.dtype == FP8 else s.q.dtype)
    if broken == "lse in base 2":
        lse = lse / math.log(2)
    if broken == "last rows shifted":
        out[-3:] = out[-4:-1].clone()
    return out, lse


def _sinks_counted(problem: Problem, broken: str) -> int:
    if problem.sinks is None:
        return 0
    return {"sink forgotten": 0, "sink counted twice": 2}.get(broken, 1)


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def sequence(dtype: torch.dtype, sq: int = 70, sk: int = 190, seed: int = 0, d: int = 64) -> Sequence:
    q, k, v = (normal(n, h, d, dtype=dtype, seed=seed + i) for i, (n, h) in enumerate([(sq, 4), (sk, 2), (sk, 2)]))
    if dtype != FP8:
        return Sequence(q, k, v)
    return Sequence(q, k, v, None, *(0.5 + torch.rand(2, generator=torch.Generator().manual_seed(9)) for _ in "qkv"))


def shares(problem: Problem, broken: str = "", kernel_sees: Problem | None = None) -> Shares:
    """The rule's verdict on the tiled kernel, which may be handed other inputs than the reference."""
    answers = [tiled(s, kernel_sees or problem, broken) for s in (kernel_sees or problem).sequences]
    return reference.check([out for out, _ in answers], [lse for _, lse in answers], problem)


SETTINGS: dict[str, dict] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (40, 0)},
    "chunk": {"attention_chunk": 48},
    "softcap": {"softcap": 8.0},
    "sinks": {"sinks": torch.tensor([0.5, 6.0, 5.0, 7.0])},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("settings", SETTINGS)
def test_an_honest_kernel_passes(dtype: torch.dtype, settings: str) -> None:
    for seed in range(4):
        problem = Problem([sequence(dtype, seed=seed), sequence(dtype, 1, 90, seed), sequence(dtype, 9, 4, seed)],
                          **SETTINGS[settings])  # fmt: skip
        assert shares(problem).worst < 0.85


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("settings", SETTINGS)
def test_the_base_itself_passes(dtype: torch.dtype, settings: str) -> None:
    problem = Problem([sequence(dtype), sequence(dtype, 5, 3)], **SETTINGS[settings])
    answers = [reference.attend(s, problem, dtype) for s in problem.sequences]
    verdict = reference.check([out for out, _ in answers], None, problem)
    assert verdict.worst <= 0.5 + 1e-6


BROKEN = [
    ("full", "middle tile skipped"),
    ("full", "last tile skipped"),
    ("full", "stale row max"),
    ("full", "row sum not rescaled"),
    ("full", "heads dealt in turn"),
    ("full", "one key past the end"),
    ("full", "scale twice"),
    ("full", "lse in base 2"),
    ("full", "last rows shifted"),
    ("causal", "mask one too wide"),
    ("causal", "mask one too narrow"),
    ("causal", "aligned to the top left"),
    ("causal", "middle tile skipped"),
    ("causal", "last tile skipped"),
    ("causal", "last rows shifted"),
    ("window", "mask one too wide"),
    ("window", "mask one too narrow"),
    ("chunk", "chunk one too long"),
    ("softcap", "softcap forgotten"),
    ("sinks", "sink counted twice"),
    ("sinks", "sink forgotten"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("settings", "broken"), BROKEN)
def test_a_broken_kernel_fails(dtype: torch.dtype, settings: str, broken: str) -> None:
    problem = Problem([sequence(dtype)], **SETTINGS[settings])
    assert shares(problem, broken).worst > 1.0


@pytest.mark.parametrize("with_lse", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_a_wrong_page_fails(dtype: torch.dtype, causal: bool, with_lse: bool) -> None:
    """One page of 16 among the last keys belongs to another sequence: early causal rows are all right."""
    s, other = sequence(dtype), sequence(dtype, seed=5)
    k, v = s.k.float().clone(), s.v.float().clone()
    k[160:176], v[160:176] = other.k.float()[:16], other.v.float()[:16]
    problem = Problem([s], causal=causal)
    out, lse = tiled(replace(s, k=k.to(dtype), v=v.to(dtype)), problem)
    assert reference.check([out], [lse] if with_lse else None, problem).worst > 1.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swapped_value_pages_fail(dtype: torch.dtype) -> None:
    s = sequence(dtype)
    order = torch.cat([torch.arange(144), torch.arange(160, 176), torch.arange(144, 160), torch.arange(176, 190)])
    swapped = replace(s, v=s.v.float()[order].to(dtype))
    problem = Problem([s], causal=True)
    assert shares(problem, kernel_sees=replace(problem, sequences=[swapped])).worst > 1.0


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("interleaved", [True, False])
def test_a_rotary_position_off_by_one_fails(dtype: torch.dtype, interleaved: bool) -> None:
    s = sequence(dtype)
    angles = torch.outer(torch.arange(400.0), 0.5 ** torch.arange(16.0))
    tables = angles.cos().to(dtype), angles.sin().to(dtype)
    here = reference.rotate(s.q, *tables, torch.arange(120, 190), interleaved=interleaved)
    late = reference.rotate(s.q, *tables, torch.arange(121, 191), interleaved=interleaved)
    other = reference.rotate(s.q, *tables, torch.arange(120, 190), interleaved=not interleaved)
    problem = Problem([replace(s, q=here)])
    for wrong in (late, other):
        assert shares(problem, kernel_sees=Problem([replace(s, q=wrong)])).worst > 1.0


@pytest.mark.parametrize("descale", ["q_descale", "k_descale", "v_descale"])
def test_a_forgotten_descale_fails(descale: str) -> None:
    problem = Problem([sequence(FP8)])
    seen = Problem([replace(problem.sequences[0], **{descale: None})])
    assert shares(problem, kernel_sees=seen).worst > 1.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_bad_element_fails(dtype: torch.dtype, value: float) -> None:
    problem = Problem([sequence(dtype)])
    out, lse = tiled(problem.sequences[0], problem)
    bad_out, bad_lse = out.clone(), lse.clone()
    bad_out[3, 2, 11] = value
    bad_lse[1, 60] = value
    assert reference.check([bad_out], [lse], problem).worst == math.inf
    assert reference.check([out], [bad_lse], problem).worst == math.inf


def test_an_example_computed_by_hand() -> None:
    """Two keys, scale 1, scores ln 3 and 0: weights 3/4 and 1/4; a sink of ln 4 halves them."""
    q = torch.tensor([[[1.0]]])
    k = torch.tensor([[[math.log(3.0)]], [[0.0]]])
    v = torch.tensor([[[4.0, 0.0]], [[0.0, 8.0]]])
    problem = Problem([Sequence(q, k, v)], softmax_scale=1.0)
    out, lse = reference.exact(problem.sequences[0], problem)
    torch.testing.assert_close(out, torch.tensor([[[3.0, 2.0]]], dtype=torch.float64), rtol=1e-6, atol=0)
    assert float(lse[0, 0]) == pytest.approx(math.log(4.0), rel=1e-6)
    with_sink = replace(problem, sinks=torch.tensor([math.log(4.0)]))
    out, lse = reference.exact(problem.sequences[0], with_sink)
    torch.testing.assert_close(out, torch.tensor([[[1.5, 1.0]]], dtype=torch.float64), rtol=1e-6, atol=0)
    assert float(lse[0, 0]) == pytest.approx(math.log(8.0), rel=1e-6)


def test_masks_drawn_by_hand() -> None:
    def drawn(sq: int, sk: int, **settings) -> list[str]:  # type: ignore[no-untyped-def]
        seen = reference.visible(Problem([], **settings), sq, sk, torch.device("cpu"))
        return ["".join("x" if key else "." for key in row) for row in seen.tolist()]

    assert drawn(2, 4, causal=True) == ["xxx.", "xxxx"]
    assert drawn(3, 2, causal=True) == ["..", "x.", "xx"]
    assert drawn(2, 4, window_size=(1, 0)) == [".xx.", "..xx"]
    assert drawn(2, 4, window_size=(1, 5), causal=True) == [".xx.", "..xx"]
    assert drawn(2, 4, window_size=(-1, 0)) == ["xxx.", "xxxx"]
    assert drawn(4, 4, attention_chunk=2) == ["xx..", "xx..", "..xx", "..xx"]
    assert drawn(4, 4, attention_chunk=2, causal=True) == ["x...", "xx..", "..x.", "..xx"]
    assert drawn(3, 2, attention_chunk=2) == ["..", "xx", "xx"]


@pytest.mark.parametrize("sink", [None, 1.5])
def test_rows_that_see_nothing(sink: float | None) -> None:
    s = sequence(torch.float32, sq=4, sk=2)
    sinks = None if sink is None else torch.full((4,), sink)
    problem = Problem([s, sequence(torch.float32, sq=3, sk=0)], causal=True, sinks=sinks)
    answers = [reference.exact(one, problem) for one in problem.sequences]
    assert not answers[0][0][:2].any()
    assert not answers[1][0].any()
    expected = -math.inf if sink is None else sink
    assert (answers[0][1][:, :2] == expected).all()
    assert (answers[1][1] == expected).all()
    wrong = answers[0][0].clone()
    wrong[0, 0, 0] = 1e-30
    assert reference.check([wrong, answers[1][0]], None, problem).worst == math.inf


def test_rotation_by_hand() -> None:
    """A quarter turn takes (a, b) to (-b, a), for pairs side by side or half a table apart."""
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0, 5.0]]])
    cos, sin = torch.zeros(1, 2), torch.ones(1, 2)
    at = torch.zeros(1, dtype=torch.int64)
    assert reference.rotate(x, cos, sin, at, interleaved=True).tolist() == [[[-2.0, 1.0, -4.0, 3.0, 5.0]]]
    assert reference.rotate(x, cos, sin, at, interleaved=False).tolist() == [[[-3.0, -4.0, 1.0, 2.0, 5.0]]]

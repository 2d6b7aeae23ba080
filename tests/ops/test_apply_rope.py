"""apply_rope against float64: halves and neighbours, part of a head, norms, layouts, positions outside the tables."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from jit_kernel.ops import apply_rope
from tests.support.ops import DEVICES, FLOATS, Draw, assert_close, cases


def exact(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool, weight: Tensor | None) -> Tensor:
    x, half = x.double().clone(), cos.shape[1]
    if weight is not None:
        x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    c, s = (table.double()[positions.long()].unsqueeze(1) for table in (cos, sin))
    pairs = x[..., : 2 * half]
    a, b = (pairs[..., 0::2], pairs[..., 1::2]) if interleaved else (pairs[..., :half], pairs[..., half:])
    turned = (a * c - b * s, a * s + b * c)
    x[..., : 2 * half] = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return x


def draw_case(draw: Draw) -> tuple[dict[str, Tensor | None], bool]:
    choice, dtype = draw.random.choice, draw.random.choice(FLOATS)
    size = choice((64, 128, 128, 256, 96, 512, 80, 2, 13, 511))
    half = choice((size // 2, size // 2, max(1, size // 4), 1))
    tokens, heads, kv_heads = draw.rows(9), choice((1, 3, 8)), choice((0, 1, 2))
    fused = draw.normal(tokens, (heads + kv_heads) * size, dtype=dtype)  # rows of q, then k
    q = fused[:, : heads * size].unflatten(1, (heads, size))
    k = fused[:, heads * size :].unflatten(1, (kv_heads, size)) if kv_heads else None
    angle = choice((dtype, torch.float32))
    cos, sin = (draw.normal(50, half, dtype=angle) for _ in range(2))
    positions = torch.tensor(
        [draw.random.randrange(50) for _ in range(tokens)], dtype=choice((torch.int32, torch.int64))
    )
    weights = {"q_weight": draw.normal(size, dtype=dtype).contiguous() if choice((True, False)) else None}
    weights["k_weight"] = draw.normal(size, dtype=dtype).contiguous() if kv_heads and choice((True, False)) else None
    return {"q": q, "k": k, "cos": cos, "sin": sin, "positions": positions.to(draw.device), **weights}, choice(
        (True, False)
    )


def check(draw: Draw) -> None:
    case, interleaved = draw_case(draw)
    tables = case["cos"], case["sin"], case["positions"], interleaved
    heads = {name: case[name] for name in ("q", "k") if case[name] is not None}
    expected = {name: exact(value, *tables, case[f"{name}_weight"]) for name, value in heads.items()}
    length = {
        name: exact(value, *tables, case[f"{name}_weight"]).norm(dim=-1, keepdim=True) for name, value in heads.items()
    }
    way = draw.random.choice(("new", "in place", "out"))
    outs = {f"{name}_out": value if way == "in place" else draw.poisoned(*value.shape, dtype=value.dtype)
            for name, value in heads.items()}  # fmt: skip
    found = apply_rope(**case, interleaved=interleaved, **({} if way == "new" else outs))
    for (name, value), result in zip(expected.items(), found, strict=False):
        assert way == "new" or result is outs[f"{name}_out"]
        assert_close(result, value, length[name] * 1e-6)
    assert len(heads) == 2 or found[1] is None


@pytest.mark.parametrize("device", DEVICES)
def test_random_cases(device):
    for seed in cases(device):
        check(Draw(seed, device))


def outside(device: str) -> tuple[Tensor, Tensor]:
    q, cos = torch.randn(2, 3, 64, device=device), torch.ones(10, 16, device=device)
    return q, apply_rope(q, None, cos, cos, torch.tensor([9, 10], device=device))[0]


def test_a_position_outside_the_tables_is_refused():
    with pytest.raises(IndexError, match=r"positions\[1\] is 10; it must be 0 or more and below cos's 10 rows"):
        outside("cpu")


@pytest.mark.gpu
def test_a_position_outside_the_tables_gives_nan():
    q, found = outside("cuda")
    assert found[1, :, :32].isnan().all() and torch.equal(found[1, :, 32:], q[1, :, 32:]) and not found[0].isnan().any()


def test_errors_name_the_argument():
    q, cos, positions = torch.ones(2, 3, 64), torch.ones(10, 32), torch.zeros(2, dtype=torch.int32)
    for arguments, error, words in (
        ({"q": torch.ones(2, 64)}, ValueError, "q has 2 dimensions; it must have 3"),
        ({"q": torch.ones(2, 3, 513)}, ValueError, "q has heads of 513 numbers; it must have at most 512"),
        ({"k": torch.ones(3, 3, 64)}, ValueError, r"k has shape \(3, 3, 64\); it must be \(2, 3, 64\)"),
        ({"cos": torch.ones(10, 33)}, ValueError, r"sin has shape \(10, 32\); it must be \(10, 33\)"),
        ({"positions": positions.float()}, TypeError, "positions has dtype torch.float32; it must be torch.int32 or"),
        ({"positions": positions[:1]}, ValueError, r"positions has shape \(1,\); it must be \(2,\)"),
        ({"k_weight": torch.ones(64)}, ValueError, "k_weight is given; it must be None, because k is None"),
        ({"q_out": q.half()}, TypeError, "q_out has dtype torch.float16; it must be torch.float32"),
    ):
        with pytest.raises(error, match=words):
            apply_rope(
                **{"q": q, "k": None, "cos": cos, "sin": torch.ones(10, 32), "positions": positions, **arguments}
            )

"""quantize_fp8 against float64: per token, group and tensor, given scales, layouts, zeros."""

from __future__ import annotations

import pytest
import torch

from jit_kernel.ops import quantize_fp8
from tests.support.ops import DEVICES, E4M3, FLOATS, Draw, assert_close, cases


def check(draw: Draw) -> None:
    choice, dtype = draw.random.choice, draw.random.choice(FLOATS)
    group = choice(("token", 128, 32, 5, "tensor", "tensor"))
    size = draw.size(choice((64, 600, 20000))) if isinstance(group, str) else group * draw.random.randint(1, 20)
    leading = choice([(draw.rows(),), (draw.rows(3), draw.rows(4))])
    x = draw.normal(*leading, size, dtype=dtype, spread=choice((1e-3, 1.0, 30.0)))
    if x.numel() and choice((True, False)):
        x[..., 0, : size // 2] = 0.0
    groups = x.double().unflatten(-1, (-1, group)) if isinstance(group, int) and x.numel() else x.double()
    shape = (1,) if group == "tensor" else (*leading, size // group if isinstance(group, int) else 1)
    if group == "tensor":
        largest = groups.abs().max().view(1) if x.numel() else torch.zeros(1, device=draw.device)
    else:
        largest = groups.abs().amax(-1).view(shape) if x.numel() else torch.zeros(shape, device=draw.device)
    given = torch.tensor([0.02], device=draw.device) if group == "tensor" and choice((True, False)) else None
    named = {}
    if choice((True, False)):
        named["out"] = draw.poisoned(*leading, size, dtype=E4M3)
        if given is None:  # any strides: those of DeepGEMM's scales, a column after the other
            columns = len(shape) == 2 and choice((True, False))
            named["scale_out"] = torch.full(shape[::-1] if columns else shape, -1.0, device=draw.device)
            named["scale_out"] = named["scale_out"].t() if columns else named["scale_out"]
    found, scales = quantize_fp8(x, group, scale=given, **named)
    assert "out" not in named or found is named["out"]
    exact = largest.double().clamp(min=1e-12) / 448 if given is None else given.double()
    assert scales.shape == shape
    assert_close(scales, exact, exact * 2e-7)
    each = exact.unsqueeze(-1) if isinstance(group, int) else exact
    expected = groups / (each if x.numel() else 1.0)
    assert_close(found, expected.view(x.shape), expected.view(x.shape).abs() * 4e-7)


@pytest.mark.parametrize("device", DEVICES)
def test_random_cases(device):
    for seed in cases(device):
        check(Draw(seed, device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_sixteen_bits_round_as_torch_rounds(device, dtype):
    """All numbers of fp16 and of bf16, so every tie, each subnormal and NaN; those past 448 become 448."""
    bits = torch.arange(-(1 << 15), 1 << 15, device=device).to(torch.int16)
    x = bits.view(dtype) if dtype != torch.float32 else bits.view(torch.float16).float() * 1.0001
    found, _ = quantize_fp8(x.view(256, 256), "tensor", scale=torch.ones(1, device=device))
    wanted = x.float().clamp(-448, 448).to(E4M3).view(256, 256)
    same = found.view(torch.uint8) == wanted.view(torch.uint8)
    assert (same | (found.float().isnan() & wanted.float().isnan())).all()


def test_errors_name_the_argument():
    x = torch.ones(2, 256)
    for arguments, error, words in (
        (
            {"group": 100},
            ValueError,
            "group is 100; it must be 'token', 'tensor' or a number that x's 256 is a multiple of",
        ),
        ({"group": "row"}, ValueError, "group is 'row'; it must be 'token'"),
        ({"scale": torch.ones(1)}, ValueError, "scale is given; it must be None, except with group='tensor'"),
        ({"out": x}, TypeError, "out has dtype torch.float32; it must be torch.float8_e4m3fn"),
        (
            {"group": 128, "scale_out": torch.ones(2, 1)},
            ValueError,
            r"scale_out has shape \(2, 1\); it must be \(2, 2\)",
        ),
        ({"group": "tensor", "scale": torch.ones(1).half()}, TypeError, "scale has dtype torch.float16; it must be"),
    ):
        with pytest.raises(error, match=words):
            quantize_fp8(**{"x": x, **arguments})

"""rms_norm against float64: dtypes, residual, e4m3, layouts, any size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from jit_kernel.ops import rms_norm
from tests.support.ops import DEVICES, E4M3, FLOATS, Draw, assert_close, cases


def exact_norm(x: Tensor, weight: Tensor, eps: float, bias: float, scale: Tensor | None) -> Tensor:
    x = x.double()
    normed = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * (weight.double() + bias)
    return normed if scale is None else normed / scale.double()


def check(draw: Draw) -> None:
    choice = draw.random.choice
    dtype, size = choice(FLOATS), draw.size(choice((64, 600, 5000, 40000)))
    leading = choice([(draw.rows(),), (draw.rows(3), draw.rows(4))])
    x = draw.normal(*leading, size, dtype=dtype, spread=choice((1e-3, 1.0, 30.0)))
    weight = draw.normal(size, dtype=choice((dtype, torch.float32)))
    weight = weight.contiguous()
    residual = draw.normal(*leading, size, dtype=dtype) if choice((True, False)) else None
    scale = torch.tensor([0.37], device=draw.device) if choice((True, False)) else None
    out = draw.poisoned(*leading, size, dtype=E4M3 if scale is not None else dtype) if choice((True, False)) else None
    eps, bias = choice((0.0, 1e-6, 1e-2)), choice((0.0, 1.0))
    added = x if residual is None else (residual.float() + x.float()).to(dtype)
    expected = exact_norm(added, weight, eps, bias, scale)
    found = rms_norm(x, weight, eps, residual=residual, scale=scale, weight_bias=bias, out=out)
    assert out is None or found is out
    assert_close(found, expected, expected.abs() * 2e-6)
    if residual is not None:
        assert torch.equal(residual, added)


@pytest.mark.parametrize("device", DEVICES)
def test_random_cases(device):
    for seed in cases(device):
        check(Draw(seed, device))


@pytest.mark.parametrize("device", DEVICES)
def test_in_place(device):
    draw = Draw(1, device)
    x, weight = draw.normal(7, 4096, dtype=torch.bfloat16), draw.normal(4096, dtype=torch.bfloat16).contiguous()
    expected = exact_norm(x, weight, 1e-6, 0.0, None)
    assert rms_norm(x, weight, out=x) is x
    assert_close(x, expected, expected.abs() * 2e-6)


def test_errors_name_the_argument():
    x, weight = torch.ones(2, 8), torch.ones(8)
    for arguments, error, words in (
        ({"x": [1.0]}, TypeError, "x is of type list; it must be a torch.Tensor"),
        ({"x": x.int()}, TypeError, "x has dtype torch.int32; it must be torch.float32, torch.float16 or"),
        ({"weight": torch.ones(7)}, ValueError, r"weight has shape \(7,\); it must be \(8,\)"),
        ({"residual": x.half()}, TypeError, "residual has dtype torch.float16; it must be torch.float32"),
        ({"residual": x[:1].expand(2, 8)}, ValueError, "residual has strides .* must not be expanded"),
        ({"out": x.to(E4M3)}, ValueError, "scale is None; it must be a float32 tensor, because out is"),
        ({"out": torch.ones(2, 16)[:, ::2]}, ValueError, r"out has strides \(16, 2\); the last one must be 1"),
        ({"eps": float("nan")}, ValueError, "eps is nan; it must be finite and at least 0.0"),
        ({"weight": weight.to("meta")}, NotImplementedError, "weight is on meta; jit_kernel.ops has kernels for CPUs"),
        ({"x": x.clone().requires_grad_()}, ValueError, "x requires a gradient; jit_kernel.ops computes none"),
    ):
        with pytest.raises(error, match=words):
            rms_norm(**{"x": x.detach(), "weight": weight, **arguments})

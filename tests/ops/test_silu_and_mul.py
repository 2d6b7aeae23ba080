"""silu_and_mul against float64: dtypes, e4m3, layouts, any size."""

from __future__ import annotations

import pytest
import torch

from jit_kernel.ops import silu_and_mul
from tests.support.ops import DEVICES, E4M3, FLOATS, Draw, assert_close, cases


def check(draw: Draw) -> None:
    choice = draw.random.choice
    dtype, size = choice(FLOATS), draw.size(choice((64, 600, 9000)))
    leading = choice([(draw.rows(),), (draw.rows(3), draw.rows(4))])
    x = draw.normal(*leading, 2 * size, dtype=dtype, spread=choice((0.1, 3.0, 60.0)))
    scale = torch.tensor([0.37], device=draw.device) if choice((True, False)) else None
    out = draw.poisoned(*leading, size, dtype=E4M3 if scale is not None else dtype) if choice((True, False)) else None
    a, b = x.double().chunk(2, -1)
    expected = a / (1 + (-a).exp()) * b / (1 if scale is None else scale.double())
    found = silu_and_mul(x, scale=scale, out=out)
    assert out is None or found is out
    # exp(-a) is off by its exponent's rounding, |a| 2^-24, and of a large one the result is all but nothing.
    assert_close(found, expected, expected.abs() * (2e-6 + a.abs() * 1.2e-7) + b.abs() * 1.2e-36)


@pytest.mark.parametrize("device", DEVICES)
def test_random_cases(device):
    for seed in cases(device):
        check(Draw(seed, device))


@pytest.mark.parametrize("device", DEVICES)
def test_not_finite(device):
    """What a gate of infinity gives: itself, or all but nothing; a NaN stays one."""
    x = torch.tensor([[float("inf"), -1e30, float("nan"), 2.0, 3.0, 1.0]], device=device)
    found = silu_and_mul(x)[0].tolist()
    assert found[0] == float("inf") and abs(found[1]) < 4e-36 and found[2] != found[2]


def test_errors_name_the_argument():
    x = torch.ones(2, 8)
    for arguments, error, words in (
        ({"x": None}, TypeError, "x is of type NoneType; it must be a torch.Tensor"),
        ({"x": torch.ones(2, 7)}, ValueError, "x has rows of 7 numbers; it must be an even number"),
        ({"out": x}, ValueError, r"out has shape \(2, 8\); it must be \(2, 4\)"),
        ({"scale": torch.ones(2)}, ValueError, "scale has 2 numbers; it must have 1 number"),
    ):
        with pytest.raises(error, match=words):
            silu_and_mul(**{"x": x, **arguments})

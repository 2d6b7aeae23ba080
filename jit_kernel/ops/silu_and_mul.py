"""The gate of a SwiGLU feed-forward (kernel_sources/ops/silu_and_mul.h)."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from jit_kernel import jit
from jit_kernel.ops import checks, launch


def silu_and_mul(x: Tensor, *, scale: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """silu(a) * b, where each row of x is a, then b: in float32, rounded once.

    x: (..., 2 d) float32, float16 or bfloat16, any strides with a unit last one whose rows lie in two dimensions.
    scale: float32, one number: the result is float8_e4m3fn, divided by it. out: (..., d), where the result goes; a
    itself, x[..., :d], will do. Raises TypeError and ValueError by an argument's name.
    """
    like = checks.tensor("x", x)
    checks.dims("x", like, 1)
    shape = (*like.shape[:-1], like.shape[-1] // 2)
    out = checks.result(out, like, shape, like.dtype if scale is None else checks.E4M3)
    _write(x, out, scale)
    return out


def _silu_and_mul(x: Tensor, out: Tensor, scale: Tensor | None) -> None:
    _plans.of(x, out, scale)(x, out, scale)


def _plan(x: Tensor, out: Tensor, scale: Tensor | None) -> launch.Plan:
    checks.memory({"x": x, "out": out, "scale": scale}, ("out",))
    checks.dtype("x", x, checks.FLOATS)
    checks.dtype("out", out, (x.dtype, checks.E4M3))
    checks.scale("scale", scale, out.dtype == checks.E4M3)
    if x.shape[-1] % 2:
        raise ValueError(f"x has rows of {x.shape[-1]} numbers; it must be an even number: two halves")
    size = x.shape[-1] // 2
    checks.shape("out", out, (*x.shape[:-1], size))
    rows, inner, strides = launch.nested({"x": x, "out": out})
    if not rows * size:
        return launch.Plan(None)
    numbers = (rows, inner, size, *strides["x"], *strides["out"])
    if x.is_cpu:
        return launch.on_cpu("silu_and_mul", "silu_and_mul", numbers)
    piece = 16 // x.element_size()
    block, parts, pieces = launch.columns_of(-(-size // piece), rows)
    whole = launch.wide(piece, x[..., :size], x[..., size:], out)
    name = launch.entry("silu_and_mul", x.dtype, out.dtype, whole, pieces)
    return launch.on_gpu("silu_and_mul", name, x.device, rows, block, numbers, parts)


_plans = launch.Plans(_plan)
_write = jit.operator("jit_kernel::silu_and_mul", _silu_and_mul, fake=lambda *_: None, mutates=("out",))
for _type, _out, _pieces in itertools.product((torch.bfloat16, torch.float16), (None, checks.E4M3), (1, 2)):
    launch.declare("silu_and_mul", launch.entry("silu_and_mul", _type, _out or _type, True, _pieces))

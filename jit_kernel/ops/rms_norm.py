"""Root-mean-square norm, alone or of x added to a residual (kernel_sources/ops/rms_norm.h)."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from jit_kernel import jit
from jit_kernel.ops import checks, launch

FEW = 2  # pieces of 16 bytes that a thread keeps where rows are few


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, *, residual: Tensor | None = None,
             scale: Tensor | None = None, weight_bias: float = 0.0, out: Tensor | None = None) -> Tensor:  # fmt: skip
    """x / sqrt(mean(x^2) + eps) * (weight + weight_bias) over the last dimension, in float32, rounded once.

    x: (..., d) float32, float16 or bfloat16, any strides with a unit last one whose rows lie in two dimensions; weight:
    (d,) of one of these dtypes; weight_bias: 1.0 for Gemma's weights. residual: of x's shape and dtype; it becomes
    residual + x, rounded, and that is what is normed. scale: float32, one number: the result is float8_e4m3fn, divided
    by it. out: where the result goes; x itself will do. Raises TypeError and ValueError by an argument's name.
    """
    like = checks.tensor("x", x)
    out = checks.result(out, like, None, like.dtype if scale is None else checks.E4M3)
    _write(x, residual, weight, out, scale, checks.number("eps", eps, 0.0), checks.number("weight_bias", weight_bias))
    return out


def _rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, out: Tensor, scale: Tensor | None, eps: float,
              weight_bias: float) -> None:  # fmt: skip
    tensors = (x, residual, weight, out, scale)
    _plans.of(*tensors)(*tensors, then=(eps, weight_bias))


def _plan(x: Tensor, residual: Tensor | None, weight: Tensor, out: Tensor, scale: Tensor | None) -> launch.Plan:
    named = {"x": x, "residual": residual, "out": out}
    checks.memory({**named, "weight": weight, "scale": scale}, ("residual", "out"))
    checks.dims("x", x, 1)
    checks.dtype("x", x, checks.FLOATS)
    checks.dtype("weight", weight, checks.FLOATS)
    checks.shape("weight", weight, x.shape[-1:])
    checks.dtype("out", out, (x.dtype, checks.E4M3))
    checks.scale("scale", scale, out.dtype == checks.E4M3)
    for name, value in (("residual", residual), ("out", out)):
        if value is not None:
            checks.shape(name, value, x.shape)
    if residual is not None:
        checks.dtype("residual", residual, (x.dtype,))
    size = x.shape[-1]
    rows, inner, strides = launch.nested(named)
    if not rows * size:
        return launch.Plan(None)
    numbers = (rows, inner, size, *strides["x"], *strides["residual"], *strides["out"])
    if x.is_cpu:
        return launch.on_cpu("rms_norm", "rms_norm", numbers)
    piece = 16 // x.element_size()
    block, kept = launch.block_of(-(-size // piece), rows, few=FEW)
    whole = launch.wide(piece, x, residual, weight, out)
    name = launch.entry("rms_norm", x.dtype, weight.dtype, out.dtype, residual is not None, whole, kept)
    return launch.on_gpu("rms_norm", name, x.device, rows, block, numbers)


_plans = launch.Plans(_plan)
_write = jit.operator("jit_kernel::rms_norm", _rms_norm, fake=lambda *_: None, mutates=("residual", "out"))
for _type, _out in itertools.product((torch.bfloat16, torch.float16), (None, checks.E4M3)):
    for _residual, _kept in itertools.product((False, True), (1, 2, 4)):
        launch.declare("rms_norm", launch.entry("rms_norm", _type, _type, _out or _type, _residual, True, _kept))

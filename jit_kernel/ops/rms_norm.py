"""Root-mean-square norm, alone or of x added to a residual (kernel_sources/ops/rms_norm.h)."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from jit_kernel import jit
from jit_kernel.ops import checks
from jit_kernel.ops.rows import Plan, Plans, block_of, blocks_for, cpu_function, cuda_kernel, declare, nested, types, wide


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    weight_bias: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (weight + weight_bias) over the last dimension, in float32, rounded once.

    x: (..., d) float32, float16 or bfloat16, any strides with a unit last one whose rows lie in two dimensions; weight:
    (d,) of one of these dtypes; weight_bias: 1.0 for Gemma's weights. residual: of x's shape and dtype; it becomes
    residual + x, rounded, and that is what is normed. scale: float32, one number: the result is float8_e4m3fn, divided
    by it. out: where the result goes; x itself will do. Raises TypeError and ValueError by an argument's name.
    """
    like = checks.tensor("x", x)
    out = checks.result(out, like, like.shape, like.dtype if scale is None else checks.E4M3)
    _write(x, residual, weight, out, scale, checks.number("eps", eps, 0.0), checks.number("weight_bias", weight_bias))
    return out


def _rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    out: Tensor,
    scale: Tensor | None,
    eps: float,
    weight_bias: float,
) -> None:
    plan = _plans.of(x, residual, weight, out, scale)
    plan(x, residual, weight, out, scale, then=(eps, weight_bias))


def _plan(x: Tensor, residual: Tensor | None, weight: Tensor, out: Tensor, scale: Tensor | None) -> Plan:
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
    rows, inner, strides = nested(named)
    if not rows * size:
        return Plan(None)
    numbers = (rows, inner, size, *strides["x"], *strides["residual"], *strides["out"])
    if x.is_cpu:
        return Plan(cpu_function("rms_norm", "rms_norm"), numbers, on_cpu=True)
    piece = 16 // x.element_size()
    whole = wide(*((value, piece) for value in (x, residual, weight, out)))
    block, kept = block_of(-(-size // piece), rows)
    entry = f"rms_norm<{types(x.dtype, weight.dtype, out.dtype)}, {_TEXT[residual is not None]}, {_TEXT[whole]}, {kept}>"
    return Plan(cuda_kernel("rms_norm", entry, x.device)[blocks_for(rows, block), block], numbers)


_TEXT = {True: "true", False: "false"}
_plans = Plans(_plan)
_write = jit.operator("jit_kernel::rms_norm", _rms_norm, fake=lambda *_: None, mutates=("residual", "out"))
declare(
    "rms_norm",
    *(
        f"rms_norm<{types(x, x, out)}, {residual}, true, {kept}>"
        for x, quantized, residual, kept in itertools.product(
            (torch.bfloat16, torch.float16), (False, True), ("false", "true"), (1, 2, 4)
        )
        for out in [checks.E4M3 if quantized else x]
    ),
)

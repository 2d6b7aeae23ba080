"""Rows, groups or a whole tensor to float8_e4m3fn and scales (kernel_sources/ops/quantize_fp8.h)."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from jit_kernel import jit
from jit_kernel.ops import checks, launch

_PARTS = 528  # blocks that look for a tensor's largest number: four on each multiprocessor of an H200


def quantize_fp8(x: Tensor, group: int | str = "token", *, scale: Tensor | None = None, out: Tensor | None = None,
                 scale_out: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x as float8_e4m3fn, and the float32 scales that it is to be multiplied by: largest |x| / 448 of what shares one.

    x: (..., d) float32, float16 or bfloat16, any strides with a unit last one whose rows lie in two dimensions. group:
    "token": a scale a row, (..., 1); a divisor of d, as 128: one for so many, (..., d / 128); "tensor": one, (1,), or
    scale=. A largest number below 1e-12 counts as that. out, scale_out: the results. Raises TypeError and ValueError.
    """
    checks.dims("x", checks.tensor("x", x), 1)
    size = checks.group(group, x.shape[-1], scale, scale_out)
    shape = (1,) if size is None else (*x.shape[:-1], x.shape[-1] // size if size else 1)
    scales = checks.result(scale_out if scale is None else scale, x, shape, torch.float32, "scale")
    _write(x, out := checks.result(out, x, None, checks.E4M3), scales, size, scale is None)
    return out, scales


def _quantize_fp8(x: Tensor, out: Tensor, scales: Tensor, group: int | None, finds_scale: bool) -> None:
    _plans.of(x, out, scales, group, finds_scale)(x, out, scales)


def _plan(x: Tensor, out: Tensor, scales: Tensor, group: int | None, finds_scale: bool) -> launch.Plan:
    groups = x.shape[-1] // group if group else 1
    wanted = (1,) if group is None else (*x.shape[:-1], groups)
    checks.quantized(x, out, scales, "scale_out" if finds_scale else "scale", wanted)
    if group is None and finds_scale and launch.fits_a_block(x, out):
        x, out, scales, group = x.view(1, -1), out.view(1, -1), scales.view(1, 1), x.numel()
    if group is None:
        return _plan_tensor(*launch.even(x, out), finds_scale)
    if not scales.numel():
        return launch.Plan(None)
    grouped = {"x": launch.grouped(x, groups), "out": launch.grouped(out, groups)}
    rows, inner, strides = launch.nested({**grouped, "scale_out": scales.unsqueeze(-1)})
    numbers = (rows, inner, group, *strides["x"], *strides["out"], *strides["scale_out"])
    if x.is_cpu:
        return launch.on_cpu("quantize_fp8", "quantize_rows", numbers)
    piece = 16 // x.element_size()
    block, kept = launch.block_of(-(-group // piece), rows)
    name = launch.entry("quantize_rows", x.dtype, launch.wide(piece, *grouped.values()), kept)
    return launch.on_gpu("quantize_fp8", name, x.device, rows, block, numbers)


def _plan_tensor(x: Tensor, out: Tensor, finds_scale: bool) -> launch.Plan:
    rows, inner, strides = launch.nested({"x": x, "out": out})
    numbers = (rows, inner, x.shape[-1], *strides["x"], *strides["out"])
    if x.is_cpu:
        return launch.on_cpu("quantize_fp8", "quantize_tensor", (finds_scale, *numbers))
    whole = launch.wide(piece := 16 // x.element_size(), x, out)
    block, columns, pieces = launch.columns_of(-(-x.shape[-1] // piece), rows)
    name = launch.entry("quantize_tensor", x.dtype, whole, pieces)
    every = numbers if finds_scale else (None, 0, *numbers)
    quantize = launch.on_gpu("quantize_fp8", name, x.device, max(rows, 1), block, every, columns)
    largest = launch.cuda_kernel("quantize_fp8", launch.entry("largest_parts", x.dtype, whole), x.device)

    def both(x: Tensor, out: Tensor, scales: Tensor) -> None:
        largest[_PARTS, 256](x, parts := x.new_empty(_PARTS, dtype=torch.float32), *numbers[:5])
        quantize(x, out, scales, parts, _PARTS)

    return launch.Plan(both) if finds_scale else quantize


_plans = launch.Plans(_plan)
_write = jit.operator("jit_kernel::quantize_fp8", _quantize_fp8, fake=lambda *_: None, mutates=("out", "scales"))
for _type, _n in itertools.product((torch.bfloat16, torch.float16), (1, 2, 4)):
    for _name, *_more in (("quantize_rows", True, _n), ("quantize_tensor", True, min(_n, 2)), ("largest_parts", True)):
        launch.declare("quantize_fp8", launch.entry(_name, _type, *_more))

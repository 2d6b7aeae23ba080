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
    "token": a scale a row, (..., 1); a number that d is a multiple of, as 128: a scale for so many numbers of a row,
    (..., d / 128); "tensor": one for all, (1,), or with scale= that one, float32. Numbers below 1e-12 count as that.
    out, scale_out: where the results go; scale_out has any strides. Raises TypeError and ValueError by a name.
    """
    checks.dims("x", checks.tensor("x", x), 1)
    size = checks.group(group, x.shape[-1], scale, scale_out)
    out = checks.result(out, x, None, checks.E4M3)
    if scale is None:
        shape = (*x.shape[:-1], x.shape[-1] // size if size and x.shape[-1] else 1) if size is not None else (1,)
        scale_out = checks.result(scale_out, x, shape, torch.float32)
    scales = checks.tensor("scale", scale) if scale_out is None else scale_out
    _write(x, out, scales, size, scale is None)
    return out, scales


def _quantize_fp8(x: Tensor, out: Tensor, scales: Tensor, group: int | None, finds_scale: bool) -> None:
    _plans.of(x, out, scales, group, finds_scale)(x, out, scales)


def _plan(x: Tensor, out: Tensor, scales: Tensor, group: int | None, finds_scale: bool) -> launch.Plan:
    name = "scale_out" if finds_scale else "scale"
    checks.memory({"x": x, "out": out, name: scales.unsqueeze(-1)}, ("out", "scale_out"))
    for each, value, allowed in (
        ("x", x, checks.FLOATS),
        ("out", out, (checks.E4M3,)),
        (name, scales, (torch.float32,)),
    ):
        checks.dtype(each, value, allowed)
    checks.shape("out", out, x.shape)
    if group is None:
        checks.shape(name, scales, (1,))
        return _plan_tensor(*launch.even(x, out), finds_scale)
    groups = x.shape[-1] // group if group else 1
    checks.shape("scale_out", scales, (*x.shape[:-1], groups))
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
    size, piece, whole = x.shape[-1], 16 // x.element_size(), launch.wide(16 // x.element_size(), x, out)
    numbers = (rows, inner, size, *strides["x"], *strides["out"])
    if x.is_cpu:
        return launch.on_cpu("quantize_fp8", "quantize_tensor", (finds_scale, *numbers))
    block, columns, pieces = launch.columns_of(-(-size // piece), rows)
    by_parts = (None, 0) if not finds_scale else ()
    name = launch.entry("quantize_tensor", x.dtype, whole, pieces)
    quantize = launch.on_gpu("quantize_fp8", name, x.device, max(rows, 1), block, (*by_parts, *numbers), columns)
    if not finds_scale:
        return quantize
    largest = launch.cuda_kernel("quantize_fp8", launch.entry("largest_parts", x.dtype, whole), x.device)[_PARTS, 256]

    def both(x: Tensor, out: Tensor, scales: Tensor) -> None:
        parts = torch.empty(_PARTS, dtype=torch.float32, device=x.device)
        largest(x, parts, *numbers[:5])
        quantize(x, out, scales, parts, _PARTS)

    return launch.Plan(both)


_plans = launch.Plans(_plan)
_write = jit.operator("jit_kernel::quantize_fp8", _quantize_fp8, fake=lambda *_: None, mutates=("out", "scales"))
for _type, _count in itertools.product((torch.bfloat16, torch.float16), (1, 2, 4)):
    launch.declare("quantize_fp8", launch.entry("quantize_rows", _type, True, _count))
    launch.declare("quantize_fp8", launch.entry("quantize_tensor", _type, True, min(_count, 2)))
    launch.declare("quantize_fp8", launch.entry("largest_parts", _type, True))

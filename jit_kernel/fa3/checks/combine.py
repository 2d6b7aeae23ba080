"""The checks of `flash_attn_combine` and `merge_state`, done before anything is launched or written."""

from __future__ import annotations

import torch
from torch import Tensor

from jit_kernel.fa3.call import lse_shape
from jit_kernel.fa3.checks.memory import share
from jit_kernel.fa3.checks.plain import need_served_device
from jit_kernel.fa3.checks.values import (
    MAX_SPLITS,
    OUTPUT_DTYPES,
    need_device,
    need_dtype,
    need_known_dtype,
    need_range,
    need_shape,
    need_tensor,
    need_unit_stride,
    need_writable,
    refuse_derivatives,
)


def check_combine(
    out_partial: Tensor, lse_partial: Tensor, out: Tensor | None, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, torch.dtype]:
    """Check the arguments of `flash_attn_combine`; returns the parts as a kernel takes them, and the dtype of out.

    Raises TypeError or ValueError; NotImplementedError for an input that requires grad or has a tangent.
    """
    parts, lse = need_tensor("out_partial", out_partial), need_tensor("lse_partial", lse_partial)
    need_served_device("out_partial", parts)
    need_dtype("out_partial", parts, OUTPUT_DTYPES)
    if parts.dim() not in (4, 5):
        raise ValueError(
            f"out_partial has shape {tuple(parts.shape)}; "
            "it must be (splits, b, sq, hq, dv) or (splits, total_q, hq, dv)"
        )
    need_range("out_partial's number of splits", parts.shape[0], 1, MAX_SPLITS)
    need_unit_stride("out_partial", parts)
    need_dtype("lse_partial", lse, (torch.float32,))
    need_device("lse_partial", lse, parts.device, "out_partial")
    need_shape("lse_partial", lse, parts.shape[:-1], "out_partial's shape without dv")
    if out_dtype is not None:
        need_known_dtype("out_dtype", out_dtype, OUTPUT_DTYPES, ", or None")
    if out is not None:
        _check_out(out, parts, lse, out_dtype)
    refuse_derivatives((("out_partial", out_partial), ("lse_partial", lse_partial), ("out", out)))
    if out is not None:
        return parts, lse, out.dtype
    return parts, lse, parts.dtype if out_dtype is None else out_dtype


def _check_out(out: Tensor, parts: Tensor, lse: Tensor, dtype: torch.dtype | None) -> None:
    need_tensor("out", out, written=True)
    need_dtype("out", out, OUTPUT_DTYPES if dtype is None else (dtype,), "" if dtype is None else ", out_dtype")
    need_device("out", out, parts.device, "out_partial")
    need_shape("out", out, parts.shape[1:], "out_partial's shape without splits")
    need_unit_stride("out", out)
    need_writable("out", out)
    for name, part in (("out_partial", parts), ("lse_partial", lse)):
        if share(out, part):
            raise ValueError(f"out shares its memory with {name}; it must have memory of its own")


def check_merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Check the arguments of `merge_state`; returns them as a kernel takes them.

    Raises TypeError or ValueError; NotImplementedError for an input that requires grad or has a tangent.
    """
    given = (("out_a", out_a), ("lse_a", lse_a), ("out_b", out_b), ("lse_b", lse_b))
    out_a, lse_a, out_b, lse_b = (need_tensor(name, tensor) for name, tensor in given)
    need_served_device("out_a", out_a)
    need_dtype("out_a", out_a, OUTPUT_DTYPES)
    need_dtype("out_b", out_b, (out_a.dtype,), ", the dtype of out_a")
    if out_a.dim() not in (3, 4):
        raise ValueError(f"out_a has shape {tuple(out_a.shape)}; it must be (total_q, hq, dv) or (b, sq, hq, dv)")
    need_shape("out_b", out_b, out_a.shape, "out_a's shape")
    need_device("out_b", out_b, out_a.device, "out_a")
    for name, tensor in (("out_a", out_a), ("out_b", out_b)):
        need_unit_stride(name, tensor)
    form = "(hq, total_q)" if out_a.dim() == 3 else "(b, hq, sq)"
    shape = lse_shape(out_a)
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        need_dtype(name, lse, (torch.float32,))
        need_device(name, lse, out_a.device, "out_a")
        need_shape(name, lse, shape, form)
    refuse_derivatives(given)
    return out_a, lse_a, out_b, lse_b

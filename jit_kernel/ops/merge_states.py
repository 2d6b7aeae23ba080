"""Parts of attention over disjoint keys to the whole (kernel_sources/ops/merge_states.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from jit_kernel import jit
from jit_kernel.ops import checks, launch


def merge_states(out_partial: Tensor, lse_partial: Tensor, *, out: Tensor | None = None,
                 lse: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out = sum_i exp(lse_i - lse) out_i and lse = log(sum_i exp(lse_i)), in float32, rounded once.

    out_partial: (parts, ..., d) float32, float16 or bfloat16; lse_partial: (parts, ...) float32, natural logarithms;
    any strides whose rows lie in two dimensions, d's a unit. A part that saw no key has an lse of -inf, or +inf as
    FlashAttention-2 marks it, and its numbers may be anything; a row that none saw gives 0 and -inf. out: (..., d), of
    out_partial's dtype if left out, or of any of the three; lse: (...) float32. Raises TypeError and ValueError.
    """
    checks.dims("out_partial", checks.tensor("out_partial", out_partial), 2)
    out = checks.result(out, out_partial, out_partial.shape[1:], out_partial.dtype)
    lse = checks.result(lse, out_partial, out_partial.shape[1:-1], torch.float32, "lse")
    _write(out_partial, lse_partial, out, lse)
    return out, lse


def _merge_states(out_partial: Tensor, lse_partial: Tensor, out: Tensor, lse: Tensor) -> None:
    tensors = (out_partial, lse_partial, out, lse)
    _plans.of(*tensors)(*tensors)


def _plan(out_partial: Tensor, lse_partial: Tensor, out: Tensor, lse: Tensor) -> launch.Plan:
    checks.tensor("lse_partial", lse_partial)
    named = {"out_partial": out_partial, "lse_partial": lse_partial.unsqueeze(-1), "out": out, "lse": lse.unsqueeze(-1)}
    checks.memory(named, ("out", "lse"))
    for name, value in (("out_partial", out_partial), ("out", out)):
        checks.dtype(name, value, checks.FLOATS)
    for name, value in (("lse_partial", lse_partial), ("lse", lse)):
        checks.dtype(name, value, (torch.float32,))
    checks.shape("lse_partial", lse_partial, out_partial.shape[:-1])
    checks.shape("out", out, out_partial.shape[1:])
    checks.shape("lse", lse, out_partial.shape[1:-1])
    parts, size = out_partial.shape[0], out.shape[-1]
    if not lse.numel():
        return launch.Plan(None)
    one = {name: value[0] if name.endswith("_partial") and parts else value for name, value in named.items()}
    rows, inner, strides = launch.nested(one if parts else {"out": out, "lse": named["lse"]})
    none = (0, 0)
    numbers = (parts, rows, inner, size, out_partial.stride(0), *strides.get("out_partial", none),
               lse_partial.stride(0), *strides.get("lse_partial", none), *strides["out"], *strides["lse"])  # fmt: skip
    if out.is_cpu:
        return launch.on_cpu("merge_states", "merge_states", numbers)
    piece = 16 // out_partial.element_size()
    block = launch.head_block(min(32, -(-size // piece)))
    name = launch.entry("merge_states", out_partial.dtype, out.dtype, launch.wide(piece, out_partial, out))
    return launch.on_gpu("merge_states", name, out.device, rows, block, numbers)


_plans = launch.Plans(_plan)
_write = jit.operator("jit_kernel::merge_states", _merge_states, fake=lambda *_: None, mutates=("out", "lse"))
_HALVES = (torch.bfloat16, torch.float16)
launch.declare("merge_states", *(launch.entry("merge_states", t, o, True) for o in _HALVES for t in (torch.float32, o)))

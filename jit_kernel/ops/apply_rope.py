"""Rotary embedding of queries and keys, after a norm of each head where wanted (kernel_sources/ops/apply_rope.h)."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from jit_kernel import jit
from jit_kernel.ops import checks, launch


def apply_rope(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor, *, interleaved: bool = False,
    q_weight: Tensor | None = None, k_weight: Tensor | None = None, eps: float = 1e-6,
    q_out: Tensor | None = None, k_out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """q and k, each head normed where it has a weight, turned by the angles of its token's position.

    q: (tokens, heads, d), k: (tokens, kv_heads, d) or None: float32, float16 or bfloat16, any strides with a unit last
    one, d at most 512. cos, sin: (length, r / 2), of q's dtype or float32: the first r numbers of a head turn, as two
    halves, or as neighbours with interleaved=True. positions: (tokens,) int32 or int64, each below length: a CPU raises
    IndexError for another one, a GPU gives NaN. q_weight, k_weight: (d,) of q's dtype or float32: a root-mean-square
    norm with eps comes first. q_out, k_out: where the results go; q and k themselves will do. Computed in float32,
    rounded once. Raises TypeError and ValueError by an argument's name.
    """
    q_out = checks.result(q_out, checks.tensor("q", q), None, q.dtype)
    if k is not None:
        k_out = checks.result(k_out, checks.tensor("k", k), None, k.dtype)
    _write(
        q, k, q_out, k_out, cos, sin, positions, q_weight, k_weight, checks.number("eps", eps, 0.0), bool(interleaved)
    )
    return q_out, k_out


def _apply_rope(
    q: Tensor, k: Tensor | None, q_out: Tensor, k_out: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor,
    q_weight: Tensor | None, k_weight: Tensor | None, eps: float, interleaved: bool,
) -> None:  # fmt: skip
    tensors = (q, k, q_out, k_out, cos, sin, positions, q_weight, k_weight)
    plan = _plans.of(*tensors, interleaved)
    plan(*tensors, then=(eps, interleaved, positions.dtype == torch.int64))


def _plan(q: Tensor, k: Tensor | None, q_out: Tensor, k_out: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor,
          q_weight: Tensor | None, k_weight: Tensor | None, interleaved: bool) -> launch.Plan:  # fmt: skip
    named = {"q": q, "k": k, "q_out": q_out, "k_out": k_out, "cos": cos, "sin": sin, "positions": positions}
    checks.memory({**named, "q_weight": q_weight, "k_weight": k_weight}, ("q_out", "k_out"))
    checks.heads(q, k, q_out, k_out)
    tokens, heads, size = q.shape
    checks.angles(cos, sin, size, q.dtype)
    checks.integers("positions", positions, tokens)
    weight = checks.weights({"q_weight": q_weight, "k_weight": k_weight}, size, q.dtype)
    if k_weight is not None and k is None:
        raise ValueError("k_weight is given; it must be None, because k is None")
    kv_heads, half, rotary = (0 if k is None else k.shape[1]), cos.shape[1], 2 * cos.shape[1]
    if not tokens * (heads + kv_heads) * size:
        return launch.Plan(None)
    places = [each.stride()[:2] if each is not None else (0, 0) for each in (q, k, q_out, k_out)]
    numbers = (tokens, heads, kv_heads, size, rotary, cos.shape[0], *sum(places, ()), cos.stride(0), sin.stride(0))
    if q.is_cpu:
        return launch.on_cpu("apply_rope", "apply_rope", numbers)
    threads = -(-half // 8) + -(-(size - rotary) // 16)
    whole = launch.wide(8, q, k, q_out, k_out, cos, sin, q_weight, k_weight) and (size - rotary) % 16 == 0
    each = launch.heads_each(threads, tokens * (heads + kv_heads))
    name = launch.entry("apply_rope", q.dtype, cos.dtype, weight, whole, each)
    rows = tokens * (-(-heads // each) - (-kv_heads // each))
    return launch.on_gpu("apply_rope", name, q.device, rows, launch.head_block(threads), numbers)


_plans = launch.Plans(_plan)
_write = jit.operator("jit_kernel::apply_rope", _apply_rope, fake=lambda *_: None, mutates=("q_out", "k_out"))
for _type, _angle, _each in itertools.product((torch.bfloat16, torch.float16), (None, torch.float32), (1, 4)):
    launch.declare("apply_rope", launch.entry("apply_rope", _type, _angle or _type, _type, True, _each))

"""The backward pass as a torch operator, `torch.ops.jit_kernel.backward`, and what makes a forward operator call it.

A traced program holds the operator whole: what it does depends on the values of cu_seqlens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from jit_kernel.fa3.call import UNBOUNDED, default_scale
from jit_kernel.fa3.gradients import cpu, cuda

_library: Any = torch.library.Library("jit_kernel", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(
    "backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? offsets_q, "
    "Tensor? offsets_k, SymInt longest_q, SymInt longest_k, float? scale, bool causal, SymInt left, SymInt right) "
    "-> (Tensor, Tensor, Tensor)"
)
_below_autograd: Callable[[], Any] = torch._C._AutoDispatchBelowAutograd


def differentiable(operator: Callable[..., Any], arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """(out, lse) of an attention operator's arguments, by name; out can be differentiated after q, k and v."""
    rest = dict(arguments)
    q, k, v = (rest.pop(name) for name in "qkv")
    found: tuple[Tensor, Tensor] = _Attention.apply(operator, rest, q, k, v)  # type: ignore[no-untyped-call]
    return found


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, operator: Callable[..., Any], rest: dict[str, Any], q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        with _below_autograd():
            out, lse = operator(q=q, k=k, v=v, **{**rest, "return_softmax_lse": True})
        offsets = rest.get("cu_seqlens_q"), rest.get("cu_seqlens_k")
        ctx.save_for_backward(q, k, v, out, lse, *offsets)
        given = rest.get("max_seqlen_q"), rest.get("max_seqlen_k")
        longest = [
            each.shape[1] if each.dim() == 4 else each.shape[0] if bound is None else bound
            for each, bound in zip((q, k), given, strict=True)
        ]
        ctx.settings = (
            *longest, rest.get("softmax_scale"), rest.get("causal", False), *rest.get("window_size", UNBOUNDED),
        )  # fmt: skip
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, _: Any) -> tuple[Any, ...]:
        q, k, v, out, lse, *offsets = ctx.saved_tensors
        grads = torch.ops.jit_kernel.backward(grad_out, q, k, v, out, lse, *offsets, *ctx.settings)
        return (None, None, *grads)


class _Backward(torch.autograd.Function):
    """The operator in grad mode: its results can be made, and say by name that they cannot be differentiated again."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        with _below_autograd():
            made: tuple[Tensor, Tensor, Tensor] = torch.ops.jit_kernel.backward.default(*arguments)
        return made

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(
            "the gradients of q, k and v cannot be differentiated: jit_kernel's attention has first derivatives alone"
        )


def _attend_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets_q: Tensor | None,
    offsets_k: Tensor | None,
    longest_q: int,
    longest_k: int,
    scale: float | None,
    causal: bool,
    left: int,
    right: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator's implementation on every device."""
    if q.numel() == 0 or k.numel() == 0:
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    scale = default_scale(q, None, only_qv=False) if scale is None else scale
    right = 0 if causal else right
    lse = lse.masked_fill(lse == -math.inf, math.inf)  # exp(score - lse) is 0 in a row that sees no key
    tensors = _of_one_head_size((grad_out, out, q, k, v))
    offsets = None
    if offsets_q is not None or offsets_k is not None:
        tensors, lse, offsets = _laid_end_to_end(tensors, lse, offsets_q, offsets_k)
    if q.is_cpu and offsets is not None:
        grads = cpu.ragged(tensors, lse, offsets, scale, left, right)
    elif q.is_cpu:
        grads = cpu.dense(tensors, lse, scale, left, right)
    else:
        grads = cuda.flash(tensors, lse, offsets, (longest_q, longest_k), scale, left, right)
    grad_q, grad_k, grad_v = (
        grad[..., : of.shape[-1]].contiguous().view(of.shape) for grad, of in zip(grads, (q, k, v), strict=True)
    )
    return grad_q, grad_k, grad_v


def _laid_end_to_end(
    tensors: tuple[Tensor, ...], lse: Tensor, offsets_q: Tensor | None, offsets_k: Tensor | None
) -> tuple[tuple[Tensor, ...], Tensor, tuple[Tensor, Tensor]]:
    """A ragged call's tensors (total, h, d), lse (h, total_q) and offsets; one side may come as (b, s, h, d)."""
    grad_out, out, q, k, v = tensors
    if offsets_q is None:
        offsets_q = _offsets_of(q)
        grad_out, out, q = (each.flatten(0, 1) for each in (grad_out, out, q))
        lse = lse.transpose(0, 1).flatten(1)
    if offsets_k is None:
        offsets_k = _offsets_of(k)
        k, v = k.flatten(0, 1), v.flatten(0, 1)
    return (grad_out, out, q, k, v), lse, (offsets_q, offsets_k)


def _offsets_of(rows: Tensor) -> Tensor:
    batch, length = rows.shape[:2]
    return torch.arange(batch + 1, dtype=torch.int32, device=rows.device) * length


def _of_one_head_size(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """grad_out, out, q, k, v with zeros behind, to one head size, on CUDA a multiple of 8; last strides are 1."""
    size = max(each.shape[-1] for each in tensors)
    if not tensors[0].is_cpu:
        size = -(-size // 8) * 8
    padded = (
        each if each.shape[-1] == size else torch.nn.functional.pad(each, (0, size - each.shape[-1]))
        for each in tensors
    )
    return tuple(each if each.stride(-1) == 1 else each.contiguous() for each in padded)


def _fake_backward(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _with_autograd(*arguments: Any) -> Any:
    return _Backward.apply(*arguments)  # type: ignore[no-untyped-call]


_library.impl("backward", _attend_backward, "CompositeExplicitAutograd")
_library.impl("backward", _fake_backward, "Meta")
_library.impl("backward", _with_autograd, "Autograd")

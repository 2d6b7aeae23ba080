"""Gradients on CUDA, by `aten::_flash_attention_backward`: FlashAttention 2's, for what none of ours serves.

torch's "FA3" stands before that operator and calls `flash_attn_3::bwd`. Where that is ours it would come back here
without an end, so whoever defines it has torch's own kernel held first.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from jit_kernel.fa3.decision import Accepted, Decision, Rejected
from jit_kernel.fa3.gradients.call import Backward, Gradients

_OPERATOR = "aten::_flash_attention_backward"
_held: list[tuple[Any, Any]] = []  # torch's own kernel and the key set that it is called with, while it is held
MAX_HEAD_DIM = 256
# What the operator does not have, of a backward pass's fields.
_LACKING = ("grad_lse", "attention_chunk", "softcap", "sinks", "seqused_q", "seqused_k", "deterministic")


def hold_own_kernel(key: str = "CUDA") -> None:
    """Call the kernel that stands under a dispatch key now, whatever stands before it later; before torch 2.10 nothing.

    torch cannot put anything before it there, nor hand it out.
    """
    get_kernel = getattr(torch.library, "get_kernel", None)
    if get_kernel is not None:
        dispatch_key = getattr(torch._C.DispatchKey, key)
        _held[:] = [(get_kernel(_OPERATOR, key), torch._C.DispatchKeySet(dispatch_key))]


def release_own_kernel() -> None:
    """Call the operator again."""
    _held.clear()


def decide(call: Backward) -> Decision:
    """bf16 and fp16, head sizes up to 256; no gradient of lse, no softcap, chunk, sinks or seqused."""
    name = next((name for name in _LACKING if _is_used(getattr(call, name))), None)
    if name == "deterministic" and torch.are_deterministic_algorithms_enabled():
        name = None  # which the operator asks, too
    if name is not None:
        return Rejected(f"{name}: torch's FlashAttention 2 has none in its backward pass", claimed=False)
    if call.q.dtype not in (torch.bfloat16, torch.float16):
        return Rejected(f"q has dtype {call.q.dtype}: torch's FlashAttention 2 has bf16 and fp16", claimed=False)
    sizes = call.q.shape[-1], call.v.shape[-1]
    if max(sizes) > MAX_HEAD_DIM:
        return Rejected(f"head sizes {sizes[0]}/{sizes[1]} of q and v: torch's has them up to 256", claimed=False)
    return Accepted()


def _is_used(value: Tensor | float | None) -> bool:
    return value is not None if isinstance(value, Tensor) or value is None else value != 0


def gradients(call: Backward) -> Gradients:
    """The gradients of a call that `decide` accepts. Rows outside of every sequence get zeros."""
    grad_out, out, q, k, v = _of_one_head_size((call.grad_out, call.out, call.q, call.k, call.v))
    longest = (call.max_seqlen_q, call.max_seqlen_k)
    # exp(score - lse) is 0 in a row that sees no key
    lse = call.lse.masked_fill(call.lse == -math.inf, math.inf).contiguous()
    starts: tuple[Tensor | None, Tensor | None] = (None, None)
    if call.cu_seqlens_q is not None and call.cu_seqlens_k is not None:
        starts_q, starts_k = (each.to(torch.int32).contiguous() for each in (call.cu_seqlens_q, call.cu_seqlens_k))
        starts = starts_q, starts_k
        if starts_q.numel() == 1 or 0 in longest:  # no sequence, or none with rows: the operator takes neither
            nothing = [each.new_zeros(each.shape) for each in (call.q, call.k, call.v)]
            return Gradients(nothing[0], nothing[1], nothing[2], None)
    of_dropout = q.new_empty(2, dtype=torch.uint64), q.new_empty((), dtype=torch.uint64)
    found = _backward(
        grad_out, q, k, v, out, lse, *starts, *longest, 0.0, call.right == 0, *of_dropout,
        scale=call.softmax_scale, window_size_left=call.left, window_size_right=call.right,
    )  # fmt: skip
    grad_q, grad_k, grad_v = (
        grad[..., : of.shape[-1]].contiguous() for grad, of in zip(found, (call.q, call.k, call.v), strict=True)
    )
    if starts[0] is not None and starts[1] is not None:
        # The operator writes the rows of sequences alone, and its memory may hold anything.
        grad_q.masked_fill_(_outside(starts[0], q), 0)
        outside = _outside(starts[1], k)
        grad_k.masked_fill_(outside, 0)
        grad_v.masked_fill_(outside, 0)
    return Gradients(grad_q, grad_k, grad_v, None)


def _of_one_head_size(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Tensors with zeros behind, to one head size, a multiple of 8; last strides are 1."""
    size = -(-max(each.shape[-1] for each in tensors) // 8) * 8
    padded = (
        each if each.shape[-1] == size else torch.nn.functional.pad(each, (0, size - each.shape[-1]))
        for each in tensors
    )
    return tuple(each if each.stride(-1) == 1 else each.contiguous() for each in padded)


def _outside(starts: Tensor, rows: Tensor) -> Tensor:
    """(total, 1, 1): whether a row belongs to no sequence; nothing is read on the host."""
    index = torch.arange(rows.shape[0], device=rows.device)
    return ((index < starts[0]) | (index >= starts[-1]))[:, None, None]


def _backward(*arguments: Any, **named: Any) -> tuple[Tensor, ...]:
    """`aten::_flash_attention_backward`, or the kernel that is held of it."""
    found: tuple[Tensor, ...]
    if _held:
        kernel, keys = _held[0]
        found = kernel.call_boxed(keys, *arguments, **named)
    else:
        found = torch.ops.aten._flash_attention_backward(*arguments, **named)
    return found

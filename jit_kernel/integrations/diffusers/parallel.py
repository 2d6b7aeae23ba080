"""Context parallelism: the two passes that diffusers' ring and Ulysses attention call, with the lse that a ring needs.

diffusers exchanges keys (ring) or heads (Ulysses) and merges partial results by their lse; what stands here computes
one rank's part. The backward pass is torch's own operator with our out and lse, which a ring merges over all ranks.
"""

from __future__ import annotations

from typing import Any

from diffusers.models import attention_dispatch
from torch import Tensor

from jit_kernel.flash_attention_v3 import flash_attn_func
from jit_kernel.integrations.diffusers import padding
from jit_kernel.integrations.fa3_attention import gradients

_TEMPLATE = "_templated_context_parallel_attention"  # from diffusers 0.36 on


def available() -> bool:
    """Whether this diffusers has context parallelism."""
    return hasattr(attention_dispatch, _TEMPLATE)


def attend(
    tensors: tuple[Tensor, Tensor, Tensor], seen: Tensor | None, is_causal: bool, scale: float | None,
    enable_gqa: bool, return_lse: bool, config: Any,
) -> Any:  # fmt: skip
    """One rank's rows of the result, and of the lse (b, sq, hq) if asked for.

    seen: (b, sk) bool, for Ulysses alone: NotImplementedError in a ring, whose keys come from other ranks without it.
    diffusers raises ValueError for is_causal and enable_gqa.
    """
    if seen is not None and config.context_parallel_config.ring_degree > 1:
        raise NotImplementedError("attn_mask is given in a ring, where other ranks' keys come without it; use Ulysses")
    template = getattr(attention_dispatch, _TEMPLATE)
    return template(
        *tensors, seen, 0.0, is_causal, scale, enable_gqa, return_lse,
        forward_op=forward, backward_op=backward, _parallel_config=config,
    )  # fmt: skip


def forward(
    ctx: Any, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False, return_lse: bool = False,
    _save_ctx: bool = True, _parallel_config: Any = None,
) -> Any:  # fmt: skip
    """diffusers' forward operator: out (b, sq, h, d), or (out, lse (b, sq, h)); attn_mask is (b, sk) bool."""
    if attn_mask is not None:
        out, lse = padding.attend(query, key, value, attn_mask, scale)
    else:
        found = flash_attn_func(query, key, value, scale, return_softmax_lse=True)
        out, lse = found[0], found[1]
    lse = lse.transpose(1, 2).contiguous()
    if _save_ctx:
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.seen, ctx.scale = attn_mask, scale
    return (out, lse) if return_lse else out


def backward(
    ctx: Any, grad_out: Tensor, *_: Any, query: Tensor | None = None, key: Tensor | None = None,
    value: Tensor | None = None, out: Tensor | None = None, lse: Tensor | None = None, **others: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """diffusers' backward operator: the gradients of query, key and value; a ring gives other keys, and its own lse."""
    given = (query, key, value, out, lse)
    saved = ctx.saved_tensors[: len(given)]
    q, k, v, o, of_rows = (old if new is None else new for new, old in zip(given, saved, strict=True))
    if ctx.seen is None:
        return gradients(grad_out, q, k, v, o, of_rows.transpose(1, 2).contiguous(), softmax_scale=ctx.scale)
    rows = padding.layout(ctx.seen, q.shape[1])
    grad_q, *of_keys = gradients(
        grad_out.flatten(0, 1), q.flatten(0, 1), rows.of_keys(k), rows.of_keys(v), o.flatten(0, 1),
        of_rows.flatten(0, 1).T.contiguous(), cu_seqlens_q=rows.starts_q, cu_seqlens_k=rows.starts_k,
        max_seqlen_q=q.shape[1], max_seqlen_k=k.shape[1], softmax_scale=ctx.scale,
    )  # fmt: skip
    grad_k, grad_v = (each.new_zeros(each.shape).index_copy_(0, rows.order, rows.counting(each)) for each in of_keys)
    return grad_q.view(q.shape), grad_k.view(k.shape), grad_v.view(v.shape)

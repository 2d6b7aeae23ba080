"""FlashAttention-3's forward and backward pass by its operators' argument names, for its module and its operators.

As there, an input may require grad in every call, and it is the backward pass that says what it does not serve.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from jit_kernel import flash_attention_v3 as public
from jit_kernel.fa3.checks.values import need_window
from jit_kernel.integrations.peers import note_served, refuse_given, with_unit_stride

HOST = "flash_attn_interface"
_COPIED = ("q", "k", "v", "k_new", "v_new", "qv", "page_table", "rotary_cos", "rotary_sin")
# What only a call over a cache has, by the operator's names.
_OF_A_CACHE = ("k_new", "v_new", "kv_batch_idx", "leftpad_k", "rotary_cos", "rotary_sin", "scheduler_metadata")


def attend(function: Callable[..., Any], arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """(out, lse) of a public function's arguments by name; tensors whose last stride is not 1 are copied.

    out can be differentiated after q, k and v where `gradients` serves the call. lse cannot, as in FlashAttention-3.
    """
    given = {name: with_unit_stride(value) if name in _COPIED else value for name, value in arguments.items()}
    if are_gradients_wanted(given.values()):
        result = differentiable(function, given)
    else:
        result = function(**_of_forward(function, given), return_softmax_lse=True)
    note_served(HOST)
    return result


def _of_forward(function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a public function; of flash_attn_varlen_func's only the backward pass has deterministic."""
    has_it = function is public.flash_attn_func
    return {name: value for name, value in arguments.items() if has_it or name != "deterministic"}


def are_gradients_wanted(values: Iterable[Any]) -> bool:
    """Whether one of the values requires grad, in grad mode."""
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in values)


def differentiable(function: Callable[..., Any], arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """(out, lse) of a public function without out and sinks; the backward pass says by name what it does not serve."""
    rest = {name: value for name, value in arguments.items() if name not in ("q", "k", "v", "qv")}
    tensors = (arguments["q"], arguments["k"], arguments["v"], arguments.get("qv"))
    out, lse = _Attention.apply(function, rest, *tensors)  # type: ignore[no-untyped-call]
    return out, lse


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, function: Callable[..., Any], rest: dict[str, Any], q: Any, k: Any, v: Any, qv: Any
    ) -> tuple[Tensor, Tensor]:
        out, lse = function(q=q, k=k, v=v, qv=qv, **_of_forward(function, rest), return_softmax_lse=True)
        named = {name: value for name, value in rest.items() if name in _OF_THE_BACKWARD}
        tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
        ctx.save_for_backward(q, k, v, out, lse, *tensors.values())
        ctx.tensors, ctx.named, ctx.has_qv = tuple(tensors), named, qv is not None
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _: Any) -> tuple[Any, ...]:
        q, k, v, out, lse = ctx.saved_tensors[:5]
        named = ctx.named | dict(zip(ctx.tensors, ctx.saved_tensors[5:], strict=True))
        left, right = need_window(named.pop("window_size", None))
        grads = gradients(
            dout, q, k, v, out, lse, qv=ctx.has_qv or None, window_size_left=left, window_size_right=right, **named
        )
        return None, None, *grads, None


# The arguments of a public function on which its gradients depend.
_OF_THE_BACKWARD = frozenset((
    "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "page_table", "max_seqlen_q", "max_seqlen_k",
    "softmax_scale", "causal", "window_size", "attention_chunk", "softcap", "deterministic",
))  # fmt: skip


def gradients(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *,
    cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None, seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None, max_seqlen_q: int | None = None, max_seqlen_k: int | None = None,
    softmax_scale: float | None = None, causal: bool = False, window_size_left: int = -1, window_size_right: int = -1,
    softcap: float = 0.0, attention_chunk: int | None = 0, page_table: Tensor | None = None, qv: Any = None,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v with the out and lse of the forward pass.

    Dense calls and ragged ones, causal masks, windows, chunks, softcap, grouped heads, seqused. Raises
    NotImplementedError, by name, for page_table, qv and for e4m3.
    """
    backward = "the backward pass of FlashAttention-3's functions"
    refuse_given(backward, page_table=page_table, qv=qv)
    if q.dtype is torch.float8_e4m3fn:
        raise NotImplementedError(f"q is of {q.dtype}; {backward} needs fp32, bf16 or fp16")
    right = 0 if causal else window_size_right
    grad_q, grad_k, grad_v, _ = torch.ops.jit_kernel.backward(
        dout, q, k, v, out, lse, softmax_scale, window_size_left, right, None, attention_chunk or 0, softcap, None,
        cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k, deterministic,
    )  # fmt: skip
    return grad_q, grad_k, grad_v


def row_products(dout: Tensor, out: Tensor) -> Tensor:
    """FlashAttention-3's softmax_d without its padding: sum(dout * out) of each row, float32, of lse's shape."""
    return (dout.float() * out.float()).sum(-1).transpose(-1, -2).contiguous()


def forward(arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """(out, lse) of the arguments of `flash_attn_3::fwd`, by its names.

    What only a call over a cache has goes with neither cu_seqlens_k nor seqused_q: NotImplementedError by name.
    """
    a = arguments
    shared = {
        "q": a["q"], "qv": a["q_v"], "out": a["out"], "cu_seqlens_q": a["cu_seqlens_q"],
        "max_seqlen_q": a["max_seqlen_q"], "page_table": a["page_table"], "softmax_scale": a["softmax_scale"],
        "causal": a["is_causal"], "window_size": (a["window_size_left"], a["window_size_right"]),
        **{name: a[name] for name in ("q_descale", "k_descale", "v_descale", "attention_chunk", "softcap")},
        **{name: a[name] for name in ("num_splits", "pack_gqa", "sm_margin")},
    }  # fmt: skip
    if all(a[name] is None for name in _OF_A_CACHE):
        named = {name: a[name] for name in ("k", "v", "cu_seqlens_k", "max_seqlen_k", "seqused_q", "seqused_k")}
        return attend(public.flash_attn_varlen_func, shared | named)
    refuse_given("flash_attn_3::fwd over a cache", cu_seqlens_k=a["cu_seqlens_k"], seqused_q=a["seqused_q"])
    of_cache = {
        "k_cache": a["k"], "v_cache": a["v"], "k": a["k_new"], "v": a["v_new"], "cache_seqlens": a["seqused_k"],
        "cache_batch_idx": a["kv_batch_idx"], "cache_leftpad": a["leftpad_k"], "rotary_seqlens": a["seqlens_rotary"],
        "rotary_interleaved": a["is_rotary_interleaved"],
        **{name: a[name] for name in ("cu_seqlens_k_new", "rotary_cos", "rotary_sin", "scheduler_metadata")},
    }  # fmt: skip
    return attend_cache(shared | of_cache)


def attend_cache(arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """(out, lse) of the arguments of `flash_attn_with_kvcache`, which has no backward pass there either."""
    given = {name: with_unit_stride(value) if name in _COPIED else value for name, value in arguments.items()}
    out, lse = public.flash_attn_with_kvcache(**given | {"return_softmax_lse": True})
    note_served(HOST)
    return out, lse

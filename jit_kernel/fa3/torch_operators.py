"""The public functions as torch operators, for torch.compile and torch.export; eager calls never come here.

While a function is traced, its call becomes one operator with a fake implementation (shapes and dtypes alone). When
the compiled program runs, the operator calls the public function, which checks and computes as ever. What a call
writes is declared: `out`, and the caches when new keys are appended. An operator may not return its own argument, so
with `out` it returns an empty tensor in its place, and no lse is an empty tensor too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

_NAMESPACE = "jit_kernel"

_VARLEN = """(*, Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt? max_seqlen_q=None,
SymInt? max_seqlen_k=None, Tensor? seqused_q=None, Tensor? seqused_k=None, Tensor? page_table=None,
float? softmax_scale=None, bool causal=False, Tensor? qv=None, Tensor? q_descale=None, Tensor? k_descale=None,
Tensor? v_descale=None, SymInt[] window_size=[-1, -1], SymInt? attention_chunk=None, float softcap=0.0,
SymInt num_splits=1, bool? pack_gqa=None, bool only_qv=False, SymInt sm_margin=0, bool return_softmax_lse=False,
Tensor? sinks=None, Tensor(a!)? out=None) -> (Tensor, Tensor)"""

# k_cache and v_cache are written only by a call that appends: declaring it of every call would copy whole caches.
_KVCACHE = """(*, Tensor q, Tensor{a} k_cache, Tensor{b} v_cache, Tensor? k=None, Tensor? v=None, Tensor? qv=None,
Tensor? rotary_cos=None, Tensor? rotary_sin=None, Tensor? cache_seqlens=None, Tensor? cache_batch_idx=None,
Tensor? cache_leftpad=None, Tensor? page_table=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k_new=None,
SymInt? max_seqlen_q=None, Tensor? rotary_seqlens=None, Tensor? q_descale=None, Tensor? k_descale=None,
Tensor? v_descale=None, float? softmax_scale=None, bool causal=False, SymInt[] window_size=[-1, -1],
SymInt? attention_chunk=None, float softcap=0.0, bool rotary_interleaved=True, Tensor? scheduler_metadata=None,
SymInt num_splits=0, bool? pack_gqa=None, bool only_qv=False, SymInt sm_margin=0, bool return_softmax_lse=False,
Tensor? sinks=None, Tensor(c!)? out=None) -> (Tensor, Tensor)"""

_DENSE = """(*, Tensor q, Tensor k, Tensor v, float? softmax_scale=None, bool causal=False, Tensor? qv=None,
Tensor? q_descale=None, Tensor? k_descale=None, Tensor? v_descale=None, SymInt[] window_size=[-1, -1],
SymInt? attention_chunk=None, float softcap=0.0, SymInt num_splits=1, bool? pack_gqa=None, bool deterministic=False,
SymInt sm_margin=0, bool return_softmax_lse=False, Tensor? sinks=None, Tensor(a!)? out=None) -> (Tensor, Tensor)"""

_METADATA = """(*, SymInt batch_size, SymInt max_seqlen_q, SymInt max_seqlen_k, SymInt num_heads_q, SymInt num_heads_kv,
SymInt headdim, Tensor cache_seqlens, ScalarType qkv_dtype, SymInt? headdim_v=None, Tensor? cu_seqlens_q=None,
Tensor? cu_seqlens_k_new=None, Tensor? cache_leftpad=None, SymInt? page_size=None, SymInt max_seqlen_k_new=0,
bool causal=False, SymInt[] window_size=[-1, -1], SymInt? attention_chunk=None, bool has_softcap=False,
SymInt num_splits=0, bool? pack_gqa=None, SymInt sm_margin=0) -> Tensor"""

_COMBINE = """(*, Tensor out_partial, Tensor lse_partial, Tensor(a!)? out=None, ScalarType? out_dtype=None)
-> (Tensor, Tensor)"""

_MERGE = "(*, Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor, Tensor)"

_library = torch.library.Library(_NAMESPACE, "DEF")


def implement(functions: Mapping[str, Callable[..., Any]]) -> None:
    """Define the operators, once, on top of the public functions by name."""
    attention = {
        "varlen": (_VARLEN, functions["flash_attn_varlen_func"]),
        "kvcache": (_KVCACHE.format(a="", b=""), functions["flash_attn_with_kvcache"]),
        "kvcache_append": (_KVCACHE.format(a="(a!)", b="(b!)"), functions["flash_attn_with_kvcache"]),
        "dense": (_DENSE, functions["flash_attn_func"]),
    }
    for name, (schema, function) in attention.items():
        _define(name, schema, _as_operator(function), _fake_attention)
    _define("metadata", _METADATA, functions["get_scheduler_metadata"], None)
    torch.library.register_fake(f"{_NAMESPACE}::metadata", _fake_metadata, lib=_library)
    _define("combine", _COMBINE, _as_operator(functions["flash_attn_combine"]), _fake_combine)
    _define("merge_state", _MERGE, functions["merge_state"], _fake_merge)


def _define(name: str, schema: str, real: Callable[..., Any], fake: Callable[..., Any] | None) -> None:
    _library.define(name + schema.replace("\n", " "))
    _library.impl(name, real, "CompositeExplicitAutograd")
    if fake is not None:  # as a Meta kernel: register_fake looks up its caller's source line, 0.7 ms each
        _library.impl(name, fake, "Meta")


def _as_operator(function: Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor]]:
    """A public function as an operator's implementation: two tensors, neither of them an argument."""

    def call(**arguments: Any) -> tuple[Tensor, Tensor]:
        result = function(**arguments)
        out, lse = result if isinstance(result, tuple) else (result, None)
        if arguments.get("out") is not None:
            out = out.new_empty(0)
        return out, out.new_empty(0, dtype=torch.float32) if lse is None else lse

    return call


def _fake_attention(*, q: Tensor, out: Tensor | None = None, **rest: Any) -> tuple[Tensor, Tensor]:
    values: Tensor = rest["v_cache"] if "v_cache" in rest else rest["v"]
    if out is None:
        dtype = torch.bfloat16 if q.dtype == torch.float8_e4m3fn else q.dtype
        made = q.new_empty((*q.shape[:-1], values.shape[-1]), dtype=dtype)
    else:
        made = out.new_empty(0)
    *lead, rows, heads, _ = q.shape
    shape = (*lead, heads, rows) if rest.get("return_softmax_lse") else (0,)
    return made, q.new_empty(shape, dtype=torch.float32)


def _fake_metadata(*, cache_seqlens: Tensor, **rest: Any) -> Tensor:
    # Each implementation has a length of its own for it.
    length = torch.library.get_ctx().new_dynamic_size()
    return cache_seqlens.new_empty(length)


def _fake_combine(
    *,
    out_partial: Tensor,
    lse_partial: Tensor,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    shape = out_partial.shape[1:]
    made = out_partial.new_empty(shape, dtype=out_dtype or out_partial.dtype) if out is None else out.new_empty(0)
    return made, lse_partial.new_empty(shape[:-1])


def _fake_merge(*, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    return out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)


def _refuse_gradients(call: Mapping[str, Any]) -> None:
    if torch.is_grad_enabled():
        for name, value in call.items():
            if isinstance(value, Tensor) and value.requires_grad:
                raise NotImplementedError(f"{name} requires grad; jit_kernel has the forward pass alone")


def _run(operator: Callable[..., Any], call: Mapping[str, Any]) -> Tensor | tuple[Tensor, Tensor]:
    _refuse_gradients(call)
    out, lse = operator(**call)
    if call["out"] is not None:
        out = call["out"]
    return (out, lse) if call["return_softmax_lse"] else out


def varlen(call: dict[str, Any]) -> Tensor | tuple[Tensor, Tensor]:
    """`flash_attn_varlen_func` while it is traced."""
    return _run(torch.ops.jit_kernel.varlen, call)


def kvcache(call: dict[str, Any]) -> Tensor | tuple[Tensor, Tensor]:
    """`flash_attn_with_kvcache` while it is traced."""
    q, offsets, seqlens = call["q"], call["cu_seqlens_q"], call["cache_seqlens"]
    if seqlens is not None and not isinstance(seqlens, Tensor):
        batch = q.shape[0] if offsets is None else offsets.shape[0] - 1
        call["cache_seqlens"] = torch.full((batch,), seqlens, dtype=torch.int32, device=q.device)
    return _run(torch.ops.jit_kernel.kvcache if call["k"] is None else torch.ops.jit_kernel.kvcache_append, call)


def dense(call: dict[str, Any]) -> Tensor | tuple[Tensor, Tensor]:
    """`flash_attn_func` while it is traced."""
    return _run(torch.ops.jit_kernel.dense, call)


def metadata(call: dict[str, Any]) -> Tensor:
    """`get_scheduler_metadata` while it is traced."""
    made: Tensor = torch.ops.jit_kernel.metadata(**call)
    return made


def combine(call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """`flash_attn_combine` while it is traced."""
    _refuse_gradients(call)
    out, lse = torch.ops.jit_kernel.combine(**call)
    return (out if call["out"] is None else call["out"]), lse


def merge(call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """`merge_state` while it is traced."""
    _refuse_gradients(call)
    merged: tuple[Tensor, Tensor] = torch.ops.jit_kernel.merge_state(**call)
    return merged

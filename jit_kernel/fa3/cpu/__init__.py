"""Attention on the CPU: C++ compiled for this machine, one library for each dtype and one to combine results.

The libraries take every head size up to 512 and every argument at run time (kernel_sources/flash_attention_v3/cpu).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from jit_kernel import jit
from jit_kernel.device import Target, cpu_target
from jit_kernel.fa3.checks import metadata as scheduler_header
from jit_kernel.fa3.checks.combine import lse_shape
from jit_kernel.fa3.checks.shapes import default_scale
from jit_kernel.fa3.cpu import known as cpu_plain
from jit_kernel.fa3.features import DTYPE_NAMES, Accepted, Decision, Features, Rejected, refusal

NAME = "cpu"
MAX_HEAD_DIM = 512

_KERNEL = "flash_attention_v3/cpu"
_ELEMENTS = {"fp32": "f32", "bf16": "bf16", "fp16": "fp16", "e4m3": "e4m3"}
# Scores that are masked are -inf, so never -ffast-math. The library's threads outlive a dropped module: nodelete.
_FLAGS = ("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-pthread", "-Wl,-z,nodelete")

# k_new to rotary_seqlens, in a call without any of them.
_NO_INDICES = (None,) * 13

Result = Tensor | tuple[Tensor, Tensor]

_forwards: dict[tuple[torch.dtype, int, int], Callable[..., None]] = {}
_combines: dict[str, Callable[..., None]] = {}


def supports(target: Target) -> Decision:
    """Every CPU is supported."""
    if target.vendor != "cpu":
        return Rejected(f"it serves CPUs, not {target}", claimed=False)
    return Accepted()


def decide(target: Target, features: Features) -> Decision:
    """Everything but head sizes above 512."""
    return _decide_sizes(features.head_dim, features.head_dim_v)


def _decide_sizes(head_dim: int, head_dim_v: int) -> Decision:
    if max(head_dim, head_dim_v) > MAX_HEAD_DIM:
        return Rejected(f"head sizes {head_dim}/{head_dim_v}: the CPU kernel serves head sizes up to {MAX_HEAD_DIM}")
    return Accepted()


def prepare(device: str) -> None:
    """Nothing: a CPU needs no launcher."""


def forward_spec(dtype: str) -> jit.KernelSpec:
    """The library that attends in one dtype."""
    unit = f'#include "{_KERNEL}/entry/forward.h"\nJIT_KERNEL_EXPORT_FORWARD({_ELEMENTS[dtype]})\n'
    variant = (("function", "forward"), ("dtype", dtype), ("head_dim", "any"))
    return jit.KernelSpec(_KERNEL, unit, "host", variant, _FLAGS)


def combine_spec() -> jit.KernelSpec:
    """The library that combines splits and merges states, in every dtype."""
    unit = f'#include "{_KERNEL}/entry/combine.h"\nJIT_KERNEL_EXPORT_COMBINE()\n'
    return jit.KernelSpec(_KERNEL, unit, "host", (("function", "combine"),), _FLAGS)


def all_variants(target: Target) -> list[jit.KernelSpec]:
    """What warm-up compiles: a library for each dtype, and the one that combines."""
    return [*(forward_spec(dtype) for dtype in _ELEMENTS), combine_spec()]


def variant(target: Target, features: Features, call: Mapping[str, Any]) -> jit.KernelSpec:
    """The library that serves a call."""
    return forward_spec(features.dtype)


def canonical(field: str, value: str) -> str:
    """The value of a variant's field that serves a user's value: one library serves every head size."""
    if field == "head_dim" and value.isdigit() and 1 <= int(value) <= MAX_HEAD_DIM:
        return "any"
    return value


def _forward(q: Tensor, v: Tensor) -> Callable[..., None]:
    key = (q.dtype, q.shape[-1], v.shape[-1])
    forward = _forwards.get(key)
    if forward is None:
        decision = _decide_sizes(key[1], key[2])
        if isinstance(decision, Rejected):
            raise refusal(f"head sizes {key[1]}/{key[2]} on {cpu_target()}", [(NAME, decision)])
        library = jit.load(forward_spec(DTYPE_NAMES[q.dtype]), cpu_target())
        forward = _forwards[key] = library.forward
        cpu_plain.serve(q.dtype, library)
    return forward


def _combine(name: str) -> Callable[..., None]:
    function = _combines.get(name)
    if function is None:
        function = _combines[name] = getattr(jit.load(combine_spec(), cpu_target()), name)
    return function


def _results(
    q: Tensor, v: Tensor, out: Tensor | None, with_lse: bool, seqused_q: Tensor | None, cu_seqlens_q: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """out and lse, allocated where they are not given; rows that no query fills are 0 and -inf in ours."""
    partly = seqused_q is not None or (cu_seqlens_q is not None and int(cu_seqlens_q[-1]) < q.shape[0])
    if out is None:
        dtype = torch.bfloat16 if q.dtype == torch.float8_e4m3fn else q.dtype
        shape = (*q.shape[:-1], v.shape[-1])
        make = torch.zeros if partly else torch.empty
        out = make(shape, dtype=dtype, device="cpu")  # whatever the default device is
    lse = None
    if with_lse:
        lse = torch.empty(lse_shape(q), dtype=torch.float32, device="cpu")
        if partly:
            lse.fill_(-math.inf)
    return out, lse


def flash_attn_varlen_func(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    page_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    only_qv: bool = False,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
) -> Result:
    """See `jit_kernel.flash_attention_v3.flash_attn_varlen_func`."""
    forward = _forward(q, v)
    out, lse = _results(q, v, out, return_softmax_lse, seqused_q, cu_seqlens_q)
    forward(
        q,
        k,
        v,
        out,
        lse,
        qv,
        None,  # k_new
        None,  # v_new
        page_table,
        cu_seqlens_q,
        cu_seqlens_k,
        None,  # cu_seqlens_k_new
        seqused_q,
        seqused_k,
        None,  # cache_batch_idx
        None,  # cache_leftpad
        None,  # rotary_cos
        None,  # rotary_sin
        None,  # rotary_seqlens
        q_descale,
        k_descale,
        v_descale,
        sinks,
        default_scale(q, qv, only_qv=only_qv) if softmax_scale is None else softmax_scale,
        causal,
        *window_size,
        attention_chunk,
        softcap,
        False,  # rotary_interleaved
        only_qv,
        num_splits,
        torch.get_num_threads(),
    )
    return out if lse is None else (out, lse)


def flash_attn_with_kvcache(
    *,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    only_qv: bool = False,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
) -> Result:
    """See `jit_kernel.flash_attention_v3.flash_attn_with_kvcache`."""
    if scheduler_metadata is not None:
        scheduler_header.verify(NAME, locals())
    forward = _forward(q, v_cache)
    out, lse = _results(q, v_cache, out, return_softmax_lse, None, cu_seqlens_q)
    forward(
        q,
        k_cache,
        v_cache,
        out,
        lse,
        qv,
        k,
        v,
        page_table,
        cu_seqlens_q,
        None,  # cu_seqlens_k
        cu_seqlens_k_new,
        None,  # seqused_q
        cache_seqlens,
        cache_batch_idx,
        cache_leftpad,
        rotary_cos,
        rotary_sin,
        rotary_seqlens,
        q_descale,
        k_descale,
        v_descale,
        sinks,
        default_scale(q, qv, only_qv=only_qv) if softmax_scale is None else softmax_scale,
        causal,
        *window_size,
        attention_chunk,
        softcap,
        rotary_interleaved,
        only_qv,
        num_splits,
        torch.get_num_threads(),
    )
    return out if lse is None else (out, lse)


def flash_attn_func(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
) -> Result:
    """See `jit_kernel.flash_attention_v3.flash_attn_func`."""
    forward = _forward(q, v)
    out, lse = _results(q, v, out, return_softmax_lse, None, None)
    forward(
        q,
        k,
        v,
        out,
        lse,
        qv,
        *_NO_INDICES,
        q_descale,
        k_descale,
        v_descale,
        sinks,
        default_scale(q, qv, only_qv=False) if softmax_scale is None else softmax_scale,
        causal,
        *window_size,
        attention_chunk,
        softcap,
        False,  # rotary_interleaved
        False,  # only_qv
        num_splits,
        torch.get_num_threads(),
    )
    return out if lse is None else (out, lse)


def get_scheduler_metadata(
    *,
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    headdim: int,
    cache_seqlens: Tensor,
    qkv_dtype: torch.dtype = torch.bfloat16,
    headdim_v: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_size: int | None = None,
    max_seqlen_k_new: int = 0,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> Tensor:
    """See `jit_kernel.flash_attention_v3.get_scheduler_metadata`. The kernel plans for itself: a header alone."""
    return scheduler_header.make(NAME, locals())


def flash_attn_combine(
    *, out_partial: Tensor, lse_partial: Tensor, out: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """See `jit_kernel.flash_attention_v3.flash_attn_combine`."""
    if out is None:
        dtype = out_partial.dtype if out_dtype is None else out_dtype
        out = torch.empty(out_partial.shape[1:], dtype=dtype, device="cpu")
    lse = torch.empty(out_partial.shape[1:-1], dtype=torch.float32, device="cpu")
    _combine("combine")(out_partial, lse_partial, out, lse)
    return out, lse


def merge_state(*, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """See `jit_kernel.flash_attention_v3.merge_state`."""
    out = torch.empty(out_a.shape, dtype=out_a.dtype, device="cpu")
    lse = torch.empty(lse_a.shape, dtype=torch.float32, device="cpu")
    by_token = (x.transpose(-1, -2) for x in (lse_a, lse_b, lse))
    lse_a, lse_b, lse_out = by_token
    _combine("merge_state")(out_a, lse_a, out_b, lse_b, out, lse_out)
    return out, lse


KERNELS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "flash_attn_varlen_func": flash_attn_varlen_func,
        "flash_attn_with_kvcache": flash_attn_with_kvcache,
        "flash_attn_func": flash_attn_func,
        "get_scheduler_metadata": get_scheduler_metadata,
        "flash_attn_combine": flash_attn_combine,
        "merge_state": merge_state,
    }
)
plain_attend = cpu_plain.attend

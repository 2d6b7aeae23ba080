"""Attention on the CPU: C++ compiled for this machine."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from jit_kernel import jit
from jit_kernel.device import Target, cpu_target
from jit_kernel.fa3 import call as calls
from jit_kernel.fa3 import header
from jit_kernel.fa3.call import Call, MetadataParameters, Result
from jit_kernel.fa3.cpu import kernels, known
from jit_kernel.fa3.decision import Accepted, Decision, Rejected, refusal
from jit_kernel.fa3.features import DTYPE_NAMES, Features
from jit_kernel.jit import KernelSpec

NAME = "cpu"
FUNCTIONS = (calls.VARLEN, calls.KVCACHE, calls.DENSE)
REFUSES = True
try_unchecked = known.try_unchecked

_forwards: dict[tuple[torch.dtype, torch.dtype, int, int], Callable[..., None]] = {}
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
    if max(head_dim, head_dim_v) > kernels.MAX_HEAD_DIM:
        most = kernels.MAX_HEAD_DIM
        return Rejected(f"head sizes {head_dim}/{head_dim_v}: the CPU kernel serves head sizes up to {most}")
    return Accepted()


def prepare(device: str) -> None:
    """Nothing: a CPU needs no launcher."""


def all_variants(target: Target) -> list[KernelSpec]:
    """What warm-up compiles: a library for each dtype, and the one that combines."""
    return list(kernels.all_specs())


def variant(target: Target, features: Features, call: Call) -> KernelSpec:
    """The library that serves a call."""
    return kernels.forward_spec(features.dtype, features.kv_dtype)


def canonical(spec: KernelSpec, field: str, value: str) -> str:
    """The value of a variant's field that serves a user's value: one library serves every head size."""
    if field == "head_dim" and value.isdigit() and 1 <= int(value) <= kernels.MAX_HEAD_DIM:
        return "any"
    return value


def _forward(q: Tensor, v: Tensor) -> Callable[..., None]:
    key = (q.dtype, v.dtype, q.shape[-1], v.shape[-1])
    forward = _forwards.get(key)
    if forward is None:
        decision = _decide_sizes(*key[2:])
        if isinstance(decision, Rejected):
            raise refusal(f"head sizes {key[2]}/{key[3]} on {cpu_target()}", [(NAME, decision)])
        library = jit.load(kernels.forward_spec(DTYPE_NAMES[q.dtype], DTYPE_NAMES[v.dtype]), cpu_target())
        forward = _forwards[key] = library.forward
        if v.dtype is q.dtype:  # the library of another dtype of keys serves no plain calls
            known.serve(q.dtype, library)
    return forward


def _combine(name: str) -> Callable[..., None]:
    function = _combines.get(name)
    if function is None:
        function = _combines[name] = getattr(jit.load(kernels.combine_spec(), cpu_target()), name)
    return function


def attend(call: Call) -> Result:
    """Attention of a checked call."""
    q, v, offsets = call.q, call.v, call.cu_seqlens_q
    if call.scheduler_metadata is not None:
        header.verify(NAME, call)
    forward = _forward(q, v)
    out, lse = call.out, calls.new_lse(call)
    if out is None:
        out = calls.new_result(call)
    # Rows that no query fills: 0 in memory of ours, and -inf.
    if call.seqused_q is not None or (offsets is not None and int(offsets[-1]) < q.shape[0]):
        if call.out is None:
            out.zero_()
        if lse is not None:
            lse.fill_(-math.inf)
    forward(
        q, call.k, v, out, lse, call.qv, call.k_new, call.v_new, call.page_table, offsets, call.cu_seqlens_k,
        call.cu_seqlens_k_new, call.seqused_q, call.seqused_k, call.cache_batch_idx, call.cache_leftpad,
        call.rotary_cos, call.rotary_sin, call.rotary_seqlens, call.q_descale, call.k_descale, call.v_descale,
        call.k_scale, call.v_scale, call.sinks, call.draft_mask, call.softmax_scale, call.causal, *call.window_size,
        call.attention_chunk, call.softcap, call.rotary_interleaved, call.only_qv, calls.splits_of(call),
        torch.get_num_threads(),
    )  # fmt: skip
    return out if lse is None else (out, lse)


def plan(parameters: MetadataParameters) -> Tensor:
    """Scheduler metadata: the kernel plans for itself, so a header alone."""
    return header.make(NAME, parameters)


def combine(out_partial: Tensor, lse_partial: Tensor, out: Tensor, lse: Tensor) -> None:
    """Combine checked parts into out and lse."""
    _combine("combine")(out_partial, lse_partial, out, lse)


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor, lse: Tensor) -> None:
    """Merge two checked states into out and lse. The library takes an lse with the tokens first."""
    by_token = [tensor.transpose(-1, -2) for tensor in (lse_a, lse_b, lse)]
    _combine("merge_state")(out_a, by_token[0], out_b, by_token[1], out, by_token[2])

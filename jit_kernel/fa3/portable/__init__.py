"""The portable implementation: Triton kernels for every NVIDIA GPU from compute capability 8.0 on.

The whole public contract but fp32. Triton compiles in a process of its own into the cache; a warmed
machine needs neither Triton nor a compiler.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jit_kernel import config
from jit_kernel.device import Target
from jit_kernel.engine import triton_compiler
from jit_kernel.fa3 import call as calls
from jit_kernel.fa3 import header
from jit_kernel.fa3.call import Call, MetadataParameters, Result
from jit_kernel.fa3.decision import Accepted, Decision, Rejected, refusal
from jit_kernel.fa3.features import Features, asks_for_more, features_of, unclaimed
from jit_kernel.fa3.portable import append, backward, forward, kernels, planning, tiles
from jit_kernel.jit import KernelSpec

NAME = "portable"
FUNCTIONS = (calls.VARLEN, calls.KVCACHE, calls.DENSE)
REFUSES = True
LEAST_CAPABILITY = 80

# What a call may ask for, by the names of features.ARGUMENTS: the rest is rejected.
CLAIMED = frozenset(
    (
        *("ragged_q", "ragged_k", "page_size", "seqused_q", "seqused_k", "append", "ragged_append", "rotary"),
        *("cache_batch_idx", "cache_leftpad", "causal", "window", "chunk", "softcap", "sinks", "lse", "split"),
        *("metadata", "draft_mask", "deterministic", "qv", "only_qv", "descale", "token_scales"),
    )
)

_asks_for_more = asks_for_more(CLAIMED)


def supports(target: Target) -> Decision:
    """NVIDIA GPUs of compute capability 8.0 and newer."""
    if target.vendor != "cuda":
        return Rejected(f"it serves NVIDIA GPUs, not {target}", claimed=False)
    if triton_compiler.capability(target.architecture) < LEAST_CAPABILITY:
        return Rejected(f"{target.architecture}: it serves sm_80 and newer", claimed=False)
    return Accepted()


def decide(target: Target, features: Features) -> Decision:
    """bf16, fp16 and e4m3, the latter also beside queries of 16 bits, with head sizes up to 512."""
    return _decide(features)


def _decide(features: Features) -> Decision:
    reason = kernels.unserved(features.dtype, features.head_dim, features.head_dim_v)
    arguments = unclaimed(features, CLAIMED)
    if arguments is not None:
        reason = f"{arguments}: its kernels have none"
    return Accepted() if reason is None else Rejected(reason, claimed=False)


def prepare(device: str) -> None:
    """Compile or load the launcher."""
    forward.kernels_of(torch.device(device))


def all_variants(target: Target) -> list[KernelSpec]:
    """What warm-up compiles for a target."""
    if not isinstance(supports(target), Accepted):
        return []
    return [*kernels.all_specs(target), *backward.variants(target)]


def variant(target: Target, features: Features, call: Call) -> KernelSpec:
    """The attention kernel that serves a call that `decide` accepts; split keys may need a combine kernel too."""
    q = call.q
    longest = q.shape[1] if q.ndim == 4 else call.max_seqlen_q or q.shape[0]
    kind = planning.tile_kind(calls.splits_of(call), longest * features.group, features.aligned, features.draft_mask)
    local = planning.is_local(call.window_size, call.attention_chunk or 0, features.draft_mask)
    qv = features.qv + features.only_qv
    tile = tiles.tile(target.architecture, features.head_dim, features.head_dim_v, kind, qv, features.kv_dtype)
    return kernels.forward_spec(
        target.architecture,
        features.dtype,
        features.head_dim,
        features.head_dim_v,
        kind,
        features.page_size > 0,
        local,
        features.softcap,
        features.aligned,
        features.draft_mask,
        features.kv_dtype,
        qv,
        features.token_scales,
        planning.has_whole_tiles(qv, features.page_size, tile, features.cache_leftpad),
    )


def canonical(spec: KernelSpec, field: str, value: str) -> str:
    """The value of a variant's field that serves a user's value: each has a kernel of its own."""
    return value


def attend(call: Call) -> Result:
    """Attention of a checked call. Raises NotImplementedError for one that `decide` rejects."""
    if _asks_for_more(call):
        raise refusal("this call", [(NAME, _decide(features_of(call)))])
    if call.scheduler_metadata is not None and config.check_indices():
        header.verify(NAME, call)
    if call.k_new is not None:
        q = append.append(call)
        if q is not call.q:
            call.q, call.layouts = q, 0
    return forward.attend(call)


def plan(parameters: MetadataParameters) -> Tensor:
    """Scheduler metadata: splits are chosen on the host, so a header alone."""
    return header.make(NAME, parameters)


def combine(out_partial: Tensor, lse_partial: Tensor, out: Tensor, lse: Tensor) -> None:
    """Combine checked parts into out and lse."""
    forward.combine(out_partial, lse_partial, out, lse)


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor, lse: Tensor) -> None:
    """Merge two checked states into out and lse. The kernel takes an lse with the tokens first."""
    by_token = [tensor.transpose(-1, -2) for tensor in (lse_a, lse_b, lse)]
    forward.merge(out_a, by_token[0], out_b, by_token[1], out, by_token[2])

"""Gradients of attention: the host side of the backward kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from jit_kernel.device import Target, device_target
from jit_kernel.fa3.decision import Accepted, Decision, Rejected
from jit_kernel.fa3.features import DTYPE_NAMES
from jit_kernel.fa3.gradients.call import Backward, Gradients
from jit_kernel.fa3.hopper import kernels
from jit_kernel.jit import KernelSpec

ARCHITECTURE = "sm_90a"
_LOG2E = 1.4426950408889634


def decide(call: Backward) -> Decision:
    """bf16 and fp16 on sm_90a, head sizes up to 256 that are multiples of 8; every mask, softcap, sinks, in order."""
    q = call.q
    if q.device.type == "meta":  # of a question about a target, which the dispatcher has looked at
        return decide_unplaced(call)
    target = device_target(q.device) if q.is_cuda else None
    if target is None or target.architecture != ARCHITECTURE:
        where = target or q.device
        return Rejected(f"q is on {where}: its backward kernels are for cuda:{ARCHITECTURE}", claimed=False)
    return decide_unplaced(call)


def decide_unplaced(call: Backward) -> Decision:
    """What `decide` says where the device is right."""
    dtype, head_dim, head_dim_v = call.q.dtype, call.q.shape[-1], call.v.shape[-1]
    if DTYPE_NAMES.get(dtype) not in kernels.DTYPES:
        return Rejected(f"q has dtype {dtype}: its backward kernels compute in bf16 and fp16", claimed=False)
    sizes = f"q and v have head sizes {head_dim}/{head_dim_v}"
    if head_dim % 8 or head_dim_v % 8:
        return Rejected(f"{sizes}: the copy engine moves multiples of 8", claimed=False)
    most = max(kernels.BACKWARD_HEAD_DIMS)
    if max(head_dim, head_dim_v) > most:
        return Rejected(f"{sizes}: its backward kernels have head sizes up to {most}", claimed=False)
    if (call.cu_seqlens_q is None) != (call.cu_seqlens_k is None):
        return Rejected("cu_seqlens_q and cu_seqlens_k: its backward kernels take both or none", claimed=False)
    return Accepted()


def spec_of(call: Backward) -> KernelSpec:
    """The kernels that serve a call; raises ValueError for head sizes that none have."""
    most = max(call.q.shape[-1], call.v.shape[-1])
    size = next((size for size in kernels.BACKWARD_HEAD_DIMS if most <= size), None)
    if size is None:
        raise ValueError(f"no backward kernel has a head size of {most}")
    return kernels.backward_spec(DTYPE_NAMES[call.q.dtype], size, call.softcap > 0)


def variants(target: Target) -> list[KernelSpec]:
    """What warm-up compiles for a target."""
    return list(kernels.backward_specs()) if str(target) == f"cuda:{ARCHITECTURE}" else []


def gradients(call: Backward) -> Gradients:
    """The gradients of a call that `decide` accepts. Nothing here synchronises."""
    q, k, v = (_aligned(x) for x in (call.q, call.k, call.v))
    grad_out, out = _aligned(call.grad_out), _aligned(call.out)
    has_other_rows = call.cu_seqlens_q is not None or call.seqused_q is not None or call.seqused_k is not None
    sequences: int = q.shape[0] if call.cu_seqlens_q is None else call.cu_seqlens_q.shape[0] - 1
    if q.numel() == 0 or sequences == 0:
        return _nothing(call)
    new = torch.zeros if has_other_rows else torch.empty
    grads = [new(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    device, heads = kernels.kernels_of(q.device), q.shape[-2]
    key = ("backward", q.dtype, q.shape[-1], v.shape[-1], call.softcap > 0)
    handle = device.handles.get(key)
    if handle is None:
        handle = device.load(key, spec_of(call))
    tiles, tile_floats, rows, parts = device.backward_room(
        handle, q.shape[-3], sequences, call.cu_seqlens_q is not None
    )
    work = torch.empty(heads * tiles * tile_floats, dtype=torch.float32, device=q.device)
    added = torch.zeros(heads * tiles * parts, dtype=torch.int32, device=q.device) if call.deterministic else None
    lse = call.lse if call.lse.stride(-1) == 1 else call.lse.contiguous()
    device.backward(
        handle, grad_out, q, k, v, out, lse, call.grad_lse, call.cu_seqlens_q, call.cu_seqlens_k, call.seqused_q,
        call.seqused_k, *grads, work, added, float(call.softmax_scale), float(call.softcap), call.left, call.right,
        call.attention_chunk,
    )  # fmt: skip
    of_rows = work[: 2 * heads * tiles * rows].view(2, heads, tiles * rows)
    return Gradients(grads[0], grads[1], grads[2], _grad_sinks(call.sinks, *of_rows))


def _grad_sinks(sinks: Tensor | None, lse_log2: Tensor, delta: Tensor) -> Tensor | None:
    """-sum exp(sink - lse) D, of rows as the kernels left them: where there is none, lse is infinite and D 0."""
    if sinks is None:
        return None
    weights = torch.exp2((sinks.float() * _LOG2E)[:, None] - lse_log2)
    return -(weights * delta).sum(-1)


def _nothing(call: Backward) -> Gradients:
    """Without a query: zeros."""
    grads = [torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (call.q, call.k, call.v)]
    of_sinks = None if call.sinks is None else torch.zeros_like(call.sinks, dtype=torch.float32)
    return Gradients(grads[0], grads[1], grads[2], of_sinks)


def _aligned(x: Tensor) -> Tensor:
    """x, or a copy of it where the copy engine cannot reach its rows: each begins at a multiple of 16 bytes."""
    strides = [stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    reached = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(s > 0 and s % 8 == 0 for s in strides)
    return x if reached else x.clone(memory_format=torch.contiguous_format)

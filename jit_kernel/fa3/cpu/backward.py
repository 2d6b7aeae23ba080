"""The backward pass on the CPU: one library a dtype serves every call (kernel_sources/.../cpu/entry/backward.h)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from jit_kernel import jit
from jit_kernel.device import Target, cpu_target
from jit_kernel.fa3.cpu import kernels
from jit_kernel.fa3.decision import Accepted, Decision, Rejected
from jit_kernel.fa3.features import DTYPE_NAMES
from jit_kernel.fa3.gradients.call import Backward, Gradients
from jit_kernel.jit import KernelSpec

DTYPES = ("fp32", "bf16", "fp16")
_VECTOR = 16  # floats of the widest vectors: a row of dQ's sums holds whole ones

_functions: dict[torch.dtype, Callable[..., None]] = {}


def decide(call: Backward) -> Decision:
    """fp32, bf16 and fp16 on a CPU, head sizes up to 512, with everything that a call can ask for."""
    if call.q.device.type not in ("cpu", "meta"):
        return Rejected(f"q is on {call.q.device}: it serves CPUs", claimed=False)
    if DTYPE_NAMES.get(call.q.dtype) not in DTYPES:
        return Rejected(f"q has dtype {call.q.dtype}: it computes in {', '.join(DTYPES)}", claimed=False)
    sizes = call.q.shape[-1], call.v.shape[-1]
    if max(sizes) > kernels.MAX_HEAD_DIM:
        return Rejected(f"head sizes {sizes[0]}/{sizes[1]} of q and v: it serves up to {kernels.MAX_HEAD_DIM}")
    return Accepted()


def variants(target: Target) -> Iterable[KernelSpec]:
    """What warm-up compiles: a library for each dtype."""
    return [kernels.backward_spec(dtype) for dtype in DTYPES]


def _function(dtype: torch.dtype) -> Callable[..., None]:
    function = _functions.get(dtype)
    if function is None:
        function = _functions[dtype] = jit.load(kernels.backward_spec(DTYPE_NAMES[dtype]), cpu_target()).backward
    return function


def gradients(call: Backward) -> Gradients:
    """The gradients of a call that `decide` accepts; the same bits for any number of threads."""
    q, k, v, sinks = call.q, call.k, call.v, call.sinks
    heads, rows = q.shape[-2], q[..., 0, 0].numel()
    # Zeros, as the library writes what is seen alone.
    grads = [each.new_zeros(each.shape) for each in (q, k, v)]
    of_sinks = None if sinks is None else torch.zeros(heads, dtype=torch.float32, device="cpu")
    sums = torch.empty((heads, rows, -(-q.shape[-1] // _VECTOR) * _VECTOR), dtype=torch.float32, device="cpu")
    of_rows = torch.empty((2, heads, rows), dtype=torch.float32, device="cpu")
    _function(q.dtype)(
        _unit(call.grad_out), _unit(q), _unit(k), _unit(v), _unit(call.out), call.lse, *grads, sums, of_rows,
        call.grad_lse, sinks, of_sinks, call.cu_seqlens_q, call.cu_seqlens_k, call.seqused_q, call.seqused_k,
        call.softmax_scale, call.left, call.right, call.attention_chunk, call.softcap, torch.get_num_threads(),
    )  # fmt: skip
    return Gradients(grads[0], grads[1], grads[2], of_sinks)


def _unit(tensor: Tensor) -> Tensor:
    """A tensor whose last stride is 1; a gradient may be an expanded one."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()

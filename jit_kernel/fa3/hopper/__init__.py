"""The Hopper implementation: prefill kernels for sm_90a in CUDA C++ with raw PTX.

Dense and ragged attention in bf16 and fp16, head sizes up to 256 that are multiples of 8. Paged and cached keys,
split keys, qv and fp8 are not claimed: the portable kernels are the best ones for them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from jit_kernel.device import Target
from jit_kernel.fa3 import call as calls
from jit_kernel.fa3.call import Call, Result
from jit_kernel.fa3.decision import Accepted, Decision, Rejected
from jit_kernel.fa3.features import DTYPE_NAMES, Features, asks_for_more, unclaimed
from jit_kernel.fa3.hopper import kernels
from jit_kernel.fa3.hopper.kernels import DeviceKernels
from jit_kernel.jit import KernelSpec

NAME = "hopper"
ARCHITECTURE = "sm_90a"
FUNCTIONS = (calls.VARLEN, calls.DENSE)
# What a call may ask for, by the names of features.ARGUMENTS: `decide` and `try_known` reject the rest.
CLAIMED = frozenset(
    ("ragged_q", "ragged_k", "seqused_q", "seqused_k", "causal", "window", "chunk", "softcap", "sinks", "lse")
)

_asks_for_more = asks_for_more(CLAIMED)


def supports(target: Target) -> Decision:
    """NVIDIA GPUs of compute capability 9.0 alone: wgmma and setmaxnreg exist nowhere else."""
    if target.vendor != "cuda" or target.architecture != ARCHITECTURE:
        return Rejected(f"it serves cuda:{ARCHITECTURE}, not {target}", claimed=False)
    return Accepted()


def decide(target: Target, features: Features) -> Decision:
    """bf16 and fp16, head sizes that are multiples of 8 up to 256, rows that the copy engine can reach."""
    if features.dtype not in kernels.DTYPES:
        return Rejected(f"dtype {features.dtype}: it computes in bf16 and fp16", claimed=False)
    arguments = unclaimed(features, CLAIMED)
    if arguments is not None:
        return Rejected(f"{arguments}: its kernels are for prefill without them", claimed=False)
    sizes = f"head sizes {features.head_dim}/{features.head_dim_v}"
    if features.head_dim % 8 or features.head_dim_v % 8:
        return Rejected(f"{sizes}: the copy engine moves multiples of 8", claimed=False)
    if kernels.padded(features.head_dim, features.head_dim_v) is None:
        return Rejected(f"{sizes}: it serves head sizes up to 256", claimed=False)
    if not features.aligned:
        return Rejected("strides or addresses that are no multiple of the copy engine's 16 bytes", claimed=False)
    return Accepted()


def prepare(device: str) -> None:
    """Compile or load the launcher."""
    global _asks_for_more
    _asks_for_more = asks_for_more(CLAIMED)
    _kernels_of(torch.device(device))


def all_variants(target: Target) -> list[KernelSpec]:
    """What warm-up compiles for a target."""
    return list(kernels.all_specs()) if isinstance(supports(target), Accepted) else []


def canonical(field: str, value: str) -> str:
    """The value of a variant's field that serves a user's value: the next head size there is a kernel for."""
    index = {"head_dim": 0, "head_dim_v": 1}.get(field)
    if index is None or not value.isdecimal():
        return value
    sizes = sorted({pair[index] for pair in kernels.HEAD_DIMS})
    return str(next((size for size in sizes if int(value) <= size), value))


def variant(target: Target, features: Features, call: Call) -> KernelSpec:
    """The kernel that serves a call that `decide` accepts."""
    masked = features.causal or features.window or features.chunk
    return _spec(features.dtype, features.head_dim, features.head_dim_v, masked, features.softcap)


def _spec(dtype: str, head_dim: int, head_dim_v: int, masked: bool, softcap: bool) -> KernelSpec:
    sizes = kernels.padded(head_dim, head_dim_v)
    if sizes is None:
        raise ValueError(f"no kernel has head sizes {head_dim}/{head_dim_v}")
    return kernels.forward_spec(dtype, *sizes, masked, softcap)


def _kernels_of(device: torch.device) -> DeviceKernels:
    return kernels.kernels_of(device)


def _load(device: DeviceKernels, key: tuple[Any, ...]) -> int:
    dtype, *rest = key
    return device.load(key, _spec(DTYPE_NAMES[dtype], *rest))


def try_known(call: Call) -> Result | None:
    """The result of a checked call of a kind that these kernels have had before; None for every other call.

    What `decide` looks at takes 5 us to gather; here a loaded kernel's key answers for dtype and head sizes, the
    launcher for addresses and strides, and the arguments that ask for an unclaimed feature must be absent.
    """
    if _asks_for_more(call):
        return None
    return _attend(call, only_known=True)


def attend(call: Call) -> Result:
    """Attention of a checked call that `decide` accepts."""
    result = _attend(call, only_known=False)
    if result is None:
        raise RuntimeError("the Hopper launcher did not launch a call that was accepted")
    return result


def _attend(call: Call, only_known: bool) -> Result | None:
    """Nothing here synchronises.

    only_known: None, and nothing is launched, where the kernel is not loaded yet or a row is not aligned.
    """
    q, v, offsets = call.q, call.v, call.cu_seqlens_q
    device = _kernels_of(q.device)
    left, right = calls.mask_bounds(call)
    chunk, softcap = call.attention_chunk or 0, call.softcap
    key = (q.dtype, q.shape[-1], v.shape[-1], left >= 0 or right >= 0 or chunk > 0, softcap > 0)
    handle = device.handles.get(key)
    if handle is None and only_known:
        return None
    result: Tensor = calls.new_result(call) if call.out is None else call.out
    lse = calls.new_lse(call)
    if result.numel() == 0 or (offsets is not None and offsets.shape[0] == 1):
        if call.out is None:
            result.zero_()
        return result if lse is None else (result, lse.fill_(-math.inf))
    if handle is None:
        handle = _load(device, key)
    clear_rest = call.out is None and (offsets is not None or call.seqused_q is not None)
    launched = device.forward(
        handle, q, call.k, v, result, lse, offsets, call.cu_seqlens_k, call.seqused_q, call.seqused_k,
        call.sinks, call.softmax_scale, float(softcap), left, right, chunk, call.sm_margin, clear_rest, only_known,
    )  # fmt: skip
    if not launched:
        return None
    return result if lse is None else (result, lse)

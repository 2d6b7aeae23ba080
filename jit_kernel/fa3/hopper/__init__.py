"""The Hopper implementation: prefill kernels for sm_90a in CUDA C++ with raw PTX.

Dense and ragged attention in bf16 and fp16, head sizes up to 256 that are multiples of 8. Paged and cached keys,
split keys, qv and fp8 are not claimed: they are the portable kernels' by right.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from jit_kernel.device import Target, device_target
from jit_kernel.fa3.features import DTYPE_NAMES, Accepted, Decision, Features, Rejected
from jit_kernel.fa3.hopper import kernels as hopper_kernels
from jit_kernel.fa3.hopper.kernels import DeviceKernels
from jit_kernel.jit import KernelSpec

NAME = "hopper"
ARCHITECTURE = "sm_90a"
# What a call may ask for that these kernels do not have, and how to say it.
_UNCLAIMED = {
    "page_size": "page_table",
    "append": "new keys and values",
    "rotary": "rotary_cos and rotary_sin",
    "cache_batch_idx": "cache_batch_idx",
    "cache_leftpad": "cache_leftpad",
    "qv": "qv",
    "descale": "q_descale, k_descale and v_descale",
    "split": "num_splits other than 1",
    "metadata": "scheduler_metadata",
}

Result = Tensor | tuple[Tensor, Tensor]

_devices: dict[int, DeviceKernels] = {}


def supports(target: Target) -> Decision:
    """NVIDIA GPUs of compute capability 9.0 alone: wgmma and setmaxnreg exist nowhere else."""
    if target.vendor != "cuda" or target.architecture != ARCHITECTURE:
        return Rejected(f"it serves cuda:{ARCHITECTURE}, not {target}", claimed=False)
    return Accepted()


def decide(target: Target, features: Features) -> Decision:
    """bf16 and fp16, head sizes that are multiples of 8 up to 256, rows that the copy engine can reach."""
    if features.dtype not in hopper_kernels.DTYPES:
        return Rejected(f"dtype {features.dtype}: it computes in bf16 and fp16", claimed=False)
    for field, words in _UNCLAIMED.items():
        if getattr(features, field):
            return Rejected(f"{words}: its kernels are for prefill without them", claimed=False)
    sizes = f"head sizes {features.head_dim}/{features.head_dim_v}"
    if features.head_dim % 8 or features.head_dim_v % 8:
        return Rejected(f"{sizes}: the copy engine moves multiples of 8", claimed=False)
    if hopper_kernels.padded(features.head_dim, features.head_dim_v) is None:
        return Rejected(f"{sizes}: it serves head sizes up to 256", claimed=False)
    if not features.aligned:
        return Rejected("strides or addresses that are no multiple of the copy engine's 16 bytes", claimed=False)
    return Accepted()


def prepare(device: str) -> None:
    """Compile or load the launcher."""
    _kernels_of(torch.device(device))


def all_variants(target: Target) -> list[KernelSpec]:
    """What warm-up compiles for a target."""
    return list(hopper_kernels.all_specs()) if isinstance(supports(target), Accepted) else []


def canonical(field: str, value: str) -> str:
    """The value of a variant's field that serves a user's value: the next head size there is a kernel for."""
    index = {"head_dim": 0, "head_dim_v": 1}.get(field)
    if index is None or not value.isdecimal():
        return value
    sizes = sorted({pair[index] for pair in hopper_kernels.HEAD_DIMS})
    return str(next((size for size in sizes if int(value) <= size), value))


def variant(target: Target, features: Features, call: Mapping[str, Any]) -> KernelSpec:
    """The kernel that serves a call that `decide` accepts."""
    sizes = hopper_kernels.padded(features.head_dim, features.head_dim_v)
    if sizes is None:
        raise ValueError(f"no kernel has head sizes {features.head_dim}/{features.head_dim_v}")
    masked = features.causal or features.window or features.chunk
    return hopper_kernels.forward_spec(features.dtype, *sizes, masked, features.softcap)


def _kernels_of(device: torch.device) -> DeviceKernels:
    index: int = device.index
    found = _devices.get(index)
    if found is None:
        found = _devices[index] = DeviceKernels(index, device_target(device))
    return found


def _load(kernels: DeviceKernels, key: tuple[Any, ...]) -> int:
    dtype, head_dim, head_dim_v, masked, softcap = key
    sizes = hopper_kernels.padded(head_dim, head_dim_v)
    if sizes is None:
        raise ValueError(f"no kernel has head sizes {head_dim}/{head_dim_v}")
    return kernels.load(key, hopper_kernels.forward_spec(DTYPE_NAMES[dtype], *sizes, masked, softcap))


def _attend(call: Mapping[str, Any], only_known: bool) -> Result | None:
    """Attention of a checked call; nothing here synchronises.

    only_known: None, and nothing is launched, where the kernel is not loaded yet or a row is not aligned.
    """
    q: Tensor = call["q"]
    v: Tensor = call["v"]
    out: Tensor | None = call["out"]
    kernels = _kernels_of(q.device)
    left, right = call["window_size"]
    if call["causal"]:
        right = 0
    chunk, softcap, scale = call["attention_chunk"], call["softcap"], call["softmax_scale"]
    shape = q.shape
    head_dim, head_dim_v = shape[-1], v.shape[-1]
    key = (q.dtype, head_dim, head_dim_v, left >= 0 or right >= 0 or chunk > 0, softcap > 0)
    handle = kernels.handles.get(key)
    if handle is None and only_known:
        return None
    cu_seqlens_q, seqused_q = call.get("cu_seqlens_q"), call.get("seqused_q")
    result = torch.empty((*shape[:-1], head_dim_v), dtype=q.dtype, device=q.device) if out is None else out
    lse = None
    if call["return_softmax_lse"]:
        rows = (shape[1], shape[0]) if cu_seqlens_q is not None else (shape[0], shape[2], shape[1])
        lse = torch.empty(rows, dtype=torch.float32, device=q.device)
    if result.numel() == 0 or (cu_seqlens_q is not None and cu_seqlens_q.shape[0] == 1):
        if out is None:
            result.zero_()
        return result if lse is None else (result, lse.fill_(-math.inf))
    if handle is None:
        handle = _load(kernels, key)
    clear_rest = out is None and (cu_seqlens_q is not None or seqused_q is not None)
    launched = kernels.forward(
        handle, q, call["k"], v, result, lse, cu_seqlens_q, call.get("cu_seqlens_k"), seqused_q, call.get("seqused_k"),
        call["sinks"], head_dim**-0.5 if scale is None else scale, float(softcap), left, right, chunk,
        call["sm_margin"], clear_rest, only_known,
    )  # fmt: skip
    if not launched:
        return None
    return result if lse is None else (result, lse)


def _served(call: Mapping[str, Any]) -> Result:
    result = _attend(call, only_known=False)
    if result is None:
        raise RuntimeError("the Hopper launcher did not launch a call that was accepted")
    return result


def shortcut(function: str, chosen: Callable[..., Result]) -> Callable[..., Result]:
    """`chosen`, which asks `decide` about every call, but not for a kind of call that these kernels had before.

    What `decide` looks at takes 5 us to gather; here a loaded kernel's key answers for dtype and head sizes, the
    launcher for addresses and strides, and the rest are arguments that must be absent.
    """
    paged = function == "flash_attn_varlen_func"

    @functools.wraps(chosen)
    def serve(**call: Any) -> Result:
        result = None
        if (
            call["num_splits"] == 1
            and call["qv"] is None
            and call["q_descale"] is None
            and call["k_descale"] is None
            and call["v_descale"] is None
            and not (paged and call["page_table"] is not None)
        ):
            result = _attend(call, only_known=True)
        return chosen(**call) if result is None else result

    return serve


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
    """See `jit_kernel.flash_attention_v3.flash_attn_varlen_func`. The kernel needs no max_seqlen."""
    return _served(locals())


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
    """See `jit_kernel.flash_attention_v3.flash_attn_func`. Every call is deterministic."""
    return _served(locals())


KERNELS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {"flash_attn_varlen_func": flash_attn_varlen_func, "flash_attn_func": flash_attn_func}
)

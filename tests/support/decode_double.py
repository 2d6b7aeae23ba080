"""The Hopper decode launcher compiled for the CPU, and calls for it: what is launched is kept, nothing is computed."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jit_kernel import device, flash_attn_with_kvcache, jit
from jit_kernel.fa3 import call as calls
from jit_kernel.fa3.call import Arguments
from jit_kernel.fa3.hopper import kernels
from tests.support import cases

DTYPES = (torch.bfloat16, torch.float16)
# What try_unchecked serves, and what cases of it have besides.
FEATURES = frozenset(
    {"ragged", "paged", "causal", "window", "chunk", "softcap", "sinks", "scale", "splits", "seqused_k", "out"}
    | {"strides", "groups", "hot", "lse", "tail", "large", "deterministic", "mixed", "token_scales"}
)


def space(name: str, where: str = "cpu", features: frozenset[str] = FEATURES) -> cases.Space:
    """Calls with a cache whose rows begin at multiples of 16 bytes."""
    return cases.Space(
        name, device=where, dtypes=(*DTYPES, cases.FP8), head_dims=((64, 64), (128, 128), (256, 256)), any_head_dim=256,
        head_dim_step=8, qv_head_dims=(), functions=(cases.KVCACHE,), features=features, lengths=(6, 130, 700),
        stride_step=8,
    )  # fmt: skip


class OnHost:
    """Stands for a GPU's loaded kernels: every decode kernel, of which a launch is kept."""

    def __init__(self) -> None:
        unit = Path(__file__).with_name("decode_on_host.h").read_text(encoding="utf-8")
        library = jit.load(jit.KernelSpec(kernels.FOLDER, unit, "host", (("function", "decode_on_host"),)),
                           device.cpu_target())  # fmt: skip
        self.known_decode = library["known_decode"]
        self.decode = library["decode"]
        self.partial_floats = library["partial_floats"]
        self.launches = library["launches"]
        self.parameters = library["parameters"]
        self.set_capturing = library["set_capturing"]
        self.handles = {
            (dtype, size, rows, mixed): library["load_decode"](b"", dtype is torch.bfloat16, mixed, size, rows, 0)
            for dtype in DTYPES
            for size, most in kernels.DECODE_MOST_ROWS.items()
            for rows in kernels.DECODE_ROWS
            if rows <= most
            for mixed in (False, True)
        }


_PARAMETERS = inspect.signature(flash_attn_with_kvcache).parameters
DEFAULTS = {name: p.default for name, p in _PARAMETERS.items() if p.default is not inspect.Parameter.empty}


def fields(arguments: dict[str, Any]) -> Arguments:
    """The fields of the call of flash_attn_with_kvcache with these arguments."""
    return calls.of(calls.KVCACHE, DEFAULTS | arguments)


def halved(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same call in bf16. Tensors keep their strides, and share memory where they shared it before."""
    memory: dict[int, Tensor] = {}
    made = dict(arguments)
    for name, x in arguments.items():
        plain = type(x) is Tensor and x.layout is torch.strided and x.dtype is torch.float32
        if not plain or not x.is_cpu or x.requires_grad:
            continue
        storage = x.untyped_storage()
        if storage.data_ptr() not in memory:
            memory[storage.data_ptr()] = torch.empty(0).set_(storage).bfloat16()
        made[name] = memory[storage.data_ptr()].as_strided(x.shape, x.stride(), x.storage_offset())
    return made

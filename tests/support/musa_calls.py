"""Decode calls and scheduler metadata for the MUSA double."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

import jit_kernel.flash_attention_v3 as fa3
from jit_kernel.attention import ForwardMetadata
from tests.support.musa_device import to_musa


def on_device(metadata: ForwardMetadata, index: int) -> ForwardMetadata:
    """The same metadata with its tensors on musa:index."""
    fields = {f.name: getattr(metadata, f.name) for f in dataclasses.fields(metadata)}
    return ForwardMetadata(**{name: to_musa(value, index) for name, value in fields.items()})


def decode_call(batch: int, sq: int, keys: int, d: int = 64) -> dict[str, object]:
    """A dense decode call with random numbers, room for 7 keys more."""
    random = torch.Generator().manual_seed(batch * 100 + keys)
    q = torch.randn(batch, sq, 4, d, generator=random).bfloat16()
    k, v = (torch.randn(batch, keys + 7, 2, d, generator=random).bfloat16() for _ in "kv")
    lengths = torch.full((batch,), keys, dtype=torch.int32)
    return {"q": q, "k_cache": k, "v_cache": v, "cache_seqlens": lengths, "causal": True}


def metadata_of(call: dict[str, object], **changes: object) -> torch.Tensor:
    """get_scheduler_metadata with the parameters of a decode call, on musa:0."""
    q, k = call["q"], call["k_cache"]
    arguments = {
        "batch_size": q.shape[0],
        "max_seqlen_q": q.shape[1],
        "max_seqlen_k": k.shape[1],
        "num_heads_q": q.shape[2],
        "num_heads_kv": k.shape[2],
        "headdim": q.shape[3],
        "cache_seqlens": call["cache_seqlens"],
        "causal": call["causal"],
    }
    return fa3.get_scheduler_metadata(**to_musa(arguments | changes))


def same(out: Tensor, expected: Tensor) -> bool:
    """Equal as far as two kernels in bf16 are."""
    return bool(torch.allclose(out.float(), expected.float(), rtol=2e-2, atol=2e-2))


def truth(name: str, call: dict[str, Any]) -> Any:
    """What the CPU answers."""
    return getattr(fa3, name)(**call)

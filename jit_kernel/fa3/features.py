"""What a call asks for, as plain scalars, and what an implementation answers to it.

`plain_features()` makes a plain tuple on the path of every call; `Features` gives the same fields
names, for an implementation's `decide()`, for `explain()` and for error texts. Nothing here depends on
the batch or on a sequence's length, so that what serves a sequence never depends on its neighbours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

DTYPE_NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "e4m3",
}


@dataclass(frozen=True)
class Accepted:
    """The implementation serves the call."""


@dataclass(frozen=True)
class Rejected:
    """The implementation does not serve the call, and why.

    `claimed` tells whether it claims every feature that the call uses: where it does, that the next
    implementation takes the call is worth a WARNING; where it does not, the next one is the best.
    """

    reason: str
    claimed: bool = True


Decision = Accepted | Rejected


@dataclass(frozen=True)
class Features:
    """What one call asks for. The order of the fields is the order of `plain_features()`."""

    dtype: str  # "fp32", "bf16", "fp16" or "e4m3"
    head_dim: int
    head_dim_v: int
    group: int  # query heads per key/value head
    aligned: bool  # every stride of q, k, v, qv and out is a multiple of 16 bytes, as TMA wants it
    ragged_q: bool  # cu_seqlens_q
    ragged_k: bool  # cu_seqlens_k
    page_size: int  # 0: not paged
    seqused_q: bool
    seqused_k: bool  # seqused_k or cache_seqlens
    append: bool  # new k and v
    ragged_append: bool  # cu_seqlens_k_new
    rotary: bool
    cache_batch_idx: bool
    cache_leftpad: bool
    causal: bool  # causal, or window_size[1] == 0, which is the same
    window: bool  # a bound of window_size that causal does not give already
    chunk: bool
    softcap: bool
    qv: bool
    only_qv: bool
    descale: bool
    sinks: bool
    lse: bool
    split: bool  # num_splits other than 1
    metadata: bool  # scheduler_metadata

    def used(self) -> str:
        """The fields that differ from a plain dense call, as one line of text."""
        shape = f"{self.dtype} head_dim={self.head_dim}/{self.head_dim_v} group={self.group}"
        rest = []
        for field in fields(self)[5:]:
            value = getattr(self, field.name)
            if value:
                rest.append(field.name if value is True else f"{field.name}={value}")
        return " ".join([shape, *([] if self.aligned else ["unaligned"]), *rest])


def plain_features(call: Mapping[str, Any]) -> tuple[object, ...]:
    """The fields of `Features`, in order, of the checked call of a public function.

    A plain tuple: making a frozen dataclass of them costs 2.5 us.
    """
    get = call.get
    q: Tensor = call["q"]
    k: Tensor
    if "k_cache" in call:
        k, v, appended = call["k_cache"], call["v_cache"], call["k"]
    else:
        k, v, appended = call["k"], call["v"], None
    qv: Tensor | None = call["qv"]
    head_dim, group = q.shape[-1], q.shape[-2] // k.shape[-2]
    page_size = 0 if get("page_table") is None else k.shape[1]
    left, right = call["window_size"]
    causal: bool = call["causal"]
    return (
        DTYPE_NAMES[q.dtype],
        head_dim,
        v.shape[-1],
        group,
        _aligned(q, k, v, qv, call["out"]) and (head_dim | v.shape[-1]) * q.element_size() % 16 == 0,
        get("cu_seqlens_q") is not None,
        get("cu_seqlens_k") is not None,
        page_size,
        get("seqused_q") is not None,
        get("seqused_k") is not None or get("cache_seqlens") is not None,
        appended is not None,
        appended is not None and call["cu_seqlens_k_new"] is not None,
        get("rotary_cos") is not None,
        get("cache_batch_idx") is not None,
        get("cache_leftpad") is not None,
        causal or right == 0,
        left >= 0 or (right > 0 and not causal),
        call["attention_chunk"] > 0,
        call["softcap"] > 0,
        qv is not None,
        get("only_qv", False),
        call["q_descale"] is not None or call["k_descale"] is not None or call["v_descale"] is not None,
        call["sinks"] is not None,
        call["return_softmax_lse"],
        call["num_splits"] != 1,
        get("scheduler_metadata") is not None,
    )


def _aligned(*tensors: Tensor | None) -> bool:
    """Whether all memory starts at a multiple of 16 bytes, and so does every row where there are gaps between rows.

    Without gaps the head sizes say it, which the caller looks at; a look at every stride would take 1 us more.
    """
    bits = 0
    for tensor in tensors:
        if tensor is not None:
            bits |= tensor.data_ptr()
            if not tensor.is_contiguous():
                for stride in tensor.stride()[:-1]:
                    bits |= stride * tensor.element_size()
    return bits & 15 == 0


def refusal(what: str, decisions: Iterable[tuple[str, Decision]]) -> NotImplementedError:
    """The error that says that nothing serves a call, with every candidate and its reason."""
    lines = [f"{name}: {d.reason}" for name, d in decisions if isinstance(d, Rejected)]
    return NotImplementedError("\n  ".join([f"no implementation serves {what}", *lines]))

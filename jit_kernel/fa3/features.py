"""What a call asks for, as plain scalars.

`plain_features()` makes a plain tuple on the path of a call; `Features` gives the same fields names, for an
implementation's `decide()`, for `why` and for error texts. Nothing here but `many_rows` and `widens` depends on the
batch or on a sequence's length, so that what serves a sequence never depends on its neighbours.

ARGUMENTS says which arguments ask for a feature. What an implementation claims, it claims by the names of this table:
`decide` rejects every other feature (`unclaimed`), and so does a faster way that never makes the features of a call
(`asks_for_more`). A feature that is new in the table is rejected by both until an implementation claims it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from jit_kernel.fa3.call import (
    FIELDS,
    Arguments,
    Call,
    MetadataParameters,
    has_cache,
    has_many_rows,
    is_deterministic,
    widens,
)

DTYPE_NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "e4m3",
}

# By feature: the fields of a `Call` that ask for it.
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "ragged_q": ("cu_seqlens_q",),
    "ragged_k": ("cu_seqlens_k",),
    "page_size": ("page_table",),
    "seqused_q": ("seqused_q",),
    "seqused_k": ("seqused_k",),
    "append": ("k_new", "v_new"),
    "ragged_append": ("cu_seqlens_k_new",),
    "rotary": ("rotary_cos", "rotary_sin", "rotary_seqlens"),
    "cache_batch_idx": ("cache_batch_idx",),
    "cache_leftpad": ("cache_leftpad",),
    "causal": ("causal",),
    "window": ("window_size",),
    "chunk": ("attention_chunk",),
    "draft_mask": ("draft_mask",),
    "softcap": ("softcap",),
    "qv": ("qv",),
    "only_qv": ("only_qv",),
    "descale": ("q_descale", "k_descale", "v_descale"),
    "token_scales": ("k_scale", "v_scale"),
    "sinks": ("sinks",),
    "lse": ("return_softmax_lse",),
    "split": ("num_splits",),
    "metadata": ("scheduler_metadata",),
    "deterministic": ("deterministic",),
}
# The values that ask for nothing, of fields that are not None then.
_NEUTRAL: dict[str, object] = {
    "causal": False,
    "window_size": (-1, -1),
    "attention_chunk": 0,
    "softcap": 0.0,
    "only_qv": False,
    "return_softmax_lse": False,
    "num_splits": 1,
    "deterministic": False,
}

# How a feature is named in a refusal where its arguments' names do not say it.
_SHOWN = {
    "append": "new keys and values",
    "split": "num_splits other than 1",
    "descale": "q_descale, k_descale and v_descale",
}


@dataclass(frozen=True)
class Features:
    """What one call asks for. The order of the fields is the order of `plain_features()`."""

    dtype: str  # of q: "fp32", "bf16", "fp16" or "e4m3"
    kv_dtype: str  # of k and v: dtype, or "e4m3" beside a q of 16 bits
    head_dim: int
    head_dim_v: int
    group: int  # query heads per key/value head
    cache: bool  # keys in a cache, of flash_attn_with_kvcache or with a page table
    aligned: bool  # every stride of q, k, v, qv and out is a multiple of 16 bytes, as TMA wants it
    ragged_q: bool = False  # cu_seqlens_q
    ragged_k: bool = False  # cu_seqlens_k
    page_size: int = 0  # 0: not paged
    seqused_q: bool = False
    seqused_k: bool = False  # seqused_k or cache_seqlens
    append: bool = False  # new keys and values
    ragged_append: bool = False  # new keys and values with cu_seqlens_k_new
    rotary: bool = False
    cache_batch_idx: bool = False
    cache_leftpad: bool = False
    causal: bool = False  # causal, or window_size[1] == 0, which is the same
    window: bool = False  # a bound of window_size that causal does not give already
    chunk: bool = False
    draft_mask: bool = False
    softcap: bool = False
    qv: bool = False
    only_qv: bool = False
    descale: bool = False
    token_scales: bool = False  # k_scale or v_scale
    sinks: bool = False
    lse: bool = False
    split: bool = False  # num_splits other than 1
    metadata: bool = False  # scheduler_metadata
    deterministic: bool = False  # of flash_attn_with_kvcache
    many_rows: bool = False  # what has_many_rows() says
    widens: bool = False  # what widens() says

    def used(self) -> str:
        """The fields that differ from a plain dense call, as one line of text."""
        dtypes = self.dtype if self.kv_dtype == self.dtype else f"{self.dtype} kv_dtype={self.kv_dtype}"
        shape = f"{dtypes} head_dim={self.head_dim}/{self.head_dim_v} group={self.group}"
        rest = []
        for each in fields(self)[7:]:
            value = getattr(self, each.name)
            if value:
                rest.append(each.name if value is True else f"{each.name}={value}")
        cache = ["cache"] if self.cache else []
        return " ".join([shape, *cache, *([] if self.aligned else ["unaligned"]), *rest])


def plain_features(call: Call) -> tuple[object, ...]:
    """The fields of `Features`, in order, of a checked call.

    A plain tuple: making a frozen dataclass of them costs 2.5 us.
    """
    q, k, v, qv = call.q, call.k, call.v, call.qv
    head_dim, head_dim_v = q.shape[-1], v.shape[-1]
    left, right = call.window_size
    causal, append = call.causal, call.k_new is not None
    return (
        DTYPE_NAMES[q.dtype],
        DTYPE_NAMES[k.dtype],
        head_dim,
        head_dim_v,
        q.shape[-2] // k.shape[-2],
        has_cache(call),
        _aligned(q, k, v, qv, call.out) and (head_dim | head_dim_v) * q.element_size() % 16 == 0,
        call.cu_seqlens_q is not None,
        call.cu_seqlens_k is not None,
        0 if call.page_table is None else k.shape[1],
        call.seqused_q is not None,
        call.seqused_k is not None,
        append,
        append and call.cu_seqlens_k_new is not None,
        call.rotary_cos is not None,
        call.cache_batch_idx is not None,
        call.cache_leftpad is not None,
        causal or right == 0,
        left >= 0 or (right > 0 and not causal),
        call.attention_chunk != 0,
        call.draft_mask is not None,
        call.softcap > 0,
        qv is not None,
        call.only_qv,
        call.q_descale is not None or call.k_descale is not None or call.v_descale is not None,
        call.k_scale is not None or call.v_scale is not None,
        call.sinks is not None,
        call.return_softmax_lse,
        call.num_splits != 1,
        call.scheduler_metadata is not None,
        is_deterministic(call),
        has_many_rows(call),
        widens(call),
    )


def features_of(call: Call) -> Features:
    """The features of a checked call."""
    return Features(*plain_features(call))  # type: ignore[arg-type]


def planned_features(parameters: MetadataParameters) -> Features:
    """The features of the calls that scheduler metadata is for."""
    left, right = parameters.window_size
    append = parameters.max_seqlen_k_new > 0
    return Features(
        dtype=DTYPE_NAMES[parameters.qkv_dtype],
        kv_dtype=DTYPE_NAMES[parameters.qkv_dtype],
        head_dim=parameters.headdim,
        head_dim_v=parameters.headdim if parameters.headdim_v is None else parameters.headdim_v,
        group=parameters.num_heads_q // parameters.num_heads_kv,
        cache=True,
        aligned=True,
        ragged_q=parameters.cu_seqlens_q is not None,
        page_size=parameters.page_size or 0,
        seqused_k=True,
        append=append,
        ragged_append=append and parameters.cu_seqlens_k_new is not None,
        cache_leftpad=parameters.cache_leftpad is not None,
        causal=parameters.causal or right == 0,
        window=left >= 0 or (right > 0 and not parameters.causal),
        chunk=bool(parameters.attention_chunk),
        softcap=parameters.has_softcap,
        split=parameters.num_splits != 1,
        metadata=True,
    )


def unclaimed(features: Features, claimed: frozenset[str]) -> str | None:
    """The first feature that is used and not claimed, as its arguments' names; None where there is none."""
    for feature, arguments in ARGUMENTS.items():
        if feature not in claimed and getattr(features, feature):
            return _SHOWN.get(feature, " and ".join(arguments))
    return None


def mixed_dtypes(features: Features) -> str | None:
    """What a refusal calls a q of another dtype than k and v; None where they have one."""
    if features.kv_dtype == features.dtype:
        return None
    return f"q in {features.dtype} with k and v in {features.kv_dtype}"


def first_unclaimed(arguments: Mapping[str, Any], claimed: frozenset[str]) -> str | None:
    """The same of arguments that nobody has checked, by name; absent ones and None ask for nothing."""
    for feature, names in ARGUMENTS.items():
        for name in names if feature not in claimed else ():
            value = arguments.get(name)
            if value is not None and (isinstance(value, Tensor) or value != _NEUTRAL.get(name)):
                return name
    return None


def asks_for_more(claimed: frozenset[str]) -> Callable[[Call], bool]:
    """A test of a call: whether it has an argument that asks for a feature which is not claimed.

    It is compiled from the table, as dataclasses compile their methods: 0.3 us where a loop over names takes 1.4.
    """
    return _compiled([f"x.{name}" for name in FIELDS], claimed)


def fields_ask_for_more(claimed: frozenset[str], count: int) -> Callable[[Arguments], bool]:
    """The same for the first `count` fields of a call, as a plain tuple."""
    return _compiled([f"x[{place}]" for place in range(count)], claimed)


def _compiled(fields: list[str], claimed: frozenset[str]) -> Callable[[Any], bool]:
    names = {name for feature, names in ARGUMENTS.items() if feature not in claimed for name in names}
    asked = [f"{field} {_asks(name)}" for name, field in zip(FIELDS, fields, strict=False) if name in names]
    test: Callable[[Any], bool] = eval(f"lambda x: {' or '.join(asked) or False}")
    return test


def _asks(name: str) -> str:
    """The comparison that says that a field asks for something. A bool by identity: 0 is no False to the checks."""
    neutral = _NEUTRAL.get(name)
    return f"is not {neutral!r}" if neutral is None or isinstance(neutral, bool) else f"!= {neutral!r}"


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

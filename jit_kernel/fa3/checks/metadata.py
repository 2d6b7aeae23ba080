"""scheduler_metadata: an int32 tensor that opens with the parameters it was made with.

Its length depends on the batch alone, so it can be copied into a static buffer of that length or more. The
room behind the header belongs to the implementation that made it. An implementation that chooses splits on
the host leaves it 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from jit_kernel.fa3.checks.values import (
    INPUT_DTYPES,
    INT32_MAX,
    MAX_SPLITS,
    described,
    need_bool,
    need_index,
    need_integer,
    need_range,
)

_MAGIC = 0x4A4B4641
_VERSION = 1
MAKERS = ("cpu", "hopper", "portable", "musa")
FIELDS = (
    "batch_size",
    "max_seqlen_q",
    "max_seqlen_k",
    "num_heads_q",
    "num_heads_kv",
    "headdim",
    "headdim_v",
    "qkv_dtype",
    "page_size",
    "max_seqlen_k_new",
    "causal",
    "window_left",
    "window_right",
    "attention_chunk",
    "has_softcap",
    "num_splits",
    "pack_gqa",
    "sm_margin",
    "cu_seqlens_q",
    "cache_leftpad",
)
HEADER_LENGTH = 24  # magic, version, maker, the fields, one spare


def length(batch_size: int) -> int:
    """How many numbers the metadata of a batch holds: the header, and eight a sequence for the maker."""
    return HEADER_LENGTH + 8 * batch_size


def check_parameters(call: dict[str, Any]) -> None:
    """Check the arguments of `get_scheduler_metadata`, by name. Raises TypeError or ValueError."""
    for name in ("batch_size", "num_heads_q", "num_heads_kv", "headdim"):
        need_integer(name, call[name])
        need_range(name, call[name], 0 if name == "batch_size" else 1, INT32_MAX)
    for name in ("max_seqlen_q", "max_seqlen_k", "max_seqlen_k_new", "attention_chunk", "sm_margin", "num_splits"):
        if name == "attention_chunk" and call[name] is None:
            call[name] = 0
        need_integer(name, call[name])
        need_range(name, call[name], 0, MAX_SPLITS if name == "num_splits" else INT32_MAX)
    for name in ("headdim_v", "page_size"):
        if call[name] is not None:
            need_integer(name, call[name])
            need_range(name, call[name], 1, INT32_MAX)
    for name in ("causal", "has_softcap"):
        need_bool(name, call[name])
    if call["pack_gqa"] is not None:
        need_bool("pack_gqa", call["pack_gqa"])
    if call["num_heads_q"] % call["num_heads_kv"]:
        raise ValueError(
            f"num_heads_q is {call['num_heads_q']}; it must be a multiple of num_heads_kv, {call['num_heads_kv']}"
        )
    if call["qkv_dtype"] not in INPUT_DTYPES:
        wanted = ", ".join(str(dtype) for dtype in INPUT_DTYPES)
        raise ValueError(f"qkv_dtype is {described(call['qkv_dtype'])}; it must be one of {wanted}")
    call["window_size"] = checked_window(call["window_size"])
    seqlens = call["cache_seqlens"]
    if not isinstance(seqlens, Tensor):
        raise TypeError(f"cache_seqlens is {described(seqlens)}; it must be a torch.Tensor")
    batch, device = call["batch_size"], seqlens.device
    need_index("cache_seqlens", seqlens, (batch,), "(batch_size,)", device)
    for name, size in (("cu_seqlens_q", batch + 1), ("cu_seqlens_k_new", batch + 1), ("cache_leftpad", batch)):
        if call[name] is not None:
            form = "(batch_size,)" if size == batch else "(batch_size + 1,)"
            need_index(name, call[name], (size,), form, device)


def is_unbounded(window: Any) -> bool:
    """Whether window_size is (-1, -1), in ints: most calls' needs no other check."""
    ints = window.__class__ is tuple and len(window) == 2 and window[0].__class__ is window[1].__class__ is int
    return ints and window == (-1, -1)


def checked_window(window: Any) -> tuple[int, int]:
    """window_size as a pair of ints, -1 for a side without bound. Raises TypeError or ValueError."""
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"window_size is {described(window)}; it must be a pair of ints (left, right)")
    left, right = window
    for side, bound in (("left", left), ("right", right)):
        need_integer(f"window_size's {side} bound", bound)
        need_range(f"window_size's {side} bound", bound, -1, INT32_MAX, "; -1 is unbounded")
    return left, right


def make(maker: str, call: Mapping[str, Any]) -> Tensor:
    """The metadata of a checked call of `get_scheduler_metadata`, its maker's room zero."""
    left, right = _window(call["causal"], call["window_size"])
    headdim_v = call["headdim"] if call["headdim_v"] is None else call["headdim_v"]
    fields = {
        **{name: call[name] for name in FIELDS[:6]},
        "headdim_v": headdim_v,
        "qkv_dtype": INPUT_DTYPES.index(call["qkv_dtype"]),
        "page_size": call["page_size"] or 0,
        "max_seqlen_k_new": call["max_seqlen_k_new"],
        "causal": int(right == 0),
        "window_left": left,
        "window_right": right,
        "attention_chunk": call["attention_chunk"],
        "has_softcap": int(call["has_softcap"]),
        "num_splits": call["num_splits"],
        "pack_gqa": -1 if call["pack_gqa"] is None else int(call["pack_gqa"]),
        "sm_margin": call["sm_margin"],
        "cu_seqlens_q": int(call["cu_seqlens_q"] is not None),
        "cache_leftpad": int(call["cache_leftpad"] is not None),
    }
    numbers = [_MAGIC, _VERSION, MAKERS.index(maker), *(fields[name] for name in FIELDS)]
    numbers += [0] * (length(call["batch_size"]) - len(numbers))
    return torch.tensor(numbers, dtype=torch.int32, device=call["cache_seqlens"].device)


def _window(causal: bool, window: tuple[int, int]) -> tuple[int, int]:
    return window[0], 0 if causal else window[1]


def verify(maker: str, call: Mapping[str, Any]) -> None:
    """Check that scheduler_metadata was made with the parameters of this `flash_attn_with_kvcache` call.

    Reads the metadata, so on a GPU it synchronises. Raises ValueError with the parameter that differs.
    """
    q, k, v, metadata = call["q"], call["k_cache"], call["v_cache"], call["scheduler_metadata"]
    batch = q.shape[0] if call["cu_seqlens_q"] is None else call["cu_seqlens_q"].shape[0] - 1
    if metadata.shape[0] < length(batch):
        raise ValueError(
            f"scheduler_metadata has shape {tuple(metadata.shape)}; for a batch of {batch} "
            f"it must hold at least {length(batch)} numbers"
        )
    numbers = metadata[:HEADER_LENGTH].tolist()
    if numbers[:3] != [_MAGIC, _VERSION, MAKERS.index(maker)]:
        raise ValueError(f"scheduler_metadata must come from get_scheduler_metadata of the {maker} implementation")
    made = dict(zip(FIELDS, numbers[3:], strict=False))
    left, right = _window(call["causal"], call["window_size"])
    paged = call["page_table"] is not None
    wanted = {
        "batch_size": batch,
        "num_heads_q": q.shape[-2],
        "num_heads_kv": k.shape[-2],
        "headdim": q.shape[-1],
        "headdim_v": v.shape[-1],
        "qkv_dtype": INPUT_DTYPES.index(q.dtype),
        "page_size": k.shape[1] if paged else 0,
        "causal": int(right == 0),
        "window_left": left,
        "window_right": right,
        "attention_chunk": call["attention_chunk"],
        "has_softcap": int(call["softcap"] > 0),
        "num_splits": call["num_splits"],
        "pack_gqa": -1 if call["pack_gqa"] is None else int(call["pack_gqa"]),
        "sm_margin": call["sm_margin"],
        "cu_seqlens_q": int(call["cu_seqlens_q"] is not None),
        "cache_leftpad": int(call["cache_leftpad"] is not None),
    }
    if call["cu_seqlens_q"] is None:
        wanted["max_seqlen_q"] = q.shape[1]
    if call["k"] is None or call["cu_seqlens_k_new"] is None:
        wanted["max_seqlen_k_new"] = 0 if call["k"] is None else call["k"].shape[1]
    for name, value in wanted.items():
        if made[name] != value:
            raise ValueError(f"scheduler_metadata was made with {name} = {made[name]}; this call has {value}")
    if made["max_seqlen_q"] < call["max_seqlen_q"]:
        raise ValueError(
            f"scheduler_metadata was made with max_seqlen_q = {made['max_seqlen_q']}; "
            f"it must be at least {call['max_seqlen_q']} for this call"
        )
    capacity = k.shape[1] * (call["page_table"].shape[1] if paged else 1)
    if made["max_seqlen_k"] > capacity:
        raise ValueError(
            f"scheduler_metadata was made with max_seqlen_k = {made['max_seqlen_k']}; "
            f"it must be at most {capacity}, what the cache has room for"
        )

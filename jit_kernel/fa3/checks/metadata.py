"""The checks of `get_scheduler_metadata`'s arguments."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jit_kernel import config
from jit_kernel.fa3.call import MetadataParameters
from jit_kernel.fa3.checks.plain import need_served_device
from jit_kernel.fa3.checks.values import (
    INPUT_DTYPES,
    INT32_MAX,
    MAX_SPLITS,
    as_kernel_index,
    is_kernel_index,
    need_bool,
    need_index,
    need_integer,
    need_known_dtype,
    need_range,
    need_tensor,
    need_window,
)

_COUNTS = ("batch_size", "num_heads_q", "num_heads_kv", "headdim")
_LENGTHS = ("max_seqlen_q", "max_seqlen_k", "max_seqlen_k_new", "attention_chunk", "sm_margin", "num_splits")
_SIZES = ("headdim_v", "page_size")


def check_parameters(parameters: MetadataParameters) -> MetadataParameters:
    """Check the arguments of `get_scheduler_metadata`; returns them with window_size and attention_chunk resolved.

    Raises TypeError or ValueError.
    """
    given = replace(parameters, **_numbers(parameters))
    for name in _COUNTS:
        need_range(name, getattr(given, name), 0 if name == "batch_size" else 1, INT32_MAX)
    for name in _LENGTHS:
        need_range(name, getattr(given, name), 0, MAX_SPLITS if name == "num_splits" else INT32_MAX)
    for name in _SIZES:
        if getattr(given, name) is not None:
            need_range(name, getattr(given, name), 1, INT32_MAX)
    for name in ("causal", "has_softcap"):
        need_bool(name, getattr(given, name))
    if given.pack_gqa is not None:
        need_bool("pack_gqa", given.pack_gqa)
    if given.num_heads_q % given.num_heads_kv:
        raise ValueError(
            f"num_heads_q is {given.num_heads_q}; it must be a multiple of num_heads_kv, {given.num_heads_kv}"
        )
    need_known_dtype("qkv_dtype", given.qkv_dtype, INPUT_DTYPES)
    window = need_window(given.window_size)
    return replace(given, window_size=window, **_tensors(given))


def _numbers(given: MetadataParameters) -> dict[str, Any]:
    """Every argument that is one integer, as an int of Python's; an absent attention_chunk is 0."""
    chunk = 0 if given.attention_chunk is None else given.attention_chunk
    values = {name: getattr(given, name) for name in (*_COUNTS, *_LENGTHS, *_SIZES)} | {"attention_chunk": chunk}
    return {
        name: value if value is None and name in _SIZES else need_integer(name, value) for name, value in values.items()
    }


def _tensors(given: MetadataParameters) -> dict[str, Any]:
    """The index tensors as kernels take them."""
    seqlens, batch = given.cache_seqlens, given.batch_size
    seqlens = need_tensor("cache_seqlens", seqlens)
    need_served_device("cache_seqlens", seqlens)
    made = {"cache_seqlens": need_index("cache_seqlens", seqlens, (batch,), "(batch_size,)", seqlens.device)}
    for name, size in (("cu_seqlens_q", batch + 1), ("cu_seqlens_k_new", batch + 1), ("cache_leftpad", batch)):
        if getattr(given, name) is not None:
            form = "(batch_size,)" if size == batch else "(batch_size + 1,)"
            made[name] = need_index(name, getattr(given, name), (size,), form, seqlens.device)
    exact = seqlens.is_cpu or config.check_indices()
    return {
        name: tensor if is_kernel_index(tensor) else as_kernel_index(name, tensor, exact=exact)
        for name, tensor in made.items()
    }

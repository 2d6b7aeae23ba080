"""The checks of an attention call, written once, done before anything is launched or written.

What depends only on types, shapes, strides, dtypes and devices is remembered by a plain tuple of them, so
that a call like an earlier one is checked in a few microseconds. Numbers are checked at every call, and so
are the values of index tensors: always on the CPU, elsewhere under JIT_KERNEL_CHECK_INDICES=1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from jit_kernel import config
from jit_kernel.fa3.checks import indices as index_checks
from jit_kernel.fa3.checks import shapes as attention_shapes
from jit_kernel.fa3.checks.metadata import checked_window, is_unbounded
from jit_kernel.fa3.checks.shapes import Facts
from jit_kernel.fa3.checks.values import FLOAT32_MAX, FLOAT32_MIN, INT32_MAX, MAX_SPLITS, need_present, need_range

_MOST_REMEMBERED = 8192  # a ragged server makes new shapes for ever; the memory of them must not grow so

# By the types of all arguments (which tell the function too: each has a number of arguments of its own): the names
# of the tensors among them, and what passed before, by all of these tensors but their numbers.
_passed: dict[tuple[type, ...], tuple[tuple[str, ...], dict[tuple[object, ...] | None, Facts]]] = {}


def check_attention(function: str, call: dict[str, Any]) -> None:
    """Check one call of `flash_attn_varlen_func`, `flash_attn_with_kvcache` or `flash_attn_func`.

    `call` holds every argument by name. Its softmax_scale, attention_chunk, window_size, max_seqlen_* and an
    int cache_seqlens are replaced by what they stand for. Raises TypeError and ValueError for bad arguments,
    NotImplementedError for inputs that require grad while grad mode is on.
    """
    types = (*map(type, call.values()),)
    known = _passed.get(types)
    facts = None if known is None else known[1].get(_key(call, known[0]))
    if facts is None:
        facts = attention_shapes.check(function, call)
        if torch.is_grad_enabled():
            refuse_gradients(call)
        _remember(call, types, facts)
    check_numbers(call)
    scale: float | None = facts.scale
    if call.get("only_qv"):
        scale = facts.scale_of_qv
        need_present("qv", scale, "with only_qv")
    if call["softmax_scale"] is None:
        call["softmax_scale"] = scale
    if call["out"] is not None:
        _refuse_shared_memory(call)
    if function != "flash_attn_func":
        _check_lengths(call, facts)


def _key(call: dict[str, Any], tensors: tuple[str, ...]) -> tuple[object, ...] | None:
    """All that the checks of shapes look at in these tensors, and the grad mode."""
    seen: list[object] = [torch.is_grad_enabled()]
    try:
        for name in tensors:
            tensor = call[name]
            seen += (tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad)
    except RuntimeError:  # a sparse tensor has no strides: never remembered, and the checks refuse it
        return None
    return tuple(seen)


def _remember(call: dict[str, Any], types: tuple[type, ...], facts: Facts) -> None:
    kinds = set(types)
    if any(issubclass(kind, Tensor) for kind in kinds - {Tensor, Parameter}):
        return  # another subclass may say of itself what it likes
    tensors = tuple(name for name, kind in zip(call, types, strict=True) if kind is Tensor or kind is Parameter)
    passed = _passed.setdefault(types, (tensors, {}))[1]
    if len(passed) >= _MOST_REMEMBERED:
        passed.clear()
    key = _key(call, tensors)
    if key is not None:
        passed[key] = facts


def refuse_gradients(call: dict[str, Any]) -> None:
    """There is no backward pass: an input that asks for one, in grad mode, is an error."""
    for name, value in call.items():
        if getattr(value, "requires_grad", False):
            raise NotImplementedError(
                f"{name} requires grad; jit_kernel has the forward pass alone: "
                "call it under torch.no_grad() or detach the tensor"
            )


def check_numbers(call: dict[str, Any]) -> None:
    """The numbers that shapes say nothing about; their types were checked with the shapes."""
    scale = call["softmax_scale"]
    if scale is not None and not FLOAT32_MIN <= scale <= FLOAT32_MAX:
        raise ValueError(f"softmax_scale is {scale}; it must be positive and finite in float32, or None")
    softcap = call["softcap"]
    if softcap != 0 and not FLOAT32_MIN <= softcap <= FLOAT32_MAX:
        raise ValueError(f"softcap is {softcap}; it must be 0 (off), or positive and finite in float32")
    if not is_unbounded(call["window_size"]):
        call["window_size"] = checked_window(call["window_size"])
    chunk = call["attention_chunk"]
    if chunk is None:
        call["attention_chunk"] = 0
    elif not 0 <= chunk <= INT32_MAX:
        need_range("attention_chunk", chunk, 0, INT32_MAX)
    if not 0 <= call["num_splits"] <= MAX_SPLITS:
        need_range("num_splits", call["num_splits"], 0, MAX_SPLITS)
    if not 0 <= call["sm_margin"] <= INT32_MAX:
        need_range("sm_margin", call["sm_margin"], 0, INT32_MAX)


def _refuse_shared_memory(call: dict[str, Any]) -> None:
    """out must not start where an input starts: other threads still read what one has written."""
    start = call["out"].data_ptr()
    if start:
        for name in ("q", "k_cache", "v_cache", "k", "v", "qv") if "k_cache" in call else ("q", "k", "v", "qv"):
            value = call[name]
            if value is not None and value.data_ptr() == start:
                raise ValueError(f"out shares its memory with {name}; it must have memory of its own")


def _check_lengths(call: dict[str, Any], facts: Facts) -> None:
    """Expand an int cache_seqlens, check what index tensors hold and fill in the longest lengths."""
    seqlens = call.get("cache_seqlens")
    if seqlens.__class__ is int:
        need_range("cache_seqlens", seqlens, 0, facts.k_rows, ", the keys that the cache has room for")
        call["cache_seqlens"] = torch.full((facts.batch,), seqlens, dtype=torch.int32, device=call["q"].device)
    if "k_cache" in call and call["k"] is None:
        call["cu_seqlens_k_new"] = None  # serving engines pass it with every call; FA3 ignores it too
    longest_q, longest_k = facts.q_rows, facts.k_rows
    exact = facts.on_host or config.check_indices()
    if exact and facts.indexed:
        longest_q, longest_k = index_checks.check(call, facts)
    longest = (("max_seqlen_q", longest_q), ("max_seqlen_k", longest_k))
    for name, least in longest if "max_seqlen_k" in call else longest[:1]:
        given = call[name]
        if given is None:
            call[name] = least
        elif not (least if exact else 0) <= given <= INT32_MAX:
            why = ", where the least is the longest sequence" if exact else ""
            need_range(name, given, least if exact else 0, INT32_MAX, why)

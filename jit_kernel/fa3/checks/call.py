"""The checks of an attention call, done once, before anything is launched or written.

What depends only on types, shapes, strides, dtypes and devices is remembered by a plain tuple of them, so
that a call like an earlier one is checked in a few microseconds. Numbers are checked at every call, and so
are the values of index tensors: always on the CPU, elsewhere under JIT_KERNEL_CHECK_INDICES=1.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

from jit_kernel import config
from jit_kernel.fa3.call import DENSE, FIELDS, KVCACHE, NAME_OF, UNBOUNDED, Arguments, Call
from jit_kernel.fa3.checks import indices, shapes
from jit_kernel.fa3.checks.shapes import Facts
from jit_kernel.fa3.checks.values import (
    FLOAT32_MAX,
    FLOAT32_MIN,
    INT32_MAX,
    MAX_SPLITS,
    need_present,
    need_range,
    need_window,
    refuse_gradients,
)

_MOST_REMEMBERED = 8192  # a ragged server never stops making new shapes; the memory of them must not grow without end

# By the function and the types of all arguments: the places of the tensors among them, and what passed before, by all
# of these tensors but their numbers.
_passed: dict[tuple[object, ...], tuple[tuple[int, ...], dict[tuple[object, ...] | None, Facts]]] = {}


def checked(arguments: Arguments) -> Call:
    """The call of `flash_attn_varlen_func`, `flash_attn_with_kvcache` or `flash_attn_func` with these fields, checked.

    Its softmax_scale, attention_chunk, window_size, max_seqlen_q, max_seqlen_k and an int seqused_k are replaced by
    what they stand for. Raises TypeError and ValueError for bad arguments, NotImplementedError for inputs that require
    grad while grad mode is on.
    """
    call = Call(*arguments)
    kinds = (call.function, *map(type, arguments))
    known = _passed.get(kinds)
    facts = None if known is None else known[1].get(_key(arguments, known[0]))
    if facts is None:
        facts = shapes.check(call)
        if torch.is_grad_enabled():
            names = NAME_OF[call.function]
            for name, value in zip(FIELDS, arguments, strict=False):
                refuse_gradients(names.get(name, name), value)
        _remember(arguments, kinds, facts)
    check_numbers(call)
    scale: float | None = facts.scale
    if call.only_qv:
        scale = facts.scale_of_qv
        need_present("qv", scale, "with only_qv")
    if call.softmax_scale is None:
        call.softmax_scale = scale
    if call.out is not None:
        _refuse_shared_memory(call)
    if call.function == DENSE:
        call.max_seqlen_q, call.max_seqlen_k = facts.q_rows, facts.k_rows
    else:
        _check_lengths(call, facts)
    return call


def _key(arguments: Arguments, places: tuple[int, ...]) -> tuple[object, ...] | None:
    """All that the checks of shapes look at in these tensors, and the grad mode."""
    seen: list[object] = [torch.is_grad_enabled()]
    try:
        for place in places:
            tensor = arguments[place]
            seen += (tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad)
    except RuntimeError:  # a sparse tensor has no strides: never remembered, and the checks refuse it
        return None
    return tuple(seen)


def _remember(arguments: Arguments, kinds: tuple[object, ...], facts: Facts) -> None:
    types = kinds[1:]
    if any(isinstance(kind, type) and issubclass(kind, Tensor) for kind in {*types} - {Tensor, Parameter}):
        return  # another subclass may say of itself what it likes
    places = tuple(place for place, kind in enumerate(types) if kind is Tensor or kind is Parameter)
    passed = _passed.setdefault(kinds, (places, {}))[1]
    if len(passed) >= _MOST_REMEMBERED:
        passed.clear()
    key = _key(arguments, places)
    if key is not None:
        passed[key] = facts


def check_numbers(call: Call) -> None:
    """The numbers that shapes say nothing about; their types were checked with the shapes."""
    scale, softcap, chunk = call.softmax_scale, call.softcap, call.attention_chunk
    if scale is not None and not FLOAT32_MIN <= scale <= FLOAT32_MAX:
        raise ValueError(f"softmax_scale is {scale}; it must be positive and finite in float32, or None")
    if softcap != 0 and not FLOAT32_MIN <= softcap <= FLOAT32_MAX:
        raise ValueError(f"softcap is {softcap}; it must be 0 (off), or positive and finite in float32")
    if call.window_size is not UNBOUNDED:
        call.window_size = need_window(call.window_size)
    if chunk is None:
        call.attention_chunk = 0
    elif not 0 <= chunk <= INT32_MAX:
        need_range("attention_chunk", chunk, 0, INT32_MAX)
    if not 0 <= call.num_splits <= MAX_SPLITS:
        need_range("num_splits", call.num_splits, 0, MAX_SPLITS)
    if not 0 <= call.sm_margin <= INT32_MAX:
        need_range("sm_margin", call.sm_margin, 0, INT32_MAX)


def _refuse_shared_memory(call: Call) -> None:
    """out must not start where an input starts: other threads still read what one has written."""
    start = call.out.data_ptr() if call.out is not None else 0
    if start:
        for name in ("q", "k", "v", "k_new", "v_new", "qv"):
            value = getattr(call, name)
            if value is not None and value.data_ptr() == start:
                shown = NAME_OF[call.function].get(name, name)
                raise ValueError(f"out shares its memory with {shown}; it must have memory of its own")


def _check_lengths(call: Call, facts: Facts) -> None:
    """Expand an int cache_seqlens, check what index tensors hold and fill in the longest lengths."""
    of_cache = call.function == KVCACHE
    seqlens = call.seqused_k
    if isinstance(seqlens, int):
        need_range("cache_seqlens", seqlens, 0, facts.k_rows, ", the keys that the cache has room for")
        call.seqused_k = torch.full((facts.batch,), seqlens, dtype=torch.int32, device=call.q.device)
    if call.k_new is None:
        call.cu_seqlens_k_new = None  # serving engines pass it with every call; FA3 ignores it too
    longest_q, longest_k = facts.q_rows, facts.k_rows
    exact = facts.on_host or config.check_indices()
    if exact and facts.indexed:
        longest_q, longest_k = indices.check(call, facts)
    call.max_seqlen_q = _longest("max_seqlen_q", call.max_seqlen_q, longest_q, exact)
    # A cache's bound is its room: how keys are split must not depend on JIT_KERNEL_CHECK_INDICES.
    call.max_seqlen_k = facts.k_rows if of_cache else _longest("max_seqlen_k", call.max_seqlen_k, longest_k, exact)


def _longest(name: str, given: int | None, least: int, exact: bool) -> int:
    if given is None:
        return least
    if not (least if exact else 0) <= given <= INT32_MAX:
        why = ", where the least is the longest sequence" if exact else ""
        need_range(name, given, least if exact else 0, INT32_MAX, why)
    return given

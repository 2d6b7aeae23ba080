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
from jit_kernel.fa3.checks import forms, indices, shapes
from jit_kernel.fa3.checks.memory import overlap
from jit_kernel.fa3.checks.plain import in_forward_mode
from jit_kernel.fa3.checks.shapes import Facts
from jit_kernel.fa3.checks.values import (
    FLOAT32_MAX,
    FLOAT32_MIN,
    INT32_MAX,
    MAX_SPLITS,
    need_present,
    need_range,
    need_window,
    refuse_derivatives,
    shown,
)

_MOST_REMEMBERED = 8192  # a ragged server never stops making new shapes; the memory of them must not grow without end

# By the function and the types of all arguments: the places of the tensors among them, and what passed before, by all
# of these tensors but their numbers; with it, whether an argument that is one number is none of Python's own.
_Passed = dict[tuple[object, ...] | None, tuple[Facts, bool]]
_passed: dict[tuple[object, ...], tuple[tuple[int, ...], _Passed]] = {}


def checked(arguments: Arguments) -> Call:
    """The call of `flash_attn_varlen_func`, `flash_attn_with_kvcache` or `flash_attn_func` with these fields, checked.

    Its softmax_scale, attention_chunk, window_size, max_seqlen_q, max_seqlen_k and an int seqused_k are replaced by
    what they stand for, its tensors by what a kernel takes, and what has no effect by None. Raises TypeError and
    ValueError for bad arguments, NotImplementedError for inputs that require grad while grad mode is on, or have a
    forward-mode tangent.
    """
    call = Call(*arguments)
    kinds = (call.function, *map(type, arguments))
    known = _passed.get(kinds)
    passed = None if known is None or in_forward_mode() else known[1].get(_key(arguments, known[0]))
    if passed is None:
        facts = _looked_at(call, arguments, kinds)
    else:
        facts, has_odd_numbers = passed
        if has_odd_numbers:
            forms.settle_numbers(call)
        if call.k is None:
            forms.settle_absent_keys(call)
    check_numbers(call)
    scale: float | None = facts.scale
    if call.only_qv:
        scale = facts.scale_of_qv
        need_present("qv", scale, "with only_qv")
    if call.softmax_scale is None:
        call.softmax_scale = scale
    if facts.extents:
        refuse_shared_memory(call, facts.extents)
    forms.drop_what_is_not_read(call)
    if call.function == DENSE:
        call.max_seqlen_q, call.max_seqlen_k = facts.q_rows, facts.k_rows
    else:
        _check_lengths(call, facts)
    return call


def _looked_at(call: Call, arguments: Arguments, kinds: tuple[object, ...]) -> Facts:
    """What is the same for every call with such types and shapes, which are remembered."""
    forms.settle_tensors(call)
    forms.settle_numbers(call)
    if call.k is None:
        forms.settle_absent_keys(call)
    facts = shapes.check(call)
    names = NAME_OF[call.function]
    refuse_derivatives((names.get(name, name), value) for name, value in zip(FIELDS, arguments, strict=False))
    _remember(arguments, kinds, facts)
    return facts


def _key(arguments: Arguments, places: tuple[int, ...]) -> tuple[object, ...] | None:
    """All that the checks of shapes look at in these tensors, and the grad mode; None where one must be looked at anew.

    Of tensors whose class is Tensor or Parameter, those that are no plain memory have no address, or are negated.
    """
    seen: list[object] = [torch.is_grad_enabled()]
    try:
        for place in places:
            tensor = arguments[place]
            if tensor.is_neg():
                return None
            has_address = tensor.data_ptr() != 0
            seen += (tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad, has_address)
    except RuntimeError:  # a sparse or batched tensor: never remembered, and the checks refuse it
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
        passed[key] = facts, forms.has_odd_numbers(arguments)


def check_numbers(call: Call) -> None:
    """The numbers that shapes say nothing about; their types were settled before."""
    scale, softcap, chunk = call.softmax_scale, call.softcap, call.attention_chunk
    if scale is not None and not FLOAT32_MIN <= scale <= FLOAT32_MAX:
        raise ValueError(f"softmax_scale is {shown(scale)}; it must be positive and finite in float32, or None")
    if softcap != 0 and not FLOAT32_MIN <= softcap <= FLOAT32_MAX:
        raise ValueError(f"softcap is {shown(softcap)}; it must be 0 (off), or positive and finite in float32")
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


def refuse_shared_memory(call: Call, extents: tuple[tuple[str, int], ...]) -> None:
    """out, and a cache that is appended to, share no byte with another tensor: what one thread writes, others read.

    extents: every tensor of the call that has memory, by its field, with its extent in bytes.
    """
    placed = [(name, getattr(call, name), size) for name, size in extents]
    starts = [tensor.data_ptr() for _, tensor, _ in placed]
    for at, (name, tensor, size) in enumerate(placed):
        if name != "out" and (call.k_new is None or name not in ("k", "v")):
            continue
        start, end = starts[at], starts[at] + size
        for place, (other, given, length) in enumerate(placed):
            if place != at and starts[place] < end and start < starts[place] + length and overlap(tensor, given):
                names = NAME_OF[call.function]
                one, two = names.get(name, name), names.get(other, other)
                raise ValueError(f"{one} shares its memory with {two}; what is written must have memory of its own")


def _check_lengths(call: Call, facts: Facts) -> None:
    """Expand an int cache_seqlens, check what index tensors hold and fill in the longest lengths."""
    of_cache = call.function == KVCACHE
    seqlens = call.seqused_k
    if isinstance(seqlens, int):
        need_range("cache_seqlens", seqlens, 0, facts.k_rows, ", the keys that the cache has room for")
        call.seqused_k = torch.full((facts.batch,), seqlens, dtype=torch.int32, device=call.q.device)
    longest_q, longest_k = facts.q_rows, facts.k_rows
    exact = facts.on_host or config.check_indices()
    if facts.converted:
        forms.convert_indices(call, facts.converted, exact=exact)
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

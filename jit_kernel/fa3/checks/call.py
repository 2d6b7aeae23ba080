"""The checks of an attention call, done once, before anything is launched or written.

What depends only on types, shapes, strides, dtypes and devices is remembered by a plain tuple of them, so
that a call like an earlier one is checked in a few microseconds. Numbers are checked at every call, and so
are the values of index tensors: always on the CPU, elsewhere under JIT_KERNEL_CHECK_INDICES=1.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from jit_kernel import config
from jit_kernel.fa3.call import DENSE, FIELDS, KVCACHE, NAME_OF, UNBOUNDED, Arguments, Call
from jit_kernel.fa3.checks import forms, indices, shapes
from jit_kernel.fa3.checks.memory import extent, share
from jit_kernel.fa3.checks.plain import SURE_ADDRESS, is_in_memory, need_served_device
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
_NO_MEMORY = ("window_size", "max_seqlen_q", "max_seqlen_k", *forms.INTEGERS)  # a tensor of these is read at once


class Passed(NamedTuple):
    """What is known of calls with such types and shapes, of which one passed."""

    facts: Facts
    has_odd_numbers: bool  # an argument that is one number is none of Python's own
    extents: tuple[int, ...]  # by tensor, in bytes; 0 where its memory does not matter
    written: tuple[int, ...]  # which of the tensors the call writes
    number: int  # of no other types and shapes; see Call.layouts


_numbers = itertools.count(1)  # one at a time, whichever thread asks

# By the function and the types of all arguments: the places of the tensors among them, and what passed before, by all
# of these tensors but their numbers.
_passed: dict[tuple[object, ...], tuple[tuple[int, ...], dict[tuple[object, ...], Passed]]] = {}


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
    passed = None
    starts: list[int] = []
    if known is not None and forward_ad._current_level < 0:
        key = _key(arguments, known[0], starts)
        passed = None if key is None else known[1].get(key)
    if passed is None:
        facts = _looked_at(call, arguments, kinds)
    else:
        facts = passed.facts
        call.layouts = passed.number
        if passed.has_odd_numbers:
            forms.settle_numbers(call)
        if call.k is None:
            forms.settle_absent_keys(call)
        if passed.written and _ranges_meet(starts, passed):
            refuse_shared_memory(call)
    check_numbers(call)
    scale: float | None = facts.scale
    if call.only_qv:
        scale = facts.scale_of_qv
        need_present("qv", scale, "with only_qv")
    if call.softmax_scale is None:
        call.softmax_scale = scale
    for name in facts.unread:
        setattr(call, name, None)
    if call.function == DENSE:
        call.max_seqlen_q, call.max_seqlen_k = facts.q_rows, facts.k_rows
    else:
        _check_lengths(call, facts)
    return call


def _looked_at(call: Call, arguments: Arguments, kinds: tuple[object, ...]) -> Facts:
    """What is the same for every call with such types and shapes, which are remembered."""
    forms.settle_tensors(call)
    if isinstance(call.q, Tensor):
        need_served_device("q", call.q)
    forms.settle_numbers(call)
    if call.k is None:
        forms.settle_absent_keys(call)
    facts = shapes.check(call)
    names = NAME_OF[call.function]
    refuse_derivatives((names.get(name, name), value) for name, value in zip(FIELDS, arguments, strict=False))
    refuse_shared_memory(call)
    _remember(call, arguments, kinds, facts)
    return facts


def _key(arguments: Arguments, places: tuple[int, ...], starts: list[int]) -> tuple[object, ...] | None:
    """What is remembered about a call's tensors, None for one with a tensor that is no plain memory.

    Of tensors whose class is Tensor or Parameter, those that are no plain memory have no storage with memory, or are
    negated. Their addresses are appended to `starts`.
    """
    with_gradients = torch.is_grad_enabled()
    seen: list[object] = [with_gradients]
    try:
        for place in places:
            tensor = arguments[place]
            start = tensor.data_ptr()
            if tensor.is_neg() or (start < SURE_ADDRESS and not is_in_memory(tensor)):
                return None
            starts.append(start)
            seen.append((tensor.shape, tensor.stride(), tensor.dtype, tensor.device))
            if with_gradients:
                seen.append(tensor.requires_grad)
    except RuntimeError:  # a sparse or batched tensor: never remembered, and the checks refuse it
        return None
    return tuple(seen)


def _remember(call: Call, arguments: Arguments, kinds: tuple[object, ...], facts: Facts) -> None:
    types = kinds[1:]
    if any(isinstance(kind, type) and issubclass(kind, Tensor) for kind in {*types} - {Tensor, Parameter}):
        return  # another subclass may say of itself what it likes
    places = tuple(place for place, kind in enumerate(types) if kind is Tensor or kind is Parameter)
    passed = _passed.setdefault(kinds, (places, {}))[1]
    if len(passed) >= _MOST_REMEMBERED:
        passed.clear()
    key = _key(arguments, places, [])
    if key is not None:
        fields = [FIELDS[place] for place in places]
        extents = tuple(0 if name in _NO_MEMORY else extent(arguments[FIELDS.index(name)]) for name in fields)
        written = tuple(at for at, name in enumerate(fields) if name in forms.written_fields(call))
        passed[key] = Passed(facts, forms.has_odd_numbers(arguments), extents, written, next(_numbers))


def _ranges_meet(starts: list[int], passed: Passed) -> bool:
    """Whether the range of addresses of something that is written meets another one."""
    extents = passed.extents
    for written in passed.written:
        start = starts[written]
        end = start + extents[written]
        for at, other in enumerate(starts):
            if other < end and start < other + extents[at] and at != written:
                return True
    return False


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


def refuse_shared_memory(call: Call) -> None:
    """out, and a cache that is appended to, share no byte with another tensor: what one thread writes, others read."""
    names = NAME_OF[call.function]
    fields = [name for name in FIELDS if name not in _NO_MEMORY]
    given = [(names.get(name, name), value) for name in fields if isinstance(value := getattr(call, name), Tensor)]
    for field in forms.written_fields(call):
        written = getattr(call, field)
        for name, tensor in given:
            if (tensor is not written or name != names.get(field, field)) and share(written, tensor):
                one = names.get(field, field)
                raise ValueError(f"{one} shares its memory with {name}; it must have memory of its own: it is written")


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
    # Of dense queries that all count the shape says the longest, whatever an index tensor holds.
    exact_q = exact or (call.cu_seqlens_q is None and call.seqused_q is None)
    call.max_seqlen_q = _longest("max_seqlen_q", call.max_seqlen_q, longest_q, exact_q)
    # A cache's bound is its room: how keys are split must not depend on JIT_KERNEL_CHECK_INDICES.
    call.max_seqlen_k = facts.k_rows if of_cache else _longest("max_seqlen_k", call.max_seqlen_k, longest_k, exact)


def _longest(name: str, given: int | None, least: int, exact: bool) -> int:
    if given is None:
        return least
    if not (least if exact else 0) <= given <= INT32_MAX:
        why = ", where the least is the longest sequence" if exact else ""
        need_range(name, given, least if exact else 0, INT32_MAX, why)
    return given

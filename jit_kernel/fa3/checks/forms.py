"""The forms of an argument that have one meaning, made the one form that the checks and the kernels look at.

FlashAttention's callers pass integers of numpy and 0-dim tensors, no window as None, offsets in int64, lazily negated
views, descales beside 16-bit keys. None of it reaches a kernel.
"""

from __future__ import annotations

from types import NoneType

from torch import Tensor

from jit_kernel.fa3.call import FIELDS, KVCACHE, NAME_OF, Arguments, Call
from jit_kernel.fa3.checks import dtypes
from jit_kernel.fa3.checks.plain import in_memory
from jit_kernel.fa3.checks.values import as_kernel_index, need_integer, need_number, need_present

INTEGERS = ("num_splits", "sm_margin", "attention_chunk", "max_seqlen_q", "max_seqlen_k")
_OPTIONAL = ("attention_chunk", "max_seqlen_q", "max_seqlen_k")


def has_odd_numbers(arguments: Arguments) -> bool:
    """Whether an argument that is one number is no int, or no float, of Python's own."""
    given = dict(zip(FIELDS, arguments, strict=False))
    if any(given.get(name).__class__ not in (int, NoneType) for name in INTEGERS):
        return True
    if any(given[name].__class__ not in (float, NoneType) for name in ("softmax_scale", "softcap")):
        return True
    seqlens = given.get("seqused_k")
    return seqlens.__class__ not in (int, NoneType) and not (isinstance(seqlens, Tensor) and seqlens.dim() > 0)


def settle_numbers(call: Call) -> None:
    """Every argument that is one number, as an int or a float of Python's. Raises TypeError for what is none."""
    for name in INTEGERS:
        value = getattr(call, name)
        if value is not None or name not in _OPTIONAL:
            setattr(call, name, need_integer(name, value))
    if call.softmax_scale is not None:
        call.softmax_scale = need_number("softmax_scale", call.softmax_scale)
    call.softcap = need_number("softcap", call.softcap)
    seqlens = call.seqused_k
    if call.function == KVCACHE and seqlens is not None and (not isinstance(seqlens, Tensor) or seqlens.dim() == 0):
        call.seqused_k = need_integer("cache_seqlens", seqlens)


def settle_absent_keys(call: Call) -> None:
    """With only_qv no key is read: without keys, a view of the values stands for them."""
    name = NAME_OF[call.function].get("k", "k")
    if call.only_qv is not True:
        need_present(name, None, "without only_qv")
    if call.k_new is not None:
        need_present(name, None, "with k: new keys are appended to it")
    if isinstance(call.v, Tensor) and isinstance(call.q, Tensor) and call.v.dim() and call.q.dim():
        call.k = call.v[..., : call.q.shape[-1]]


def settle_tensors(call: Call) -> None:
    """Every tensor as plain memory. Raises TypeError or NotImplementedError for one that cannot be."""
    names = NAME_OF[call.function]
    for name in FIELDS:
        value = getattr(call, name)
        if isinstance(value, Tensor):
            setattr(call, name, in_memory(names.get(name, name), value, written=name in written_fields(call)))


def written_fields(call: Call) -> tuple[str, ...]:
    """The fields of the tensors that a call writes."""
    caches = () if call.k_new is None else ("k", "v")
    return caches if call.out is None else ("out", *caches)


def unread_fields(call: Call) -> tuple[str, ...]:
    """The fields that were given and have no effect, as in FlashAttention-3: no implementation has to look at them."""
    unread: list[str] = []
    if call.k_new is None:
        unread.append("cu_seqlens_k_new")  # serving engines pass it with every call
    if call.rotary_cos is None:
        unread.append("rotary_seqlens")
    unread += dtypes.unread_descales(call)
    return tuple(name for name in unread if getattr(call, name) is not None)


def convert_indices(call: Call, fields: tuple[str, ...], *, exact: bool) -> None:
    """These index tensors as kernels take them; see `as_kernel_index`."""
    names = NAME_OF[call.function]
    for name in fields:
        value = getattr(call, name)
        if value is not None:
            setattr(call, name, as_kernel_index(names.get(name, name), value, exact=exact))

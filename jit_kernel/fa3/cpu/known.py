"""Plain calls on the CPU: the library checks the arguments itself; Python checks the calls that it declines.

The checks in Python take 4 of 8 us of the smallest call. After a call that has driven Python from the caches, each
object that the next one touches is a wait for memory, so few are touched on the way here. Before a call of 512 tokens
and 8 heads computes (0.55 ms), Python took 46 us with the checks and 15 so.
"""

from __future__ import annotations

from collections.abc import Callable
from types import NoneType
from typing import Any

import torch
from torch import Tensor, contiguous_format, empty, empty_like, get_num_threads, is_grad_enabled
from torch.autograd import forward_ad

from jit_kernel.fa3.call import DEFAULTS, FIELDS, OF_DENSE, UNBOUNDED, Arguments, Result, lse_shape, result_dtype
from jit_kernel.fa3.checks.plain import SURE_ADDRESS, all_in_memory
from jit_kernel.fa3.checks.values import need_window
from jit_kernel.fa3.features import fields_ask_for_more

# What plain_forward serves (kernel_sources/flash_attention_v3/cpu/entry/plain_call.h), by the names of
# features.ARGUMENTS.
CLAIMED = frozenset(
    ("ragged_q", "ragged_k", "page_size", "seqused_k", "causal", "window", "chunk", "softcap", "lse", "split")
)

# flash_attn_func's `deterministic` has no meaning.
_CLAIMED_OF_DENSE = CLAIMED | {"deterministic"}

# By the inputs' dtype: plain_forward of a library that was loaded, and the dtype of out.
_libraries: dict[torch.dtype, tuple[Callable[..., bool], torch.dtype]] = {}


# What an argument of another kind comes to on its way to the library (a read-only array: BufferError), and room that no
# machine has for the result of an expanded q: the checks know the argument's name.
_DECLINED = (RuntimeError, TypeError, ValueError, OverflowError, AttributeError, IndexError, BufferError)

_INDICES = frozenset((Tensor, NoneType))  # the classes of an index tensor, or of none

# Whether a call asks for more than that: of flash_attn_func, and of the others.
_dense_asks_for_more = fields_ask_for_more(_CLAIMED_OF_DENSE, OF_DENSE)
_asks_for_more = fields_ask_for_more(CLAIMED, len(FIELDS))


def serve(dtype: torch.dtype, library: Any) -> None:
    """Plain calls of this dtype go to a forward library that was loaded."""
    global _dense_asks_for_more, _asks_for_more
    _dense_asks_for_more = fields_ask_for_more(_CLAIMED_OF_DENSE, OF_DENSE)
    _asks_for_more = fields_ask_for_more(CLAIMED, len(FIELDS))
    # Where the heap lies low the library would decline every small tensor.
    is_low = empty(1, device="cpu").data_ptr() < SURE_ADDRESS
    forward = _asking_for_memory(library.plain_forward_anywhere) if is_low else library.plain_forward
    _libraries[dtype] = (forward, result_dtype(dtype))


def _asking_for_memory(forward: Callable[..., bool]) -> Callable[..., bool]:
    """plain_forward for addresses that do not tell whether a tensor has memory."""

    def ask(*arguments: Any) -> bool:
        return all_in_memory(arguments) and forward(*arguments)

    return ask


def try_unchecked(arguments: Arguments) -> Result | None:
    """The result of an unchecked plain call; None where it has a mistake or asks for more.

    A window_size that is none raises the ValueError or TypeError of the checks.
    """
    table = offsets_q = offsets_k = used_k = longest_q = longest_k = None
    if len(arguments) == OF_DENSE:
        (
            _, q, k, v, scale, causal, window, chunk, softcap, num_splits, with_lse,
            out, _, _, _, _, _, pack_gqa, sm_margin, deterministic,
        ) = arguments  # fmt: skip
        declined = _dense_asks_for_more(arguments) or deterministic.__class__ is not bool
    else:
        arguments += DEFAULTS[len(arguments) :]
        (
            _, q, k, v, scale, causal, window, chunk, softcap, num_splits, with_lse,
            out, _, _, _, _, _, pack_gqa, sm_margin, _, _,
            offsets_q, longest_q, used_k, table, offsets_k, longest_k, _, _, _, _,
            _, _, _, _, _, _, _, _, rotary_interleaved, _,
        ) = arguments  # fmt: skip
        declined = _asks_for_more(arguments) or rotary_interleaved.__class__ is not bool
        # The library would take an array for an index tensor; the checks refuse it.
        declined = declined or not (
            offsets_q.__class__ in _INDICES and offsets_k.__class__ in _INDICES
            and used_k.__class__ in _INDICES and table.__class__ in _INDICES
        )  # fmt: skip
    # The library looks at the types of what it is given; some it is not given.
    if declined or not (
        q.__class__ is k.__class__ is v.__class__ is Tensor
        and q.is_cpu
        and (library := _libraries.get(q.dtype)) is not None
        and with_lse.__class__ is bool
        and (out is None or out.__class__ is Tensor)
        and pack_gqa is None
        and sm_margin.__class__ is int
        and sm_margin == 0
    ):
        return None
    if is_grad_enabled() and (
        q.requires_grad or k.requires_grad or v.requires_grad or (out is not None and out.requires_grad)
    ):
        return None
    # What has no memory, and an index tensor whose sign is lazy, the library declines. Other signs only torch knows.
    if q.is_neg() or k.is_neg() or v.is_neg() or (out is not None and out.is_neg()) or forward_ad._current_level >= 0:
        return None
    left, right = window if window is UNBOUNDED else need_window(window)
    forward, out_dtype = library
    try:
        lse = empty(lse_shape(q), dtype=torch.float32, device="cpu") if with_lse else None
        if out is None:  # of q's head size: another one is declined. From its shape it would take 1.4 us more
            out = empty_like(q, dtype=out_dtype, memory_format=contiguous_format)
        if not forward(
            q, k, v, out, lse, table, offsets_q, offsets_k, used_k, longest_q, longest_k,
            scale, causal, left, right, chunk, softcap, num_splits, get_num_threads(),
        ):  # fmt: skip
            return None
    except _DECLINED:
        return None
    return out if lse is None else (out, lse)

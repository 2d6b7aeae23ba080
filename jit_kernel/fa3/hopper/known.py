"""Decode calls that the launcher checks itself; Python checks the calls that it declines.

On a GPU a short decode call takes longer on the host than on the device: of 20 us in Python the checks took 10 and the
way to a kernel 5. What the kernels read is looked at nowhere: values of index tensors are on the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from math import inf
from types import NoneType

import torch
from torch import Tensor, contiguous_format, empty, empty_like, is_grad_enabled
from torch.autograd import forward_ad
from torch.nn import Parameter

from jit_kernel.fa3.call import FIELDS, KVCACHE, UNBOUNDED, Arguments, Result, lse_shape, result_dtype
from jit_kernel.fa3.checks.plain import all_in_memory
from jit_kernel.fa3.checks.values import need_window
from jit_kernel.fa3.features import fields_ask_for_more

# What known_decode serves (kernel_sources/flash_attention_v3/hopper/launch/known_decode.h), by the names of
# features.ARGUMENTS. cu_seqlens_k_new has no meaning without new keys; metadata is read under CHECK_INDICES alone.
CLAIMED = frozenset(
    ("ragged_q", "page_size", "seqused_k", "ragged_append", "causal", "window", "chunk", "softcap", "sinks", "lse",
     "split", "metadata", "deterministic", "descale", "token_scales")
)  # fmt: skip
_FP8 = torch.float8_e4m3fn
# What the launcher answers, as it has them.
_LAUNCHED, _UNSURE = 1, 2
# What an argument of another kind comes to on its way to the launcher, and room that no machine has for the result of
# an expanded q. An error of the driver repeats the way of the checks.
_DECLINED = (RuntimeError, TypeError, ValueError, OverflowError, AttributeError, IndexError, BufferError)
# The classes of what the launcher would not tell from them, or is not given: q, k, v; out; sinks, which are parameters
# in gpt-oss; index tensors and metadata; three bools; pack_gqa. To look one up takes half the time of fourteen tests.
_KINDS = frozenset(
    itertools.product(
        *[(Tensor,)] * 3, (Tensor, NoneType), (Tensor, Parameter, NoneType), *[(Tensor, NoneType)] * 5, *[(bool,)] * 3,
        (bool, NoneType),
    )
)  # fmt: skip

_asks_for_more = fields_ask_for_more(CLAIMED, len(FIELDS))
# The launcher's function, and whether addresses tell that there is memory: the CUDA driver may map it anywhere.
_decode: Callable[..., int] | None = None
_asks_first = False


def serve(decode: Callable[..., int]) -> None:
    """Decode calls go to a launcher that was loaded."""
    global _asks_for_more, _decode, _asks_first
    _asks_for_more = fields_ask_for_more(CLAIMED, len(FIELDS))
    _decode, _asks_first = decode, False


def try_unchecked(arguments: Arguments) -> Result | None:
    """The result of an unchecked decode call of a kind that these kernels have had before; None for every other call.

    A window_size that is none raises the ValueError or TypeError of the checks.
    """
    global _asks_first
    if arguments[0] != KVCACHE or _decode is None or _asks_for_more(arguments):
        return None
    (
        _, q, k, v, scale, causal, window, chunk, softcap, num_splits, with_lse,
        out, sinks, _, q_descale, k_descale, v_descale, pack_gqa, sm_margin, deterministic, _,
        offsets_q, longest_q, used_k, table, _, _, _, _, k_scale, v_scale,
        _, _, offsets_new, _, _, _, _, _, rotary_interleaved, metadata,
    ) = arguments  # fmt: skip
    kinds = (
        q.__class__, k.__class__, v.__class__, out.__class__, sinks.__class__, used_k.__class__, table.__class__,
        offsets_q.__class__, offsets_new.__class__, metadata.__class__, with_lse.__class__,
        rotary_interleaved.__class__, deterministic.__class__, pack_gqa.__class__,
    )  # fmt: skip
    if kinds not in _KINDS:
        return None
    # Signs and derivatives only torch knows.
    if (
        q.is_neg() or k.is_neg() or v.is_neg() or (out is not None and out.is_neg())
        or (used_k is not None and used_k.is_neg()) or (table is not None and table.is_neg())
        or (offsets_q is not None and offsets_q.is_neg()) or (sinks is not None and sinks.is_neg())
        or forward_ad._current_level >= 0
    ):  # fmt: skip
        return None
    if is_grad_enabled() and (
        q.requires_grad or k.requires_grad or v.requires_grad
        or (out is not None and out.requires_grad) or (sinks is not None and sinks.requires_grad)
    ):  # fmt: skip
        return None
    if not (
        (q_descale is None or (q_descale.__class__ is Tensor if q.dtype is not _FP8 else _is_plain(q_descale)))
        and (k_descale is None or _is_plain(k_descale)) and (v_descale is None or _is_plain(v_descale))
        and (k_scale is None or _is_scale(k_scale, q)) and (v_scale is None or _is_scale(v_scale, q))
    ):  # fmt: skip
        return None
    left, right = window if window is UNBOUNDED else need_window(window)
    try:
        is_ours = out is None
        if out is None:  # of q's head size: another one is declined
            out = empty_like(q, dtype=result_dtype(q.dtype), memory_format=contiguous_format)
        lse = _new_lse(q, not is_ours and offsets_q is not None) if with_lse else None
        call = (
            q, k, v, out, lse, used_k, table, offsets_q, offsets_new, sinks, metadata,
            q_descale if q.dtype is _FP8 else None, k_descale, v_descale, k_scale, v_scale, longest_q, scale, causal,
            left, right, chunk, softcap, num_splits, sm_margin, deterministic, is_ours and offsets_q is not None,
        )  # fmt: skip
        answer = _UNSURE if _asks_first else _decode(*call, False)
        if answer == _UNSURE:
            _asks_first = True
            answer = _decode(*call, True) if all_in_memory(call) else 0
    except _DECLINED:
        return None
    if answer != _LAUNCHED:
        return None
    return out if lse is None else (out, lse)


def _is_plain(scale: Tensor) -> bool:
    """Whether factors of an e4m3 cache are a tensor in which no sign and no derivative waits."""
    return scale.__class__ is Tensor and not (scale.is_neg() or (scale.requires_grad and is_grad_enabled()))


def _is_scale(scale: Tensor, q: Tensor) -> bool:
    """As _is_plain, of tokens: beside q in fp16 hopper.decide rejects them."""
    return q.dtype is not torch.float16 and _is_plain(scale)


def _new_lse(q: Tensor, has_other_rows: bool) -> Tensor:
    """As arguments.new_lse."""
    lse = empty(lse_shape(q), dtype=torch.float32, device=q.device)
    return lse.fill_(-inf) if has_other_rows else lse

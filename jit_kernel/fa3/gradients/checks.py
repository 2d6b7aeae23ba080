"""Checks of one backward pass: whoever calls the operator by itself may get anything wrong, and kernels read addresses.

The public functions' own calls pass: their forward pass has checked what is the same here.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import fields

from torch import Tensor

from jit_kernel import config
from jit_kernel.fa3.call import lse_shape
from jit_kernel.fa3.checks.values import (
    INT32_MAX,
    need_device,
    need_dims,
    need_dtype,
    need_index,
    need_number,
    need_range,
    need_shape,
)
from jit_kernel.fa3.features import DTYPE_NAMES
from jit_kernel.fa3.gradients.call import Backward

_DTYPES = tuple(dtype for dtype, name in DTYPE_NAMES.items() if name != "e4m3")


def check(call: Backward) -> None:
    """Shapes, dtypes and devices; on a CPU, and under JIT_KERNEL_CHECK_INDICES=1, what index tensors hold, too.

    Raises ValueError that names the argument, what it was and what it must be.
    """
    q, k, v = call.q, call.k, call.v
    need_dtype("q", q, _DTYPES)
    _check_settings(call)
    for name, starts, form in (
        ("q", call.cu_seqlens_q, "(b, sq, hq, d)"), ("k", call.cu_seqlens_k, "(b, sk, hk, d)"),
    ):  # fmt: skip
        ragged = "(total_q, hq, d)" if name == "q" else "(total_k, hk, d)"
        need_dims(name, getattr(call, name), form if starts is None else ragged)
    need_dims("v", v, "(b, sk, hk, dv)" if call.cu_seqlens_k is None else "(total_k, hk, dv)")
    heads, of_keys = q.shape[-2], k.shape[-2]
    for name in ("q", "v"):
        if getattr(call, name).shape[-1] == 0:
            raise ValueError(f"{name} has shape {tuple(getattr(call, name).shape)}; its head size must be at least 1")
    need_shape("k", k, (*k.shape[:-1], q.shape[-1]), "(..., hk, d)")
    need_shape("v", v, (*k.shape[:-1], v.shape[-1]), "(..., hk, dv)")
    if of_keys == 0 or heads % of_keys:
        raise ValueError(f"q has {heads} heads; they must be a multiple of k's {of_keys}")
    for name in ("grad_out", "out"):
        need_shape(name, getattr(call, name), (*q.shape[:-1], v.shape[-1]), "(..., hq, dv)")
    for name in ("k", "v", "grad_out", "out"):
        need_dtype(name, getattr(call, name), (q.dtype,), ", q's dtype")
    _check_floats(call, heads)
    _check_offsets(call)
    for name in ("k", "v", "grad_out", "out", "lse"):
        need_device(name, getattr(call, name), q.device)


def need_one_device(call: Backward) -> None:
    """Raise ValueError, by name, for a tensor that is not on q's device."""
    for each in fields(call):
        value = getattr(call, each.name)
        if isinstance(value, Tensor):
            need_device(each.name, value, call.q.device)


def _check_settings(call: Backward) -> None:
    """Numbers: finite, and of a size that means something."""
    for name in ("softcap", "softmax_scale"):
        value = getattr(call, name)
        if value is not None and not math.isfinite(need_number(name, value)):
            raise ValueError(f"{name} is {value}; it must be finite")
    if call.softcap < 0:
        raise ValueError(f"softcap is {call.softcap}; it must be at least 0, which is none")
    for name, least in (("left", -1), ("right", -1), ("attention_chunk", 0), ("max_seqlen_q", 0), ("max_seqlen_k", 0)):
        value = getattr(call, name)
        if value is not None:
            need_range(name, value, least, INT32_MAX)


def _check_floats(call: Backward, heads: int) -> None:
    """lse and its gradient, sinks."""
    for name, value in (("lse", call.lse), ("grad_lse", call.grad_lse)):
        if value is not None:
            need_shape(name, value, lse_shape(call.q), "(hq, total_q) or (b, hq, sq)")
            need_dtype(name, value, (_DTYPES[0],))
            need_device(name, value, call.q.device)
    if call.sinks is not None:
        need_shape("sinks", call.sinks, (heads,), "(hq,)")
        need_dtype("sinks", call.sinks, (_DTYPES[0], call.q.dtype))
        need_device("sinks", call.sinks, call.q.device)


def _check_offsets(call: Backward) -> None:
    """As many sequences on both sides, and index tensors that fit them."""
    of_q = call.q.shape[0] if call.cu_seqlens_q is None else call.cu_seqlens_q.shape[0] - 1
    for side, rows in (("q", call.q), ("k", call.k)):
        starts, used = getattr(call, f"cu_seqlens_{side}"), getattr(call, f"seqused_{side}")
        if starts is not None:
            need_index(f"cu_seqlens_{side}", starts, None, "(b + 1,)", call.q.device)
            if starts.shape[0] == 0:
                raise ValueError(f"cu_seqlens_{side} is empty; it must have the shape (b + 1,)")
        batch = rows.shape[0] if starts is None else starts.shape[0] - 1
        if batch != of_q:
            name = side if starts is None else f"cu_seqlens_{side}"
            raise ValueError(f"{name} has {batch} sequences; it must have q's {of_q}")
        if used is not None:
            need_index(f"seqused_{side}", used, (batch,), "(b,)", call.q.device)
        if rows.device.type == "meta":
            continue
        if rows.is_cpu or config.check_indices():
            _check_numbers(side, rows, starts, used, getattr(call, f"max_seqlen_{side}"))


def _check_numbers(side: str, rows: Tensor, starts: Tensor | None, used: Tensor | None, bound: int | None) -> None:
    """Sequences lie in their rows, and no more rows of one are used than it has."""
    room = [rows.shape[1]] * rows.shape[0] if starts is None else []
    if starts is not None:
        numbers = starts.tolist()
        room = [end - start for start, end in itertools.pairwise(numbers)]
        if numbers[0] != 0 or [*numbers, rows.shape[0]] != sorted([*numbers, rows.shape[0]]):
            raise ValueError(
                f"cu_seqlens_{side} holds {numbers[:8]}; it must begin with 0, not decrease, and end within the "
                f"{rows.shape[0]} rows of {side}"
            )
        if bound and max(room, default=0) > bound:  # without one, the rows are its bound
            raise ValueError(f"max_seqlen_{side} is {bound}; cu_seqlens_{side} has a sequence of {max(room)}")
    if used is not None:
        for at, (count, most) in enumerate(zip(used.tolist(), room, strict=True)):
            if not 0 <= count <= most:
                raise ValueError(f"seqused_{side}[{at}] is {count}; it must be between 0 and {most}")

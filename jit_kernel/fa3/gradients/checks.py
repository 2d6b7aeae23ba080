"""Checks of one backward pass: whoever calls the operator by itself may get anything wrong, and kernels read addresses.

The public functions' own calls pass: their forward pass has checked what is the same here.
"""

from __future__ import annotations

import itertools

from torch import Tensor

from jit_kernel import config
from jit_kernel.fa3.call import lse_shape
from jit_kernel.fa3.checks.values import need_device, need_dims, need_dtype, need_shape
from jit_kernel.fa3.features import DTYPE_NAMES
from jit_kernel.fa3.gradients.call import Backward

_DTYPES = tuple(dtype for dtype, name in DTYPE_NAMES.items() if name != "e4m3")


def check(call: Backward) -> None:
    """Shapes, dtypes and devices; on a CPU, and under JIT_KERNEL_CHECK_INDICES=1, what index tensors hold, too.

    Raises ValueError that names the argument, what it was and what it must be.
    """
    q, k, v = call.q, call.k, call.v
    need_dtype("q", q, _DTYPES)
    for name, starts, form in (
        ("q", call.cu_seqlens_q, "(b, sq, hq, d)"), ("k", call.cu_seqlens_k, "(b, sk, hk, d)"),
    ):  # fmt: skip
        ragged = "(total_q, hq, d)" if name == "q" else "(total_k, hk, d)"
        need_dims(name, getattr(call, name), form if starts is None else ragged)
    heads, of_keys = q.shape[-2], k.shape[-2]
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
    batches: dict[str, int] = {}
    for side, rows in (("q", call.q), ("k", call.k)):
        starts, used = getattr(call, f"cu_seqlens_{side}"), getattr(call, f"seqused_{side}")
        batch = rows.shape[0] if starts is None else starts.shape[0] - 1
        batches["qk" if starts is None else f"cu_seqlens_{side}"] = batch
        if starts is not None:
            need_dims(f"cu_seqlens_{side}", starts, "(b + 1,)")
            need_device(f"cu_seqlens_{side}", starts, call.q.device)
        if used is not None:
            need_shape(f"seqused_{side}", used, (batch,), "(b,)")
            need_device(f"seqused_{side}", used, call.q.device)
        if rows.is_cpu or config.check_indices():
            _check_numbers(side, rows, starts, used)
        if len({*batches.values(), batch}) > 1:
            name = "k" if starts is None else f"cu_seqlens_{side}"
            raise ValueError(f"{name} has {batch} sequences; q has {next(iter(batches.values()))}")


def _check_numbers(side: str, rows: Tensor, starts: Tensor | None, used: Tensor | None) -> None:
    """Sequences lie in their rows, and no more rows of one are used than it has."""
    room = [rows.shape[1]] * rows.shape[0] if starts is None else []
    if starts is not None:
        numbers = starts.tolist()
        room = [end - start for start, end in itertools.pairwise(numbers)]
        if [0, *numbers, rows.shape[0]] != sorted([0, *numbers, rows.shape[0]]):
            raise ValueError(
                f"cu_seqlens_{side} holds {numbers[:8]}; it must not decrease, and lie between 0 and the "
                f"{rows.shape[0]} rows of {side}"
            )
    if used is not None:
        for at, (count, most) in enumerate(zip(used.tolist(), room, strict=True)):
            if not 0 <= count <= most:
                raise ValueError(f"seqused_{side}[{at}] is {count}; it must be between 0 and {most}")

"""The factors of e4m3 tensors in a call: descales of sequences, scales of tokens."""

from __future__ import annotations

from torch import Tensor

from jit_kernel.fa3.call import Call
from jit_kernel.fa3.portable import planning
from jit_kernel.fa3.portable.planning import Strides

NONE: Strides = (0,) * 12  # the strides without e4m3


def of_keys(call: Call) -> tuple[Tensor | None, ...]:
    """The factors of e4m3 keys and values that a call has, of sequences and of tokens."""
    return call.k_descale, call.v_descale, call.k_scale, call.v_scale


def flags(call: Call) -> int:
    """Which factors of e4m3 a call has; those beside other dtypes are taken away before."""
    return (
        (planning.Q_DESCALE if call.q_descale is not None else 0)
        | (planning.K_DESCALE if call.k_descale is not None else 0)
        | (planning.V_DESCALE if call.v_descale is not None else 0)
        | (planning.K_SCALE if call.k_scale is not None else 0)
        | (planning.V_SCALE if call.v_scale is not None else 0)
    )


def strides(call: Call) -> Strides:
    """Strides of the descales, (batch, head) each, and of the token scales, (batch or page, token, head) each."""
    return (
        *_descale_strides(call.q_descale), *_descale_strides(call.k_descale), *_descale_strides(call.v_descale),
        *_scale_strides(call.k_scale), *_scale_strides(call.v_scale),
    )  # fmt: skip


def _descale_strides(x: Tensor | None) -> Strides:
    return (0, 0) if x is None else x.stride()


def _scale_strides(x: Tensor | None) -> Strides:
    """A ragged tensor, (tokens, heads), has one batch entry."""
    if x is None:
        return 0, 0, 0
    return x.stride() if x.dim() == 3 else (0, *x.stride())

"""What the modules with other projects' functions share: what they refuse by name, copy and count."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jit_kernel.fa3.checks.values import described
from jit_kernel.integrations.counters import count


def refuse_given(function: str, **arguments: object) -> None:
    """Raise NotImplementedError for the first argument that is not None: it asks for what jit_kernel has not."""
    for name, value in arguments.items():
        if value is not None:
            raise _refusal(function, name, value, "None")


def refuse_other_than(function: str, neutral: object, **arguments: object) -> None:
    """The same for an argument that is neither None nor `neutral`, a number with which it asks for nothing."""
    for name, value in arguments.items():
        if value is not None and (isinstance(value, Tensor) or value != neutral):
            raise _refusal(function, name, value, f"{neutral!r} or None")


def _refusal(function: str, name: str, value: object, must_be: str) -> NotImplementedError:
    return NotImplementedError(
        f"{name} of {function} is {described(value)}; jit_kernel has nothing for it: it must be {must_be}"
    )


def note_served(host: str) -> None:
    """Count a call that was answered; a traced one runs later, and is not counted."""
    if not torch.compiler.is_compiling():
        count(host, "served")


def with_unit_stride(tensor: Any) -> Any:
    """A copy of a tensor whose last stride is not 1, as FlashAttention-3 makes one; anything else as it is."""
    if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or tensor.dim() == 0:
        return tensor
    return tensor.contiguous() if tensor.stride(-1) != 1 else tensor

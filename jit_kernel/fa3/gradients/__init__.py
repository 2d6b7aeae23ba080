"""The backward pass of attention, by torch's own backward operators with our out and lse.

They serve what they know: dense and ragged calls, causal masks and windows, grouped heads. An input that requires grad
in any other call is refused by the argument that they lack.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from jit_kernel.fa3.call import KVCACHE
from jit_kernel.fa3.checks.values import refuse_gradients
from jit_kernel.fa3.features import first_unclaimed

# What torch's backward operators serve, by the names of features.ARGUMENTS. How keys are split is the forward pass's.
_CLAIMED = frozenset(("ragged_q", "ragged_k", "causal", "window", "lse", "split"))
_DIFFERENTIABLE = ("q", "k", "v")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_WITHOUT = "call it under torch.no_grad() or detach the tensor"


def are_wanted(arguments: Mapping[str, Any]) -> bool:
    """Whether an argument requires grad, in grad mode."""
    tensors = (value for value in arguments.values() if isinstance(value, Tensor))
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def refuse_unserved(function: str, arguments: Mapping[str, Any]) -> None:
    """Raise NotImplementedError where an argument requires grad and torch's backward operators do not serve the call.

    arguments: those of the public function, by their names there.
    """
    if not are_wanted(arguments):
        return
    for name, value in arguments.items():
        if name not in _DIFFERENTIABLE or function == KVCACHE:
            refuse_gradients(name, value)
    q: Tensor = arguments["q"]
    asking = next(name for name in _DIFFERENTIABLE if are_wanted({name: arguments.get(name)}))
    lacking = first_unclaimed(arguments, _CLAIMED)
    if arguments.get("out") is not None:
        raise NotImplementedError(f"{asking} requires grad, and out is given, which is written without it: {_WITHOUT}")
    if lacking is not None:
        raise NotImplementedError(f"{asking} requires grad; torch's backward operators have no {lacking}: {_WITHOUT}")
    if q.dtype not in _DTYPES:
        raise NotImplementedError(f"{asking} requires grad; torch's backward operators have no {q.dtype}: {_WITHOUT}")
    if q.device.type not in ("cpu", "cuda"):
        raise NotImplementedError(f"{asking} requires grad; torch has no backward operator on {q.device}: {_WITHOUT}")

"""The backward pass of attention: what asks for it, and what of a call it serves.

`operator` makes it differentiable, `choice` says which implementation serves a backward pass, `call` is what each of
them takes. The forward pass's out and lse are kept, it is never computed again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from jit_kernel.fa3.call import KVCACHE
from jit_kernel.fa3.checks.plain import is_differentiated
from jit_kernel.fa3.checks.values import refuse_gradients
from jit_kernel.fa3.features import first_unclaimed

# What a backward pass may have, by the names of features.ARGUMENTS. How keys are split is the forward pass's.
_CLAIMED = frozenset(
    ("ragged_q", "ragged_k", "seqused_q", "seqused_k", "causal", "window", "chunk", "softcap", "sinks", "lse", "split",
     "deterministic")
)  # fmt: skip
DIFFERENTIABLE = ("q", "k", "v", "sinks")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_WITHOUT = "call it under torch.no_grad() or detach the tensor"


def are_wanted(arguments: Mapping[str, Any]) -> bool:
    """Whether an argument requires grad, in grad mode."""
    tensors = (value for value in arguments.values() if isinstance(value, Tensor))
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def are_differentiated(arguments: Mapping[str, Any]) -> bool:
    """Whether torch.func differentiates after an argument."""
    return any(isinstance(value, Tensor) and is_differentiated(value) for value in arguments.values())


def refuse_unserved(function: str, arguments: Mapping[str, Any]) -> None:
    """Raise NotImplementedError where an argument requires grad and no backward pass serves the call.

    arguments: those of the public function, by their names there.
    """
    if not are_wanted(arguments):
        return
    for name, value in arguments.items():
        if name not in DIFFERENTIABLE or function == KVCACHE:
            refuse_gradients(name, value)
    q: Tensor = arguments["q"]
    asking = next(name for name in DIFFERENTIABLE if are_wanted({name: arguments.get(name)}))
    lacking = first_unclaimed(arguments, _CLAIMED)
    if arguments.get("out") is not None:
        raise NotImplementedError(f"{asking} requires grad, and out is given, which is written without it: {_WITHOUT}")
    if lacking is not None:
        raise NotImplementedError(f"{asking} requires grad; the backward pass has no {lacking}: {_WITHOUT}")
    for name in "qkv":
        dtype = arguments[name].dtype
        if dtype not in _DTYPES:
            raise NotImplementedError(
                f"{asking} requires grad; the backward pass has no {dtype}, as {name} is: {_WITHOUT}"
            )
    if q.device.type == "musa":
        raise NotImplementedError(f"{asking} requires grad; MATE has no backward pass on {q.device}: {_WITHOUT}")

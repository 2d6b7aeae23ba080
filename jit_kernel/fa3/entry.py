"""How a public function's call is taken: at once, or as a torch operator where something traces it.

Something traces it under torch.compile, torch.export, make_fx, torch.jit.trace and FakeTensorMode, and when one of its
tensors is a fake one. A transform of torch.func has nothing to do with a call whose tensors it does not reach.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_dynamo_compiling

from jit_kernel.fa3 import call as calls
from jit_kernel.fa3 import seam, torch_operators
from jit_kernel.fa3.call import FIELDS, KVCACHE, NAME_OF, Arguments, MetadataParameters, Result
from jit_kernel.fa3.checks.plain import (
    TracedTensorError,
    are_wrapped,
    count_modes,
    has_function_mode,
    is_traced,
    is_transformed,
    outside_of_transforms,
    tracing_state,
)
from jit_kernel.fa3.checks.values import GradientError
from jit_kernel.fa3.gradients import are_differentiated

T = TypeVar("T")


def attend(call: Arguments) -> Result:
    """Attention of an unchecked call."""
    # torch.compile makes a constant of the first; the next are calls of C, 0.03 us each, that find any mode.
    if is_dynamo_compiling():
        return torch_operators.attend(call)
    if tracing_state() is not None or count_modes() or has_function_mode():
        return _attend_in_mode(call)
    if (try_known := calls.try_unchecked) is not None and (result := try_known(call)) is not None:
        return result
    return _attend_in_mode(call) if is_transformed() else _attend_or_trace(seam.attend_checked, call)


def _attend_in_mode(call: Arguments) -> Result:
    """The same where some mode or transform of torch's is on, which may have nothing to do with the call."""
    if is_compiling():
        return torch_operators.attend(call)
    if is_transformed():
        names = NAME_OF[call[0]]
        named = {names.get(name, name): value for name, value in zip(FIELDS, call, strict=False)}
        if call[0] != KVCACHE and are_differentiated(named):
            return torch_operators.attend_traced(call)
        return torch_operators.attend_traced(call) if are_wrapped(named) else outside_of_transforms(attend, call)
    if is_traced():
        return torch_operators.attend_traced(call)
    return _attend_or_trace(seam.attend, call)


def _attend_or_trace(attend: Callable[[Arguments], Result], call: Arguments) -> Result:
    try:
        return attend(call)
    except (TracedTensorError, GradientError):  # what no kernel takes and an operator may
        pass
    return torch_operators.attend_traced(call)


def plan(parameters: MetadataParameters) -> Tensor:
    """Scheduler metadata for parameters that nobody has checked."""
    return _taken("get_scheduler_metadata", torch_operators.plan, seam.plan, parameters.arguments(), parameters)


def combine(
    out_partial: Tensor, lse_partial: Tensor, out: Tensor | None, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """`flash_attn_combine` of arguments that nobody has checked."""
    named = {"out_partial": out_partial, "lse_partial": lse_partial, "out": out, "out_dtype": out_dtype}
    return _taken(
        "flash_attn_combine", torch_operators.combine, seam.combine, named, out_partial, lse_partial, out, out_dtype
    )


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """`merge_state` of arguments that nobody has checked."""
    named = {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b}
    return _taken("merge_state", torch_operators.merge, seam.merge, named, out_a, lse_a, out_b, lse_b)


def _taken(
    function: str, traced: Callable[..., T], now: Callable[..., T], named: Mapping[str, object], *arguments: Any
) -> T:
    """The same choice for the other functions, whose tensors are among `named`."""
    if is_compiling():
        return traced(**named)
    if is_transformed():
        if are_wrapped(named):
            return traced(**named)
        made: T = outside_of_transforms(_taken, function, traced, now, named, *arguments)
        return made
    if not is_traced():
        try:
            return now(*arguments)
        except TracedTensorError:
            pass  # a fake tensor outside of its mode
    return traced(**torch_operators.settle(function, named))

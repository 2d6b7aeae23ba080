"""The forward step that runs now: immutable contexts on a stack that gives back what it found.

The stack is a ContextVar, so threads and asyncio tasks each see their own; leaving a step restores the outer one,
whatever happened inside. A step owns its scheduler metadata, which is dropped with it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from jit_kernel.attention.plan import GraphMetadata

_numbers = itertools.count(1)


@dataclass(frozen=True)
class ForwardContext:
    """One forward step of one backend. `made` holds the step's scheduler metadata by key."""

    owner: int
    device: torch.device
    stream: int
    step: int
    graph: GraphMetadata | None
    made: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)


_stack: ContextVar[tuple[ForwardContext, ...]] = ContextVar("jit_kernel_forward_contexts", default=())


def current(owner: int) -> ForwardContext | None:
    """The innermost step that `owner` has open in this thread or task."""
    return next((context for context in reversed(_stack.get()) if context.owner == owner), None)


@contextmanager
def entered(owner: int, device: torch.device, graph: GraphMetadata | None) -> Iterator[ForwardContext]:
    """A new step, the innermost one until the block ends."""
    context = ForwardContext(owner, device, stream_of(device), next(_numbers), graph)
    token = _stack.set((*_stack.get(), context))
    try:
        yield context
    finally:
        _stack.reset(token)


def stream_of(device: torch.device) -> int:
    """The current stream of a device as a number; 0 on the CPU."""
    if device.type == "cuda":
        return int(torch.cuda.current_stream(device).cuda_stream)
    if device.type == "musa":
        return int(torch.musa.current_stream(device).musa_stream)  # type: ignore[attr-defined]
    return 0


def is_capturing(device: torch.device) -> bool:
    """Whether the device's current stream is being captured into a graph."""
    if device.type == "cuda":
        return torch.cuda.is_current_stream_capturing()
    if device.type == "musa":
        return bool(torch.musa.is_current_stream_capturing())  # type: ignore[attr-defined]
    return False

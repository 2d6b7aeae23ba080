"""Counting an integration's calls where torch.compile may trace them: counters.py's lock cannot be traced.

A traced call is counted when it is traced, once; the compiled program counts nothing.
"""

from __future__ import annotations

from typing import Any

import torch

from jit_kernel.engine.progress import warn_once
from jit_kernel.integrations import counters


def served(host: str) -> None:
    """Count a call that jit_kernel serves."""
    if torch.compiler.is_dynamo_compiling():
        _counted_while_traced(host, "")
    else:
        counters.count(host, "served")


def passed_on(host: str, reason: str) -> None:
    """Count a call that goes on to torch, and say so in a warning, once for each reason."""
    if torch.compiler.is_dynamo_compiling():
        _counted_while_traced(host, reason)
    else:
        _count(host, reason)


def _count(host: str, reason: str) -> None:
    counters.count(host, "passed on" if reason else "served", reason)
    if reason:
        warn_once(f"{host}: {reason}: torch's SDPA computes it", (host, reason))


# torch.compile calls it while it traces, and keeps its answer: nothing of it is in the compiled program.
_counted_while_traced: Any = torch.compiler.assume_constant_result(_count)  # type: ignore[no-untyped-call]

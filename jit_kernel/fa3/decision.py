"""What an implementation answers to a call: it serves it, or it does not and says why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Accepted:
    """The implementation serves the call."""


@dataclass(frozen=True)
class Rejected:
    """The implementation does not serve the call, and why.

    `claimed` tells whether it claims every feature that the call uses: where it does, that the next
    implementation takes the call is worth a WARNING; where it does not, the next one is the best.
    """

    reason: str
    claimed: bool = True


Decision = Accepted | Rejected


def refusal(what: str, decisions: Iterable[tuple[str, Decision]]) -> NotImplementedError:
    """The error that says that nothing serves a call, with every candidate and its reason."""
    lines = [f"{name}: {decision.reason}" for name, decision in decisions if isinstance(decision, Rejected)]
    return NotImplementedError("\n  ".join([f"no implementation serves {what}", *lines]))

"""Waiting for something that another process does: as long as it takes, unless it hangs."""

from __future__ import annotations

import time
from collections.abc import Callable

HANG = 300.0  # seconds after which a wait is a hang: no judgement of a slow machine


def wait_for(holds: Callable[[], object]) -> bool:
    """Wait until something holds; False where it hangs."""
    deadline = time.monotonic() + HANG
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True

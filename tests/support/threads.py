"""The same call on several numbers of threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def answers(call: Callable[[], Any], threads: tuple[int, ...] = (1, 2, 5)) -> list[Any]:
    """What the call returns with each number of threads."""
    before, results = torch.get_num_threads(), []
    try:
        for count in threads:
            torch.set_num_threads(count)
            results.append(call())
    finally:
        torch.set_num_threads(before)
    return results

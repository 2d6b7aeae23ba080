"""What a network file system answers now and then, and answers otherwise a moment later."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TypeVar

Answer = TypeVar("Answer")

# A handle whose file another host has replaced, and a file that another host holds open or renames.
_PASSING = (errno.ESTALE, errno.EBUSY)
_ATTEMPTS = 6
_SECONDS = 0.01  # before the second attempt; twice as long before each that follows, 0.31 s in all


def retried(work: Callable[[], Answer]) -> Answer:
    """The answer of `work`, which is asked again where it raises ESTALE or EBUSY; the last of these is raised."""
    for attempt in range(_ATTEMPTS - 1):
        try:
            return work()
        except OSError as error:
            if error.errno not in _PASSING:
                raise
        time.sleep(_SECONDS * 2**attempt)
    return work()

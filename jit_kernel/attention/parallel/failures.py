"""Which rank an exchange failed for: a rank that fails leaves word of the one that it waited for.

A rank that dies takes its neighbours with it, and theirs: everybody would name whoever ended last before him. So who
fails writes the first rank of that chain into the group's store before he raises, and who sees him fail repeats it.
"""

from __future__ import annotations

import time
from typing import Any

import torch.distributed as dist

_KEY = "jit_kernel/context_parallel/rank_{}_waited_for"
_GRACE = 1.0  # seconds in which a rank that timed out beside this one may leave its word


class RankError(RuntimeError):
    """An exchange between ranks did not end. rank: the global rank that died, or came too late."""

    def __init__(self, rank: int, text: str) -> None:
        super().__init__(text)
        self.rank = rank


def failure_of(peer: int, error: BaseException) -> RankError:
    """The error of an exchange with global rank `peer`, which this rank leaves word of."""
    me = dist.get_rank()
    _write(me, peer)  # at once: who waits for this rank looks at its word in a moment
    first = _first_of(peer, me)
    if first != peer:
        _write(me, first)
    text = f"rank {me} got nothing from rank {first} in context parallelism: it died, or it came too late"
    if first != peer:
        text += f"; rank {peer}, which was to send, had waited for it, too"
    told = str(error).partition(". ")[0] or type(error).__name__
    return RankError(first, f"{text} ({told})")


def _first_of(peer: int, me: int) -> int:
    """The end of the chain of words that begins with a rank's; it may still be written."""
    end, seen = time.monotonic() + _GRACE, {me}
    while True:
        word = _read(peer)
        if word is not None and word not in seen:
            seen.add(peer)
            peer = word
        elif word is not None or time.monotonic() >= end:  # a circle, or nobody that it waited for
            return peer
        else:
            time.sleep(0.02)


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _read(rank: int) -> int | None:
    store, key = _store(), _KEY.format(rank)
    try:
        return int(store.get(key)) if store.check([key]) else None
    except RuntimeError:  # DistError: the store went with its rank
        return None


def _write(rank: int, first: int) -> None:
    try:
        _store().set(_KEY.format(rank), str(first))
    except RuntimeError as error:  # DistError: who reads finds nobody, and names this rank
        import logging

        logging.getLogger("jit_kernel").warning("rank %d could not leave word in the group's store: %s", rank, error)

"""How many calls of each host were served, and how many were passed on, with the reason: for this process alone.

`count(host, "served")` and `count(host, "passed on", reason)` are called by an integration, once a call; `read()` and
`clear()` are for whoever wants to know. Threads may do any of it at once; a forked child begins with none.

Under JIT_KERNEL_COUNTERS, the path of a file, a process that has counted a call adds a line of JSON to it when it ends:
`read_file()` reads them. A process that is killed adds none.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal, TypedDict

from jit_kernel import config
from jit_kernel.engine.progress import log

Outcome = Literal["served", "passed on"]


class Counts(TypedDict):
    """Calls of one host: how many were served, and how many passed on by reason."""

    served: int
    passed_on: dict[str, int]


class Ended(TypedDict):
    """A process that ended: its number, its program's path, when (UTC, ISO 8601), and its counts by host."""

    process: int
    program: str
    ended: str
    hosts: dict[str, Counts]


# A lock and a dict hit take 0.15 us. The lock is freed by whoever takes it: nothing that could wait runs under it.
_lock = threading.Lock()
_counts: dict[tuple[str, str, str], int] = {}
_will_be_written = False


def count(host: str, outcome: Outcome, reason: str = "") -> None:
    """Count one call of `host`. `reason`: for "passed on" alone, why; few different ones, they are kept."""
    if outcome not in ("served", "passed on"):
        raise ValueError(f"outcome is {outcome!r}; it must be 'served' or 'passed on'")
    if (outcome == "served") == bool(reason):
        need = "be empty for a call that is served" if reason else "say why the call is passed on"
        raise ValueError(f"reason is {reason!r}; it must {need}")
    key = (host, outcome, reason)
    with _lock:
        before = _counts.get(key, 0)
        _counts[key] = before + 1
    if not before:
        _write_at_the_end()


def read() -> dict[str, Counts]:
    """The counts by host, a copy of them; hosts without a call are missing."""
    with _lock:
        counts = dict(_counts)
    found: dict[str, Counts] = {}
    for (host, outcome, reason), number in sorted(counts.items()):
        of_host = found.setdefault(host, Counts(served=0, passed_on={}))
        if outcome == "served":
            of_host["served"] = number
        else:
            of_host["passed_on"][reason] = number
    return found


def clear() -> None:
    """Forget every count."""
    with _lock:
        _counts.clear()


def read_file(path: Path) -> list[Ended]:
    """What ended processes have added to a file of JIT_KERNEL_COUNTERS, the last one last.

    Raises OSError where the file cannot be read, ValueError with the line that is not one of ours.
    """
    ended: list[Ended] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            entry = json.loads(line)
            hosts = {
                str(host): Counts(served=int(each["served"]), passed_on={**each["passed_on"]})
                for host, each in entry["hosts"].items()
            }
            ended.append(Ended(process=entry["process"], program=entry["program"], ended=entry["ended"], hosts=hosts))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}, line {number} is {line[:80]!r}; it must be counts of one process") from error
    return ended


def total(ended: list[Ended]) -> dict[str, Counts]:
    """The counts of several processes together, by host."""
    found: dict[str, Counts] = {}
    for entry in ended:
        for host, counts in entry["hosts"].items():
            of_host = found.setdefault(host, Counts(served=0, passed_on={}))
            of_host["served"] += counts["served"]
            for reason, number in counts["passed_on"].items():
                of_host["passed_on"][reason] = of_host["passed_on"].get(reason, 0) + number
    return found


def _write_at_the_end() -> None:
    """See to it, once, that the counts are written when the process ends, where the setting asks for it."""
    global _will_be_written
    if _will_be_written:
        return
    _will_be_written = True
    if config.counters_file() is not None:
        # Its finalizers run in children of multiprocessing, too, where atexit's functions do not.
        from multiprocessing import util

        util.Finalize(None, _write, exitpriority=0)


def _write() -> None:
    """Add the counts as one line, by one write: processes that end at once do not mix theirs."""
    path, hosts = config.counters_file(), read()
    if path is None or not hosts:
        return
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    entry = Ended(process=os.getpid(), program=sys.argv[0] if sys.argv else "", ended=now, hosts=hosts)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, (json.dumps(entry) + "\n").encode())
        finally:
            os.close(descriptor)
    except OSError as error:
        log.warning(f"JIT_KERNEL_COUNTERS: the counts are lost, {path} cannot be written: {error}")


def _begin_again() -> None:
    """In a forked child: its parent's counts are not its own, and a lock held at the fork would never be free."""
    global _lock, _will_be_written
    _lock, _will_be_written = threading.Lock(), False
    _counts.clear()


os.register_at_fork(after_in_child=_begin_again)

"""Child processes that make calls: a crash or a hang costs one call, and the parent knows which.

A child writes the index of each call into memory that the parent sees, before it makes the call, and what came of it
afterwards. When a child dies or stands still, the next one goes on behind that call.
"""

from __future__ import annotations

import faulthandler
import json
import mmap
import os
import resource
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_STATE = struct.Struct("q")
_NOTHING = -1
Make = Callable[[int], tuple[str, str, dict[str, Any]]]
MEMORY = 4 << 30  # bytes that a child may address beyond its start; a call that asks for more is refused by torch


@dataclass
class Report:
    """What one call did: a word and a text, and the tail of what the child said before it died."""

    index: int
    what: str
    text: str = ""
    more: dict[str, Any] = field(default_factory=dict)


class Worker:
    """One child over a range of calls. `make(index)` makes one and gives a word, a text and more to report."""

    def __init__(self, make: Make, indices: range, *, limit: float, limited: bool, traces: bool) -> None:
        self.indices, self.limit = indices, limit
        self._make = make
        self._shared = mmap.mmap(-1, _STATE.size)
        self._reports, self._errors = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        self._read, self._ended = 0, False
        self._seen, self._since = _NOTHING, time.monotonic()
        self._set(_NOTHING)
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._child(limited, traces)

    def _set(self, index: int) -> None:
        self._shared[:] = _STATE.pack(index)

    @property
    def at(self) -> int:
        """The call that the child makes now, or made last."""
        return int(_STATE.unpack(self._shared[:])[0])

    def _child(self, limited: bool, traces: bool) -> None:
        status = 70
        try:
            os.dup2(self._errors.fileno(), 2)
            os.dup2(self._errors.fileno(), 1)
            faulthandler.disable()
            if not traces and not _watched():
                signal.signal(signal.SIGSEGV, signal.SIG_DFL)  # tvm-ffi's handler takes a second to say where
            _limit_memory(limited)
            for index in self.indices:
                self._set(index)
                what, text, more = self._make(index)
                os.write(self._reports.fileno(), json.dumps([index, what, text[:2000], more]).encode() + b"\n")
                if more.get("last"):  # what went wrong may have left something behind
                    break
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def reports(self) -> Iterator[Report]:
        """What came in since the last question."""
        size = os.fstat(self._reports.fileno()).st_size
        text = os.pread(self._reports.fileno(), size - self._read, self._read)
        text = text[: text.rfind(b"\n") + 1]
        self._read += len(text)
        for line in text.splitlines():
            yield Report(*json.loads(line))

    def said(self) -> str:
        """The end of the child's output."""
        size = os.fstat(self._errors.fileno()).st_size
        return os.pread(self._errors.fileno(), 12000, max(0, size - 12000)).decode(errors="replace").strip()

    def rest(self) -> range:
        """The calls behind the last one."""
        return range(self.at + 1, self.indices.stop)

    def ended(self) -> Report | bool:
        """False while it works, True when it is through, else the crash or the hang of its last call."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid:
            self._ended = True
            if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
                return True
            if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 70:
                raise RuntimeError(f"the fuzzer itself failed at call {self.at}:\n{self.said()}")
            if os.WIFSIGNALED(status):
                return Report(self.at, "crash", signal.Signals(os.WTERMSIG(status)).name, {"said": self.said()})
            text = f"the process ended with status {os.WEXITSTATUS(status)}"
            return Report(self.at, "crash", text, {"said": self.said()})
        if self.at != self._seen:
            self._seen, self._since = self.at, time.monotonic()
        elif time.monotonic() - self._since > self.limit:
            self.stop()
            return Report(self.at, "hang", f"no answer for {self.limit:.0f} s", {"said": self.said()})
        return False

    def stop(self) -> None:
        """End it."""
        if not self._ended:
            self._ended = True
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


def _watched() -> bool:
    """Whether this is a process of AddressSanitizer's."""
    return "libasan" in os.environ.get("LD_PRELOAD", "")


def _limit_memory(limited: bool) -> None:
    """No core files; and a limit to memory, but under AddressSanitizer and CUDA, which address all there is."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if limited and not _watched():
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        used = pages * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))


def run(
    make: Make, indices: Iterator[range], *, jobs: int, limit: float, until: float | None = None, limited: bool = True,
    traces: bool = False,
) -> Iterator[Report]:  # fmt: skip
    """The reports of all calls of all ranges, `jobs` children at a time, until time.monotonic() is `until`."""
    left: list[range] = []
    workers: list[Worker] = []

    def following() -> range | None:
        if left:
            return left.pop()
        return None if until is not None and time.monotonic() > until else next(indices, None)

    try:
        while True:
            while len(workers) < jobs and (batch := following()) is not None:
                workers.append(Worker(make, batch, limit=limit, limited=limited, traces=traces))
            if not workers:
                return
            time.sleep(0.01)
            for worker in list(workers):
                ended = worker.ended()
                yield from worker.reports()
                if ended is not False:
                    workers.remove(worker)
                    if isinstance(ended, Report):
                        yield ended
                    if worker.rest():
                        left.append(worker.rest())
            if until is not None and time.monotonic() > until:
                return
    finally:
        for worker in workers:
            worker.stop()


def alone(make: Make, index: int, *, limit: float, limited: bool = True) -> Report:
    """One call in a child of its own."""
    return next(iter(run(make, iter([range(index, index + 1)]), jobs=1, limit=limit, limited=limited)))

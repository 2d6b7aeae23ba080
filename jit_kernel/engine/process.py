"""The only file that starts a process: a compiler, asked for its version or at work."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jit_kernel.engine import forks

# The shell runs the program in a process group of its own. Its standard input is one end of a socket whose other end
# only the parent holds. A parent that is killed closes it, and the whole group (cc1plus, as, ld) goes with it. The
# program's status comes back on it: the system gives none where the parent ignores SIGCHLD or a thread reaps every
# child.
_WATCHED = (
    'exec 3<&0 </dev/null; "$@" 3<&- & program=$!; (read -r _ <&3; kill -KILL 0) >/dev/null 2>&1 & watcher=$!; '
    'wait $program; status=$?; echo "$status" >&3; kill -KILL $watcher; exit'
)
# What is kept of a program's output: a compiler that prints 50 MB says what is wrong at the start or at the end.
KEPT_BYTES = 1 << 20
_SECONDS_TO_END = 5.0
# The system may give a Ctrl-C to another thread; Python acts on it once this one wakes.
_WAKE_SECONDS = 1.0


class TooSlowError(RuntimeError):
    """A program did not end in its time."""


@dataclass(frozen=True)
class Ended:
    """How a program ended: its status, None where it was killed with the shell around it; what it printed; and the
    most memory that it held at once, 0 where the system does not say."""

    status: int | None
    output: str
    errors: str = ""
    peak_bytes: int = 0

    @property
    def killed_by(self) -> str:
        """The name of the signal that ended it, "" for none. A shell reports signal n as status 128 + n."""
        number = signal.SIGKILL if self.status is None else self.status - 128
        with contextlib.suppress(ValueError):
            return signal.Signals(number).name
        return ""


def run(
    command: Sequence[str],
    *,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    log: Path | None = None,
    kept_bytes: int = KEPT_BYTES,
    seconds: float | None = None,
    slow: tuple[float, Callable[[], None]] | None = None,
) -> Ended:
    """Run a program in `folder` to its end; it is ended when this process is, however that ends.

    With `log`, both its outputs stand in `output` in their order, and in that file. Of each output `kept_bytes` are
    kept. `slow` is called once where the program still runs after so many seconds. Raises OSError where no process can
    be started, TooSlowError after `seconds`.
    """
    with forks.postponed():
        ours, theirs = socket.socketpair()
        held = forks.Descriptor(ours.detach)
        try:
            with theirs:
                process = subprocess.Popen(
                    ["/bin/sh", "-c", _WATCHED, "sh", *command],
                    cwd=folder,
                    stdin=theirs.fileno(),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE if log is None else subprocess.STDOUT,
                    start_new_session=True,
                    env=environment,
                    umask=0o077,
                )
        except BaseException:
            held.close()
            raise
    try:
        with process.stdout or contextlib.nullcontext(), process.stderr or contextlib.nullcontext():
            outputs = {each.fileno(): _Kept(kept_bytes) for each in (process.stdout, process.stderr) if each}
            answer = _Kept(64)
            try:
                _read(held.number, answer, outputs, seconds, slow)
            finally:
                held.close()
                if not answer.head:
                    _read_rest(outputs)
                peak = _reap(process)
    finally:
        held.close()
    output, errors = [*(each.text() for each in outputs.values()), ""][:2]
    if log is not None:
        log.write_text(output, encoding="utf-8")
    status = answer.text().strip()
    return Ended(int(status) if status else None, output, errors, peak)


class _Kept:
    """The first and the last bytes of an output, half of the limit each."""

    def __init__(self, limit: int) -> None:
        self.head, self._tail, self._half, self._dropped = bytearray(), bytearray(), limit // 2, 0

    def add(self, data: bytes) -> None:
        room = self._half - len(self.head)
        self.head += data[:room]
        self._tail += data[room:]
        if len(self._tail) > 2 * self._half:
            self._dropped += len(self._tail) - self._half
            del self._tail[: -self._half]

    def text(self) -> str:
        middle = f"\n[{self._dropped} bytes are left out here]\n".encode() if self._dropped else b""
        return bytes(self.head + middle + self._tail).decode(errors="replace")


def _ready(numbers: set[int], until: float | None) -> Iterator[int]:
    """The descriptors that can be read, as they can; ends with `until` or where all were taken out of `numbers`."""
    with selectors.DefaultSelector() as selector:
        for number in numbers:
            selector.register(number, selectors.EVENT_READ)
        while selector.get_map():
            left = _WAKE_SECONDS if until is None else max(0.0, until - time.monotonic())
            for key, _ in selector.select(min(left, _WAKE_SECONDS)):
                yield key.fd
                if key.fd not in numbers:
                    selector.unregister(key.fd)
            if left == 0.0:
                return


def _read(
    control: int,
    answer: _Kept,
    outputs: dict[int, _Kept],
    seconds: float | None,
    slow: tuple[float, Callable[[], None]] | None,
) -> None:
    """Read outputs until the status is there: a process that the program left behind may hold them open for ever."""
    started = time.monotonic()
    open_ones = {control, *outputs}
    stages = sorted({limit for limit in (seconds, slow[0] if slow else None) if limit is not None})
    for stage in [*stages, None]:
        for number in _ready(open_ones, None if stage is None else started + stage):
            data = os.read(number, 1 << 16)
            if number == control:
                answer.add(data)
                if not data or answer.head.endswith(b"\n"):
                    _read_rest(outputs, 0.0)
                    return
            elif data:
                outputs[number].add(data)
            else:
                open_ones.discard(number)
                if open_ones == {control}:  # the shell is gone, with a word or without one
                    for _ in _ready({control}, started):
                        answer.add(os.read(control, 64))
                    return
        if slow and stage == slow[0]:
            slow[1]()
        if seconds is not None and stage == seconds:
            raise TooSlowError(f"no end after {seconds:.0f} s")


def _read_rest(outputs: dict[int, _Kept], seconds: float = _SECONDS_TO_END) -> None:
    """Read what is there; with time, until the outputs are closed: the processes that held them are gone then."""
    open_ones = set(outputs)
    for number in _ready(open_ones, time.monotonic() + seconds):
        data = os.read(number, 1 << 16)
        outputs[number].add(data)
        if not data:
            open_ones.discard(number)


def _reap(process: subprocess.Popen[bytes]) -> int:
    """Take the shell's end from the system, if it was left to us; answers with the most memory held."""
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except ChildProcessError:
        process.returncode = 0
        return 0
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)

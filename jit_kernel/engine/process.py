"""The only file that starts a process: a compiler, asked for its version or at work."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# The shell runs the compiler in a process group of its own and reads a pipe whose other end only the
# parent holds: a parent that is killed closes it, and the whole group (cc1plus, as, ld) goes with it.
_WATCHED = (
    'exec 3<&0; "$@" </dev/null 3<&- & compiler=$!; (read -r _ <&3; kill -KILL 0) & watcher=$!; '
    "wait $compiler; status=$?; kill -KILL $watcher; exit $status"
)


@dataclass(frozen=True)
class Ended:
    """How a program ended: its status, what it printed and, of `run_watched`, the most memory that it held at once."""

    status: int
    output: str
    errors: str = ""
    peak_bytes: int = 0


def run(
    command: Sequence[str], *, text: str | None = None, environment: Mapping[str, str] | None = None, seconds: float
) -> Ended:
    """Run a program to its end with `text` on its standard input.

    Raises OSError where it cannot be started, subprocess.TimeoutExpired after `seconds`.
    """
    done = subprocess.run(
        command, input=text, env=environment, capture_output=True, text=True, timeout=seconds, check=False
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def run_watched(command: Sequence[str], folder: Path, log: Path, environment: Mapping[str, str]) -> Ended:
    """Run a program in `folder`, its output in the file `log`; it ends when this process does, however that ends."""
    read_end, write_end = os.pipe()
    with os.fdopen(write_end, "wb"):
        with os.fdopen(read_end, "rb") as watched, log.open("wb") as output:
            process = subprocess.Popen(
                ["/bin/sh", "-c", _WATCHED, "sh", *command],
                cwd=folder,
                stdin=watched,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env=environment,
            )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    unit = 1 if sys.platform == "darwin" else 1024
    printed = log.read_text(encoding="utf-8", errors="replace")
    return Ended(process.returncode, printed, peak_bytes=usage.ru_maxrss * unit)

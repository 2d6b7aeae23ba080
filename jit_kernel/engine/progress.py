"""What the engine prints and logs: lines while a compiler runs or another process is waited for, and warnings."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Iterator

from jit_kernel import config
from jit_kernel.engine.forks import Lock

log = logging.getLogger("jit_kernel")

_INTERVAL = 0.2
_line_taken = Lock()
_silenced = 0  # how many blocks want no lines
_warned: set[object] = set()
_warned_guard = Lock()


def warn_once(text: str, key: object = None) -> None:
    """Log a warning, once a process for each `key` (any value that hashes); without one, for each text."""
    with _warned_guard:
        if (text if key is None else key) in _warned:
            return
        _warned.add(text if key is None else key)
    log.warning(text)


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Print no progress lines inside this block: the caller prints its own."""
    global _silenced
    _silenced += 1
    try:
        yield
    finally:
        _silenced -= 1


def say(text: str, level: str = "info") -> None:
    """Print one line on standard error, if JIT_KERNEL_LOG lets this level through."""
    if not _silenced and config.LOG_LEVELS.index(config.log_level()) >= config.LOG_LEVELS.index(level):
        write(f"jit_kernel: {text}\n")


def write(text: str) -> None:
    """Write on standard error, where there is one that takes it: a daemon may have none, or a closed one."""
    stream = sys.stderr
    if stream is not None:
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.write(text)
            stream.flush()


def on_terminal() -> bool:
    """Whether standard error is a terminal. What a program puts in its place may not know."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        return sys.stderr.isatty()
    return False


@contextlib.contextmanager
def compiling(title: str, last_seconds: float | None) -> Iterator[None]:
    """Show that `title` is being compiled: a running clock on a terminal, two plain lines elsewhere."""
    before = f", last time {last_seconds:.1f} s" if last_seconds is not None else ""
    started = time.monotonic()
    shown = config.log_level() != "quiet" and not _silenced and on_terminal()
    if not (shown and _line_taken.acquire(blocking=False)):
        say(f"compiling {title}{before}")
        yield
        say(f"compiled {title} in {time.monotonic() - started:.1f} s")
        return
    done = threading.Event()

    def run() -> None:
        while not done.wait(_INTERVAL):
            write(f"\r\033[Kjit_kernel: compiling {title} {time.monotonic() - started:5.1f} s{before}")

    clock = threading.Thread(target=run, daemon=True)
    clock.start()
    try:
        yield
        last = f"jit_kernel: compiled {title} in {time.monotonic() - started:.1f} s\n"
    except BaseException:
        last = ""
        raise
    finally:
        done.set()
        clock.join()
        write(f"\r\033[K{last}")
        _line_taken.release()

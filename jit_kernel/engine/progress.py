"""What the engine prints and logs: lines while a compiler runs or another process is waited for, and warnings."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Iterator

from jit_kernel import config

log = logging.getLogger("jit_kernel")

_INTERVAL = 0.2
_line_taken = threading.Lock()
_silenced = threading.Event()
_warned: set[object] = set()
_warned_guard = threading.Lock()


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
    _silenced.set()
    try:
        yield
    finally:
        _silenced.clear()


def say(text: str, level: str = "info") -> None:
    """Print one line on standard error, if JIT_KERNEL_LOG lets this level through."""
    if not _silenced.is_set() and config.LOG_LEVELS.index(config.log_level()) >= config.LOG_LEVELS.index(level):
        print(f"jit_kernel: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def compiling(title: str, last_seconds: float | None) -> Iterator[None]:
    """Show that `title` is being compiled: a running clock on a terminal, two plain lines elsewhere."""
    before = f", last time {last_seconds:.1f} s" if last_seconds is not None else ""
    started = time.monotonic()
    on_terminal = sys.stderr.isatty() and config.log_level() != "quiet" and not _silenced.is_set()
    if not (on_terminal and _line_taken.acquire(blocking=False)):
        say(f"compiling {title}{before}")
        yield
        say(f"compiled {title} in {time.monotonic() - started:.1f} s")
        return
    done = threading.Event()

    def run() -> None:
        while not done.wait(_INTERVAL):
            seconds = time.monotonic() - started
            sys.stderr.write(f"\r\033[Kjit_kernel: compiling {title} {seconds:5.1f} s{before}")
            sys.stderr.flush()

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
        sys.stderr.write(f"\r\033[K{last}")
        sys.stderr.flush()
        _line_taken.release()

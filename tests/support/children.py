"""Fresh processes for tests of the loader: forked from a server that has torch imported, so that a process
costs milliseconds, and each with its own environment, its own standard error and its warnings collected."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "tvm_ffi", "jit_kernel.flash_attention_v3"])


@dataclass
class Outcome:
    """What a child did: its result or the name and text of what it raised, and what it said."""

    result: Any = None
    error: str = ""
    message: str = ""
    warnings: list[str] = field(default_factory=list)
    stderr: str = ""


class Child:
    """A process that runs `work(*arguments)` under `environment` (None removes a variable)."""

    def __init__(
        self, work: Callable[..., Any], *arguments: Any, environment: dict[str, str | None], scratch: Path
    ) -> None:
        self._stderr = scratch / f"stderr-{os.urandom(4).hex()}"
        self._receiver, sender = CONTEXT.Pipe(duplex=False)
        self.process = CONTEXT.Process(
            target=_main, args=(work, arguments, environment, str(self._stderr), sender), daemon=True
        )
        self.process.start()
        sender.close()

    def kill(self) -> None:
        """End it with SIGKILL."""
        self.process.kill()
        self.process.join()

    def outcome(self, timeout: float = 600) -> Outcome:
        """Wait for its end and tell what it did."""
        if not self._receiver.poll(timeout):
            self.kill()
            raise TimeoutError(f"the child said nothing for {timeout} s; its standard error: {self.stderr()}")
        outcome: Outcome = self._receiver.recv()
        self.process.join(timeout)
        outcome.stderr = self.stderr()
        return outcome

    def stderr(self) -> str:
        """What it wrote to standard error so far."""
        return self._stderr.read_text(encoding="utf-8") if self._stderr.exists() else ""


def run(work: Callable[..., Any], *arguments: Any, environment: dict[str, str | None], scratch: Path) -> Outcome:
    """Run `work` in a child to its end."""
    return Child(work, *arguments, environment=environment, scratch=scratch).outcome()


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def _main(
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
    environment: dict[str, str | None],
    stderr: str,
    sender: Connection,
) -> None:
    # A shell starts what runs in its background with Ctrl-C ignored, and children inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    descriptor = os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(descriptor, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    for key in [key for key in os.environ if key.startswith("JIT_KERNEL_")]:
        del os.environ[key]
    for key, value in environment.items():
        if value is None:
            os.environ.pop(key, None)
        else:
            os.environ[key] = value
    from jit_kernel import config

    config.reload()
    collector = _Collector()
    logging.getLogger("jit_kernel").addHandler(collector)
    outcome = Outcome(warnings=collector.messages)
    try:
        outcome.result = work(*arguments)
    except Exception as error:
        outcome.error, outcome.message = type(error).__name__, str(error)
    sender.send(outcome)
    sender.close()

"""The processes of the store campaign: forked callers of every kind, and what each answered."""

from __future__ import annotations

import faulthandler
import functools
import json
import logging
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jit_kernel import config
from tests.fuzz import store_faults as faults
from tests.support import tiny

CLEAR = {"CacheError", "CompileError", "CompilerNotFoundError", "PackError", "SealedError"}
HANG = 120.0  # seconds after which a call hangs


class Caller:
    """A forked process that runs `work`; its answer, or the name and text of what it raised."""

    def __init__(self, work: Callable[[], Any], title: str, notes: Path, **environment: str) -> None:
        self.title, self.meant_to_die = title, False
        self.notes = notes / f"{title}-{os.urandom(4).hex()}"
        self._reading, writing = os.pipe()
        # An interrupt in the child before its own try would run the campaign's end in it, which removes every folder.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        self.process = os.fork()
        if self.process == 0:
            os.close(self._reading)
            self._answer(work, writing, environment)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        os.close(writing)

    def _answer(self, work: Callable[[], Any], writing: int, environment: dict[str, str]) -> None:
        """In the child, which never returns."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            descriptor = os.open(self.notes, os.O_WRONLY | os.O_CREAT, 0o644)
            os.dup2(descriptor, 2)
            sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
            faulthandler.enable(sys.stderr)
            faulthandler.dump_traceback_later(HANG * 0.9, file=sys.stderr)
            os.environ.update(environment)
            tempfile.tempdir = None  # the parent's choice
            config.reload()
            answer: Any = ["", work()]
        except BaseException as error:
            answer = [type(error).__name__, str(error)]
            if type(error).__name__ not in CLEAR:
                logging.getLogger("campaign").exception("unexpected")
        os.write(writing, json.dumps(answer).encode())
        os._exit(0)

    def answer(self) -> tuple[str, Any]:
        """What it answered: ("", result), (name of an error, text), or ("died", signal) or ("hangs", notes)."""
        data, until = b"", time.monotonic() + HANG
        while select.select([self._reading], [], [], max(0.0, until - time.monotonic()))[0]:
            part = os.read(self._reading, 1 << 16)
            if not part:
                break
            data += part
        else:
            os.kill(self.process, signal.SIGKILL)
        os.close(self._reading)
        _, status = os.waitpid(self.process, 0)
        if time.monotonic() > until:
            return "hangs", self.notes.read_text()[-4000:]
        if not data:
            return "died", os.waitstatus_to_exitcode(status)
        error, result = json.loads(data)
        return error, result

    def kill(self, number: int) -> None:
        """Send it a signal."""
        self.meant_to_die = True
        os.kill(self.process, number)


# -- what a process may be like ------------------------------------------------------------------------


def plain(factor: int) -> Any:
    return tiny.call(factor)


def stranger(factor: int) -> Any:
    return tiny.as_user(faults.STRANGER, functools.partial(tiny.call, factor))


def any_umask(factor: int) -> Any:
    return tiny.with_umask(
        random.Random(os.getpid()).choice([0o000, 0o002, 0o077]), functools.partial(tiny.call, factor)
    )


def container(factor: int) -> Any:
    return _inner(tiny.in_container(functools.partial(tiny.call, factor)), factor)


def ignoring(factor: int) -> Any:
    return tiny.with_children_ignored(functools.partial(tiny.call, factor))


def reaping(factor: int) -> Any:
    return tiny.beside_a_reaper(functools.partial(tiny.call, factor))


def limited(factor: int) -> Any:
    """No file may be longer than some bytes: as on a full disk."""
    size = random.Random(os.getpid()).choice([100, 3000, 8000])
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    return tiny.call(factor)


def forking(factor: int) -> Any:
    """A child forked while a thread calls; both must be right."""
    thread = threading.Thread(target=_quiet, args=(factor,))
    thread.start()
    time.sleep(random.Random(os.getpid()).random() * 0.1)
    answer = _inner(tiny.forked(functools.partial(tiny.call, factor)), factor)
    thread.join()
    return answer


def disk(noexec: bool, factor: int) -> Any:
    """A store on a file system of its own: too small, then large enough; or noexec."""
    folder = tempfile.mkdtemp(prefix="disk-")
    size = "16m" if noexec else f"{random.Random(os.getpid()).choice([8, 16, 40])}k"

    def twice() -> Any:
        os.environ["JIT_KERNEL_CACHE_DIR"] = folder
        config.reload()
        return tiny.call(factor)

    try:
        answer = tiny.mounted(folder, f"size={size},mode=700", noexec, twice)
        return tiny.call(factor) if isinstance(answer, str) else answer
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sealed(factor: int) -> Any:
    """A process that compiles nothing: it answers, or says what it lacks."""
    _with(JIT_KERNEL_SEALED="1")
    answer = tiny.call(factor)
    return {**answer, "right": answer["right"] and answer["compiled"] == 0}


def layered(factor: int) -> Any:
    """The store is the layer of another one, in which what it lacks is compiled."""
    store = config.cache_dir()
    _with(JIT_KERNEL_CACHE_LAYERS=str(store), JIT_KERNEL_CACHE_DIR=f"{store.parents[1]}/own-{os.getpid()}")
    return tiny.call(factor)


def bounded(factor: int) -> Any:
    """A store that has room for one entry, and a profile that many write."""
    _with(JIT_KERNEL_CACHE_LIMIT="1", JIT_KERNEL_RECORD=f"{config.cache_dir().parents[1]}/profile")
    return tiny.call(factor)


def _with(**environment: str) -> None:
    os.environ.update(environment)
    config.reload()


def _quiet(factor: int) -> None:
    try:
        tiny.call(factor)
    except RuntimeError as error:
        if type(error).__name__ not in CLEAR:
            raise


def _inner(answer: Any, factor: int) -> Any:
    """A grandchild's answer: what it raised is raised here."""
    if not isinstance(answer, str):
        return answer
    name, _, text = answer.partition(": ")
    if name in CLEAR:
        raise type(name, (RuntimeError,), {})(text)
    return tiny.call(factor) if "unshare" in answer else answer


USUAL = (plain, any_umask, ignoring, reaping, forking, sealed, layered, bounded)
AS_ROOT = (stranger, container, functools.partial(disk, True), functools.partial(disk, False))

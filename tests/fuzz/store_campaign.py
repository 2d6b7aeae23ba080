"""Faults against the store, seeded: `python -m tests.fuzz.store_campaign --seconds 900 --seed 1 --processes 8`.

A round is a store, some processes that call kernels (as root and as another user, in containers, with forks, limits
and compilers of all kinds), and faults that fall among them. Judged: an answered call is right; a failed one raised one
of the package's clear errors; nothing hangs, and nothing dies but what was killed; and when the faults are over, every
kernel answers again. The last line is one JSON object with the counts; a failure names its round, which --first N
--rounds 1 repeats with the same choices.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import functools
import importlib
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
from tests.support.compilers import counting_compiler

CLEAR = {"CacheError", "CompileError", "CompilerNotFoundError"}
FACTORS = (2, 3, 5, 7, 11)
HANG = 120.0  # seconds after which a call hangs
_IMPORTED_LATE = ("tvm_ffi.libinfo", "platformdirs", "jit_kernel.commands.cache", "concurrent.futures.thread")


class Caller:
    """A forked process that runs `work`; its answer, or the name and text of what it raised."""

    def __init__(self, work: Callable[[], Any], title: str, notes: Path, **environment: str) -> None:
        self.title, self.meant_to_die = title, False
        self.notes = notes / f"{title}-{os.urandom(4).hex()}"
        self._reading, writing = os.pipe()
        self.process = os.fork()
        if self.process == 0:
            os.close(self._reading)
            self._answer(work, writing, environment)
        os.close(writing)

    def _answer(self, work: Callable[[], Any], writing: int, environment: dict[str, str]) -> None:
        """In the child, which never returns."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            descriptor = os.open(self.notes, os.O_WRONLY | os.O_CREAT, 0o644)
            os.dup2(descriptor, 2)
            sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
            faulthandler.enable(sys.stderr)
            faulthandler.dump_traceback_later(HANG * 0.9, file=sys.stderr)
            os.environ.update(environment)
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
    return tiny.with_umask(random.Random(os.getpid()).choice([0o000, 0o002, 0o077]), functools.partial(tiny.call, factor))


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


USUAL = (plain, any_umask, ignoring, reaping, forking)
AS_ROOT = (stranger, container, functools.partial(disk, True), functools.partial(disk, False))
COMPILERS = ("exit 0", "exit 1", "kill -SEGV $$", ": > kernel.so", "echo 'int x;' > unit.cpp", "sleep 0.2", "")


class Campaign:
    """The rounds of one seed, what they counted, and what went wrong."""

    def __init__(self, seed: int, processes: int) -> None:
        self.seed, self.processes = seed, processes
        self.counts: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []
        self.folder = Path(tempfile.mkdtemp(prefix="jit_kernel-campaign-"))
        self.folder.chmod(0o755)
        self.kinds = (*USUAL, limited, *(AS_ROOT if os.geteuid() == 0 else ()))
        for name in _IMPORTED_LATE:  # another user may not be able to read the interpreter's modules
            importlib.import_module(name)

    def round(self, number: int) -> None:
        """One store, its callers and its faults."""
        chance = random.Random(f"{self.seed}:{number}")
        place = self.folder / str(number)
        (place / "notes").mkdir(parents=True, mode=0o755)
        store = place / "above" / "store"
        self.where = f"round {number} of seed {self.seed}"
        environment = {"JIT_KERNEL_CACHE_DIR": str(store), "TMPDIR": "/tmp", "CXX": self._compiler(place, chance)}
        for factor in chance.sample(FACTORS, chance.randrange(4)):  # what is stored before
            self._judge(Caller(functools.partial(plain, factor), "before", place, **environment | {"CXX": ""}))
        callers = [self._caller(place, chance, environment) for _ in range(chance.randint(1, self.processes))]
        opened = False
        for _ in range(chance.randint(2, 10)):
            time.sleep(chance.random() * 0.06)
            opened |= self._fault(store, place, chance, callers)
        for caller in callers:
            self._judge(caller)
        if os.geteuid() == 0 and not opened and store.exists():
            self._judge(Caller(lambda: {"right": faults.intrude(store, chance)}, "intruder", place))
        faults.repair(store)
        for factor in FACTORS[: chance.randint(1, 3)]:
            after = Caller(functools.partial(plain, factor), "after", place, **environment | {"CXX": ""})
            self._judge(after, must_answer=True)
        shutil.rmtree(place, ignore_errors=True)

    def _compiler(self, place: Path, chance: random.Random) -> str:
        """Mostly the real one; else one that fails, makes nothing, or takes its time."""
        if chance.random() < 0.6:
            return ""
        self.counts["fault: compiler"] += 1
        doing = chance.choice(COMPILERS)
        script, _ = counting_compiler(place / "bin", before=f'case "$*" in *unit.cpp*) {doing or ":"};; esac', version="one")
        return script

    def _caller(self, place: Path, chance: random.Random, environment: dict[str, str]) -> Caller:
        kind = plain if chance.random() < 0.4 else chance.choice(self.kinds)
        factor = chance.choice(FACTORS)
        if kind is not plain:
            self.counts[f"fault: {getattr(kind, '__name__', 'disk')}"] += 1
        return Caller(functools.partial(kind, factor), getattr(kind, "__name__", "disk"), place, **environment)

    def _fault(self, store: Path, place: Path, chance: random.Random, callers: list[Caller]) -> bool:
        """Let one fall; answers with whether it may have let others write, or hidden something."""
        if chance.random() < 0.3:
            caller, number = chance.choice(callers), chance.choice([signal.SIGKILL, signal.SIGINT])
            caller.kill(number)
            self.counts[f"fault: {signal.Signals(number).name}"] += 1
            return False
        fault = chance.choice(faults.FAULTS)
        inner = random.Random(chance.random())

        def attempt() -> dict[str, bool]:
            try:
                return {"right": True, "done": fault(store, inner)}
            except OSError:  # it was gone already
                return {"right": True, "done": False}

        error, result = Caller(attempt, fault.__name__, place, JIT_KERNEL_CACHE_DIR=str(store)).answer()
        if error and error not in CLEAR:
            self.wrong.append(f"{self.where}: the fault {fault.__name__} itself: {error}: {result}")
        self.counts[f"fault: {fault.__name__}"] += not error and result["done"]
        return fault not in faults.HARMLESS_MODES

    def _judge(self, caller: Caller, *, must_answer: bool = False) -> None:
        error, result = caller.answer()
        right = not error and isinstance(result, dict) and result["right"]
        excused = caller.meant_to_die and (error == "KeyboardInterrupt" or result in (-signal.SIGKILL, -signal.SIGINT))
        self.counts["calls"] += 1
        self.counts["answered" if right else f"error: {error}"] += 1
        if not right and (must_answer or not (error in CLEAR or excused)):
            notes = caller.notes.read_text()[-3000:] if caller.notes.exists() else ""
            self.wrong.append(f"{self.where}: {caller.title}: {error or 'wrong'}: {result}\n{notes}")

    def summary(self) -> dict[str, Any]:
        """The counts; faults are all that were counted as one."""
        total = sum(count for name, count in self.counts.items() if name.startswith("fault: "))
        return {"seed": self.seed, "faults": total, **dict(sorted(self.counts.items())), "wrong": len(self.wrong)}


def main(argv: list[str] | None = None) -> int:
    """Run rounds for so many seconds, or so many rounds; 1 where something went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=8, help="callers of a round, at most")
    parser.add_argument("--rounds", type=int, default=10**9)
    parser.add_argument("--first", type=int, default=0, help="the number of the first round")
    options = parser.parse_args(argv)
    campaign = Campaign(options.seed, options.processes)
    until = time.monotonic() + options.seconds
    number = options.first
    try:
        while number < options.first + options.rounds and time.monotonic() < until:
            campaign.round(number)
            number += 1
    finally:
        shutil.rmtree(campaign.folder, ignore_errors=True)
    for text in campaign.wrong:
        print(text, file=sys.stderr)
    print(json.dumps({"rounds": number - options.first, **campaign.summary()}))
    return 1 if campaign.wrong else 0


if __name__ == "__main__":
    sys.exit(main())

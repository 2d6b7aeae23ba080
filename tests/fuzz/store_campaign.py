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
import functools
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.fuzz import store_faults as faults
from tests.fuzz.store_callers import AS_ROOT, CLEAR, USUAL, Caller, limited, plain
from tests.support.compilers import counting_compiler

FACTORS = (2, 3, 5, 7, 11)
_IMPORTED_LATE = (
    "tvm_ffi.libinfo",
    "platformdirs",
    "filelock",
    "jit_kernel.commands.cache",
    "jit_kernel.engine.unpack",
    "concurrent.futures.thread",
)
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
        (place / "tmp").mkdir()
        (place / "tmp").chmod(0o1777)
        store = place / "above" / "store"
        self.where = f"round {number} of seed {self.seed}"
        environment = {
            "JIT_KERNEL_CACHE_DIR": str(store),
            "TMPDIR": str(place / "tmp"),
            "CXX": self._compiler(place, chance),
        }
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
        script, _ = counting_compiler(
            place / "bin", before=f'case "$*" in *unit.cpp*) {doing or ":"};; esac', version="one"
        )
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
        steps = {"faults": total, "steps": total + self.counts["calls"]}
        return {"seed": self.seed, **steps, **dict(sorted(self.counts.items())), "wrong": len(self.wrong)}


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

"""Worker processes of several checkouts that measure in turns, and the ratios of what they measured.

What else a machine does drifts, and where a process lies in memory stays while it lives: a decode of the same code took
up to 16 % longer in one process than in another. So workers measure right after each other, in an order that changes
with every turn, and fresh processes start in an order that changes too; a ratio is the mean over processes of the
median over their turns.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
Rounds = dict[str, list[list[dict[str, float]]]]  # by checkout, process and round: what was measured, by case


class Measured(NamedTuple):
    """Checkouts by name, and what their workers are asked with."""

    checkouts: dict[str, Path]
    stores: Path
    program: Path
    arguments: tuple[str, ...]


def environment_of(checkout: Path, store: Path) -> dict[str, str]:
    """The environment of a child that finds the package in a checkout and keeps its kernels in a store.

    Bytecode is kept beside the store, whatever the environment says of it: users have it from the second process on.
    """
    others = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {
        **others,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(checkout), os.environ.get("PYTHONPATH")])),
        "JIT_KERNEL_CACHE_DIR": str(store / "kernels"),
        "PYTHONPYCACHEPREFIX": str(store / "bytecode"),
        "JIT_KERNEL_LOG": "quiet",
        "CUDA_CACHE_DISABLE": "1",  # a cold call is cold in the driver as well
    }


class Worker:
    """A process that measures whenever it is asked to. `questions` are what it can be asked."""

    def __init__(self, checkout: Path, store: Path, program: Path, arguments: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(program), "calls", *arguments],
            env=environment_of(checkout, store),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        greeting = json.loads(self._line())
        require_package(greeting, checkout)
        self.questions: list[str] = greeting["questions"]

    def _line(self) -> str:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker ended with status {self._process.wait()}")
        return line

    def ask(self, question: str) -> dict[str, float]:
        """Medians in microseconds by case, measured now."""
        assert self._process.stdin
        self._process.stdin.write(f"{question}\n")
        self._process.stdin.flush()
        return json.loads(self._line())

    def end(self) -> None:
        """Let the process end."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def require_package(answer: dict[str, Any], checkout: Path) -> None:
    """Refuse figures of a package from elsewhere."""
    if not Path(answer["package"]).is_relative_to(checkout):
        raise RuntimeError(f"jit_kernel was imported from {answer['package']}, not from {checkout}")


@contextlib.contextmanager
def workers(measured: Measured, order: Sequence[str]) -> Iterator[dict[str, Worker]]:
    """A worker of each checkout, started in this order. Names of the same folder share a store."""
    started: dict[str, Worker] = {}
    with contextlib.ExitStack() as ends:
        for name in order:
            folder = measured.checkouts[name]
            first = next(other for other, each in measured.checkouts.items() if each == folder)
            started[name] = Worker(folder, measured.stores / first, measured.program, measured.arguments)
            ends.callback(started[name].end)
        yield started


def orders(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Every order of the names, each followed by its reverse."""
    forward = [order for order in itertools.permutations(names) if names.index(order[0]) <= names.index(order[-1])]
    return [order for each in forward for order in dict.fromkeys((each, each[::-1]))]


def turns(measured: Measured, processes: int, count: int) -> Rounds:
    """What every checkout's worker answers in `count` turns, in each of so many fresh processes."""
    found: Rounds = {name: [] for name in measured.checkouts}
    every = orders(list(measured.checkouts))
    for process in range(processes):
        for of_name in found.values():
            of_name.append([{} for _ in range(count)])
        with workers(measured, every[process % len(every)]) as started:
            for question in next(iter(started.values())).questions:
                for turn in range(count + 1):
                    for name in every[turn % len(every)]:
                        answer = started[name].ask(question)
                        if turn:  # the first one warms up
                            found[name][-1][turn - 1].update(answer)
    return found


def ratios(rounds: Rounds, name: str, other: str, case: str) -> list[float]:
    """By process: the median over its turns of the time of `name` over that of `other`."""
    return [
        statistics.median(mine[case] / theirs[case] for mine, theirs in zip(*process, strict=True))
        for process in zip(rounds[name], rounds[other], strict=True)
    ]


def lines_of(rounds: Rounds, unit: str, scale: float) -> list[dict[str, Any]]:
    """One line a case: the median, that of torch's SDPA, that of the checkout before and the ratio to it.

    Where the checkout before was measured twice ("again"), also the ratios of it to itself.
    """
    flat = {name: list(itertools.chain.from_iterable(processes)) for name, processes in rounds.items()}
    lines = []
    for case in flat["this"][0]:
        if case.endswith(", torch SDPA"):
            continue
        mine = [measured[case] * scale for measured in flat["this"]]
        line: dict[str, Any] = {"case": case, "unit": unit, "rounds": len(mine), "ours": statistics.median(mine)}
        line["ours_least"], line["ours_most"] = min(mine), max(mine)
        peer = f"{case}, torch SDPA"
        if peer in flat["this"][0]:
            line["torch_sdpa"] = statistics.median(measured[peer] * scale for measured in flat["this"])
        if "before" in rounds:
            line["before"] = statistics.median(measured[case] * scale for measured in flat["before"])
            line["over_before"] = statistics.geometric_mean(ratios(rounds, "this", "before", case))
        if "again" in rounds:
            same = ratios(rounds, "again", "before", case)
            line["same_code"], line["same_least"], line["same_most"] = (
                statistics.geometric_mean(same),
                min(same),
                max(same),
            )
        lines.append({name: round(x, 4) if isinstance(x, float) else x for name, x in line.items()})
    return lines


def show(line: dict[str, Any]) -> None:
    """One row of the table."""
    text = (
        f"{line['case']:34s} {line['ours']:9.2f} {line['unit']} ({line['ours_least']:.2f} to {line['ours_most']:.2f})"
    )
    if "torch_sdpa" in line:
        text += f"; torch SDPA {line['torch_sdpa']:.2f} {line['unit']}"
    if "before" in line:
        text += f"; before {line['before']:.2f} {line['unit']}, {line['over_before']:.3f} times as long now"
    if "same_code" in line:
        text += f"; the same code {line['same_code']:.3f} ({line['same_least']:.3f} to {line['same_most']:.3f})"
    print(text, flush=True)

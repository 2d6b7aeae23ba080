"""What a call costs before any arithmetic: smallest calls, imports, first calls; on a CPU or a GPU.

usage: python benchmarks/overhead.py [--device cpu|cuda] [--before FOLDER] [--processes 3] [--rounds 7] [--dry-run]

Smallest calls take turns with torch's SDPA on tensors of the same shapes: medians of rounds, each the median of its
calls, in microseconds from Python to return. Imports and first calls are medians over fresh processes: cold with an
empty store, warm with what the cold call left there. `--before` measures another checkout as well, in processes of its
own that take turns with this one's round by round, and prints the median ratio of neighbouring rounds: what else a busy
machine does falls on both. Only public names are used, so that the other checkout may be of any age. Appends JSON lines
to benchmarks/results/overhead.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import record

ROOT = Path(__file__).resolve().parents[1]
WORKER = Path(__file__).with_name("overhead_worker.py")
Rounds = dict[str, list[dict[str, float]]]  # of each checkout: what each round measured, by case


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
    """A process that measures a round of smallest calls whenever it is asked to."""

    def __init__(self, checkout: Path, store: Path, device: str, calls: int, program: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(program), "calls", device, str(calls)],
            env=environment_of(checkout, store),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        require_package(json.loads(self._line()), checkout)

    def _line(self) -> str:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker ended with status {self._process.wait()}")
        return line

    def round(self) -> dict[str, float]:
        """Medians of one round, in microseconds, by case."""
        assert self._process.stdin
        self._process.stdin.write("round\n")
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
def workers(
    checkouts: dict[str, Path], stores: Path, device: str, calls: int, program: Path = WORKER
) -> Iterator[dict[str, Worker]]:
    """A worker of each checkout."""
    started = {name: Worker(checkout, stores / name, device, calls, program) for name, checkout in checkouts.items()}
    try:
        yield started
    finally:
        for worker in started.values():
            worker.end()


def turns(
    processes: int, count: int, start: Callable[[], contextlib.AbstractContextManager[dict[str, Worker]]]
) -> Rounds:
    """Rounds of every checkout in turns, in so many fresh processes; which goes first changes with every round."""
    rounds: Rounds = {}
    for _ in range(processes):
        with start() as started:
            for turn in range(count + 1):
                names = list(started) if turn % 2 else list(reversed(started))
                for name in names:
                    measured = started[name].round()
                    if turn:  # the first round warms up
                        rounds.setdefault(name, []).append(measured)
    return rounds


def first_calls(options: argparse.Namespace, checkouts: dict[str, Path]) -> Rounds:
    """Imports and first calls of fresh processes of every checkout in turns."""
    rounds: Rounds = {name: [] for name in checkouts}
    for turn in range(options.processes):
        for name in list(checkouts) if turn % 2 else list(reversed(checkouts)):
            with tempfile.TemporaryDirectory() as store:
                measured: dict[str, float] = {}
                for state in ("cold", "warm"):
                    answer = subprocess.run(
                        [sys.executable, str(WORKER), "first", options.device],
                        env=environment_of(checkouts[name], Path(store)), stdout=subprocess.PIPE, text=True, check=True,
                    )  # fmt: skip
                    found = json.loads(answer.stdout)
                    require_package(found, checkouts[name])
                    measured[f"first call, {state} store"] = found["first_call_s"]
                    measured["import jit_kernel"] = found["import_s"]
                    measured["import of a public name"] = found["public_name_s"]
            rounds[name].append(measured)
    return rounds


def lines_of(rounds: Rounds, unit: str, scale: float) -> list[dict[str, Any]]:
    """One line a case: the median, that of torch's SDPA, that of the checkout before and the ratio to it."""
    lines = []
    for case in rounds["this"][0]:
        if case.endswith(", torch SDPA"):
            continue
        mine = [measured[case] * scale for measured in rounds["this"]]
        line: dict[str, Any] = {"case": case, "unit": unit, "rounds": len(mine), "ours": statistics.median(mine)}
        line["ours_least"], line["ours_most"] = min(mine), max(mine)
        peer = f"{case}, torch SDPA"
        if peer in rounds["this"][0]:
            line["torch_sdpa"] = statistics.median(measured[peer] * scale for measured in rounds["this"])
        if "before" in rounds:
            theirs = [measured[case] * scale for measured in rounds["before"]]
            line["before"] = statistics.median(theirs)
            line["over_before"] = statistics.median(a / b for a, b in zip(mine, theirs, strict=True))
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
    print(text, flush=True)


def main() -> None:
    """Measure, print a table and append it to results/overhead.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--before", type=Path, help="another checkout, measured in turns with this one")
    parser.add_argument("--processes", type=int, default=3, help="fresh processes of each checkout")
    parser.add_argument("--rounds", type=int, default=7, help="of smallest calls in each process")
    parser.add_argument("--calls", type=int, default=2000, help="of each kind in a round")
    parser.add_argument("--folder", type=Path, default=record.RESULTS)
    parser.add_argument("--dry-run", action="store_true", help="print, and write nothing")
    options = parser.parse_args()
    checkouts = {"this": ROOT}
    if options.before:
        checkouts["before"] = options.before.resolve()
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as stores:
        for part in (
            lambda: lines_of(
                turns(
                    options.processes,
                    options.rounds,
                    lambda: workers(checkouts, Path(stores), options.device, options.calls),
                ),
                "us",
                1,
            ),
            lambda: lines_of(first_calls(options, checkouts), "ms", 1e3),
        ):
            for line in part():
                if options.before:
                    line["before_commit"] = record.commit_before(options.before)
                show(line)
                lines.append(line)
    if not options.dry_run:
        device = "cpu" if options.device == "cpu" else "cuda:0"
        print(f"written to {record.write('overhead', lines, device, options.folder)}")


if __name__ == "__main__":
    main()

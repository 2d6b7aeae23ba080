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
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import record
from turns import ROOT, Measured, Rounds, environment_of, lines_of, require_package, show, turns

WORKER = Path(__file__).with_name("overhead_worker.py")


def first_calls(options: argparse.Namespace, checkouts: dict[str, Path]) -> Rounds:
    """Imports and first calls of fresh processes of every checkout in turns."""
    rounds: Rounds = {name: [[]] for name in checkouts}  # the median is over all of them
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
            rounds[name][0].append(measured)
    return rounds


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
        smallest = Measured(checkouts, Path(stores), WORKER, (options.device, str(options.calls)))
        for part in (
            lambda: lines_of(turns(smallest, options.processes, options.rounds), "us", 1),
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

"""What a change costs where arithmetic or memory decides: prefill and decode of this checkout beside another one.

usage: python benchmarks/rates.py --before FOLDER [--device cpu|cuda] [--processes 3] [--rounds 9] [--dry-run]

A worker of each checkout measures every case once a round; workers take turns, so that what else the machine does falls
on both. A round's time is the median of its calls on a CPU (processor time of one thread) and of its events on a GPU.
Printed are the median times and the median ratio of neighbouring rounds. Appends JSON lines to
benchmarks/results/rates.jsonl.

The worker that starts first may lie worse in memory: on a Zen 4 its decode took 8 to 16 % longer with the same code on
both sides. Measure against a copy of this checkout first; a ratio means something beyond that one.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import record
from overhead import ROOT, lines_of, show, turns, workers

WORKER = Path(__file__).with_name("rates_worker.py")


def main() -> None:
    """Measure, print a table and append it to results/rates.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--before", type=Path, required=True, help="another checkout, measured in turns with this one")
    parser.add_argument("--processes", type=int, default=3, help="fresh processes of each checkout")
    parser.add_argument("--rounds", type=int, default=9, help="in each process")
    parser.add_argument("--calls", type=int, default=0, help="of each case in a round; 0: by the device")
    parser.add_argument("--folder", type=Path, default=record.RESULTS)
    parser.add_argument("--dry-run", action="store_true", help="print, and write nothing")
    options = parser.parse_args()
    checkouts = {"this": ROOT, "before": options.before.resolve()}
    calls = options.calls or (3 if options.device == "cpu" else 20)
    with tempfile.TemporaryDirectory() as stores:
        rounds = turns(
            options.processes,
            options.rounds,
            lambda: workers(checkouts, Path(stores), options.device, calls, WORKER),
        )
    lines = lines_of(rounds, "us", 1)
    for line in lines:
        line["before_commit"] = record.commit_before(options.before)
        show(line)
    if not options.dry_run:
        device = "cpu" if options.device == "cpu" else "cuda:0"
        print(f"written to {record.write('rates', lines, device, options.folder)}")


if __name__ == "__main__":
    main()

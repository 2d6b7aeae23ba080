"""What a change costs where arithmetic or memory decides: prefill and decode of this checkout beside another one.

usage: python benchmarks/rates.py --before FOLDER [--quick] [--device cpu|cuda] [--processes 6] [--rounds 40]

Three workers measure every case in turns: one of this checkout and two of the other, whose ratio to each other is
printed beside the other's ratio to this: the same code on both sides, so a change means something beyond that spread
(the mean and, in brackets, the least and the most of a process). A turn's time is the median of its calls on a CPU
(processor time of one thread, all workers on one core) and of its events on a GPU. On a CPU all workers read and write
the same physical memory. `--quick` has few cases and takes about five minutes on two cores, half of them compiling.
Appends JSON lines to benchmarks/results/rates.jsonl.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import record
from turns import ROOT, Measured, lines_of, show, turns

WORKER = Path(__file__).with_name("rates_worker.py")
_INPUT_BYTES = 512 << 20  # room for the inputs of all cases of a CPU; what is not written takes none


def main() -> None:
    """Measure, print a table and append it to results/rates.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--before", type=Path, required=True, help="another checkout, measured in turns with this one")
    parser.add_argument("--quick", action="store_true", help="few cases")
    parser.add_argument(
        "--processes", type=int, default=6, help="fresh processes of each checkout, best a multiple of 6"
    )
    parser.add_argument("--rounds", type=int, default=40, help="in each process")
    parser.add_argument("--calls", type=int, default=0, help="of each case in a round; 0: by the device")
    parser.add_argument("--folder", type=Path, default=record.RESULTS)
    parser.add_argument("--dry-run", action="store_true", help="print, and write nothing")
    options = parser.parse_args()
    before = options.before.resolve()
    arguments = [options.device, str(options.calls or (1 if options.device == "cpu" else 20)), str(int(options.quick))]
    if options.device == "cpu":
        memory = os.memfd_create("inputs")
        os.truncate(memory, _INPUT_BYTES)
        arguments.append(f"/proc/{os.getpid()}/fd/{memory}")
    with tempfile.TemporaryDirectory() as stores:
        checkouts = {"this": ROOT, "before": before, "again": before}
        rounds = turns(Measured(checkouts, Path(stores), WORKER, tuple(arguments)), options.processes, options.rounds)
    lines = lines_of(rounds, "us", 1)
    for line in lines:
        line["before_commit"] = record.commit_before(before)
        show(line)
    if not options.dry_run:
        device = "cpu" if options.device == "cpu" else "cuda:0"
        print(f"written to {record.write('rates', lines, device, options.folder)}")


if __name__ == "__main__":
    main()

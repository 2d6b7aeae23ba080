"""Serving on Hopper: decode, verify, chunked prefill, beside the pure read of the same pages, portable and peers.

    python benchmarks/hopper_serving.py [--quick] [--check] [--only NAME ...] [--rounds 3] [--peers flashinfer fa3]

Every implementation plain and in a CUDA graph of 20 calls, the L2 cache flushed before each run, medians of rounds in
which they follow each other in random order. NAME is a cell's name or its beginning; --list prints them. --check holds
each result against float32 first; what is wrong is not timed. --quick: five cells, one round, no peers. Where no peer
can be imported the best one's recorded time stands in the line, scaled by the copies' bandwidth, and says so.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import pure_read  # noqa: E402
import record  # noqa: E402
import serving_cells  # noqa: E402
import serving_inputs  # noqa: E402
import serving_peers  # noqa: E402
import torch  # noqa: E402
from serving_cells import CELLS, HOST, HOST_LIMIT, QUICK, Cell, Limit  # noqa: E402
from serving_timing import GRAPH_CALLS, Competitor, compete, copy_rate, force, host_us, in_graph  # noqa: E402

Line = dict[str, Any]
OURS = ("hopper", "portable")
PEER_NAMES = ("flashinfer", "flashinfer_fa2", "flashinfer_fa3", "fa3")


class Run:
    """What all cells of a run share: its options, the pure read, the copy's rate, what earlier cells took."""

    def __init__(self, rounds: int, check: bool, peers: list[str]) -> None:
        self.rounds, self.check, self.peers = rounds, check, peers
        self.reads = pure_read.PureRead()
        self.copy = copy_rate()
        self.hopper_ms: dict[str, float] = {}
        self.faults = 0

    def add(
        self, name: str, competitors: dict[str, Competitor], call: Callable[[], Any], implementation: str | None
    ) -> None:
        """A competitor plain and in a graph."""
        competitors[name] = Competitor(call, 1, implementation)
        competitors[f"{name}_graph"] = Competitor(in_graph(call), GRAPH_CALLS, implementation)

    def attempt(self, name: str) -> Line:
        """A cell's line, or what kept it from one: the others are measured all the same."""
        try:
            return self.host() if name == HOST else self.measure(CELLS[name])
        except Exception as error:
            traceback.print_exc()
            self.faults += 1
            return {"case": name, "failed": f"{type(error).__name__}: {error}"[:300]}

    def measure(self, cell: Cell) -> Line:
        """A cell's line: times of all, and what they are in units of each other."""
        line = cell.facts()
        reason = serving_inputs.missing(cell)
        if reason is not None:
            return line | {"skipped": reason}
        inputs = serving_inputs.make(cell, "cuda")
        competitors: dict[str, Competitor] = {}
        self._add_ours(cell, inputs, competitors, line)
        if cell.is_read_bound:
            self._add_reads(cell, inputs, competitors)
        if not cell.mixed:  # peers read no e4m3 cache as these calls mean it
            self._add_peers(cell, inputs, competitors, line)
        for name, milliseconds in compete(competitors, self.rounds).items():
            line[f"{name}_ms"] = round(statistics.median(milliseconds), 5)
            line[f"{name}_range"] = [round(min(milliseconds), 5), round(max(milliseconds), 5)]
        return compared(cell, line, self.copy, self.hopper_ms)

    def _add_ours(
        self, cell: Cell, inputs: serving_inputs.Inputs, competitors: dict[str, Competitor], line: Line
    ) -> None:
        for name in OURS:
            force(name)
            call = serving_inputs.our_call(cell, inputs)
            if not serves(name, call, line):
                continue
            made: dict[str, Competitor] = {}
            self.add(name, made, call, name)
            if cell.deterministic and name == "hopper":
                free = replace(cell, deterministic=False)
                self.add("hopper_free", made, serving_inputs.our_call(free, inputs), name)
            if cell.mixed and name == "hopper":
                competitors["hopper_bf16"] = Competitor(
                    serving_inputs.our_call(cell, serving_inputs.in_bf16(inputs)), 1, name
                )
            for each, competitor in made.items():
                fault = serving_inputs.fault_of(cell, inputs, competitor.run) if self.check else None
                if fault is None:
                    competitors[each] = competitor
                else:
                    line[f"{each}_wrong"] = fault
                    self.faults += 1

    def _add_reads(self, cell: Cell, inputs: serving_inputs.Inputs, competitors: dict[str, Competitor]) -> None:
        caches = serving_inputs.read_caches(cell, inputs)
        units = pure_read.units_of(inputs.page_table, inputs.lengths, cell.page)
        if self.check:
            self.reads.check(units, *caches)
        self.add("pure_read", competitors, self.reads.reader(units, *caches), None)
        if cell.goal is not None:
            linear = self.reads.reader(pure_read.in_order(units), *caches)
            competitors["pure_read_linear"] = Competitor(linear)

    def _add_peers(
        self, cell: Cell, inputs: serving_inputs.Inputs, competitors: dict[str, Competitor], line: Line
    ) -> None:
        for name in self.peers:
            try:
                for each, call in serving_peers.calls([name], cell, inputs).items():
                    result = call()
                    fault = serving_inputs.fault(cell, inputs, result) if self.check else None
                    if fault is None:
                        self.add(each, competitors, call, None)
                    else:
                        line[f"{each}_wrong"] = fault
            except Exception as error:  # a peer raises what it likes; the line keeps it
                line[f"{name}_failed"] = f"{type(error).__name__}: {error}"[:300]

    def host(self) -> Line:
        """Host time of a small paged decode call with `out` given."""
        cell = Cell(HOST, 4, 512, heads=8, kv_heads=2)
        inputs = serving_inputs.make(cell, "cuda")
        line = cell.facts()
        competitors: dict[str, Competitor] = {}
        for name in OURS:
            force(name)
            call = serving_inputs.our_call(cell, inputs)
            if serves(name, call, line):
                competitors[name] = Competitor(call, 1, name)
        if "flashinfer" in self.peers:
            try:
                call = serving_peers.calls(["flashinfer"], cell, inputs)["flashinfer"]
                call()
                competitors["flashinfer"] = Competitor(call)
            except Exception as error:  # a peer raises what it likes; the line keeps it
                line["flashinfer_failed"] = f"{type(error).__name__}: {error}"[:300]
        line |= {f"{name}_us": round(us, 2) for name, us in host_us(competitors).items()}
        line["shows"] = [judged(HOST_LIMIT, line)] if HOST_LIMIT.field in line else []
        return line


def serves(name: str, call: Callable[[], object], line: Line) -> bool:
    """Whether an implementation takes the call; where it does not, its reason goes into the line."""
    try:
        call()
    except NotImplementedError as error:
        line[f"{name}_refused"] = str(error).splitlines()[-1].strip()
        return False
    return True


def compared(cell: Cell, line: Line, copy: float, hopper_ms: dict[str, float]) -> Line:
    """The line with what its times are in units of each other; Hopper's is kept in `hopper_ms` for later cells."""
    ours, pure = line.get("hopper_ms"), line.get("pure_read_ms")
    for name in OURS:
        if f"{name}_ms" in line:
            line |= rates(cell, name, line[f"{name}_ms"])
    measured = {name: line[f"{name}_ms"] for name in PEER_NAMES if f"{name}_ms" in line}
    if measured:
        best = min(measured, key=lambda name: measured[name])
        line |= {"peer": f"{best}, same run", "peer_ms": measured[best]}
    elif cell.peer is not None:
        note = f"{cell.peer.name} at a copy of {cell.peer.copy} GB/s, scaled to this run's {copy:.0f} GB/s"
        scaled = round(cell.peer.ms * cell.peer.copy / copy, 5)
        line |= {"peer": note, "peer_ms": scaled, "peer_recorded_ms": cell.peer.ms}
    if cell.probe_ms is not None and pure is not None:
        line |= {"probe_read_ms": cell.probe_ms, "pure_read_over_probe": round(pure / cell.probe_ms, 4)}
    if ours is not None:
        hopper_ms[cell.name] = ours
        if pure is not None:
            line["over_pure_read"] = round(ours / pure, 4)
        if "peer_ms" in line:
            line["over_peer"] = round(ours / line["peer_ms"], 4)
        for kind in ("", "_graph"):
            if f"hopper_free{kind}_ms" in line and f"hopper{kind}_ms" in line:
                line[f"over_free{kind}"] = round(line[f"hopper{kind}_ms"] / line[f"hopper_free{kind}_ms"], 4)
        if "hopper_bf16_ms" in line:
            line["times_bf16"] = round(line["hopper_bf16_ms"] / ours, 4)
        if cell.twin in hopper_ms:
            line |= {"twin": cell.twin, "over_twin": round(ours / hopper_ms[cell.twin], 4)}
        if cell.goal is not None:
            line |= {"goal": cell.goal, "value": ours}
    line["shows"] = [judged(limit, line) for limit in cell.limits if limit.field in line]
    return line


def rates(cell: Cell, name: str, ms: float) -> Line:
    """GB/s of keys and values where reading bounds a cell, else TFLOP/s."""
    if cell.is_read_bound:
        return {f"{name}_gbytes_per_s": round(cell.kv_bytes() / ms / 1e6)}
    return {f"{name}_tflops": round(cell.operations() / ms / 1e9, 1)}


def judged(limit: Limit, line: Line) -> Line:
    """A limit beside what was measured.

    Where the pure read takes longer than the probe's did, the limit is also given as a multiple of it. Whether the card
    is slower, or the pure read worse, the copy's rate tells: the probe's card copied at 4,268 GB/s.
    """
    value = line[limit.field]
    verdict = "aim" if value <= limit.aim else "at least" if value <= limit.at_least else "no"
    found = {"field": limit.field, "value": value, "at_least": limit.at_least, "aim": limit.aim, "meets": verdict}
    slower = line.get("pure_read_over_probe", 1.0)
    if limit.field == "hopper_ms" and slower > 1.0:
        found["at_least_by_pure_read"] = round(limit.at_least * slower, 5)
    return found


def table(lines: list[Line]) -> str:
    """A row a cell: ms of ours plain and in a graph, of portable, pure read and peer; what it shows."""
    columns = ("hopper_ms", "hopper_graph_ms", "portable_ms", "pure_read_ms", "peer_ms", "over_pure_read", "over_twin")
    heads = ("ms", "graph", "portable", "pure", "peer", "/ pure", "/ twin", "shows")
    rows = ["  ".join([f"{'case':22}", *(f"{head:>8}" for head in heads[:-1]), heads[-1]])]
    for line in lines:
        if line["case"] == "copy":
            continue
        cells = [f"{line[key]:8.4f}" if key in line else f"{'-':>8}" for key in columns]
        notes = [f"{each['field']} {each['value']}: {each['meets']}" for each in line.get("shows", ())]
        notes += [f"{key}: {value}"[:60] for key, value in line.items() if key.endswith(("_wrong", "failed"))]
        notes += [line["skipped"]] if "skipped" in line else []
        notes += ["refused"] if "hopper_refused" in line else []
        rows.append("  ".join([f"{line['case']:22}", *cells, "; ".join(notes)]))
    return "\n".join(rows)


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of five cells, no peers unless named")
    parser.add_argument("--check", action="store_true", help="compare with float32 first; time nothing wrong")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="cells by name or by its beginning")
    parser.add_argument("--rounds", type=int, help="3; 1 with --quick")
    parser.add_argument("--peers", nargs="*", choices=serving_peers.PEERS, help="which to measure; all that are there")
    parser.add_argument("--folder", type=Path, default=record.RESULTS)
    parser.add_argument("--list", action="store_true", help="print the cells' names and end")
    options = parser.parse_args(arguments)
    if options.rounds is None:
        options.rounds = 1 if options.quick else 3
    if options.rounds < 1:
        parser.error(f"argument --rounds: {options.rounds}; it must be at least 1")
    if options.peers is None:
        options.peers = [] if options.quick else list(serving_peers.PEERS)
    try:
        options.cells = serving_cells.chosen(options.only or (list(QUICK) if options.quick else [""]))
    except ValueError as error:
        parser.error(f"argument --only: {error}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, append to results/hopper_serving.jsonl; 1 where a result was wrong or a cell failed."""
    options = options_of(arguments)
    if options.list:
        print("\n".join(options.cells))
        return 0
    peers = serving_peers.importable(options.peers)
    run = Run(options.rounds, options.check, list(peers))
    lines: list[Line] = [{"case": "copy", "gbytes_per_s": round(run.copy), "peers": peers}]
    try:
        for name in options.cells:
            line = run.attempt(name)
            line |= {"rounds": options.rounds, "checked": options.check and name != HOST}
            lines.append(line)
            print(" ".join(f"{key}={value}" for key, value in line.items()), flush=True)
            torch.cuda.empty_cache()
    finally:  # what was measured before an error is kept
        record.write("hopper_serving", lines, "cuda:0", options.folder)
    print(table(lines))
    return 1 if run.faults else 0


if __name__ == "__main__":
    sys.exit(main())

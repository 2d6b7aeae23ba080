"""Random calls of all public functions: `python -m tests.fuzz.calls --seconds 60 --seed 1`.

Prints how many were made, answered and refused, and each fault with the seed and index that repeats it:
`--only SEED:INDEX` makes that call alone and describes it. Status 1 when there is a fault.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.fuzz import drawing, kinds, oracle, workers
from tests.fuzz.oracle import ANSWERED, FAULTS, REFUSED

BATCH = 400  # calls of one child
MOST_REDUCED = 40  # kinds of faults whose steps are tried one by one, each in a child


@dataclass
class Options:
    """How calls are drawn and made."""

    seed: int = 0
    without: Collection[str] = ()
    guarded: bool = True
    jobs: int = 1
    most_threads: int = 3  # 1 where the parent has threads: what torch runs on cannot be forked
    device: str = "cpu"
    limit: float = 60.0  # seconds without an answer that are a hang


@dataclass
class Total:
    """What came of a run. `faults` by what they have in common: the reports of each."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: dict[tuple[str, ...], list[workers.Report]] = field(default_factory=dict)
    known: dict[tuple[str, ...], tuple[str, ...]] = field(default_factory=dict)  # to these, from all steps
    texts: dict[tuple[str, ...], str] = field(default_factory=dict)
    steps: dict[tuple[str, ...], list[str]] = field(default_factory=dict)  # of each first one, those it needs

    def line(self) -> str:
        made = sum(self.counts[what] for what in (ANSWERED, REFUSED, *FAULTS))
        rest = ", ".join(f"{self.counts[what]} {what}" for what in FAULTS)
        judged = self.counts[ANSWERED] - self.counts["unjudged"]
        return (
            f"{made} calls: {self.counts[ANSWERED]} answered ({judged} judged by value), "
            f"{self.counts[REFUSED]} refused by name; faults: {rest}"
        )


def maker(options: Options, keep: Collection[int] | None = None) -> workers.Make:
    """What a child does for one index."""

    def make(index: int) -> tuple[str, str, dict[str, Any]]:
        torch.set_num_threads(1)
        drawn = drawing.draw(
            options.seed, index, without=options.without, keep=keep, guarded=options.guarded, device=options.device
        )
        drawn.threads = min(drawn.threads, options.most_threads)
        state = kinds.state_of_torch()
        verdict = oracle.judge(drawn)
        more: dict[str, Any] = {}
        if not verdict.judged:
            more["judged"] = False
        # Where torch fails to make a tensor, it may leave its state changed: the calls behind it go to another child.
        if verdict.what in FAULTS or kinds.state_of_torch() != state:
            more["last"] = True
        return verdict.what, verdict.text, more

    return make


def _limits(options: Options) -> dict[str, Any]:
    return {"limit": options.limit, "limited": options.device == "cpu"}


def run(
    options: Options, *, calls: int | None = None, seconds: float | None = None, say: Callable[[str], None] = print
) -> Total:
    """Make calls until so many were made or so many seconds passed."""
    total = Total()
    starts = itertools.count(0, BATCH) if calls is None else iter(range(0, calls, BATCH))
    batches = (range(start, start + BATCH if calls is None else min(start + BATCH, calls)) for start in starts)
    until = None if seconds is None else time.monotonic() + seconds
    for report in workers.run(maker(options), batches, jobs=options.jobs, until=until, **_limits(options)):
        total.counts[report.what] += 1
        total.counts["unjudged"] += report.more.get("judged") is False
        if report.what in FAULTS:
            _add(total, report, options, say)
    return total


def _add(total: Total, report: workers.Report, options: Options, say: Callable[[str], None]) -> None:
    drawn = drawing.draw(options.seed, report.index, without=options.without, guarded=options.guarded)
    raw = _kind(report.what, drawn.steps, report.text)
    if raw not in total.known:
        text, steps = report.text, drawn.steps
        if len(total.known) < MOST_REDUCED:
            text, steps = _reduced(report, drawn, options)
        key = total.known[raw] = _kind(report.what, steps, text)
        if key not in total.faults:
            total.steps[key], total.texts[key] = steps, text
            say(f"{report.what} {drawn.place} {drawn.function}: {text[:300]}")
            for line in [*(f"step {step[:160]}" for step in steps), *_telling(report.more.get("said", ""))]:
                say(f"    {line}")
    total.faults.setdefault(total.known[raw], []).append(report)


def _kind(what: str, steps: list[str], text: str) -> tuple[str, ...]:
    return what, *(_words(step) for step in steps), _words(text)[:40]


def _words(text: str) -> str:
    """A step or a message without its numbers and arguments, to tell one kind of fault from another."""
    return re.sub(r"[-+]?\d[\d.e+]*|inf|nan|0x[0-9a-f]+", "#", re.split(r"\n| of |: ", text)[0])


def _telling(said: str) -> list[str]:
    """The lines of a dead child that say why: a sanitizer's error and where it stood."""
    lines = [line.strip() for line in said.splitlines()]
    telling = re.compile(r"ERROR: |runtime error|SUMMARY|#[0-9] .*(entry|prefill|decode|common)/")
    return [line for line in lines if telling.search(line)][:8]


def _reduced(report: workers.Report, drawn: drawing.Drawn, options: Options) -> tuple[str, list[str]]:
    """The fault with as few of its steps as it needs, each tried in a child of its own."""
    needed = [int(step.split()[0]) for step in drawn.steps]
    text = report.text
    again = workers.alone(maker(options, needed), report.index, **_limits(options))
    if again.what != report.what:
        first = report.index - report.index % BATCH
        return f"{text} (not when made alone: --only {options.seed}:{first}-{report.index})", drawn.steps
    for number in list(needed):
        fewer = [other for other in needed if other != number]
        tried = workers.alone(maker(options, fewer), report.index, **_limits(options))
        if tried.what == report.what:
            needed, text = fewer, tried.text
    return text, [step for step in drawn.steps if int(step.split()[0]) in needed]


def summary(total: Total, options: Options) -> list[str]:
    """The faults, each kind with the calls that show it."""
    lines = []
    for key, reports in sorted(total.faults.items(), key=lambda item: (item[0][0], -len(item[1]))):
        shown = " ".join(f"{options.seed}:{report.index}" for report in reports[:12])
        more = "" if len(reports) <= 12 else f" and {len(reports) - 12} more"
        steps, text = "; ".join(total.steps[key])[:200], total.texts[key][:120]
        lines.append(f"{key[0]} x{len(reports)} | {steps} | {text!r} | {shown}{more}")
    return [*lines, total.line()]


def only(text: str, options: Options) -> int:
    """Make one call, or those of a range in one child, and say all about the last."""
    seed, _, numbers = text.partition(":")
    first, _, last = numbers.partition("-")
    options.seed = int(seed)
    batch = range(int(first), int(last or first) + 1)
    drawn = drawing.draw(options.seed, batch[-1], without=options.without, guarded=options.guarded)
    print(drawing.describe(drawn))
    reports = list(workers.run(maker(options), iter([batch]), jobs=1, traces=True, **_limits(options)))
    print(f"{reports[-1].what}: {reports[-1].text}")
    for line in reports[-1].more.get("said", "").splitlines()[:40]:
        print(f"    {line}")
    return int(reports[-1].what in FAULTS)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.calls", description=__doc__)
    parser.add_argument("--seconds", type=float, help="how long to go on; by default until --calls")
    parser.add_argument("--calls", type=int, help="how many calls; 1000 by default without --seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds without an answer that are a hang")
    add = parser.add_argument
    add("--without", action="append", default=[], metavar="KIND", help="leave a kind or a change out; repeatable")
    add("--only", metavar="SEED:INDEX", help="make this call alone, or SEED:FIRST-LAST, and describe it")
    add("--no-guards", action="store_true", help="tensors in memory of their own, as AddressSanitizer needs it")
    parser.add_argument("--record", metavar="FILE", help="append the counts as a JSON line")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options = Options(given.seed, given.without, not given.no_guards, given.jobs)
    options.device, options.limit = given.device, given.limit
    if given.device == "cpu":
        warm_up()
    else:
        os.environ["JIT_KERNEL_CHECK_INDICES"] = "1"  # without it a GPU's index tensors are not looked at
    if given.only:
        return only(given.only, options)
    calls = given.calls or (None if given.seconds else 1000)
    started = time.monotonic()
    total = run(options, calls=calls, seconds=given.seconds, say=lambda text: print(text, flush=True))
    print("\n".join(summary(total, options)))
    if given.record:
        with open(given.record, "a", encoding="utf-8") as file:
            record = {"seed": given.seed, "seconds": round(time.monotonic() - started), **total.counts}
            file.write(json.dumps(record) + "\n")
    return int(bool(total.faults))


def warm_up() -> None:
    """Every CPU library in the store, compiled by a child, so that no call waits for a compiler. The parent stays
    without threads, or its children could not be forked."""

    def load(_: int) -> tuple[str, str, dict[str, Any]]:
        from jit_kernel import jit
        from jit_kernel.device import cpu_target
        from jit_kernel.fa3.cpu import kernels as cpu_kernels

        for spec in cpu_kernels.all_specs():
            jit.load(spec, cpu_target())
        return ANSWERED, "", {}

    for name in ("fa3.checks.call", "fa3.checks.combine", "fa3.checks.metadata", "fa3.torch_operators"):
        importlib.import_module(f"jit_kernel.{name}")  # so that children need not
    importlib.import_module("torch._dynamo")  # for calls under a dispatch mode
    report = workers.alone(load, 0, limit=3600)
    if report.what != ANSWERED:
        raise RuntimeError(f"{report.text}: {report.more}")


if __name__ == "__main__":
    sys.exit(main())

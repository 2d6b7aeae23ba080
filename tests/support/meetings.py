"""Callers that ask for the same kernel at once, from an empty store: all are answered by one compilation."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from tests.support import children, loader_work
from tests.support.compilers import compilations, counting_compiler

CALLERS = 8


def cold_call(scratch: Path, work: object = loader_work.small_call) -> float:
    """Seconds that one call takes with an empty store."""
    environment: dict[str, str | None] = {"JIT_KERNEL_CACHE_DIR": str(scratch / f"cold-{os.urandom(4).hex()}")}
    outcome = children.run(work, environment=environment, scratch=scratch)
    assert outcome.error == "" and outcome.result["compiled"], outcome
    return float(outcome.result["seconds"])


def processes_that_meet(folder: Path) -> float:
    """Seconds until CALLERS processes have their answer, which one compilation gives."""
    compiler, starts = counting_compiler(folder / "bin")
    environment: dict[str, str | None] = {"CXX": compiler, "JIT_KERNEL_CACHE_DIR": str(folder / "store")}
    barrier = children.CONTEXT.Barrier(CALLERS)
    callers = [
        children.Child(loader_work.small_call_at, barrier, environment=environment, scratch=folder)
        for _ in range(CALLERS)
    ]
    outcomes = [caller.outcome() for caller in callers]
    assert all(outcome.error == "" and outcome.result[0]["right"] for outcome in outcomes), outcomes
    assert compilations(starts) == 1
    assert sum(len(outcome.result[0]["compiled"]) for outcome in outcomes) == 1
    took = max(outcome.result[2] for outcome in outcomes) - min(outcome.result[1] for outcome in outcomes)
    return float(took)


def threads_that_meet(folder: Path) -> float:
    """The same of threads of one process."""
    compiler, starts = counting_compiler(folder / "bin")
    environment: dict[str, str | None] = {"CXX": compiler, "JIT_KERNEL_CACHE_DIR": str(folder / "store")}
    work = partial(loader_work.small_calls_in_threads, CALLERS)
    outcome = children.run(work, environment=environment, scratch=folder)
    assert outcome.error == "" and outcome.result["right"], outcome
    assert compilations(starts) == 1
    return float(outcome.result["seconds"])

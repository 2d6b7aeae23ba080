"""Many callers at once, and callers that are killed: one compilation, and never a half-written artifact."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from jit_kernel.engine.store import Store
from tests.engine.test_loader import compilations, counting_compiler
from tests.support import children, loader_work

CALLERS = 8
MOMENTS = 20
ENTRY = ("kernel", "cpu:any", "key")


def cold_call(scratch: Path, work: object = loader_work.small_call) -> float:
    """Seconds that one call takes with an empty store."""
    environment: dict[str, str | None] = {"JIT_KERNEL_CACHE_DIR": str(scratch / f"cold-{os.urandom(4).hex()}")}
    outcome = children.run(work, environment=environment, scratch=scratch)
    assert outcome.error == "" and outcome.result["compiled"], outcome
    return float(outcome.result["seconds"])


def processes_that_meet(tmp_path: Path) -> float:
    """How many times as long as one cold call it takes until all processes have their answer from one compilation."""
    compiler, starts = counting_compiler(tmp_path / "bin")
    environment: dict[str, str | None] = {"CXX": compiler, "JIT_KERNEL_CACHE_DIR": str(tmp_path / "store")}
    before = cold_call(tmp_path)
    barrier = children.CONTEXT.Barrier(CALLERS)
    callers = [
        children.Child(loader_work.small_call_at, barrier, environment=environment, scratch=tmp_path)
        for _ in range(CALLERS)
    ]
    outcomes = [caller.outcome() for caller in callers]
    assert all(outcome.error == "" and outcome.result[0]["right"] for outcome in outcomes), outcomes
    assert compilations(starts) == 1
    assert sum(len(outcome.result[0]["compiled"]) for outcome in outcomes) == 1
    took = max(outcome.result[2] for outcome in outcomes) - min(outcome.result[1] for outcome in outcomes)
    return float(took / max(before, cold_call(tmp_path)))


def threads_that_meet(tmp_path: Path) -> float:
    """The same of threads of one process."""
    compiler, starts = counting_compiler(tmp_path / "bin")
    environment: dict[str, str | None] = {"CXX": compiler, "JIT_KERNEL_CACHE_DIR": str(tmp_path / "store")}
    before = cold_call(tmp_path)
    work = partial(loader_work.small_calls_in_threads, CALLERS)
    outcome = children.run(work, environment=environment, scratch=tmp_path)
    assert outcome.error == "" and outcome.result["right"], outcome
    assert compilations(starts) == 1
    return float(outcome.result["seconds"] / max(before, cold_call(tmp_path)))


@pytest.mark.parametrize("meet", [processes_that_meet, threads_that_meet])
def test_callers_that_meet_compile_once(tmp_path: Path, meet: Callable[[Path], float], say: list[str]) -> None:
    say.append(f"{CALLERS} {meet.__name__}: {meet(tmp_path):.2f} times one cold call")


def processes_inside(folder: Path) -> list[str]:
    """The processes whose working folder is below `folder`: compilers that still run."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if Path(os.readlink(process / "cwd")).is_relative_to(folder):
                found.append(process.name)
        except OSError:
            continue
    return found


def gone(folder: Path, patience: float = 2.0) -> list[str]:
    """The compilers below `folder` that outlive their caller by more than `patience` seconds."""
    deadline = time.monotonic() + patience
    while (left := processes_inside(folder)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def killed_at(moment: float, folder: Path, work: object) -> int:
    """Kill a cold call after `moment` seconds; the next call must be right. How many compiled in it."""
    environment: dict[str, str | None] = {"JIT_KERNEL_CACHE_DIR": str(folder / "store")}
    folder.mkdir()
    victim = children.Child(work, environment=environment, scratch=folder)
    time.sleep(moment)
    victim.kill()
    assert gone(folder / "store") == [], f"a compiler outlived its caller, killed after {moment:.2f} s"
    after = children.run(work, environment=environment, scratch=folder)
    assert after.error == "" and after.result["right"], after
    assert after.warnings == [], "something half-written was found"
    assert list((folder / "store" / ".tmp").iterdir()) == [] if after.result["compiled"] else True
    return len(after.result["compiled"])


def test_killed_at_every_moment_of_a_cold_call(tmp_path):
    cold = cold_call(tmp_path)
    rebuilt = 0
    for index in range(MOMENTS):
        rebuilt += killed_at(cold * 1.3 * index / (MOMENTS - 1), tmp_path / str(index), loader_work.small_call)
    print(f"killed at {MOMENTS} moments of {cold:.2f} s: {rebuilt} compiled again, the others had been published")
    assert rebuilt > 0


def test_the_attention_kernel_survives_a_kill(tmp_path):
    assert killed_at(1.0, tmp_path / "killed", loader_work.attention_call) > 0


def test_a_process_that_waits_names_the_holder_and_a_dead_holder_frees_the_lock(tmp_path):
    slow, starts = counting_compiler(tmp_path / "bin", before='case "$*" in *unit.cpp*) sleep 60;; esac', version="one")
    environment: dict[str, str | None] = {"CXX": slow, "JIT_KERNEL_CACHE_DIR": str(tmp_path / "store")}
    holder = children.Child(loader_work.small_call, environment=environment, scratch=tmp_path)
    while compilations(starts) == 0:
        time.sleep(0.02)
    counting_compiler(tmp_path / "bin", version="one")
    waiter = children.Child(loader_work.small_call, environment=environment, scratch=tmp_path)
    deadline = time.monotonic() + 120
    while "waiting for" not in waiter.stderr() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert f"process {holder.process.pid} on {os.uname().nodename} has been compiling it for" in waiter.stderr()
    before = compilations(starts)
    holder.kill()
    outcome = waiter.outcome()
    assert outcome.error == "" and outcome.result["right"] and len(outcome.result["compiled"]) == 1
    assert compilations(starts) == before + 1
    assert len(list(Store(tmp_path / "store").manifests())) == 1


def test_the_holders_note_keeps_the_last_builds_duration(tmp_path):
    store = Store(tmp_path / "store")
    assert store.writable()
    lock = store.lock(*ENTRY)
    with lock.held(lambda holder, waited: None):
        lock.record_duration(4.5)
    with lock.held(lambda holder, waited: None):
        other = children.Child(_lock_entry, str(store.root), environment={}, scratch=tmp_path)
        deadline = time.monotonic() + 120
        while not (tmp_path / "store" / "waited").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
    seen = other.outcome().result
    assert seen[0] == (os.getpid(), 4.5)


def _lock_entry(root: str) -> list[tuple[int, float | None]]:
    seen: list[tuple[int, float | None]] = []

    def waiting(holder: object, waited: float) -> None:
        seen.append((holder.pid, holder.last_seconds))  # type: ignore[attr-defined]
        Path(root, "waited").touch()

    with Store(Path(root)).lock(*ENTRY).held(waiting):
        return seen

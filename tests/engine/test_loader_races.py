"""Many callers at once, and callers that are killed: one compilation, and never a half-written artifact."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jit_kernel.engine.store import Store
from tests.support import children, loader_work, tiny
from tests.support.compilers import compilations, counting_compiler, processes_inside
from tests.support.meetings import cold_call, processes_that_meet, threads_that_meet
from tests.support.waiting import wait_for

MOMENTS = 20
ENTRY = ("kernel", "cpu:any", "key")


@pytest.mark.parametrize("meet", [processes_that_meet, threads_that_meet])
def test_callers_that_meet_compile_once(tmp_path: Path, meet: Callable[[Path], float]) -> None:
    meet(tmp_path)


def killed_at(moment: float, folder: Path, work: object) -> int:
    """Kill a cold call after `moment` seconds; the next call must be right. How many compiled in it."""
    environment: dict[str, str | None] = {"JIT_KERNEL_CACHE_DIR": str(folder / "store")}
    folder.mkdir()
    victim = children.Child(work, environment=environment, scratch=folder)
    time.sleep(moment)
    victim.kill()
    ended = wait_for(lambda: not processes_inside(folder / "store"))
    assert ended, f"a compiler outlived its caller, killed after {moment:.2f} s"
    after = children.run(work, environment=environment, scratch=folder)
    assert after.error == "" and after.result["right"], after
    assert after.warnings == [], "something half-written was found"
    assert list((folder / "store" / ".tmp").iterdir()) == [] if after.result["compiled"] else True
    return len(after.result["compiled"])


def test_killed_at_every_moment_of_a_cold_call(tmp_path):
    cold = cold_call(tmp_path, loader_work.tiny_call)
    rebuilt = 0
    for index in range(MOMENTS):
        rebuilt += killed_at(cold * 1.3 * index / (MOMENTS - 1), tmp_path / str(index), loader_work.tiny_call)
    print(f"killed at {MOMENTS} moments of {cold:.3f} s: {rebuilt} compiled again, the others had been published")
    assert rebuilt > 0


def test_the_attention_kernel_survives_a_kill(tmp_path):
    assert killed_at(1.0, tmp_path / "killed", loader_work.attention_call) > 0


def test_a_process_that_waits_names_the_holder_and_a_dead_holder_frees_the_lock(tmp_path):
    # Far longer than a wait lasts: only a compiler that dies with its caller is gone in time.
    slow = 'case "$*" in *unit.cpp*) sleep 600;; esac'
    compiler, starts = counting_compiler(tmp_path / "bin", before=slow, version="one")
    environment: dict[str, str | None] = {"CXX": compiler, "JIT_KERNEL_CACHE_DIR": str(tmp_path / "store")}
    holder = children.Child(loader_work.tiny_call, environment=environment, scratch=tmp_path)
    assert wait_for(lambda: compilations(starts) == 1)
    counting_compiler(tmp_path / "bin", version="one")
    waiter = children.Child(loader_work.tiny_call, environment=environment, scratch=tmp_path)
    wait_for(lambda: "waiting for" in waiter.stderr())
    assert f"process {holder.process.pid} on {os.uname().nodename} has been compiling it for" in waiter.stderr()
    assert compilations(starts) == 1, "a process that waits does not compile"
    holder.kill()
    outcome = waiter.outcome()
    assert outcome.error == "" and outcome.result["right"] and len(outcome.result["compiled"]) == 1
    assert compilations(starts) == 2
    assert wait_for(lambda: not processes_inside(tmp_path / "store")), "the holder's compiler outlived it"
    assert len(list(Store(tmp_path / "store").manifests())) == 1


def test_the_holders_note_keeps_the_last_builds_duration(tmp_path):
    store = Store(tmp_path / "store")
    assert store.writable()
    lock = store.lock(*ENTRY)
    with lock.held(lambda holder, waited: None):
        lock.record_duration(4.5)
    with lock.held(lambda holder, waited: None):
        other = children.Child(_lock_entry, str(store.root), environment={}, scratch=tmp_path)
        wait_for((tmp_path / "store" / "waited").exists)
    seen = other.outcome().result
    assert seen[0] == (os.getpid(), 4.5)


def _lock_entry(root: str) -> list[tuple[int, float | None]]:
    seen: list[tuple[int, float | None]] = []

    def waiting(holder: object, waited: float) -> None:
        seen.append((holder.pid, holder.last_seconds))  # type: ignore[attr-defined]
        Path(root, "waited").touch()

    with Store(Path(root)).lock(*ENTRY).held(waiting):
        return seen


def forked_while_a_compiler_is_asked(asked: str, free: str) -> Any:
    """Fork while a thread waits for a compiler's version; the child, which has another compiler, calls a kernel."""
    thread = threading.Thread(target=tiny.call, args=(2,))
    thread.start()
    wait_for(lambda: os.path.exists(asked))

    def child() -> Any:
        signal.alarm(60)  # a hang ends it, and the test
        os.environ["CXX"] = ""
        return tiny.call(3)

    answer = tiny.forked(child)
    Path(free).touch()
    thread.join()
    return answer


def test_a_child_that_is_forked_while_a_compiler_is_asked_for_its_version(tmp_path):
    asked, free, script = tmp_path / "asked", tmp_path / "free", tmp_path / "c++"
    waiting = f'touch "{asked}"; while ! [ -e "{free}" ]; do sleep 0.02; done; echo slow'
    script.write_text(f'#!/bin/sh\ncase "$*" in *--version*) {waiting}; exit 0;; esac\nexec g++ "$@"\n')
    script.chmod(0o755)
    environment: dict[str, str | None] = {"JIT_KERNEL_CACHE_DIR": str(tmp_path / "store"), "CXX": str(script)}
    work = forked_while_a_compiler_is_asked
    outcome = children.run(work, str(asked), str(free), environment=environment, scratch=tmp_path)
    assert outcome.error == "" and outcome.result["right"] and outcome.result["compiled"] == 1, outcome

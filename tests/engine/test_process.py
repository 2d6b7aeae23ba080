"""The process around the compiler: signals, streams, forks and pickles that a host program may have set up."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from jit_kernel import config, jit
from jit_kernel.device import cpu_target
from tests.support import children, tiny
from tests.support.compilers import compilations, counting_compiler, processes_inside
from tests.support.waiting import wait_for

BROKEN = jit.KernelSpec("tiny", "this is no C++\n", "host")


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str | None]:
    return {"JIT_KERNEL_CACHE_DIR": str(tmp_path / "store")}


def broken() -> None:
    jit.load(BROKEN, cpu_target())


@pytest.mark.parametrize("surroundings", [tiny.with_children_ignored, tiny.beside_a_reaper])
def test_a_host_that_takes_its_childrens_status(tmp_path, environment, surroundings):
    """SIGCHLD ignored, or a thread that reaps every child: the compiler's success and its failure are both seen."""
    outcome = children.run(surroundings, tiny.call, environment=environment, scratch=tmp_path)
    assert outcome.error == "" and outcome.result == {"found": 42, "right": True, "compiled": 1}, outcome
    outcome = children.run(surroundings, broken, environment=environment, scratch=tmp_path)
    assert outcome.error == "CompileError" and "unit.cpp:1" in outcome.message, outcome


class Bare:
    """A stream that knows writing alone."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def write(self, text: str) -> int:
        self.lines.append(text)
        return len(text)


class Closed:
    """A stream whose reader is gone."""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        raise BrokenPipeError

    def flush(self) -> None:
        raise ValueError("I/O operation on closed file")


def with_stream(stream: Any) -> dict[str, Any]:
    sys.stderr = stream
    return tiny.call()


@pytest.mark.parametrize("stream", [None, Bare(), Closed()], ids=["none", "bare", "closed"])
@pytest.mark.parametrize("level", ["quiet", "debug"])
def test_standard_error_that_is_none(tmp_path, environment, stream, level):
    """A daemon's, a window's, a notebook's: it compiles, in silence where there is nothing to write to."""
    environment["JIT_KERNEL_LOG"] = level
    outcome = children.run(with_stream, stream, environment=environment, scratch=tmp_path)
    assert outcome.error == "" and outcome.result["right"], outcome


def broken_in(store: str) -> None:
    os.environ["JIT_KERNEL_CACHE_DIR"] = store
    config.reload()
    broken()


def test_a_compile_error_crosses_processes(tmp_path):
    with ProcessPoolExecutor(1, mp_context=children.CONTEXT) as pool:
        error = pool.submit(broken_in, str(tmp_path / "store")).exception()
    assert type(error).__name__ == "CompileError" and "unit.cpp:1" in str(error)
    assert "unit.cpp" in error.command and "error" in error.log  # type: ignore[union-attr]
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.log, again.command) == (str(error), error.log, error.command)  # type: ignore[union-attr]


def fork_while_compiling(starts: str, factors: tuple[int, ...]) -> list[Any]:
    """Fork while a thread compiles the first kernel; what the child's calls answer."""
    thread = threading.Thread(target=tiny.call)
    thread.start()
    assert wait_for(lambda: compilations(Path(starts)) == 1)
    answers = [tiny.forked(partial(tiny.call, factor)) for factor in factors]
    thread.join()
    return answers


def test_a_child_forked_while_a_thread_compiles(tmp_path, environment):
    """It waits for the same kernel, compiles another one, and neither lock nor warning of its parent holds it."""
    compiler, starts = counting_compiler(tmp_path / "bin", before='case "$*" in *unit.cpp*) sleep 1;; esac')
    environment["CXX"] = compiler
    child = children.Child(fork_while_compiling, str(starts), (2, 3), environment=environment, scratch=tmp_path)
    outcome = child.outcome(60)
    assert outcome.error == "", outcome
    assert [answer["right"] for answer in outcome.result] == [True, True], outcome
    assert compilations(starts) == 2, "the forked child compiled what its parent was compiling"


def attention_in_a_child(starts: str) -> Any:
    """Fork while a thread makes the first attention call; what the child's own call answers."""
    from tests.support import loader_work

    thread = threading.Thread(target=loader_work.attention_call)
    thread.start()
    assert wait_for(lambda: compilations(Path(starts)) == 1)
    answer = tiny.forked(loader_work.attention_call)
    thread.join()
    return answer


def test_a_child_forked_during_the_first_attention_call(tmp_path, environment):
    """The locks in front of the loader, too: the dispatcher's."""
    compiler, starts = counting_compiler(tmp_path / "bin")
    environment["CXX"] = compiler
    outcome = children.Child(attention_in_a_child, str(starts), environment=environment, scratch=tmp_path).outcome(120)
    assert outcome.error == "" and outcome.result["right"], outcome


def leave_a_child(starts: str) -> None:
    """Fork a child that lives on while this process compiles for ever."""
    thread = threading.Thread(target=tiny.call)
    thread.start()
    assert wait_for(lambda: compilations(Path(starts)) == 1)
    if os.fork() == 0:
        time.sleep(300)
        os._exit(0)
    thread.join()


def test_a_killed_parents_compiler_ends_though_a_forked_child_lives(tmp_path, environment):
    """And the lock of its entry is free: a child that was forked meanwhile holds neither."""
    compiler, starts = counting_compiler(tmp_path / "bin", before='case "$*" in *unit.cpp*) sleep 600;; esac')
    environment["CXX"] = compiler
    parent = children.Child(leave_a_child, str(starts), environment=environment, scratch=tmp_path)
    assert wait_for(lambda: children_of(parent.process.pid or 0) >= 2)
    parent.kill()
    assert wait_for(lambda: not processes_inside(tmp_path / "store")), "the compiler of a killed process runs on"
    environment["CXX"] = None
    after = children.Child(tiny.call, environment=environment, scratch=tmp_path).outcome(60)
    assert after.error == "" and after.result["right"], after


def children_of(process: int) -> int:
    """How many children a process has."""
    with open(f"/proc/{process}/task/{process}/children", encoding="ascii") as file:
        main = len(file.read().split())
    threads = list(Path(f"/proc/{process}/task").iterdir())
    return main + sum(
        len((thread / "children").read_text().split()) for thread in threads if thread.name != str(process)
    )


def interrupted(starts: str) -> tuple[str, list[str], bool]:
    """Press Ctrl-C while a compiler runs, then call again."""
    pressing = threading.Thread(
        target=lambda: wait_for(lambda: compilations(Path(starts)) == 1) and os.kill(os.getpid(), signal.SIGINT)
    )
    pressing.start()
    try:
        tiny.call()
    except KeyboardInterrupt:
        store = config.cache_dir()
        left = [path.name for path in (store / ".tmp").iterdir()]
        os.environ["CXX"] = ""
        return "interrupted", left, tiny.call()["right"]
    return "not interrupted", [], False


def interrupted_elsewhere(starts: str) -> tuple[str, list[str], bool]:
    """The same where the system gives the signal to another thread than the one that waits."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    idle = threading.Event()

    def take() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        idle.wait()

    threading.Thread(target=take, daemon=True).start()
    return interrupted(starts)


@pytest.mark.parametrize("interrupted", [interrupted, interrupted_elsewhere])
def test_ctrl_c_ends_the_compiler_and_leaves_nothing(tmp_path, environment, interrupted):
    compiler, starts = counting_compiler(tmp_path / "bin", before='case "$*" in *unit.cpp*) sleep 600;; esac')
    environment["CXX"] = compiler
    outcome = children.Child(interrupted, str(starts), environment=environment, scratch=tmp_path).outcome(60)
    assert outcome.result == ("interrupted", [], True), outcome
    assert not processes_inside(tmp_path / "store")

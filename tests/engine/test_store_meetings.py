"""Processes, containers and other programs that share a store at the same moment."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from jit_kernel import config
from jit_kernel.engine import lock as locks
from jit_kernel.engine import removal
from jit_kernel.engine.store import Store
from tests.support import children, tiny
from tests.support.compilers import compilations, counting_compiler
from tests.support.waiting import wait_for


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def held_compiler(folder: Path) -> tuple[str, Path, Path]:
    """A compiler that waits, once it has started, until a file is there; with its count and that file."""
    free = folder / "free"
    waiting = f'case "$*" in *unit.cpp*) while ! [ -e "{free}" ]; do sleep 0.02; done;; esac'
    return (*counting_compiler(folder / "bin", before=waiting, version="one"), free)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes process namespaces here")
def test_two_containers_of_one_host_name_share_a_store(tmp_path, store):
    """Neither takes the other's private folder for a dead process's: process numbers mean nothing across containers."""
    compiler, starts, free = held_compiler(tmp_path)
    environment: dict[str, str | None] = {"JIT_KERNEL_CACHE_DIR": str(store), "CXX": compiler}
    callers = []
    for factor in (2, 3):
        work = partial(tiny.call, factor)
        callers.append(children.Child(tiny.in_container, work, 60 // factor, environment=environment, scratch=tmp_path))
        assert wait_for(lambda: compilations(starts) == len(callers) or callers[-1].process.exitcode is not None)
    assert len([path for path in (store / ".tmp").iterdir() if path.is_dir()]) == 2, "a live private folder is gone"
    free.touch()
    for caller in callers:
        outcome = caller.outcome(60)
        assert outcome.error == "" and outcome.result["right"] and outcome.result["compiled"] == 1, outcome
    assert len(tiny.entries(store)) == 2 and list((store / ".tmp").iterdir()) == []


def test_a_dead_processs_private_folder_goes_though_its_number_lives(tmp_path, store):
    """As in another container, where the number is another process's."""
    compiler, starts, _ = held_compiler(tmp_path)
    environment: dict[str, str | None] = {"JIT_KERNEL_CACHE_DIR": str(store), "CXX": compiler}
    victim = children.Child(tiny.call, environment=environment, scratch=tmp_path)
    assert wait_for(lambda: compilations(starts) == 1)
    victim.kill()
    for place in list((store / ".tmp").iterdir()):
        place.rename(place.with_name(place.name.replace(str(victim.process.pid), str(os.getpid()), 1)))
    environment["CXX"] = None
    assert children.run(tiny.call, environment=environment, scratch=tmp_path).result["right"]
    assert list((store / ".tmp").iterdir()) == []


def test_a_live_process_of_an_unknown_number_keeps_its_private_folder(tmp_path, store):
    found = Store(store)
    assert found.writable()
    private = found.private_folder()
    other = private.with_name(f"999999999-{socket.gethostname()}-{private.name[-8:]}")
    for path in list(private.parent.iterdir()):
        path.rename(path.with_name(path.name.replace(private.name, other.name)))
    found.private_folder()
    assert other.is_dir()


def removing(what: str) -> dict[str, Any]:
    """Call while another program removes something of the store, once the compiler has started."""
    store = config.cache_dir()
    removed = threading.Thread(target=_remove, args=(store, what))
    removed.start()
    answer = tiny.call()
    removed.join()
    return answer


def _remove(store: Path, what: str) -> None:
    starts, free = store.parent / "bin" / "starts", store.parent / "free"
    assert wait_for(lambda: compilations(starts) == 1)
    if what == "everything":
        shutil.rmtree(store)
    elif what == "clear":
        removal.clear(Store(store), lambda holder, waited: None)
    elif what == "the unit":
        next(store.glob(".tmp/*/unit.cpp")).unlink()
    elif what == "the marks":
        for path in store.glob(".tmp/*.alive"):
            path.unlink()
    else:
        shutil.rmtree(store / what)
    free.touch()


@pytest.mark.parametrize("what", [".tmp", ".locks", "the unit", "the marks", "everything", "clear"])
def test_what_is_removed_while_a_compiler_runs_comes_back(tmp_path, store, what):
    compiler, _, _ = held_compiler(tmp_path)
    environment: dict[str, str | None] = {"JIT_KERNEL_CACHE_DIR": str(store), "CXX": compiler}
    outcome = children.Child(removing, what, environment=environment, scratch=tmp_path).outcome(60)
    assert outcome.error == "" and outcome.result["right"], outcome
    again = children.run(tiny.call, environment=environment, scratch=tmp_path)
    assert again.error == "" and again.result == {"found": 42, "right": True, "compiled": 0}, again
    assert list((store / ".tmp").iterdir()) == []


def publishing_twice(stored: str) -> dict[str, Any]:
    """Call while another process publishes the same entry, as where locks do not work."""
    store = config.cache_dir()

    def copy() -> None:
        free = store.parent / "free"
        assert wait_for(lambda: compilations(store.parent / "bin" / "starts") == 1)
        for entry in tiny.entries(Path(stored)):
            place = store / entry.relative_to(stored)
            place.parent.mkdir(parents=True)
            shutil.copytree(entry, place)
        free.touch()

    other = threading.Thread(target=copy)
    other.start()
    answer = tiny.call()
    other.join()
    return answer


@pytest.mark.parametrize("damaged", [False, True])
def test_the_entry_that_was_published_first_stays(tmp_path, store, damaged):
    """The loser takes it; a damaged one it replaces."""
    compiler, _, free = held_compiler(tmp_path)
    environment: dict[str, str | None] = {"JIT_KERNEL_CACHE_DIR": str(tmp_path / "first"), "CXX": compiler}
    free.touch()
    assert children.run(tiny.call, environment=environment, scratch=tmp_path).result["right"]
    free.unlink()
    (tmp_path / "bin" / "starts").write_text("")
    (first,) = tiny.entries(tmp_path / "first")
    created = (first / "manifest.json").read_text().replace('"created": "2', '"created": "1')
    (first / "manifest.json").write_text(created)
    if damaged:
        os.truncate(first / "kernel.so", 100)
    environment["JIT_KERNEL_CACHE_DIR"] = str(store)
    work = partial(publishing_twice, str(tmp_path / "first"))
    outcome = children.Child(work, environment=environment, scratch=tmp_path).outcome(60)
    assert outcome.error == "" and outcome.result["right"], outcome
    (entry,) = tiny.entries(store)
    assert ((entry / "manifest.json").read_text() == created) != damaged
    again = children.run(tiny.call, environment=environment, scratch=tmp_path)
    assert again.result == {"found": 42, "right": True, "compiled": 0} and again.warnings == []


def unusable_at_once(barrier: Any) -> int:
    barrier.wait(60)
    assert tiny.call()["right"]
    return tiny.compiled()


def test_processes_that_find_an_unloadable_entry_compile_it_once(tmp_path, store):
    environment: dict[str, str | None] = {"JIT_KERNEL_CACHE_DIR": str(store)}
    assert children.run(tiny.call, environment=environment, scratch=tmp_path).result["right"]
    (entry,) = tiny.entries(store)
    tiny.rewrite(entry, (entry / "kernel.so").read_bytes().replace(b"__tvm_ffi_times", b"__tvm_ffi_gone_"))
    barrier = children.CONTEXT.Barrier(4)
    callers = [children.Child(unusable_at_once, barrier, environment=environment, scratch=tmp_path) for _ in range(4)]
    outcomes = [caller.outcome(60) for caller in callers]
    assert all(outcome.error == "" for outcome in outcomes), outcomes
    assert sum(outcome.result for outcome in outcomes) == 1


def test_an_old_private_folder_goes_where_the_file_system_has_no_locks(tmp_path, monkeypatch):
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    old, new = (tmp_path / f"1-{socket.gethostname()}-0000000{number}" for number in (1, 2))
    for folder in (old, new):
        folder.mkdir()
        folder.with_name(f"{folder.name}.alive").touch()
    os.utime(old, (1, 1))
    locks.remove_abandoned(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {new.name, f"{new.name}.alive"}


def test_clearing_fails_no_process_that_makes_a_folder_of_the_store(tmp_path):
    """`clear` removes .tmp and .locks once they are empty, also where another has just made them."""
    shared, rounds, done = Store(tmp_path / "store"), 100, threading.Event()
    assert shared.writable()

    def clear() -> None:
        while not done.is_set():
            removal.clear(shared, lambda holder, seconds: None)

    clearing = threading.Thread(target=clear)
    clearing.start()
    try:
        for _ in range(rounds):
            shared.discard(shared.private_folder())
            with shared.lock("kernel", "cpu:any", "0" * 32).held(lambda holder, seconds: None):
                pass
    finally:
        done.set()
        clearing.join()


def test_a_lock_whose_folder_is_gone_makes_one_that_nobody_else_writes(tmp_path):
    before = os.umask(0)
    try:
        lock = locks._locked(tmp_path / "folder" / "a.lock")
    finally:
        os.umask(before)
    assert lock is not None and (tmp_path / "folder").stat().st_mode & 0o777 == 0o700
    lock.release()

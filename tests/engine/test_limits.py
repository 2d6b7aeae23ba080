"""Bounds: of the store's size, of compilations at a time; and file systems that answer ESTALE and EBUSY."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from jit_kernel import config
from jit_kernel.commands import cache
from jit_kernel.device import cpu_target
from jit_kernel.engine import jobs, lock, machine, network, removal, use
from jit_kernel.engine.entry import size_of
from jit_kernel.engine.store import Store
from tests.support import children, tiny
from tests.support.compilers import compilations, counting_compiler


def call_all(factors: tuple[int, ...]) -> bool:
    return all(tiny.call(factor)["right"] for factor in factors)


def stored(store: Path) -> list[int]:
    return sorted(manifest["variant"]["factor"] for _, manifest in Store(store).manifests())


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    environment: dict[str, str | None] = {"JIT_KERNEL_CACHE_DIR": str(folder / "store")}
    outcome = children.run(call_all, (2, 3, 5), environment=environment, scratch=folder)
    assert outcome.result is True, outcome
    return folder / "store"


@pytest.fixture
def three(tmp_path: Path, made: Path) -> Path:
    """A store of three entries: 5 was not used for longest, then 2, then 3."""
    shutil.copytree(made, tmp_path / "store")
    ages = {5: 3000.0, 2: 2000.0, 3: 1000.0}
    for folder, manifest in Store(tmp_path / "store").manifests():
        for path in folder.iterdir():
            used = path.stat().st_mtime - ages[manifest["variant"]["factor"]]
            os.utime(path, (used, used))
    return tmp_path / "store"


def limited(factor: int, three: Path, tmp_path: Path, limit: int) -> children.Outcome:
    environment: dict[str, str | None] = {
        "JIT_KERNEL_CACHE_DIR": str(three), "JIT_KERNEL_CACHE_LIMIT": str(limit),
    }  # fmt: skip
    return children.run(tiny.call, factor, environment=environment, scratch=tmp_path)


def test_the_store_is_held_to_its_limit_least_recently_used_first(tmp_path, three):
    size = max(size_of(folder) for folder in tiny.entries(three))
    outcome = limited(7, three, tmp_path, 3 * size)
    assert outcome.result["right"] and stored(three) == [2, 3, 7], outcome
    assert len(outcome.warnings) == 1 and "1 entries" in outcome.warnings[0], outcome.warnings
    assert limited(11, three, tmp_path, 1).result["right"] and stored(three) == [11], "what was just made was removed"


def test_an_entry_in_use_is_never_removed(tmp_path, three):
    """One that another process loaded, though it was used longest ago; a hit of it wrote nothing."""
    free = children.CONTEXT.Event()
    reading, writing = children.CONTEXT.Pipe(duplex=False)
    environment: dict[str, str | None] = {"JIT_KERNEL_CACHE_DIR": str(three)}
    before = {path: path.stat().st_mtime_ns for path in three.rglob("*")}
    holder = children.Child(load_and_wait, 5, writing, free, environment=environment, scratch=tmp_path)
    assert reading.recv() is True
    assert {path: path.stat().st_mtime_ns for path in three.rglob("*")} == before
    outcome = limited(7, three, tmp_path, 1)
    assert outcome.result["right"] and stored(three) == [5, 7], outcome
    assert any("1 entries are in use, and stay" in text for text in outcome.warnings), outcome.warnings
    free.set()
    assert holder.outcome().result is True
    assert removal.prune(Store(three), 1).left == 0


def load_and_wait(factor: int, writing: Any, free: Any) -> bool:
    right = bool(tiny.call(factor)["right"])
    writing.send(right)
    return bool(free.wait(60)) and bool(tiny.call(factor)["right"])


def test_prune_rm_show_and_list(three, monkeypatch, capsys):
    monkeypatch.setattr(config, "cache_dir", lambda: three)

    def run(*words: str) -> tuple[int, str]:
        status = cache.main(words)
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    assert "1 entries" in run("prune", "--older", str(2500 / 86400), "--dry-run")[1] and stored(three) == [2, 3, 5]
    assert run("prune", "--older", str(2500 / 86400))[0] == 0 and stored(three) == [2, 3]
    (folder, manifest), _ = sorted(Store(three).manifests(), key=lambda found: found[1]["variant"]["factor"])
    status, said = run("show", manifest["key"][:8])
    assert status == 0 and str(folder) in said and '"in_use": false' in said and '"factor": 2' in said
    status, said = run("list", "--json")
    assert status == 0 and said.count('"kernel": "tiny"') == 2 and manifest["key"] in said
    status, said = run("rm", "0000ffff")
    assert status == 1 and "begins with 0000ffff" in said and stored(three) == [2, 3]
    assert run("rm", manifest["key"])[0] == 0 and stored(three) == [3]
    assert run("prune", "--limit", "0")[0] == 0 and stored(three) == []
    status, said = run("prune", "--limit", "many")
    assert status == 1 and "must be a size in bytes" in said


def test_an_entry_that_is_compiled_is_not_waited_for(three):
    """Pruning passes over the lock of an entry that another holds."""
    store = Store(three)
    folder, manifest = next(iter(store.manifests()))
    with store.lock("tiny", folder.parent.name, manifest["key"]).held(lambda holder, waited: None):
        pruned = removal.prune(store, 1)
    assert pruned.removed == 2 and [path for path, _ in store.manifests()] == [folder]


def test_what_is_used_cannot_be_told_without_locks(three, monkeypatch):
    """Then nothing is taken for unused."""
    monkeypatch.setattr(use.fcntl, "flock", raising(OSError(errno.ENOLCK, "no locks")))
    assert removal.prune(Store(three), 1).removed == 0


def raising(error: OSError) -> Any:
    def work(*arguments: object) -> None:
        raise error

    return work


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EBUSY])
def test_stale_and_busy_answers_are_asked_again(three, tmp_path, monkeypatch, number):
    """At the look-up and at the publishing; what stays so is an error or a miss, not a hang."""
    store, left = Store(three), [3]
    folder, manifest = next(iter(store.manifests()))
    real_open, real_rename = os.open, os.rename

    def flaky(real: Any) -> Any:
        def work(*arguments: Any, **keywords: Any) -> Any:
            if left[0]:
                left[0] -= 1
                raise OSError(number, os.strerror(number))
            return real(*arguments, **keywords)

        return work

    monkeypatch.setattr(os, "open", flaky(real_open))
    found = store.lookup("tiny", folder.parent.name, manifest["key"], folder.name.rpartition("-")[2])
    assert left == [0] and getattr(found, "folder", None) == folder, found
    monkeypatch.setattr(os, "open", real_open)
    private = store.private_folder()
    (private / "manifest.json").write_text("{}")
    left[0] = 2
    monkeypatch.setattr(os, "rename", flaky(real_rename))
    assert store.publish(private, "tiny", "cpu:any", "0" * 32 + "-00000000").is_dir() and left == [0]
    with pytest.raises(OSError, match="always"):
        network.retried(raising(OSError(number, "always")))


def pretend(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": "MemTotal: 32000000 kB\nMemAvailable: 16000000 kB\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


GIB = 1 << 30
V2 = {
    "proc/self/cgroup": "0::/pod/box\n",
    "sys/fs/cgroup/pod/memory.max": f"{2 * GIB}\n",
    "sys/fs/cgroup/pod/memory.current": f"{GIB}\n",
    "sys/fs/cgroup/pod/memory.stat": f"anon 1\ninactive_file {GIB // 2}\n",
    "sys/fs/cgroup/pod/box/memory.max": "max\n",
    "sys/fs/cgroup/pod/cpu.max": "150000 100000\n",
}
V1 = {
    "proc/self/cgroup": "4:memory:/box\n2:cpu,cpuacct:/\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2 * GIB}\n",  # a container sees its own group at the top
    "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB}\n",
    "sys/fs/cgroup/memory/memory.stat": f"total_inactive_file {GIB // 2}\n",
    "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "100000\n",
    "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
}


@pytest.mark.parametrize("files", [V2, V1], ids=["version 2", "version 1"])
def test_a_containers_memory_and_processors_bound_the_jobs(tmp_path, monkeypatch, files):
    root = pretend(tmp_path, files)
    monkeypatch.setattr(machine, "cpu_count", lambda: 64)
    assert machine.memory(root) == machine.Memory(2 * GIB, GIB + GIB // 2)
    assert machine.processors(root) == 1
    monkeypatch.setattr(machine, "processors", lambda root: 64)
    assert jobs.most(400 << 20, root) == 4 and jobs.most(8 * GIB, root) == 1


def test_a_machine_without_groups_is_bounded_by_its_own_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "processors", lambda root: 64)
    root = pretend(tmp_path, {})
    assert machine.memory(root) == machine.Memory(32_000_000 << 10, 16_000_000 << 10)
    assert jobs.most(1_500_000_000, root) == 17
    assert machine.memory(tmp_path / "nothing") is None


def test_the_peak_that_was_measured_counts(three):
    measured = max(int(manifest["peak_bytes"]) for _, manifest in Store(three).manifests())
    assert jobs.peak_of(tiny.spec(2), cpu_target(), Store(three)) == max(measured, jobs._LEAST_BYTES) > 0
    assert jobs.peak_of(tiny.spec(2), cpu_target(), Store(three / "none")) == jobs._USUAL_BYTES


def test_processes_share_the_slots_of_a_host(tmp_path):
    """With one slot, whose lock file this process holds, a cold call of another process waits until it is free."""
    folder = jobs._folder()
    assert folder is not None
    compiler, starts = counting_compiler(tmp_path / "bin", version="one")
    environment: dict[str, str | None] = {"JIT_KERNEL_CACHE_DIR": str(tmp_path / "store"), "CXX": compiler}
    held = []
    while not held:
        taken = lock.try_lock(folder / "0.lock")  # another test's compilation may have it
        held += [taken] if taken is not None else []
    child = children.Child(with_one_slot, environment=environment, scratch=tmp_path)
    assert not child._receiver.poll(1.0) and compilations(starts) == 0, "it compiled without a slot"
    held[0]()
    assert child.outcome().result["right"] and compilations(starts) == 1


def with_one_slot() -> dict[str, Any]:
    jobs.most = lambda peak: 1
    return tiny.call()


def test_without_a_folder_for_slots_nothing_is_bounded(monkeypatch, three):
    monkeypatch.setattr(jobs.locks, "make_folder", raising(PermissionError(errno.EACCES, "no")))
    entered = threading.Event()
    with jobs.slot(tiny.spec(2), cpu_target(), Store(three)):
        entered.set()
    assert entered.is_set()


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("4GiB", 4 * GIB), ("500 MiB", 500 << 20), ("1.5G", 3 * GIB // 2), ("2TB", 2 << 40), ("77", 77)],
)
def test_sizes(text, size):
    assert config.bytes_of(text) == size


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_strangers_folder_of_slots_is_not_used(tmp_path, monkeypatch):
    """Nor one that others can write: they could keep every compilation waiting."""
    monkeypatch.setattr(jobs.os, "access", lambda path, mode: False)  # no /dev/shm
    monkeypatch.setattr(jobs.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = jobs._folder()
    assert folder is not None and folder.parent == tmp_path
    folder.chmod(0o777)
    assert jobs._folder() is None
    folder.chmod(0o700)
    os.chown(folder, 12345, 12345)
    assert jobs._folder() is None

"""doctor and cache as their users meet them: output, exit status, and what stays in the store's folder."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import pytest

from jit_kernel import __main__, config
from jit_kernel.commands import cache, doctor
from jit_kernel.engine import lock as locks
from jit_kernel.engine import removal
from jit_kernel.engine.store import CacheError, Store, write_manifest
from tests.support.commands import command

KEYS = ("0" * 32, "1" * 32)


def never(holder: object, waited: float) -> None:
    raise AssertionError("nothing holds a lock here")


@pytest.fixture
def store(tmp_path: Path) -> str:
    return str(tmp_path / "store")


@pytest.fixture
def filled(tmp_path: Path) -> Store:
    """A store with two entries of two kernels, a failure, a damaged entry and a dead process's folder."""
    store = Store(tmp_path / "store")
    assert store.writable()
    for kernel, key in zip(("family/a", "b"), KEYS, strict=True):
        with store.lock(kernel, "cpu:any", key).held(never):
            private = store.private_folder()
            (private / "kernel.so").write_text(key)
            manifest = {"key": key, "kernel": kernel, "target": "cpu:any", "variant": {}, "seconds": 1.0, "created": ""}
            write_manifest(private, {**manifest, "files": {}, "artifact": "kernel.so"})
            store.publish(private, kernel, "cpu:any", f"{key}-abcdef01")
    store.keep_failure(store.private_folder(), f"{'2' * 32}-abcdef01", "log", "command")
    damaged = store.root / "b" / "cpu:any" / f"{'3' * 32}-abcdef01"
    damaged.mkdir()
    store.quarantine(damaged)
    (store.root / ".tmp" / "999999999-elsewhere-00000000").mkdir()
    os.utime(store.root / ".tmp" / "999999999-elsewhere-00000000", (0, 0))
    store.remember_compiler("path", "identity")
    return store


def test_clear_removes_what_the_store_made(filled):
    assert removal.clear(filled, never) == 2
    assert list(filled.root.iterdir()) == []
    assert removal.clear(filled, never) == 0


FOREIGN = (
    "notes.txt",
    "compilers.txt",
    "project/manifest.json",  # a manifest of another program
    "project/cpu:any/manifest.json",
    "family/a/cpu:any/notes.txt",
    "b/README",
    ".tmp/file",
    ".tmp/folder/file",
    ".quarantine/mine/file",
    ".failed/mine/file",
    ".locks/mine.lock",
    ".hidden/00000000000000000000000000000000-abcdef01/manifest.json",
)


def test_clear_leaves_foreign_files(filled):
    for name in FOREIGN:
        path = filled.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
        os.utime(path.parent, (0, 0))
    assert removal.clear(filled, never) == 2
    assert sorted(str(path.relative_to(filled.root)) for path in filled.root.rglob("*") if path.is_file()) == sorted(
        FOREIGN
    )


def test_a_new_compilation_leaves_foreign_folders(filled):
    (filled.root / ".tmp" / "folder").mkdir()
    os.utime(filled.root / ".tmp" / "folder", (0, 0))
    filled.private_folder()
    assert (filled.root / ".tmp" / "folder").is_dir()
    assert not (filled.root / ".tmp" / "999999999-elsewhere-00000000").exists()


def test_clear_waits_for_the_lock_of_an_entry(filled):
    """While a lock is held its entry stays; clear goes on when it is free."""
    entry = filled.root / "family" / "a" / "cpu:any" / f"{KEYS[0]}-abcdef01"
    waited, cleared = threading.Event(), threading.Event()

    def clear() -> None:
        assert removal.clear(filled, lambda holder, seconds: waited.set()) == 2
        cleared.set()

    thread = threading.Thread(target=clear)
    with filled.lock("family/a", "cpu:any", KEYS[0]).held(never):
        thread.start()
        assert waited.wait(60), "clear did not ask for the lock"
        assert entry.is_dir() and not cleared.is_set()
    thread.join(60)
    assert cleared.is_set() and not entry.exists()


def test_clear_leaves_a_compilation_that_runs(filled):
    """Its private folder and its lock stay, and it publishes into the cleared store."""
    key = "4" * 32
    with filled.lock("c", "cpu:any", key).held(never):
        private = filled.private_folder()
        write_manifest(private, {"key": key})
        assert removal.clear(filled, never) == 2
        assert private.is_dir() and list((filled.root / ".locks").glob("*.lock"))
        filled.publish(private, "c", "cpu:any", f"{key}-abcdef01")
    assert removal.clear(filled, never) == 1


def test_an_entry_that_is_published_twice_is_one_entry(filled):
    private = filled.private_folder()
    write_manifest(private, {"key": KEYS[0]})
    folder = filled.publish(private, "family/a", "cpu:any", f"{KEYS[0]}-abcdef01")
    assert (folder / "kernel.so").read_text() == KEYS[0]


def test_clear_says_when_the_store_cannot_be_written(filled, monkeypatch, capsys):
    monkeypatch.setattr(Store, "writable", lambda store: False)
    with pytest.raises(CacheError, match="cannot be written, so nothing was removed"):
        removal.clear(filled, never)
    monkeypatch.setattr(config, "cache_dir", lambda: filled.root)
    assert cache.main(["clear"]) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_a_store_that_is_not_there_is_empty(tmp_path):
    assert removal.clear(Store(tmp_path / "none"), never) == 0
    assert not (tmp_path / "none").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_store_of_another_user_is_refused(tmp_path):
    tmp_path.chmod(0o755)
    os.chown(tmp_path, 12345, -1)
    with pytest.raises(CacheError, match="belongs to user 12345"):
        Store(tmp_path).check()


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        ((), 2, "required: COMMAND"),
        (("dance",), 2, "invalid choice: 'dance'"),
        (("--help",), 0, "which implementation serves a call"),
        (("cache",), 2, "required: action"),
        (("cache", "--help"), 0, "read every byte of the entries, or of a pack"),
        (("doctor", "--help"), 0, "one JSON object"),
        (("why", "--help"), 0, "Which implementation serves a call"),
    ],
)
def test_commands_are_chosen_and_explained(words: tuple[str, ...], status: int, text: str, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        __main__.main(words)
    assert caught.value.code == status
    printed = capsys.readouterr()
    assert text in printed.out + printed.err


def test_every_command_has_a_file():
    shared = {"__init__", "ranks", "selecting"}  # of `why --ranks`, and of what takes --select
    files = {path.stem for path in Path(cache.__file__).parent.glob("*.py")} - shared
    assert {name.replace("-", "_") for name in __main__.COMMANDS} == files


def test_the_cache_commands(tmp_path, store):
    words = ("--target", "cpu:native", "--select", "dtype=fp32", "head_dim=128")
    assert command("jit_kernel.warmup", *words, JIT_KERNEL_CACHE_DIR=store).returncode == 0
    listed = command("jit_kernel", "cache", "list", JIT_KERNEL_CACHE_DIR=store)
    entries = list(Store(Path(store)).manifests())
    assert len(listed.stdout.splitlines()) == len(entries) >= 1
    assert command("jit_kernel", "cache", "verify", JIT_KERNEL_CACHE_DIR=store).returncode == 0
    os.truncate(entries[0][0] / "kernel.so", 10)
    verified = command("jit_kernel", "cache", "verify", JIT_KERNEL_CACHE_DIR=store)
    assert verified.returncode == 1 and "1 damaged" in verified.stdout
    Path(store, "mine.txt").touch()
    cleared = command("jit_kernel", "cache", "clear", JIT_KERNEL_CACHE_DIR=store)
    assert f"{len(entries)} entries removed" in cleared.stdout
    assert [path.name for path in Path(store).iterdir()] == ["mine.txt"]


def test_doctor_reports_devices_compilers_and_the_store(store):
    answer = command("jit_kernel", "doctor", "--json", JIT_KERNEL_CACHE_DIR=store)
    assert answer.returncode == 0, answer.stderr
    facts = json.loads(answer.stdout)
    assert facts["implementations"]["cpu"]["cpu"] == "Accepted"
    assert all(
        text.startswith(("Accepted", "Rejected: "))
        for each in facts["implementations"].values()
        for text in each.values()
    )
    host = facts["compilers"]["host"]
    assert host[0]["chosen"] and host[0]["reason"] and host[0]["version"]
    assert facts["cache"]["folder"] == store and facts["cache"]["exists"] is False
    assert facts["cache"]["limit"] == 4 << 30 and facts["cache"]["layers"] == []
    text = command("jit_kernel", "doctor", JIT_KERNEL_CACHE_DIR=store).stdout
    assert facts["devices"]["cpu"]["target"] in text and store in text
    assert not Path(store).exists(), "doctor made the store"


def test_doctor_without_a_compiler_says_what_to_install(store):
    answer = command("jit_kernel", "doctor", JIT_KERNEL_CACHE_DIR=store, PATH="", CXX="")
    assert answer.returncode == 0 and "apt-get install g++" in answer.stdout


def test_doctor_counts_what_is_left_of_entries_that_vanish(filled, monkeypatch):
    """Another process clears the store between the manifest's reading and the files'."""
    monkeypatch.setattr(config, "cache_dir", lambda: filled.root)
    found = list(filled.manifests())
    whole = doctor.report()["cache"]["bytes"]
    removed = found[0][0]
    lost = sum(path.stat().st_size for path in removed.iterdir())
    shutil.rmtree(removed)
    monkeypatch.setattr(Store, "manifests", lambda self: iter(found))
    assert doctor.report()["cache"]["bytes"] == whole - lost > 0


def test_locks_that_another_process_removes_with_their_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "is_dir", lambda self: True)  # as it was a moment before
    locks.remove_free(tmp_path / "gone")
    assert not os.path.lexists(tmp_path / "gone")


def test_a_quarantine_that_another_process_removes(filled, monkeypatch):
    damaged = next(iter(filled.manifests()))[0]
    rename = os.rename

    def renamed_and_cleared(old, new):
        rename(old, new)
        shutil.rmtree(Path(new).parent)

    monkeypatch.setattr(os, "rename", renamed_and_cleared)
    assert filled.quarantine(damaged) is not None
    assert not os.path.lexists(damaged)
